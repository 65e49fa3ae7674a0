// The conversation on the page. Everything is drawn from its data and may be drawn again at any time: what is
// already right is left alone, so that focus, selection and scrolling stay where they are.

import { chosen } from "./conversations.js";
import { render } from "./markdown.js";
import { number, text, translate, translated } from "./texts.js";

const AT_END = 40; // pixels from the end that still count as being there
const NOTICE = 6000; // milliseconds for which good news is shown

const byId = (id) => document.getElementById(id);
const scroller = byId("scroller");
const elements = new WeakMap(); // turn -> its article
let following = true; // whether the reader is at the end, and wants to stay there

/** Shows all turns of the conversation. `running`: its last answer is being written here. */
export function drawConversation(conversation, running) {
  const articles = conversation.turns.map((turn) => elements.get(turn) ?? newArticle(turn));
  const list = byId("turns");
  if (articles.length !== list.children.length || articles.some((article, at) => article !== list.children[at])) {
    list.replaceChildren(...articles);
  }
  conversation.turns.forEach((turn, index) => {
    const last = index === conversation.turns.length - 1;
    drawTurn(turn, { last, running: running && last });
  });
  byId("welcome").hidden = articles.length > 0;
}

/** Shows the chosen attempt of a turn. */
export function drawTurn(turn, { last, running }) {
  const article = elements.get(turn);
  const attempt = chosen(turn);
  const part = (selector) => article.querySelector(selector);
  setText(part(".question"), attempt.question);
  render(attempt.answer, part(".answer"));
  article.classList.toggle("running", running);
  article.classList.toggle("last", last);
  part(".answer").setAttribute("aria-busy", String(running));
  const note = running ? "" : noteOf(attempt);
  setText(part(".note span"), note);
  part(".note").hidden = note === "";
  drawRemedy(part(".note button"), attempt);
  part(".note button").hidden = !last || !RETRIED.includes(attempt.state);
  part(".tools").hidden = running;
  part(".tools [data-action=copy]").hidden = attempt.answer === "";
  part(".tools [data-action=again]").hidden = !last || RETRIED.includes(attempt.state);
  part("[data-action=edit]").hidden = !last || running;
  drawVersions(part(".versions"), turn, last);
  setText(part(".speed"), speedOf(attempt));
  keepAtEnd();
}

/** Another try, or another question where this one can never be answered. */
function drawRemedy(button, { code }) {
  const [action, key] = code === "context_length_exceeded" ? ["edit", "edit"] : ["again", "retry"];
  if (button.dataset.action === action) return;
  button.dataset.action = action;
  translated(button, key);
}

function drawVersions(versions, turn, last) {
  const count = turn.attempts.length;
  versions.hidden = !last || count < 2;
  setText(versions.querySelector(".number"), text("versions", { number: turn.chosen + 1, count }));
  versions.querySelector("[data-action=previous]").disabled = turn.chosen === 0;
  versions.querySelector("[data-action=next]").disabled = turn.chosen === count - 1;
}

const RETRIED = ["running", "lost", "offline", "busy", "refused"]; // states that offer another try

/** One sentence about how the answer ended, where there is something to say. */
function noteOf({ state, answer, omitted, message, wait }) {
  if (state === "refused") return message ?? text("lost");
  if (state === "running") return text("lost"); // no page is writing it any more
  if (state === "busy") return text("busy", { when: wait ? text("later", { count: wait }) : text("soon") });
  if (["lost", "offline", "stopped", "length"].includes(state)) return text(state);
  if (answer === "") return text("empty");
  return omitted ? text("fewerRounds", { count: omitted }) : "";
}

function speedOf({ tokens, seconds }) {
  if (!tokens) return "";
  const parts = [text("tokens", { count: number(tokens) })];
  const digits = { maximumSignificantDigits: 3 };
  // The first token waits for the prompt; the speed is that of the others.
  if (seconds > 0.05 && tokens > 1) parts.push(text("speed", { count: number((tokens - 1) / seconds, digits) }));
  return parts.join(" · ");
}

function newArticle(turn) {
  const article = byId("turn").content.cloneNode(true).firstElementChild;
  article.turn = turn;
  translate(article);
  elements.set(turn, article);
  return article;
}

// ---- editing the last question

/** Puts the question of the article into a text field; `send` is called with what it became. */
export function startEditing(article, send) {
  const form = article.querySelector(".edit");
  const field = form.querySelector("textarea");
  field.value = chosen(article.turn).question;
  show(form, true);
  fit(field);
  field.focus();
  form.onsubmit = (event) => {
    event.preventDefault();
    const question = field.value.trim();
    if (!question) return;
    show(form, false);
    send(question);
  };
}

/** Leaves the text field without a change. Returns whether there was one. */
export function stopEditing() {
  const form = document.querySelector(".edit:not([hidden])");
  if (!form) return false;
  show(form, false);
  form.closest(".turn").querySelector("[data-action=edit]").focus();
  return true;
}

function show(form, editing) {
  form.hidden = !editing;
  form.closest(".turn").classList.toggle("editing", editing);
}

/** Makes a text field as high as its text; the style sheet bounds it. */
export function fit(field) {
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}

// ---- scrolling

/** Goes to the end, and stays there while the answer grows. */
export function goToEnd() {
  following = true;
  keepAtEnd();
}

function keepAtEnd() {
  if (following) scroller.scrollTop = scroller.scrollHeight;
  showDistance();
}

function distance() {
  return scroller.scrollHeight - scroller.clientHeight - scroller.scrollTop;
}

function showDistance() {
  byId("to-end").hidden = distance() < AT_END;
}

scroller.addEventListener("scroll", () => {
  following = distance() < AT_END;
  showDistance();
});
new ResizeObserver(keepAtEnd).observe(scroller); // a phone's keyboard opens and closes

// ---- what is said beside the conversation

/** For screen readers alone. */
export function announce(message) {
  byId("status").textContent = message;
}

let fading; // timer of a notice that goes by itself

/** A sentence at the top, until it is closed or another one takes its place; "" takes it away. */
export function notify(message) {
  clearTimeout(fading);
  byId("notice").querySelector("p").textContent = message;
  byId("notice").hidden = message === "";
  keepAtEnd(); // at once: the scroll event, which comes first, would find the reader away from it
}

/** The same for good news, which goes by itself. */
export function notifyBriefly(message) {
  notify(message);
  fading = setTimeout(notify, NOTICE, "");
}

function setText(element, content) {
  if (element.textContent !== content) element.textContent = content;
}
