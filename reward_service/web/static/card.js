// Card of one image with its prompt and, once it is scored, its scores.

import { el, scoreTable, rewardAndNotes } from "./view.js";

const MIB = 2 ** 20;
const size = (bytes) => (bytes < MIB ? `${Math.ceil(bytes / 1024)} KiB` : `${(bytes / MIB).toFixed(1)} MiB`);

let made = 0;

export class Card {
  /** `events`: changed(card), removed(card). `name`: as in the curl command. */
  constructor(file, name, prompt, events) {
    Object.assign(this, { file, name, result: null });
    const id = `prompt-${++made}`;
    this.url = URL.createObjectURL(file);
    this.size = el("span", { class: "quiet" }, size(file.size));
    this.image = el("img", { alt: "", src: this.url, load: () => this.#previewLoaded(), error: () => this.#previewFailed() });
    this.field = el("textarea", { id, rows: 2, required: true, input: () => this.#edited(events) }, prompt);
    this.label = el("h2");
    this.button = el("button", { type: "button", class: "plain", click: () => events.removed(this) }, "Remove");
    this.wrong = el("p", { class: "problem", hidden: true });
    this.found = el("div");
    const saved = file.name === name ? "" : el("a", { href: this.url, download: name }, "Save");
    this.node = el(
      "li",
      { class: "card" },
      el("div", { class: "top" }, this.label, this.button),
      el("div", { class: "frame" }, this.image),
      el("p", { class: "facts" }, this.size, saved),
      el("label", { for: id }, "Prompt"),
      this.field,
      this.wrong,
      this.found,
    );
  }

  get prompt() {
    return this.field.value;
  }

  set prompt(text) {
    this.field.value = text;
    this.clearScores();
  }

  /** Index of the card, from 0. */
  set index(index) {
    this.title = `${index + 1} · ${this.name}`;
    this.label.replaceChildren(this.title);
    this.image.alt = `Image ${index + 1}`;
    this.button.setAttribute("aria-label", `Remove image ${index + 1}, ${this.name}`);
  }

  show(result, failed, weights) {
    this.result = result;
    this.found.replaceChildren(scoreTable(result, failed, weights), ...rewardAndNotes(result, failed));
  }

  showProblem(detail) {
    this.wrong.replaceChildren(detail);
    this.wrong.hidden = !detail;
  }

  /** Clear the scores, which belong to an earlier prompt. */
  clearScores() {
    this.result = null;
    this.found.replaceChildren();
    this.showProblem("");
  }

  close() {
    URL.revokeObjectURL(this.url);
    this.node.remove();
  }

  #edited(events) {
    this.clearScores();
    events.changed(this);
  }

  #previewLoaded() {
    const { naturalWidth: width, naturalHeight: height } = this.image;
    this.size.replaceChildren(`${width} × ${height} px, ${size(this.file.size)}`);
  }

  #previewFailed() {
    this.image.replaceWith(el("span", { class: "quiet" }, "no preview"));
  }
}
