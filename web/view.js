// One message as an element, and its redrawing while an answer grows. What a click means is the caller's: `actions`.
import { copy, drawMarkdown, make } from "./dom.js";
import { number, t } from "./i18n.js";
import { versions } from "./tree.js";

/// The element of `node`. `actions`: { edit(node, text), regenerate(node), turn(node, step) }.
export function messageElement(conversation, node, actions) {
  const article = make("article", { class: `message ${node.role}`, "data-id": node.id, "aria-label": t(node.role === "user" ? "you" : "assistant") });
  if (node.role === "user") drawUser(article, conversation, node, actions);
  else drawAnswer(article, conversation, node, actions);
  return article;
}

function drawUser(article, conversation, node, actions) {
  const images = (node.images ?? []).map(({ url, name }) => make("img", { src: url, alt: name }));
  const text = make("div", { class: "bubble" }, images, make("div", { class: "plain" }, node.text));
  const edit = button("edit", "✎", () => article.replaceChildren(editor(article, conversation, node, actions)));
  article.replaceChildren(text, make("div", { class: "tools" }, versionButtons(conversation, node, actions), copyButton(node), edit));
}

function editor(article, conversation, node, actions) {
  const field = make("textarea", { rows: Math.min(12, node.text.split("\n").length + 1), "aria-label": t("edit") });
  field.value = node.text;
  const cancel = () => drawUser(article, conversation, node, actions);
  const send = () => actions.edit(node, field.value);
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      cancel();
    }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  });
  queueMicrotask(() => field.focus());
  const buttons = [make("button", { type: "button", click: cancel }, t("cancel")), make("button", { type: "button", class: "send", click: send }, t("save"))];
  return make("div", { class: "editor" }, field, make("div", { class: "tools" }, buttons));
}

function drawAnswer(article, conversation, node, actions) {
  const thoughts = make("details", { class: "thoughts", hidden: true }, make("summary"), make("div", { class: "plain" }));
  const body = make("div", { class: "markdown" });
  const tools = make("div", { class: "tools" });
  article.replaceChildren(thoughts, body, make("div", { class: "note" }), tools);
  redraw(article, node);
  if (node.running) return;
  tools.append(
    ...[versionButtons(conversation, node, actions), copyButton(node), button("regenerate", "↻", () => actions.regenerate(node))].flat().filter(Boolean),
  );
  if (node.tokens?.length) tools.append(probabilityButton(body, node));
}

/// Draws what has come of an answer so far.
export function redraw(article, node) {
  const [thoughts, body, note] = article.children;
  if (node.reasoning) {
    thoughts.hidden = false;
    thoughts.firstChild.textContent = node.running && !node.text ? `${t("thinking")}…` : t("thought");
    thoughts.lastChild.textContent = node.reasoning;
  }
  drawMarkdown(body, node.text);
  article.classList.toggle("running", Boolean(node.running));
  note.replaceChildren(...remarks(node));
}

function remarks(node) {
  if (node.running) return node.text || node.reasoning ? [] : [make("span", { class: "waiting" }, progress(node))];
  const out = [];
  if (node.error) out.push(make("p", { class: "error", role: "alert" }, make("strong", {}, `${t("failed")}. `), node.error));
  if (node.finish === "length") out.push(make("p", { class: "warning" }, t("cutOff")));
  if (node.finish === "stopped") out.push(make("p", { class: "hint" }, t("stopped")));
  if (node.stats) out.push(make("p", { class: "hint stats" }, stats(node)));
  return out;
}

export function progress(node) {
  if (!node.progress) return `${t("waiting")}…`;
  return t("reading", { done: number(node.progress.done), total: number(node.progress.total) });
}

function stats({ model, stats: { tokens, rate, first, cached, prompt } }) {
  const speed = t("speed", { tokens: number(tokens), rate: number(rate, 1), first: number(first, 2) });
  const reused = cached ? ` · ${t("cached", { tokens: number(cached), total: number(prompt) })}` : "";
  return `${model} · ${speed}${reused}`;
}

function button(key, sign, click) {
  return make("button", { type: "button", class: "icon", title: t(key), "aria-label": t(key), click }, sign);
}

function copyButton(node) {
  const element = button("copy", "⧉", () => copy(node.text, element));
  return element;
}

function versionButtons(conversation, node, actions) {
  const all = versions(conversation, node);
  if (all.length < 2) return [];
  const at = all.indexOf(node);
  const previous = button("previous", "‹", () => actions.turn(node, -1));
  const next = button("next", "›", () => actions.turn(node, 1));
  previous.disabled = at === 0;
  next.disabled = at === all.length - 1;
  const label = make("span", { class: "hint", title: t("version", { n: at + 1, count: all.length }) }, `${at + 1}/${all.length}`);
  return [previous, label, next];
}

/// Switches between the answer as Markdown and its tokens, each coloured by how sure the model was.
function probabilityButton(body, node) {
  const element = button("probabilities", "%", () => {
    const on = element.getAttribute("aria-pressed") !== "true";
    element.setAttribute("aria-pressed", on);
    body.drawnBlocks = [];
    body.replaceChildren();
    if (on) body.append(tokenView(node));
    else drawMarkdown(body, node.text);
  });
  element.setAttribute("aria-pressed", "false");
  return element;
}

function tokenView(node) {
  const box = make("div", { class: "tokens plain" });
  const tip = make("div", { class: "tip", role: "tooltip", id: `tip-${node.id}`, hidden: true });
  const show = (span, token) => {
    tip.replaceChildren(...tipRows(token));
    tip.hidden = false;
    const [at, within] = [span.getBoundingClientRect(), box.getBoundingClientRect()];
    tip.style.top = `${at.bottom - within.top + 6}px`;
    tip.style.left = `${Math.max(0, Math.min(at.left - within.left, within.width - tip.offsetWidth))}px`;
  };
  const spans = node.tokens.map((token) => {
    const sure = token.probability >= 0.9 ? 4 : token.probability >= 0.6 ? 3 : token.probability >= 0.3 ? 2 : 1;
    const span = make("span", { class: `token sure-${sure}`, tabindex: "-1", "aria-describedby": tip.id }, token.text);
    span.addEventListener("mouseenter", () => show(span, token));
    span.addEventListener("focus", () => show(span, token));
    return span;
  });
  // One stop of the Tab key for all tokens; the arrows go from one to the next.
  if (spans.length) spans[0].tabIndex = 0;
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && spans[spans.indexOf(document.activeElement) + step];
    if (next) {
      event.preventDefault();
      next.focus();
    }
  });
  box.addEventListener("mouseleave", () => (tip.hidden = true));
  box.append(...spans, tip);
  return box;
}

function tipRows(token) {
  const percent = (probability) => `${number(probability * 100, probability < 0.1 ? 2 : 1)} %`;
  const row = (text, probability, own) =>
    make("div", { class: own ? "own" : "" }, make("code", {}, JSON.stringify(text).slice(1, -1)), make("span", {}, percent(probability)));
  const others = token.best.filter((other) => other.text !== token.text);
  return [row(token.text, token.probability, true), ...others.map((other) => row(other.text, other.probability, false))];
}
