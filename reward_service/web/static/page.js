// The page: pictures and prompts in, scores out. State is the list of cards; the rest follows from it.

import { Card } from "./card.js";
import { comparison, el, evaluatorList, listed, problemText } from "./view.js";
import { Problem, curl, evaluators, health, score } from "./wire.js";

const POLL_MS = 2000;
const STORED = "reward-service key";
const $ = (id) => document.getElementById(id);
const cards = [];
const events = { changed: refresh, removed: remove };
let known = null;

// ---- pictures

function add(files, named = null) {
  for (const file of files) {
    const card = new Card(file, named ? freeName(named(file)) : nameOf(file), cards.at(-1)?.prompt ?? "", events);
    cards.push(card);
    $("cards").append(card.node);
  }
  refresh();
  const empty = cards.find((card) => !card.prompt);
  if (files.length && empty) empty.field.focus();
}

function remove(card) {
  const index = cards.indexOf(card);
  cards.splice(index, 1);
  card.close();
  tell(null);
  refresh();
  (cards[Math.min(index, cards.length - 1)]?.button ?? $("files")).focus();
}

/** A file that was chosen twice has one name. */
function nameOf(file) {
  const same = (other) =>
    other.file.name === file.name && other.file.size === file.size && other.file.lastModified === file.lastModified;
  const twin = cards.find(same);
  return twin ? twin.name : freeName(file.name);
}

/** A name that no other picture here has, so that the curl line means the right files. */
function freeName(wanted) {
  const plain = wanted.replace(/[\x00-\x1f\x7f/\\]/g, "_") || "picture";
  const [, stem, ending] = plain.match(/^(.+?)(\.[^.]*)?$/);
  let name = plain;
  for (let count = 2; cards.some((card) => card.name === name); count++) name = `${stem}-${count}${ending ?? ""}`;
  return name;
}

/** A bitmap from the clipboard has no name of its own. */
const pasted = (file) => (file.name === "image.png" ? "pasted.png" : file.name);

// ---- what follows from the cards

function refresh() {
  cards.forEach((card, index) => (card.place = index));
  const some = cards.length > 0;
  $("actions").hidden = $("again").hidden = !some;
  $("same").hidden = cards.every((card) => card.prompt === cards[0].prompt);
  $("line").replaceChildren(some ? curl(cards, Boolean(key())) : "");
  $("again-key").hidden = !key();
  offer();
}

/** The scored pictures to choose two from; what was chosen stays chosen. */
function offer() {
  const scored = cards.filter((card) => card.result);
  $("compare").hidden = scored.length < 2;
  const chosen = [$("left"), $("right")].map((select) => select.card);
  if (!scored.includes(chosen[0])) chosen[0] = scored.find((card) => card !== chosen[1]);
  if (!scored.includes(chosen[1]) || chosen[0] === chosen[1]) {
    const others = scored.filter((card) => card !== chosen[0]);
    chosen[1] = others.find((card) => card.prompt === chosen[0].prompt) ?? others[0];
  }
  [$("left"), $("right")].forEach((select, index) => {
    select.replaceChildren(
      ...scored.map((card) => el("option", { value: cards.indexOf(card), selected: card === chosen[index] }, card.title)),
    );
    select.card = chosen[index];
  });
  $("verdict").replaceChildren(...(scored.length < 2 ? [] : comparison(...chosen)));
}

// ---- scoring

async function run() {
  tell(null);
  const asked = cards.map((card) => ({ card, file: card.file, prompt: card.prompt }));
  busy(true);
  try {
    const answer = await score(asked, key());
    await learn(answer);
    const fresh = asked.map(({ card, prompt }) => cards.includes(card) && card.prompt === prompt);
    asked.forEach(({ card }, index) => {
      if (fresh[index]) card.show(answer.results[index], answer.failed, weights());
    });
    say(`${asked.length === 1 ? "1 picture" : `${asked.length} pictures`} scored in ${Math.ceil(answer.timing_ms.total)} ms.`);
    refresh();
  } catch (error) {
    fail(error, asked);
  } finally {
    busy(false);
  }
}

/** The list below the scores is of the evaluators that made them. */
async function learn(answer) {
  const same = ([name, one]) =>
    known?.[name]?.fingerprint === one.fingerprint && known[name].calibration === one.calibration;
  if (!Object.entries(answer.evaluators).every(same)) await describe();
}

const weights = () => Object.fromEntries(Object.entries(known ?? {}).map(([name, one]) => [name, one.weight]));

