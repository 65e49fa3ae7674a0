// The page: which conversation is shown, which ones are being answered, and what every button does.

import { answer } from "./answering.js";
import {
  ask,
  askAgain,
  chosen,
  fromFile,
  newConversation,
  newId,
  rename,
  sound,
  toFile,
  toMarkdown,
} from "./conversations.js";
import { askKey, askTitle, confirmed, openSettings } from "./dialogs.js";
import { copy, download } from "./files.js";
import { draft, keepApiKey, keepDraft, prefer, preference } from "./preferences.js";
import { information } from "./server.js";
import { closeDrawer, drawList } from "./sidebar.js";
import { openStore } from "./store.js";
import {
  currentLanguage,
  labelled,
  preferredLanguage,
  roundNumber,
  suggestions,
  text,
  translated,
  useLanguage,
} from "./texts.js";
import * as view from "./view.js";

const LARGEST_FILE = 50_000_000; // bytes of a file to import
const LONGEST_WAIT = 30; // seconds between two tries to reach the server
const COPIED = 1500; // milliseconds for which a button tells that it has copied
const SILENCE = 10_000; // milliseconds after which another tab that wrote nothing has been closed

const byId = (id) => document.getElementById(id);
const onClick = (id, action) => byId(id).addEventListener("click", action);

const conversations = new Map(); // id -> conversation, of all with a question
const running = new Map(); // id -> AbortController, of those that this page has answered at the moment
const elsewhere = new Map(); // id -> timer, of those that another tab has answered at the moment
let current = newConversation(); // the one that is shown
let info = {}; // what the server tells about its model
let known = false; // whether `info` is still true, as far as we know
let store;

// ---- questions and answers

const field = byId("question");

function busy() {
  return running.has(current.id) || elsewhere.has(current.id);
}

function send(question) {
  if (!question || busy()) return false;
  const attempt = ask(current, question);
  if (!conversations.has(current.id)) {
    conversations.set(current.id, current);
    history.replaceState(null, "", `#${current.id}`);
  }
  run(current, attempt);
  return true;
}

function sendAgain(question) {
  if (!busy()) run(current, askAgain(current, question));
}

/** Lets the server answer; shows and stores what comes, as it comes. */
async function run(conversation, attempt) {
  const controller = new AbortController();
  running.set(conversation.id, controller);
  store.keep(conversation);
  draw();
  view.goToEnd();
  view.announce(text("answering"));
  await answerOrTellWhy(conversation, attempt, controller.signal, () => {
    if (!conversations.has(conversation.id)) return; // deleted meanwhile
    store.keepSoon(conversation);
    if (conversation === current) drawSoon();
  });
  running.delete(conversation.id);
  known &&= attempt.state !== "offline" && attempt.state !== "refused";
  if (conversations.has(conversation.id)) store.keep(conversation);
  draw();
  if (conversation === current) view.announce(attempt.answer);
}

async function answerOrTellWhy(conversation, attempt, signal, changed) {
  for (;;) {
    try {
      if (!known) await learn();
      return await answer(conversation, attempt, info, signal, changed);
    } catch (refusal) {
      if (refusal.kind === "key" && (await unlock())) continue;
      if (!refusal.kind) console.error(refusal); // a mistake of ours; the answer must not seem to go on
      attempt.state = { key: "refused", undefined: "lost" }[refusal.kind] ?? refusal.kind;
      attempt.message = refusal.message;
      return undefined;
    }
  }
}

/** Asks the user for a key; whether there is one now. */
async function unlock() {
  const key = await askKey();
  if (key) keepApiKey(key);
  return Boolean(key);
}

function stop() {
  running.get(current.id)?.abort();
}

// ---- what is shown

function draw() {
  view.drawConversation(current, busy());
  drawList(conversations.values(), current, running, show);
  byId("send").hidden = running.has(current.id);
  byId("send").disabled = elsewhere.has(current.id);
  byId("stop").hidden = !running.has(current.id);
  byId("open-more").hidden = current.turns.length === 0;
  const title = current.title || text("newConversation");
  byId("title").textContent = title;
  document.title = [current.title, info.model, "ChatGLM"].filter(Boolean).join(" · ");
  const size = info.parameters ? text("parameters", { count: roundNumber(info.parameters) }) : "";
  byId("model").textContent = [info.model, size].filter(Boolean).join(" · ");
}

let frame = 0;

