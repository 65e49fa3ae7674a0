// One answer from the first token to the last, written into its attempt as it comes.

import { messagesOf, roundsOf } from "./conversations.js";
import { preference } from "./preferences.js";
import { Refusal, complete } from "./server.js";

const ROOM = 256; // tokens an answer should have at least, or a quarter of a shorter context

/**
 * Lets the server answer the conversation's last question; `attempt` grows and ends in one of its states.
 *
 * `changed` is called after every change. What the signal stops, or the connection loses, keeps what had come.
 * Throws nothing but the Refusal "key", when the server wants one.
 */
export async function answer(conversation, attempt, info, signal, changed) {
  attempt.model = info.model;
  try {
    await untilItFits(conversation, attempt, info, signal, changed);
  } catch (error) {
    if (signal.aborted) attempt.state = "stopped";
    else if (error instanceof Refusal) refuse(attempt, error);
    else throw error;
  }
  changed();
}

/** Leaves out the older half of the rounds until the context has room for the others. */
async function untilItFits(conversation, attempt, info, signal, changed) {
  const rounds = roundsOf(conversation);
  for (let sent = fitting(rounds, attempt.question, info.context); ; sent = Math.floor(sent / 2)) {
    if (sent < rounds.length) attempt.omitted = rounds.length - sent;
    try {
      return await receive(complete(requestFor(conversation, info, sent), signal), attempt, changed);
    } catch (error) {
      if (error.code !== "context_length_exceeded" || sent === 0) throw error;
    }
  }
}

/** How many of the last rounds leave room for an answer, reckoned from what the last one took. */
function fitting(rounds, question, context) {
  const { omitted = 0, context: taken = 0 } = rounds.at(-1) ?? {};
  const room = Math.min(ROOM, context / 4);
  const sent = rounds.length - omitted;
  return taken + question.length + room > context ? Math.floor(sent / 2) : sent;
}

function requestFor(conversation, info, rounds) {
  const body = { model: info.model, messages: messagesOf(conversation, preference("system"), rounds) };
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const value = preference(name) ?? info.defaults?.[name];
    if (value !== undefined && value !== null) body[name] = value;
  }
  return body;
}

async function receive(events, attempt, changed) {
  let first, last;
  let finish = "stop";
  for await (const event of events) {
    if (event.text) {
      attempt.answer += event.text;
      last = performance.now();
      first ??= last;
      changed();
    }
    finish = event.finish ?? finish;
    if (event.usage) {
      attempt.tokens = event.usage.completion_tokens;
      attempt.context = event.usage.total_tokens;
    }
  }
  if (first !== undefined) attempt.seconds = (last - first) / 1000;
  attempt.state = { stop: "done", length: "length" }[finish] ?? "lost"; // a server that is shut down cancels
}

function refuse(attempt, refusal) {
  if (refusal.kind === "key") throw refusal;
  attempt.state = refusal.kind;
  attempt.message = refusal.message || undefined;
  attempt.code = refusal.code || undefined;
  attempt.wait = refusal.wait;
}
