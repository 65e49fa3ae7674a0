// What a conversation is, and its way to the server, to a file and back. Nothing here touches the page.
//
//   conversation { id, title, renamed, updated, turns: [turn] }     updated: milliseconds since 1970
//   turn         { attempts: [attempt], chosen }                    asked again or edited: one more attempt
//   attempt      { question, answer, state, ... }                   state: one of STATES
//
// Beside these an attempt may have: model (its name), tokens, context (tokens of prompt and answer), seconds (from
// the first token to the last), omitted (rounds that were not sent for lack of room), message and code (what the
// server said), wait (seconds, until it may have room).

const STATES = ["running", "done", "stopped", "length", "lost", "offline", "busy", "refused"];

const FORMAT = "chatglm-conversations";
const LONGEST_TITLE = 80;

export function newConversation() {
  return { id: newId(), title: "", renamed: false, updated: Date.now(), turns: [] };
}

function newAttempt(question) {
  return { question, answer: "", state: "running" };
}

/** The attempt of `turn` that is shown. */
export function chosen(turn) {
  return turn.attempts[turn.chosen];
}

/** Adds a turn with this question and returns its attempt. */
export function ask(conversation, question) {
  const attempt = newAttempt(question);
  conversation.turns.push({ attempts: [attempt], chosen: 0 });
  touch(conversation);
  return attempt;
}

/** Asks the last question again, or another in its place. What was answered stays, as an earlier version. */
export function askAgain(conversation, question) {
  const turn = conversation.turns.at(-1);
  const attempt = newAttempt(question);
  if (chosen(turn).answer === "") turn.attempts.splice(turn.chosen, 1);
  turn.attempts.push(attempt);
  turn.chosen = turn.attempts.length - 1;
  touch(conversation);
  return attempt;
}

/** Until somebody names it, a conversation is called like its first question. */
function touch(conversation) {
  conversation.updated = Date.now();
  if (!conversation.renamed) conversation.title = titleOf(chosen(conversation.turns[0]).question);
}

export function rename(conversation, title) {
  conversation.renamed = titleOf(title) !== "";
  if (conversation.renamed) conversation.title = titleOf(title);
  else touch(conversation);
}

export function titleOf(question) {
  const line = question.trim().split("\n", 1)[0].trim();
  return [...line].slice(0, LONGEST_TITLE).join("");
}

/** The rounds before the last question that were answered. */
export function roundsOf(conversation) {
  return conversation.turns.slice(0, -1).map(chosen).filter(({ answer }) => answer !== "");
}

/** The messages that ask the last question after the last `count` rounds, as the server takes them. */
export function messagesOf(conversation, system = "", count = Infinity) {
  const rounds = roundsOf(conversation);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...dialogue(rounds.slice(Math.max(0, rounds.length - count))),
    { role: "user", content: chosen(conversation.turns.at(-1)).question },
  ];
}

function dialogue(attempts) {
  return attempts
    .filter(({ answer }) => answer !== "")
    .flatMap(({ question, answer }) => [
      { role: "user", content: question },
      { role: "assistant", content: answer },
    ]);
}

export function toMarkdown(conversation) {
  const rounds = conversation.turns.map(chosen).map(({ question, answer }) => {
    const quoted = question.split("\n").map((line) => `> ${line}`.trimEnd());
    return `${quoted.join("\n")}\n\n${answer.trim()}\n`;
  });
  return [`# ${conversation.title}\n`, ...rounds].join("\n");
}

/** A file for fromFile; one with a single conversation can be read by `/load` of `chatglm chat` too. */
export function toFile(conversations) {
  const messages = conversations.length === 1 ? dialogue(conversations[0].turns.map(chosen)) : undefined;
  return `${JSON.stringify({ format: FORMAT, version: 1, messages, conversations }, null, 2)}\n`;
}

/** Reads what toFile wrote, or a file with OpenAI's list of messages. Throws an Error where there is neither. */
export function fromFile(text) {
  const value = JSON.parse(text);
  const found = value?.format === FORMAT && Array.isArray(value.conversations) ? value.conversations : [value];
  const conversations = found.map((one) => sound(one) ?? fromMessages(one)).filter(Boolean);
  if (!conversations.length) throw new Error("no conversations");
  return conversations;
}

/** A copy with every field of the right kind and nothing else; null where `value` is no conversation. */
export function sound(value) {
  if (!Array.isArray(value?.turns) || typeof value.id !== "string" || !/^[\w-]{1,64}$/.test(value.id)) return null;
  const turns = value.turns.map(soundTurn).filter(Boolean);
  if (!turns.length) return null;
  const named = typeof value.title === "string" && value.title !== "";
  return {
    id: value.id,
    title: named ? titleOf(value.title) : titleOf(turns[0].attempts[0].question),
    renamed: value.renamed === true,
    updated: Number.isFinite(value.updated) ? value.updated : Date.now(),
    turns,
  };
}

function soundTurn(turn) {
  const attempts = Array.isArray(turn?.attempts) ? turn.attempts.map(soundAttempt).filter(Boolean) : [];
  if (!attempts.length) return null;
  return { attempts, chosen: attempts[turn.chosen] ? turn.chosen : attempts.length - 1 };
}

function soundAttempt(attempt) {
  if (typeof attempt?.question !== "string" || typeof attempt.answer !== "string") return null;
  const { question, answer } = attempt;
  const copy = { question, answer, state: STATES.includes(attempt.state) ? attempt.state : "done" };
  for (const name of ["model", "message", "code"]) if (typeof attempt[name] === "string") copy[name] = attempt[name];
  for (const name of ["tokens", "context", "seconds", "omitted", "wait"]) {
    if (Number.isFinite(attempt[name]) && attempt[name] >= 0) copy[name] = attempt[name];
  }
  return copy;
}

/** From { messages: [{ role, content }] } or the list alone; null where no question is answered in it. */
function fromMessages(value) {
  const messages = Array.isArray(value) ? value : value?.messages;
  if (!Array.isArray(messages)) return null;
  const conversation = newConversation();
  messages.forEach((message, index) => {
    const question = messages[index - 1];
    if (message?.role !== "assistant" || question?.role !== "user") return;
    if (typeof message.content !== "string" || typeof question.content !== "string") return;
    Object.assign(ask(conversation, question.content), { answer: message.content, state: "done" });
  });
  if (typeof value.title === "string") conversation.title = titleOf(value.title) || conversation.title;
  return conversation.turns.length ? conversation : null;
}

/** 16 hexadecimal digits. (crypto.randomUUID is missing on plain http, as on a phone in the same network.) */
export function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}