/** Draws the growing answer before the next frame, however many pieces of it come until then. */
function drawSoon() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    if (current.turns.length) view.drawTurn(current.turns.at(-1), { last: true, running: busy() });
  });
}

function show(conversation) {
  if (conversation !== current) {
    const place = conversation.turns.length ? `#${conversation.id}` : location.pathname + location.search;
    history.pushState(null, "", place);
  }
  select(conversation);
  if (!closeDrawer() && matchMedia("(hover: hover)").matches) field.focus(); // would open a phone's keyboard
}

function select(conversation) {
  current = conversation;
  draw();
  view.goToEnd();
}

/** Shows the conversation that the address names, or a new one. */
function showPlace() {
  select(conversations.get(location.hash.slice(1)) ?? newConversation());
}

function drawSuggestions() {
  const buttons = suggestions().map((question) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = question;
    button.onclick = () => send(question);
    return button;
  });
  byId("suggestions").replaceChildren(...buttons);
}

// ---- the server's model

async function learn() {
  info = await information();
  known = true;
}

/** Waits until the server tells about its model, saying why it takes so long. */
async function connect() {
  let told = false;
  for (let wait = 1; !known; wait = Math.min(wait * 2, LONGEST_WAIT)) {
    try {
      await learn();
    } catch (refusal) {
      if (refusal.kind === "key" && (await unlock())) continue;
      if (refusal.kind === "key") return; // is asked for again with the first question
      view.notify(whyNot(refusal));
      told = true;
      await new Promise((resolve) => setTimeout(resolve, 1000 * Math.max(1, refusal.wait ?? wait)));
    }
  }
  if (told) view.notify("");
  draw();
}

function whyNot(refusal) {
  if (refusal.kind === "offline") return text("offline");
  return refusal.status === 503 ? text("loading") : refusal.message;
}

// ---- the composer

function submit() {
  if (!send(field.value.trim())) return;
  field.value = "";
  keepDraft("");
  view.fit(field);
}

/** Enter sends, Shift-Enter starts a new line; the Enter that ends an input method's word does neither. */
function isSend(event) {
  const composing = event.isComposing || event.keyCode === 229; // Safari ends composing before the key
  return event.key === "Enter" && !event.shiftKey && !composing;
}

document.addEventListener("keydown", (event) => {
  if (event.target.form && event.target.tagName === "TEXTAREA" && !event.target.closest("dialog") && isSend(event)) {
    event.preventDefault();
    event.target.form.requestSubmit();
  }
  if (event.key === "Escape" && !event.isComposing && !isAbove()) stopEditingOrAnswer();
});

/** Whether a dialog or a menu is open, which Esc closes. */
function isAbove() {
  return document.querySelector("dialog[open], :popover-open") !== null;
}

function stopEditingOrAnswer() {
  if (!view.stopEditing() && !closeDrawer()) stop();
}

document.addEventListener("input", ({ target }) => {
  if (target.tagName === "TEXTAREA") view.fit(target);
  if (target === field) keepDraft(field.value);
});

byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
onClick("stop", stop);
onClick("to-end", view.goToEnd);
for (const id of ["new", "new-too"]) onClick(id, () => show(newConversation()));

// ---- the buttons of a turn

const ACTIONS = {
  copy: (turn, button) => copyWith(button, chosen(turn).answer),
  again: (turn) => sendAgain(chosen(turn).question),
  edit: (turn, button) => view.startEditing(button.closest(".turn"), sendAgain),
  cancel: () => view.stopEditing(),
  previous: (turn) => choose(turn, turn.chosen - 1),
  next: (turn) => choose(turn, turn.chosen + 1),
};

byId("turns").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (button?.className === "copy-code") copyWith(button, button.closest(".code").querySelector("code").textContent);
  else if (button?.dataset.action) ACTIONS[button.dataset.action](button.closest(".turn").turn, button);
});

function choose(turn, number) {
  turn.chosen = number;
  store.keep(current);
  draw();
}

async function copyWith(button, content) {
  await copy(content);
  const done = (yes) => {
    const icon = button.querySelector("use");
    if (icon) icon.setAttribute("href", yes ? "#i-done" : "#i-copy");
    else translated(button, yes ? "copied" : "copy");
  };
  done(true);
  view.announce(text("copied"));
  setTimeout(done, COPIED, false);
}

// ---- conversations as a whole

