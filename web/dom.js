// Building elements, and Markdown as elements. Text enters the page as text nodes only: what a model writes can never be markup.
import { highlight } from "./highlight.js";
import { t } from "./i18n.js";
import { parseBlocks } from "./markdown.js";

/// An element with attributes (a function is a listener, `true` an empty attribute) and children.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name, value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/// Draws `source` into `target`, touching only the blocks that differ from what was drawn there before: a selection in the
/// finished part of a growing answer survives.
export function drawMarkdown(target, source) {
  const blocks = parseBlocks(source);
  const drawn = (target.drawnBlocks ??= []);
  let same = 0;
  while (same < drawn.length && same < blocks.length && drawn[same] === blocks[same].raw) same += 1;
  while (target.childNodes.length > same) target.lastChild.remove();
  target.append(...blocks.slice(same).map(block));
  target.drawnBlocks = blocks.map(({ raw }) => raw);
}

function block(node) {
  switch (node.type) {
    case "heading":
      // The page's own headings are above those of a message.
      return make(`h${Math.min(node.level + 2, 6)}`, {}, node.inline.map(inline));
    case "rule":
      return make("hr");
    case "quote":
      return make("blockquote", {}, node.blocks.map(block));
    case "list":
      return make(node.ordered ? "ol" : "ul", node.ordered && node.start !== 1 ? { start: node.start } : {}, node.items.map(item));
    case "table":
      return table(node);
    case "code":
      return code(node);
    default:
      return make("p", {}, node.inline.map(inline));
  }
}

function item({ done, blocks }) {
  const check = done === null ? null : make("input", { type: "checkbox", disabled: true, checked: done });
  // An item of one paragraph is a line.
  const children = blocks.flatMap((node, at) => (at === 0 && node.type === "paragraph" ? node.inline.map(inline) : [block(node)]));
  return make("li", check ? { class: "task" } : {}, check, children);
}

function table({ align, head, rows }) {
  const cell = (tag) => (content, column) => make(tag, align[column] ? { class: `to-${align[column]}` } : {}, content.map(inline));
  const body = rows.map((row) => make("tr", {}, row.map(cell("td"))));
  return make("div", { class: "table", tabindex: "0" }, make("table", {}, make("thead", {}, make("tr", {}, head.map(cell("th")))), make("tbody", {}, body)));
}

function code({ language, text }) {
  const button = make("button", { type: "button", click: () => copy(text, button) }, t("copy"));
  const body = make("code", {}, highlight(text, language).map(([kind, piece]) => (kind ? make("span", { class: `hl-${kind}` }, piece) : piece)));
  return make("div", { class: "code" }, make("div", { class: "code-head" }, make("span", {}, language), button), make("pre", { tabindex: "0" }, body));
}

function inline(node) {
  switch (node.type) {
    case "text":
      return node.text;
    case "break":
      return make("br");
    case "code":
      return make("code", {}, node.text);
    case "link":
      return make("a", { href: node.href, target: "_blank", rel: "noopener noreferrer" }, node.inline.map(inline));
    default:
      return make(node.type, {}, node.inline.map(inline));
  }
}

/// Copies `text` and says so on the button; where the clipboard is closed to the page (plain HTTP), through a selection.
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea", { class: "visually-hidden" });
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const before = button.textContent;
  button.textContent = t("copied");
  setTimeout(() => (button.textContent = before), 1500);
}
