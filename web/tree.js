// A conversation as a tree: editing a message or asking again adds a branch beside the old one, so nothing is lost. Pure.
//
// A conversation is { id, title, created, updated, nodes: { id: node }, chosen: { parentId: childId } }; a node is
// { id, parent, role: "user" | "assistant", text, ... }. The first message's parent is "". What is shown is the path along `chosen`.

export function newConversation(now) {
  return { id: crypto.randomUUID(), title: "", created: now, updated: now, nodes: {}, chosen: {} };
}

export function add(conversation, parent, fields) {
  const node = { id: crypto.randomUUID(), parent, text: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.chosen[parent] = node.id;
  return node;
}

/// The messages shown, first to last.
export function path(conversation) {
  const out = [];
  let node = conversation.nodes[conversation.chosen[""]];
  while (node) {
    out.push(node);
    node = conversation.nodes[conversation.chosen[node.id]];
  }
  return out;
}

/// The messages that lead to `node`, it included.
export function lineage(conversation, node) {
  const out = [];
  for (let at = node; at; at = conversation.nodes[at.parent]) out.unshift(at);
  return out;
}

/// The versions of a message, oldest first.
export function versions(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
}

/// Shows the version `step` places from this one.
export function turn(conversation, node, step) {
  const all = versions(conversation, node);
  const next = all[all.indexOf(node) + step];
  if (next) conversation.chosen[node.parent] = next.id;
}

/// What a conversation is called until its owner names it.
export function titleOf(text) {
  const line = text.trim().split("\n")[0] ?? "";
  return [...line].length > 60 ? `${[...line].slice(0, 59).join("")}…` : line;
}