function busy(now) {
  $("score").setAttribute("aria-disabled", now);
  $("score").replaceChildren(now ? "Scoring …" : "Score");
  if (now) say("");
}

function fail(error, asked = []) {
  if (!(error instanceof Problem)) throw error;
  say("");
  const aboutKey = error.code === "unauthorized" || error.code === "forbidden";
  if (aboutKey) $("key-note").after($("problem"));
  else $("actions").before($("problem"));
  tell(error, asked);
  for (const { index, detail } of error.errors) asked[index]?.card.complain(detail);
  if (aboutKey) openKey();
  $("problem").scrollIntoView({ block: "nearest" });
  if (error.code === "not_ready" || error.code === "no_answer") setTimeout(watch, POLL_MS);
}

function tell(problem, asked = []) {
  const nameOf = (index) => `Picture ${index + 1}${asked[index] ? `, ${asked[index].card.name}` : ""}`;
  $("problem").className = problem ? "problem" : "";
  $("problem").replaceChildren(...(problem ? problemText(problem, nameOf) : []));
  if (!problem) for (const card of cards) card.complain("");
}

const say = (text) => $("said").replaceChildren(text);

// ---- the service

let watching = false;

async function watch() {
  if (watching) return;
  watching = true;
  for (;;) {
    const now = await health().catch((error) => ({ status: "gone", detail: error.message }));
    state(now.status, `${now.status}: ${now.detail}`);
    if (now.status === "ready") break;
    await new Promise((done) => setTimeout(done, POLL_MS));
  }
  watching = false;
  await describe().catch((error) => fail(error));
}

function state(status, text) {
  const node = $("state");
  if (node.textContent === text && node.dataset.status === status) return; // read out once
  node.dataset.status = status;
  node.replaceChildren(text);
}

async function describe() {
  const { evaluators: found, device, dtype } = await evaluators(key());
  known = found;
  state("ready", `ready: ${Object.keys(found).length} evaluators on ${device}, ${dtype}`);
  $("list").replaceChildren(...evaluatorList(found));
  $("judges").hidden = false;
  const provisional = Object.keys(found).filter((name) => found[name].provisional);
  $("notice").hidden = !provisional.length;
  $("notice").replaceChildren(
    `The scale of ${listed(provisional)} is provisional: z and unit put pictures in order, ` +
      "but their size may change once it is calibrated.",
  );
}

// ---- key

const key = () => $("key").value.trim();

function openKey() {
  $("key-box").open = true;
  $("key").setAttribute("aria-invalid", "true");
  $("key").focus();
}

function keep() {
  if (key()) sessionStorage.setItem(STORED, key());
  else sessionStorage.removeItem(STORED);
  $("key").removeAttribute("aria-invalid");
  tell(null);
  refresh();
  describe().catch((error) => fail(error));
}

// ---- events

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("score").getAttribute("aria-disabled") !== "true" && cards.length) run();
});
$("form").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("form").requestSubmit();
});
$("files").addEventListener("change", (event) => {
  add([...event.target.files]);
  event.target.value = "";
});
$("same").addEventListener("click", () => {
  for (const card of cards.slice(1)) card.prompt = cards[0].prompt;
  refresh();
  $("score").focus();
});
for (const select of [$("left"), $("right")]) {
  select.addEventListener("change", () => {
    const other = select === $("left") ? $("right") : $("left");
    const before = select.card;
    select.card = cards[select.value];
    if (other.card === select.card) other.card = before;
    offer();
  });
}
$("key").addEventListener("change", keep);
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // Enter here confirms the key, it does not score
  keep();
});
$("copy").addEventListener("click", async () => {
  const text = $("line").textContent;
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    // Without https there is no clipboard but the selection's.
    getSelection().selectAllChildren($("line"));
    done = document.execCommand("copy");
  }
  $("copied").replaceChildren(done ? "Copied." : "Select the line and copy it.");
});

document.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files];
  const typing = event.target.matches?.("textarea, input") && event.clipboardData.types.includes("text/plain");
  if (!files.length || typing) return;
  event.preventDefault();
  add(files, pasted);
});
const carriesFiles = (event) => event.dataTransfer?.types.includes("Files");
document.addEventListener("dragover", (event) => {
  if (!carriesFiles(event)) return;
  event.preventDefault();
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  document.body.classList.remove("over");
  if (!carriesFiles(event)) return;
  event.preventDefault();
  add([...event.dataTransfer.files]);
});

$("key").value = sessionStorage.getItem(STORED) ?? "";
$("key-box").open = Boolean(key());
refresh();
watch();
