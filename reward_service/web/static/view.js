// Elements of the page. Text of users and of the service becomes text nodes, never markup.

/** An element; attributes by name, handlers as functions, children as nodes or text. */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (typeof value === "boolean") node.toggleAttribute(name, value);
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

const minus = (text) => String(text).replace("-", "−");
const number = (value, format) => el("data", { value }, minus(format.format(value)));
const format = (options) => new Intl.NumberFormat("en", { useGrouping: false, ...options });
const UNIT = format({ minimumFractionDigits: 3, maximumFractionDigits: 3 });
const Z = format({ signDisplay: "exceptZero", minimumFractionDigits: 2, maximumFractionDigits: 2 });
const RAW = format({ maximumSignificantDigits: 4, maximumFractionDigits: 4, roundingPriority: "lessPrecision" });
const unit = (value) => number(value, UNIT);
export const listed = (names) => names.join(", ").replace(/, ([^,]*)$/, " and $1");

/** A bar from 0 to 1 with a mark at 0.5; the number is shown beside it. */
function bar(value, side = "") {
  const fill = el("i");
  fill.style.setProperty("--at", value);
  return el("span", { class: `bar ${side}`, "aria-hidden": "true" }, fill);
}

const row = (kind, cells) => el("tr", {}, ...cells.map((cell) => el(kind, {}, cell)));

/** Table of the scores of one image: a row for each evaluator, marked if it is out of service. */
export function scoreTable(result, failed, weights) {
  const head = el("thead", {}, row("th", ["evaluator", "", "unit", "z", "raw"]));
  const body = el("tbody");
  for (const [name, score] of Object.entries(result.scores)) {
    const muted = weights[name] === 0 ? " (weight 0)" : "";
    body.append(
      el(
        "tr",
        { "data-evaluator": name },
        el("th", { scope: "row" }, name + muted),
        el("td", { class: "wide" }, bar(score.unit)),
        el("td", { class: "unit" }, unit(score.unit)),
        el("td", {}, number(score.z, Z)),
        el("td", {}, number(score.raw, RAW)),
      ),
    );
  }
  for (const name of Object.keys(failed)) {
    body.append(el("tr", {}, el("th", { scope: "row" }, name), el("td", { colspan: 4 }, "out of service")));
  }
  return el("table", { class: "scores" }, head, body);
}

/** The reward of one image, and notes about its scores. */
export function rewardAndNotes(result, failed) {
  const down = listed(Object.keys(failed));
  const reward =
    result.reward === null
      ? el("p", { class: "reward" }, `no reward: ${down} out of service`)
      : el("p", { class: "reward" }, "reward ", unit(result.reward));
  const notes = [];
  if (result.truncated_prompt) notes.push("The prompt was too long: its end was cut off for an evaluator.");
  if (result.lossy_input) notes.push("Lossy file: its compression artifacts affect the scores.");
  return [reward, ...notes.map((note) => el("p", { class: "notice" }, note))];
}

/** Comparison of A and B by each evaluator and by reward, in words and bars. */
export function comparison(a, b) {
  const names = Object.keys(a.result.scores).filter((name) => name in b.result.scores);
  const wins = { A: [], B: [], equal: [] };
  const body = el("tbody");
  for (const name of names) {
    const [one, other] = [a.result.scores[name], b.result.scores[name]];
    const gap = one.z - other.z;
    const better = better_of(gap, 2);
    wins[better].push(name);
    const by = better === "equal" ? ["equal"] : [side(better), ` by ${Math.abs(gap).toFixed(2)} z`];
    body.append(versus(name, one.unit, other.unit, by));
  }
  if (a.result.reward !== null && b.result.reward !== null) {
    const better = better_of(a.result.reward - b.result.reward, 3);
    const by = better === "equal" ? ["equal"] : [side(better)];
    body.append(versus("reward", a.result.reward, b.result.reward, by));
  }
  const head = el("thead", {}, row("th", ["evaluator", "", "unit", "better"]));
  const table = el("table", { class: "versus" }, head, body);
  const parts = [el("p", {}, summary(wins))];
  if (a.prompt !== b.prompt) {
    parts.push(
      el("p", { class: "notice" }, "The prompts differ: each image is scored by its own prompt."),
    );
  }
  return [...parts, table];
}

const better_of = (gap, digits) => (Number(gap.toFixed(digits)) === 0 ? "equal" : gap > 0 ? "A" : "B");
const side = (name) => el("span", { class: `side ${name.toLowerCase()}` }, name);

function versus(name, one, other, by) {
  const pair = (make) => [make(one, "a"), make(other, "b")];
  return el(
    "tr",
    { "data-evaluator": name },
    el("th", { scope: "row" }, name),
    el("td", { class: "wide" }, ...pair(bar)),
    el("td", {}, ...pair((value, which) => el("div", {}, `${which.toUpperCase()} `, unit(value)))),
    el("td", { class: "better" }, ...by),
  );
}

function summary(wins) {
  const parts = ["A", "B"]
    .filter((name) => wins[name].length)
    .map((name) => `${name} is better by ${listed(wins[name])}`);
  if (wins.equal.length) parts.push(`equal by ${listed(wins.equal)}`);
  const text = `${parts.join("; ")}.`;
  return text[0].toUpperCase() + text.slice(1);
}

/** Description of a problem; `nameOf(index)` names the image at an index of the request. */
export function problemText(problem, nameOf) {
  const items = problem.errors.filter((one) => one.index !== null && one.index !== undefined);
  const parts = [el("strong", {}, problem.title || "Something went wrong")];
  if (items.length) {
    parts.push(el("ul", {}, ...items.map((one) => el("li", {}, `${nameOf(one.index)}: ${one.detail}`))));
  } else {
    parts.push(el("p", {}, problem.detail));
  }
  if (problem.retryable) {
    const wait = problem.retryAfter ? ` in ${problem.retryAfter} s` : "";
    parts.push(el("p", {}, `Retry${wait}.`));
  }
  const marks = [problem.code, problem.status, problem.id && `request ${problem.id}`].filter(Boolean);
  parts.push(el("p", { class: "quiet" }, marks.join(" · ")));
  return parts;
}

/** The configured evaluators, one entry each. */
export function evaluatorList(found) {
  return Object.entries(found).map(([name, one]) => {
    const scale = `mean ${minus(one.mean.toPrecision(4))}, deviation ${one.std.toPrecision(4)}`;
    const facts = {
      formula: one.formula,
      weight: one.weight,
      scale: scale + (one.provisional ? " (provisional)" : ""),
      calibration: el("code", {}, one.calibration),
      fingerprint: el("code", {}, one.fingerprint),
    };
    const pairs = Object.entries(facts).flatMap(([term, fact]) => [el("dt", {}, term), el("dd", {}, fact)]);
    return el("article", {}, el("h3", {}, name), el("dl", {}, ...pairs));
  });
}
