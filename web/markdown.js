// Markdown as chat models write it -> a tree of plain objects. Pure: no DOM, so it is tested without a browser.
//
// parseBlocks(source) -> [{ type, raw, ... }], where `raw` is the block's own source, so that a growing answer redraws only
// the blocks that changed. HTML in the source is text. A block that is still open (a fence, a list) is what it has been so far.
// What is not here: reference links, footnotes, HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(?:\|\s*:?-+:?\s*)*\|?\s*$/;
/// Deeper quotes and lists are text: nesting without end would exhaust the stack.
const DEEPEST = 12;

export function parseBlocks(source, depth = 0) {
  const lines = source.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = readBlock(lines, at, depth);
    block.raw = lines.slice(at, next).join("\n");
    blocks.push(block);
    at = next;
  }
  return blocks;
}

function readBlock(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return readFence(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return [{ type: "heading", level: heading[1].length, inline: parseInline(heading[2]) }, at + 1];
  if (RULE.test(line)) return [{ type: "rule" }, at + 1];
  if (depth < DEEPEST && QUOTE.test(line)) return readQuote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return readList(lines, at, depth);
  if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && (lines[at + 1] ?? "").includes("-")) return readTable(lines, at);
  return readParagraph(lines, at, depth);
}

function readFence(lines, at, [opening, marks, language]) {
  const indent = opening.length - opening.trimStart().length;
  const body = [];
  let next = at + 1;
  for (; next < lines.length; next += 1) {
    const text = lines[next].trim();
    if (text.length >= marks.length && text === marks[0].repeat(text.length)) {
      next += 1;
      return [{ type: "code", language, text: body.join("\n"), open: false }, next];
    }
    body.push(stripIndent(lines[next], indent));
  }
  return [{ type: "code", language, text: body.join("\n"), open: true }, next];
}

function readQuote(lines, at, depth) {
  const inner = [];
  let next = at;
  for (; next < lines.length && lines[next].trim(); next += 1) {
    const quoted = QUOTE.exec(lines[next]);
    inner.push(quoted ? quoted[1] : lines[next]);
  }
  return [{ type: "quote", blocks: parseBlocks(inner.join("\n"), depth + 1) }, next];
}

function readList(lines, at, depth) {
  const [, margin, mark] = ITEM.exec(lines[at]);
  const ordered = /\d/.test(mark);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const item = ITEM.exec(lines[next]);
    if (!item || RULE.test(lines[next]) || item[1].length > margin.length + 1 || /\d/.test(item[2]) !== ordered) break;
    const inside = item[1].length + item[2].length + Math.min(item[3].length || 1, 4);
    const body = [item[4]];
    next += 1;
    while (next < lines.length && belongs(lines, next, inside)) {
      body.push(stripIndent(lines[next], inside));
      next += 1;
    }
    items.push(readItem(body.join("\n"), depth));
    // A list goes on over blank lines when its next item follows.
    let after = next;
    while (after < lines.length && !lines[after].trim()) after += 1;
    if (after > next && ITEM.test(lines[after] ?? "")) next = after;
  }
  return [{ type: "list", ordered, start: ordered ? Number.parseInt(mark, 10) : 1, items }, next];
}

function readItem(source, depth) {
  const task = /^\[([ xX])\]\s+/.exec(source);
  const text = task ? source.slice(task[0].length) : source;
  return { done: task ? task[1] !== " " : null, blocks: parseBlocks(text, depth + 1) };
}

/// Whether a line is part of the item whose text starts at column `inside`.
function belongs(lines, at, inside) {
  const line = lines[at];
  if (line.trim()) {
    const indent = line.length - line.trimStart().length;
    if (indent >= Math.min(inside, 2) && indent > 0) return indent >= inside || !ITEM.test(line) || indent >= 2;
    return lines[at - 1].trim() !== "" && !startsBlock(line);
  }
  const following = lines[at + 1] ?? "";
  return /^\s{2,}\S/.test(following) && following.length - following.trimStart().length >= Math.min(inside, 2);
}

function startsBlock(line) {
  return [FENCE, HEADING, RULE, ITEM, QUOTE].some((pattern) => pattern.test(line));
}

function readTable(lines, at) {
  const cells = (line) =>
    line.trim().replace(/^\|/, "").replace(/\|$/, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
  const align = cells(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : cell.startsWith(":") ? "left" : "");
  const head = cells(lines[at]).map((cell) => parseInline(cell));
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].trim() && lines[next].includes("|"); next += 1) {
    const row = cells(lines[next]).map((cell) => parseInline(cell));
    rows.push(head.map((_, column) => row[column] ?? []));
  }
  return [{ type: "table", align, head, rows }, next];
}

function readParagraph(lines, at, depth) {
  const body = [lines[at].trimStart()];
  let next = at + 1;
  while (next < lines.length && lines[next].trim() && (depth >= DEEPEST || !startsBlock(lines[next]))) {
    body.push(lines[next].trimStart());
    next += 1;
  }
  return [{ type: "paragraph", inline: parseInline(body.join("\n")) }, next];
}

function stripIndent(line, columns) {
  let at = 0;
  while (at < columns && line[at] === " ") at += 1;
  return line.slice(at);
}

