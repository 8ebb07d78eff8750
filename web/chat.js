// One answer: the request made of a conversation's messages, the stream read into a node, and its figures.
import { ApiError, chat } from "./api.js";
import { t } from "./i18n.js";
import { requestOptions } from "./settings.js";
import { settings } from "./store.js";
import { lineage } from "./tree.js";

/// The messages that lead to `node`, in the API's form; earlier thoughts are not sent again.
function messages(conversation, node) {
  const system = settings().systemPrompt?.trim();
  const out = system ? [{ role: "system", content: system }] : [];
  for (const { role, text, images } of lineage(conversation, node)) {
    const content = images?.length
      ? [...images.map(({ url }) => ({ type: "image_url", image_url: { url } })), { type: "text", text }]
      : text;
    out.push({ role, content });
  }
  return out;
}

/// Fills `answer` from the server until it ends or `signal` stops it; `changed` is called after every piece.
export async function answer(conversation, answer, signal, changed) {
  const asked = performance.now();
  const clock = { first: null, last: null };
  let usage = null;
  let pieces = 0;
  Object.assign(answer, { running: true, tokens: [], reasoning: "" });
  try {
    const body = { model: answer.model, messages: messages(conversation, conversation.nodes[answer.parent]), ...requestOptions() };
    for await (const part of chat(body, signal)) {
      if (part.text || part.reasoning) {
        clock.last = performance.now();
        clock.first ??= clock.last;
        pieces += 1;
      }
      take(answer, part);
      usage = part.usage ?? usage;
      changed();
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else answer.error = words(error);
  }
  delete answer.progress;
  answer.running = false;
  if (clock.first !== null) answer.stats = figures(asked, clock, usage, pieces);
  changed();
}

function take(answer, part) {
  if (part.progress) answer.progress = part.progress;
  if (part.reasoning) answer.reasoning += part.reasoning;
  if (part.text) answer.text += part.text;
  if (part.tokens) answer.tokens.push(...part.tokens);
  if (part.finish) answer.finish = part.finish;
}

/// A stopped stream carries no usage: its pieces are what is known of its tokens.
function figures(asked, { first, last }, usage, pieces) {
  const tokens = usage?.completion_tokens ?? pieces;
  const seconds = (last - first) / 1000;
  return {
    tokens,
    rate: seconds > 0 ? (tokens - 1) / seconds : 0,
    first: (first - asked) / 1000,
    prompt: usage?.prompt_tokens ?? 0,
    cached: usage?.prompt_tokens_details?.cached_tokens ?? 0,
  };
}

/// What went wrong, for a person.
export function words(error) {
  if (!(error instanceof ApiError)) return String(error.message ?? error);
  if (error.status === 0) return t("offline");
  if (error.status === 401) return `${t("needsKey")} (${error.message})`;
  return error.message;
}
