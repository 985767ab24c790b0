// What goes over the wire: health, evaluators, and a batch of pairs as the form that curl would send.

const KEY = /^[\x21-\x7e]+$/;

/** Something that went wrong, as the service's own problem details or in the same form. */
export class Problem extends Error {
  constructor(told, retryAfter = null) {
    super(told.detail);
    Object.assign(this, { title: "", code: "", errors: [], id: "", ...told, retryAfter });
  }
}

/** Address of a route; the service may live below a path of a proxy's. */
export const address = (path) => new URL(path, document.baseURI).href;

/** Whether it is ready: {status, detail}. A service that is not ready says so with an error's status. */
export async function health() {
  const answer = await sent("health/ready");
  const found = await parsed(answer);
  return found.status in { ready: 1, loading: 1, stopping: 1, failed: 1 } ? found : refused(answer, found);
}

/** What is configured: {evaluators, device, dtype}. */
export const evaluators = async (key) => checked(await sent("v1/evaluators", key));

/** Scores of pairs {prompt, file}, in their order. */
export async function score(pairs, key) {
  const answer = await checked(await sent("v1/score", key, { method: "POST", body: form(pairs) }));
  if (answer.results?.length !== pairs.length) throw foreign(200);
  return answer;
}

/** The command that gives the same answer, for a shell in the folder of the pictures {prompt, name}. */
export function curl(pairs, withKey) {
  const words = [`curl ${quoted(address("v1/score"))}`];
  if (withKey) words.push('-H "Authorization: Bearer $REWARD_KEY"');
  for (const prompt of prompts(pairs)) words.push(`--form-string ${quoted(`prompt=${prompt}`)}`);
  for (const { name } of pairs) {
    words.push(`-F ${quoted(`image=@"${name.replace(/["\\]/g, "\\$&")}"`)}`);
  }
  return [...words, "-F allow_partial=true"].join(" \\\n  ");
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** One for all if they are the same, else one for each. */
function prompts(pairs) {
  const all = pairs.map((pair) => pair.prompt);
  return new Set(all).size === 1 ? all.slice(0, 1) : all;
}

/** FormData would change the prompts' line ends, and with them what is scored. */
function form(pairs) {
  const random = crypto.getRandomValues(new Uint8Array(16));
  const boundary = `pairs${Array.from(random, (byte) => byte.toString(16).padStart(2, "0")).join("")}`;
  const parts = [];
  const add = (name, value, more = "") =>
    parts.push(`--${boundary}\r\nContent-Disposition: form-data; name="${name}"${more}\r\n\r\n`, value, "\r\n");
  for (const prompt of prompts(pairs)) add("prompt", prompt);
  for (const { file } of pairs) add("image", file, '; filename="image"');
  add("allow_partial", "true");
  return new Blob([...parts, `--${boundary}--\r\n`], { type: `multipart/form-data; boundary=${boundary}` });
}

async function sent(path, key = "", options = {}) {
  if (key && !KEY.test(key)) {
    const detail = "a key has only letters, digits and signs, without spaces; copy it again";
    throw new Problem({ title: "This cannot be a key", code: "unauthorized", detail });
  }
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    return await fetch(address(path), { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch {
    const detail = options.body
      ? "it cannot be reached, or it refused what was sent: is it running, are the pictures together below its " +
        "limit (64 MiB unless it is set otherwise), and are their files still as they were chosen?"
      : "it cannot be reached; is it running?";
    throw new Problem({ title: "The service gave no answer", code: "no_answer", detail });
  }
}

async function checked(answer) {
  const found = await parsed(answer);
  return answer.ok ? found : refused(answer, found);
}

async function parsed(answer) {
  try {
    const found = await answer.json();
    if (found && typeof found === "object") return found;
  } catch {
    // told below
  }
  throw foreign(answer.status);
}

function refused(answer, found) {
  throw found.code ? new Problem(found, answer.headers.get("retry-after")) : foreign(answer.status);
}

const foreign = (status) =>
  new Problem({
    title: "This is not the service's answer",
    code: `status ${status}`,
    detail: "something between this page and the service may have answered in its place; ask who runs it",
  });