const PAIRS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];
const BARE_LINK = /^https?:\/\/[^\s<>]*[^\s<>.,:;"')\]!?*_]/;

/// The inside of a paragraph: [{ type: "text" | "code" | "strong" | "em" | "del" | "link" | "break", ... }]
export function parseInline(source, depth = 0) {
  const out = [];
  let text = "";
  // A mark that has no partner ahead has none further on either: looked for once, so that a line of stars costs a line.
  const lonely = new Set();
  const flush = () => {
    if (text) out.push({ type: "text", text });
    text = "";
  };
  const push = (node) => {
    flush();
    out.push(node);
  };
  let at = 0;
  while (at < source.length) {
    const found = depth < DEEPEST ? readInline(source, at, depth, lonely) : null;
    if (found) {
      push(found.node);
      at = found.next;
    } else if (source[at] === "\\" && /[!-/:-@[-`{-~]/.test(source[at + 1] ?? "")) {
      text += source[at + 1];
      at += 2;
    } else if (source[at] === "\n") {
      text = text.trimEnd();
      push({ type: "break" });
      at += 1;
    } else {
      text += source[at];
      at += 1;
    }
  }
  flush();
  return out;
}

function readInline(source, at, depth, lonely) {
  const c = source[at];
  if (c === "`") return readCode(source, at, lonely);
  if (c === "[" || (c === "!" && source[at + 1] === "[")) return readLink(source, at, depth, lonely);
  if (c === "<") {
    const link = /^<(https?:\/\/[^\s<>]+)>/.exec(source.slice(at, at + 2048));
    if (link) return { node: { type: "link", href: link[1], inline: [{ type: "text", text: link[1] }] }, next: at + link[0].length };
  }
  if (c === "h" && !/\w/.test(source[at - 1] ?? "")) {
    const link = BARE_LINK.exec(source.slice(at, at + 2048));
    if (link) return { node: { type: "link", href: link[0], inline: [{ type: "text", text: link[0] }] }, next: at + link[0].length };
  }
  if (c === "*" || c === "_" || c === "~") return readPair(source, at, depth, lonely);
  return null;
}

function readCode(source, at, lonely) {
  const marks = /^`+/.exec(source.slice(at))[0];
  if (lonely.has(marks)) return { node: { type: "text", text: marks }, next: at + marks.length };
  for (let end = source.indexOf(marks, at + marks.length); end >= 0; end = source.indexOf(marks, end + 1)) {
    if (source[end - 1] !== "`" && source[end + marks.length] !== "`") {
      const inside = source.slice(at + marks.length, end).replaceAll("\n", " ");
      const padded = inside.startsWith(" ") && inside.endsWith(" ") && inside.trim();
      return { node: { type: "code", text: padded ? inside.slice(1, -1) : inside }, next: end + marks.length };
    }
  }
  lonely.add(marks);
  return { node: { type: "text", text: marks }, next: at + marks.length };
}

/// An image is shown as a link to it: the page makes no request that nobody asked for.
function readLink(source, at, depth, lonely) {
  if (lonely.has("[")) return null;
  const start = source[at] === "!" ? at + 2 : at + 1;
  let open = 1;
  let end = start;
  for (; end < source.length && open > 0; end += 1) {
    if (source[end] === "\\") end += 1;
    else if (source[end] === "[") open += 1;
    else if (source[end] === "]") open -= 1;
  }
  if (open > 0) {
    lonely.add("[");
    return null;
  }
  const target = /^\(\s*<?((?:[^\s()<>]|\([^\s()<>]*\))*)>?(?:\s+["'(][^"')]*["')])?\s*\)/.exec(source.slice(end, end + 4096));
  if (!target || !/^(https?:|mailto:)/i.test(target[1])) return null;
  const label = source.slice(start, end - 1);
  return { node: { type: "link", href: target[1], inline: parseInline(label || target[1], depth + 1) }, next: end + target[0].length };
}

function readPair(source, at, depth, lonely) {
  for (const [mark, type] of PAIRS) {
    if (!source.startsWith(mark, at)) continue;
    const after = source[at + mark.length] ?? " ";
    const intraword = mark[0] === "_" && /\w/.test(source[at - 1] ?? "");
    if (lonely.has(mark) || /\s/.test(after) || intraword) continue;
    const end = closing(source, at + mark.length, mark);
    if (end < 0) {
      lonely.add(mark);
      continue;
    }
    return { node: { type, inline: parseInline(source.slice(at + mark.length, end), depth + 1) }, next: end + mark.length };
  }
  return null;
}

/// Where the pair opened before `from` ends, code spans left out; -1 where it does not.
function closing(source, from, mark) {
  for (let at = from; at < source.length; at += 1) {
    const c = source[at];
    if (c === "\\") at += 1;
    else if (c === "`") {
      const marks = /^`+/.exec(source.slice(at, at + 64))[0];
      const end = source.indexOf(marks, at + marks.length);
      at = end < 0 ? at + marks.length - 1 : end + marks.length - 1;
    } else if (source.startsWith(mark, at) && at > from && !/\s/.test(source[at - 1])) {
      const single = mark.length === 1;
      if (single && source[at + 1] === mark) {
        at += 1;
        continue;
      }
      if (mark[0] === "_" && /\w/.test(source[at + mark.length] ?? "")) continue;
      return at;
    }
  }
  return -1;
}
