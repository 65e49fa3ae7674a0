// The server's side of the page: what model there is, and answers as they come.

import { apiKey } from "./preferences.js";
import { text } from "./texts.js";

const SILENCE = 60_000; // milliseconds; the server writes at least a comment every 15 seconds

/** The server said no, or what came was no answer of it. `kind` is a state of an attempt, or "key". */
export class Refusal extends Error {
  constructor(kind, message = "", details = {}) {
    super(message);
    this.kind = kind;
    Object.assign(this, details); // status, code, wait
  }
}

/** What the server tells about its model: see /info in docs/web.md. */
export async function information() {
  const response = await request("info", {});
  return response.json();
}

/**
 * Asks for a chat completion and yields { text }, { finish } and { usage } as they come.
 *
 * Ends after the server's last event. Throws a Refusal: "lost" where the connection ends before that, "offline"
 * where there was none, and for what the server says "busy", "refused" or "key".
 */
export async function* complete(body, signal) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers,
    body: JSON.stringify(asked),
    signal,
  });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const event = parsed(data);
    if (event.error) throw new Refusal("refused", event.error.message, { code: event.error.code });
    const choice = event.choices?.[0];
    if (choice?.delta?.content) yield { text: choice.delta.content };
    if (choice?.finish_reason) yield { finish: choice.finish_reason };
    if (event.usage) yield { usage: event.usage };
  }
  throw new Refusal("lost");
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new Refusal("lost"); // cut off, or not from our server
  }
}

async function request(path, { headers = {}, ...options }) {
  const key = apiKey();
  const authorized = key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
  let response;
  try {
    response = await fetch(path, { ...options, headers: authorized });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new Refusal("offline");
  }
  if (response.ok) return response;
  throw await refusal(response);
}

async function refusal(response) {
  const { status } = response;
  const error = await response.json().then((body) => body?.error, () => undefined);
  const kind = { 401: "key", 429: "busy" }[status] ?? "refused";
  const wait = Number.parseInt(response.headers.get("Retry-After"), 10);
  const details = { status, code: error?.code, wait: Number.isNaN(wait) ? undefined : wait };
  return new Refusal(kind, error?.message ?? text("unexpected", { status }), details);
}

/** The data of each server-sent event; comments, which keep the connection open, are skipped. */
async function* events(stream) {
  let data = [];
  for await (const line of lines(stream)) {
    if (line === "") {
      if (data.length) yield data.join("\n");
      data = [];
    } else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
}

async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await inTime(reader.read());
      if (done) return;
      const parts = (rest + value).split("\n");
      rest = parts.pop();
      for (const line of parts) yield line.replace(/\r$/, "");
    }
  } finally {
    reader.cancel().catch(() => {}); // nobody reads on: the server may stop
  }
}

/** What was read. Too long a silence is a lost connection too: no network tells a phone that it has moved on. */
async function inTime(reading) {
  let timer;
  const silence = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new Refusal("lost")), SILENCE);
  });
  try {
    return await Promise.race([reading, silence]);
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal("lost");
  } finally {
    clearTimeout(timer);
  }
}