onClick("rename", async () => {
  const title = await askTitle(current.title);
  if (title === null) return;
  rename(current, title);
  store.keep(current);
  draw();
});
onClick("delete", async () => {
  const doomed = current;
  if (!(await confirmed(text("deleteQuestion", { title: doomed.title })))) return;
  remove(doomed);
  history.replaceState(null, "", location.pathname + location.search);
  select(newConversation());
});
onClick("export-markdown", () => download(current.title, "md", "text/markdown", toMarkdown(current)));
onClick("export-json", () => download(current.title, "json", "application/json", toFile([current])));
for (const button of byId("more").children) button.addEventListener("click", () => byId("more").hidePopover());

onClick("export-all", () => download("chatglm", "json", "application/json", toFile([...conversations.values()])));
onClick("import", () => byId("file").click());
onClick("delete-all", async () => {
  if (!(await confirmed(text("deleteAllQuestion", { count: conversations.size })))) return;
  for (const conversation of [...conversations.values()]) remove(conversation);
  byId("settings").close();
  show(newConversation());
});

function remove(conversation) {
  running.get(conversation.id)?.abort();
  conversations.delete(conversation.id);
  store.remove(conversation.id);
}

byId("file").addEventListener("change", async ({ target }) => {
  const [file] = target.files;
  target.value = ""; // the same file may be chosen again
  byId("settings").close();
  try {
    if (file.size > LARGEST_FILE) throw new Error("too large");
    view.notifyBriefly(text("imported", { count: take(fromFile(await file.text())) }));
  } catch {
    view.notify(text("importFailed"));
  }
});

/** Takes conversations in, except those that are here already; returns how many. */
function take(found) {
  const fresh = found.filter((one) => JSON.stringify(sound(conversations.get(one.id))) !== JSON.stringify(one));
  for (const conversation of fresh) {
    if (conversations.has(conversation.id)) conversation.id = newId(); // another version: both stay
    conversations.set(conversation.id, conversation);
    store.keep(conversation);
  }
  if (fresh.length) show(fresh[0]);
  return fresh.length;
}

// ---- settings, language, colours

onClick("open-settings", () => openSettings(info));

function speak(language) {
  useLanguage(language);
  drawSuggestions();
  drawTheme();
  draw();
}

onClick("language", () => {
  prefer("language", currentLanguage() === "en" ? "zh" : "en");
  speak(currentLanguage() === "en" ? "zh" : "en");
});

const THEMES = { auto: "light", light: "dark", dark: "auto" }; // what follows what
const THEME_LABELS = { auto: "themeAuto", light: "themeLight", dark: "themeDark" };

function drawTheme() {
  const theme = preference("theme") ?? "auto";
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  labelled(byId("theme"), THEME_LABELS[theme]).querySelector("use").setAttribute("href", `#i-${theme}`);
}

onClick("theme", () => {
  prefer("theme", THEMES[preference("theme") ?? "auto"]);
  drawTheme();
});

// ---- start

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault(); // the address names the conversation
  field.focus();
});
byId("notice").querySelector("button").addEventListener("click", () => view.notify(""));
window.addEventListener("popstate", showPlace);
window.addEventListener("pagehide", () => store.flush());
document.addEventListener("visibilitychange", () => document.hidden && store.flush());

/** Takes over what another tab wrote or deleted. */
async function refresh(id) {
  if (running.has(id)) return; // this page knows better
  const conversation = await store.one(id);
  clearTimeout(elsewhere.get(id));
  elsewhere.delete(id);
  if (conversation && chosen(conversation.turns.at(-1)).state === "running") {
    elsewhere.set(id, setTimeout(() => elsewhere.delete(id) && draw(), SILENCE));
  }
  if (conversation) conversations.set(id, conversation);
  else conversations.delete(id);
  if (id === current.id) current = conversation ?? newConversation();
  draw();
}

async function start() {
  store = await openStore();
  store.onFailure = () => view.notify(text("storageFull"));
  store.onOtherTab(refresh);
  const { conversations: kept, damaged } = await store.all();
  for (const conversation of kept) conversations.set(conversation.id, conversation);
  speak(preference("language") ?? preferredLanguage());
  if (!store.lasting) view.notify(text("notKept"));
  if (damaged) view.notify(text("partlyUnreadable", { count: damaged }));
  field.value = draft();
  view.fit(field);
  showPlace();
  if (matchMedia("(hover: hover)").matches) field.focus();
  await connect();
}

start();
