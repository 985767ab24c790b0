// Requests to the service: health, evaluators, and a batch of pairs as the form that curl would send.

const KEY = /^[\x21-\x7e]+$/;

/** An error, as the service's problem details or in the same form. */
export class Problem extends Error {
  constructor(details, retryAfter = null) {
    super(details.detail);
    Object.assign(this, { title: "", code: "", errors: [], id: "", ...details, retryAfter });
  }
}

/** Address of a route; the service may be served below a path of a proxy. */
export const address = (path) => new URL(path, document.baseURI).href;

/** Readiness: {status, detail}. A service that is not ready sends it with status 503. */
export async function health() {
  const response = await send("health/ready");
  const found = await parse(response);
  return found.status in { ready: 1, loading: 1, stopping: 1, failed: 1 } ? found : reject(response, found);
}

/** The configuration: {evaluators, device, dtype}. */
export const evaluators = async (key) => checkStatus(await send("v1/evaluators", key));

/** Scores of pairs {prompt, file}, in their order. */
export async function score(pairs, key) {
  const response = await checkStatus(await send("v1/score", key, { method: "POST", body: form(pairs) }));
  if (response.results?.length !== pairs.length) throw unexpected(200);
  return response;
}

/** The curl command with the same response, for a shell in the folder of the images {prompt, name}. */
export function curl(pairs, withKey) {
  const words = [`curl ${quoted(address("v1/score"))}`];
  if (withKey) words.push('-H "Authorization: Bearer $REWARD_KEY"');
  for (const prompt of prompts(pairs)) words.push(`--form-string ${quoted(`prompt=${prompt}`)}`);
  for (const { name } of pairs) {
    words.push(`-F ${quoted(`image=@"${name.replace(/["\\]/g, "\\$&")}"`)}`);
  }
  return [...words, "--form-string allow_partial=true"].join(" \\\n  ");
}

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** One prompt if all are equal, else one for each image. */
function prompts(pairs) {
  const all = pairs.map((pair) => pair.prompt);
  return new Set(all).size === 1 ? all.slice(0, 1) : all;
}

/** Encode by hand: FormData would change the line ends of the prompts, and with them the scores. */
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

async function send(path, key = "", options = {}) {
  if (key && !KEY.test(key)) {
    const detail = "a key consists of letters, digits and signs, without spaces; copy it again";
    throw new Problem({ title: "Invalid API key", code: "unauthorized", detail });
  }
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    return await fetch(address(path), { ...options, headers, cache: "no-store", credentials: "omit" });
  } catch {
    const detail = options.body
      ? "it cannot be reached, or it rejected the request: check that it is running, that the images together " +
        "are below its limit (64 MiB by default), and that the files have not changed since they were chosen"
      : "it cannot be reached; check that it is running";
    throw new Problem({ title: "No response from the service", code: "no_answer", detail });
  }
}

async function checkStatus(response) {
  const found = await parse(response);
  return response.ok ? found : reject(response, found);
}

async function parse(response) {
  try {
    const found = await response.json();
    if (found && typeof found === "object") return found;
  } catch {
    // reported below
  }
  throw unexpected(response.status);
}

function reject(response, found) {
  throw found.code ? new Problem(found, response.headers.get("retry-after")) : unexpected(response.status);
}

const unexpected = (status) =>
  new Problem({
    title: "Unexpected response",
    code: `status ${status}`,
    detail: "a proxy between this page and the service may have sent it; contact the operator of the service",
  });
