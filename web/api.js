// The server as the page uses it: /v1/models and streamed /v1/chat/completions. Failures become `ApiError` with the server's words.
import { apiKey } from "./store.js";

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (apiKey()) headers.authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("", 0);
  }
  if (response.ok) return response;
  const body = await response.text();
  let message = body.trim() || response.statusText;
  try {
    message = JSON.parse(body).error.message ?? message;
  } catch {
    // Not the server's own error object: what came is shown as it is.
  }
  throw new ApiError(message, response.status);
}

/// The names the server answers to.
export async function models() {
  const { data } = await (await request("/v1/models")).json();
  return data;
}

/// Streams an answer. Yields { progress: { done, total } }, { reasoning }, { text }, { tokens: [{ text, probability, best }] },
/// { finish }, { usage }.
export async function* chat(body, signal) {
  const response = await request("/v1/chat/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  for await (const line of lines(response.body)) {
    if (line.startsWith(":")) {
      const progress = /prefill (\d+)\/(\d+)/.exec(line);
      if (progress) yield { progress: { done: Number(progress[1]), total: Number(progress[2]) } };
      continue;
    }
    if (!line.startsWith("data:")) continue;
    const data = line.slice(5).trim();
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiError(chunk.error.message, chunk.error.code ?? 500);
    yield* parts(chunk);
  }
}

function* parts(chunk) {
  if (chunk.usage) yield { usage: chunk.usage };
  const choice = chunk.choices?.[0];
  if (!choice) return;
  if (choice.delta?.reasoning_content) yield { reasoning: choice.delta.reasoning_content };
  if (choice.delta?.content) yield { text: choice.delta.content };
  if (choice.logprobs?.content?.length) yield { tokens: choice.logprobs.content.map(token) };
  if (choice.finish_reason) yield { finish: choice.finish_reason };
}

function token({ token: text, logprob, top_logprobs }) {
  const best = (top_logprobs ?? []).map((other) => ({ text: other.token, probability: Math.exp(other.logprob) }));
  return { text, probability: Math.exp(logprob), best };
}

async function* lines(body) {
  const decoder = new TextDecoder();
  let rest = "";
  for await (const bytes of chunks(body)) {
    rest += decoder.decode(bytes, { stream: true });
    const whole = rest.split("\n");
    rest = whole.pop();
    for (const line of whole) yield line.replace(/\r$/, "");
  }
  if (rest) yield rest;
}

// Not every browser iterates a stream by itself.
async function* chunks(body) {
  const reader = body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      yield value;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
