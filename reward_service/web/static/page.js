// Demo page: scores images by their prompts. The only state is the list of cards.

import { Card } from "./card.js";
import { comparison, el, evaluatorList, listed, problemText } from "./view.js";
import { Problem, curl, evaluators, health, score } from "./wire.js";

const POLL_MS = 2000;
const STORED = "reward-service key";
const $ = (id) => document.getElementById(id);
const cards = [];
const events = { changed: refresh, removed: remove };
let listedEvaluators = null;

// ---- images

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
  showProblem(null);
  refresh();
  (cards[Math.min(index, cards.length - 1)]?.button ?? $("files")).focus();
}

/** Name of a file; the same for a file that was chosen twice. */
function nameOf(file) {
  const same = (other) =>
    other.file.name === file.name && other.file.size === file.size && other.file.lastModified === file.lastModified;
  const duplicate = cards.find(same);
  return duplicate ? duplicate.name : freeName(file.name);
}

/** A name that no other image has, so that the curl command names the right files. */
function freeName(requested) {
  const plain = requested.replace(/[\x00-\x1f\x7f/\\]/g, "_") || "image";
  const [, stem, ending] = plain.match(/^(.+?)(\.[^.]*)?$/);
  let name = plain;
  for (let count = 2; cards.some((card) => card.name === name); count++) name = `${stem}-${count}${ending ?? ""}`;
  return name;
}

/** Name of a bitmap from the clipboard, which has none of its own. */
const pasted = (file) => (file.name === "image.png" ? "pasted.png" : file.name);

// ---- updates from the list of cards

function refresh() {
  cards.forEach((card, index) => (card.index = index));
  const anyCards = cards.length > 0;
  $("actions").hidden = $("again").hidden = !anyCards;
  $("same").hidden = cards.every((card) => card.prompt === cards[0].prompt);
  $("line").replaceChildren(anyCards ? curl(cards, Boolean(key())) : "");
  $("again-key").hidden = !key();
  updateComparison();
}

/** Offer the scored images for comparison; the selected ones stay selected. */
function updateComparison() {
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
  showProblem(null);
  const pairs = cards.map((card) => ({ card, file: card.file, prompt: card.prompt }));
  busy(true);
  try {
    const response = await score(pairs, key());
    await updateEvaluators(response);
    const unchanged = pairs.map(({ card, prompt }) => cards.includes(card) && card.prompt === prompt);
    pairs.forEach(({ card }, index) => {
      if (unchanged[index]) card.show(response.results[index], response.failed, weights());
    });
    setStatus(`${pairs.length === 1 ? "1 image" : `${pairs.length} images`} scored in ${Math.ceil(response.timing_ms.total)} ms.`);
    refresh();
  } catch (error) {
    fail(error, pairs);
  } finally {
    busy(false);
  }
}

/** Update the list of evaluators if others than the listed ones made the scores. */
async function updateEvaluators(response) {
  const same = ([name, one]) =>
    listedEvaluators?.[name]?.fingerprint === one.fingerprint && listedEvaluators[name].calibration === one.calibration;
  if (!Object.entries(response.evaluators).every(same)) await describe();
}

const weights = () => Object.fromEntries(Object.entries(listedEvaluators ?? {}).map(([name, one]) => [name, one.weight]));

function busy(now) {
  $("score").setAttribute("aria-disabled", now);
  $("score").replaceChildren(now ? "Scoring …" : "Score");
  if (now) setStatus("");
}

function fail(error, pairs = []) {
  if (!(error instanceof Problem)) throw error;
  setStatus("");
  const concernsKey = error.code === "unauthorized" || error.code === "forbidden";
  if (concernsKey) $("key-note").after($("problem"));
  else $("actions").before($("problem"));
  showProblem(error, pairs);
  for (const { index, detail } of error.errors) pairs[index]?.card.showProblem(detail);
  if (concernsKey) openKey();
  $("problem").scrollIntoView({ block: "nearest" });
  if (error.code === "not_ready" || error.code === "no_answer") setTimeout(watch, POLL_MS);
}

function showProblem(problem, pairs = []) {
  const nameOf = (index) => `Image ${index + 1}${pairs[index] ? `, ${pairs[index].card.name}` : ""}`;
  $("problem").className = problem ? "problem" : "";
  $("problem").replaceChildren(...(problem ? problemText(problem, nameOf) : []));
  if (!problem) for (const card of cards) card.showProblem("");
}

const setStatus = (text) => $("said").replaceChildren(text);

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
  if (node.textContent === text && node.dataset.status === status) return; // so that a screen reader reads it once
  node.dataset.status = status;
  node.replaceChildren(text);
}

async function describe() {
  const { evaluators: found, device, dtype } = await evaluators(key());
  listedEvaluators = found;
  state("ready", `ready: ${Object.keys(found).length} evaluators on ${device}, ${dtype}`);
  $("list").replaceChildren(...evaluatorList(found));
  $("judges").hidden = false;
  const provisional = Object.keys(found).filter((name) => found[name].provisional);
  $("notice").hidden = !provisional.length;
  $("notice").replaceChildren(
    `The scale of ${listed(provisional)} is provisional: z and unit rank images correctly, ` +
      "but their values may change after calibration.",
  );
}

// ---- key

const key = () => $("key").value.trim();

function openKey() {
  $("key-box").open = true;
  $("key").setAttribute("aria-invalid", "true");
  $("key").focus();
}

function storeKey() {
  if (key()) sessionStorage.setItem(STORED, key());
  else sessionStorage.removeItem(STORED);
  $("key").removeAttribute("aria-invalid");
  showProblem(null);
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
    updateComparison();
  });
}
$("key").addEventListener("change", storeKey);
$("key").addEventListener("keydown", (event) => {
  if (event.key !== "Enter") return;
  event.preventDefault(); // Enter confirms the key here; it does not submit the form
  storeKey();
});
$("copy").addEventListener("click", async () => {
  const text = $("line").textContent;
  let done = false;
  try {
    await navigator.clipboard.writeText(text);
    done = true;
  } catch {
    // Without https the clipboard is available through a selection only.
    getSelection().selectAllChildren($("line"));
    done = document.execCommand("copy");
  }
  $("copied").replaceChildren(done ? "Copied." : "Select the command and copy it.");
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
