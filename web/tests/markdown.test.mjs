// The Markdown reader, the tree of messages and the colours of code, without a browser.
import assert from "node:assert/strict";
import test from "node:test";
import { parseBlocks } from "../markdown.js";
import { add, newConversation, path, turn, versions } from "../tree.js";

const types = (source) => parseBlocks(source).map(({ type }) => type);

test("blocks of every kind are told apart", () => {
  const source = "# Title\n\nText *with* `code`.\n\n- one\n- two\n\n1. first\n\n> quote\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n---\n\n```rust\nfn main() {}\n```";
  assert.deepEqual(types(source).slice(0, 2), ["heading", "paragraph"]);
  assert.ok(["quote", "table", "rule", "code"].every((type) => types(source).includes(type)), types(source).join());
  const code = parseBlocks(source).at(-1);
  assert.deepEqual([code.language, code.text, code.open], ["rust", "fn main() {}", false]);
});

test("a fence that has not ended is code already", () => {
  const [block] = parseBlocks("```python\nprint(1)");
  assert.deepEqual([block.type, block.open, block.text], ["code", true, "print(1)"]);
});

test("every prefix of an answer is read, and blocks before the last one stay as they are", () => {
  const source = "# A\n\ntext **bold [link](https://example.com)** end\n\n- a\n  - b\n\n```js\nlet a = '<b>';\n```\n\n| a |\n|---|\n| b |\n";
  let before = [];
  for (let end = 1; end <= source.length; end += 1) {
    const blocks = parseBlocks(source.slice(0, end));
    before.slice(0, -2).forEach((block, i) => assert.equal(blocks[i].raw, block.raw));
    before = blocks;
  }
});

test("hostile depth ends in text, in little time", () => {
  const begun = performance.now();
  for (const source of [">".repeat(50000), "- ".repeat(20000), "[".repeat(20000), "*".repeat(50001), "`".repeat(9999), "| ".repeat(20000)]) parseBlocks(source);
  assert.ok(performance.now() - begun < 20000);
});

test("versions of a message are turned, and the path follows", () => {
  const conversation = newConversation(0);
  const question = add(conversation, "", { role: "user", text: "a" });
  const first = add(conversation, question.id, { role: "assistant", text: "1" });
  const second = add(conversation, question.id, { role: "assistant", text: "2" });
  assert.deepEqual(path(conversation).map(({ text }) => text), ["a", "2"]);
  turn(conversation, second, -1);
  assert.deepEqual(path(conversation).map(({ text }) => text), ["a", "1"]);
  assert.equal(versions(conversation, first).length, 2);
});
