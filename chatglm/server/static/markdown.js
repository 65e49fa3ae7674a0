// Markdown to DOM nodes: text nodes and elements from the fixed set below, so nothing a model writes can run.
//
// Blocks are found line by line and know the lines they came from: while an answer grows, only the blocks that
// changed are made anew. Every pass is linear in the length of the text, and nesting is bounded.

import { translated } from "./texts.js";

const DEEPEST_BLOCK = 8;
const DEEPEST_MARK = 16;

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?=[ \t]|$)/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])(?=[ \t]|$)/;
const FIRST_ITEM = /^ {0,3}([-*+]|1[.)])[ \t]+\S/; // the only items that may follow a paragraph's line
const RULE = /^(\*{3,}|-{3,}|_{3,})$/;

const shown = new WeakMap(); // container -> the blocks it shows, each with its element

/** Makes `container` show `text`. Called again with a longer text, it leaves alone what has not changed. */
export function render(text, container) {
  const before = shown.get(container) ?? [];
  const blocks = split(text);
  blocks.forEach((block, index) => place(block, before[index], container));
  for (const block of before.slice(blocks.length)) block.element.remove();
  shown.set(container, blocks);
}

function place(block, before, container) {
  if (before?.source === block.source) block.element = before.element;
  else if (before?.type === "code" && block.type === "code" && before.language === block.language) {
    block.element = before.element;
    grow(block.element.querySelector("code").firstChild, block.text);
  } else {
    block.element = build(block, 0);
    if (before) before.element.replaceWith(block.element);
    else container.append(block.element);
  }
}

function grow(node, text) {
  if (text.startsWith(node.data)) node.appendData(text.slice(node.data.length)); // keeps what is selected
  else node.data = text;
}

// ---- blocks

/** The blocks of `text` from top to bottom: { type, source, ... }; what is inside them is split when built. */
function split(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (blank(lines[at])) {
      at += 1;
      continue;
    }
    const block = (READERS.find(({ starts }) => starts(lines, at)) ?? PARAGRAPH).read(lines, at);
    block.source = lines.slice(at, block.end).join("\n");
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

const PARAGRAPH = {
  read(lines, at) {
    let end = at + 1;
    while (end < lines.length && !blank(lines[end]) && !interrupts(lines, end)) end += 1;
    return { type: "paragraph", end, text: lines.slice(at, end).join("\n") };
  },
};

const READERS = [
  {
    starts: (lines, at) => FENCE.test(lines[at]),
    read(lines, at) {
      const [, fence, info] = FENCE.exec(lines[at]);
      const indent = indentOf(lines[at]);
      let end = at + 1;
      while (end < lines.length && !closes(lines[end], fence)) end += 1;
      const text = lines.slice(at + 1, end).map((line) => dedent(line, indent)).join("\n");
      // The last fence may not have come yet; what there is of the code is shown as code already.
      return { type: "code", end: Math.min(end + 1, lines.length), language: info.trim().split(/\s/)[0], text };
    },
  },
  {
    starts: (lines, at) => HEADING.test(lines[at]),
    read(lines, at) {
      const [start, marks] = HEADING.exec(lines[at]);
      return { type: "heading", end: at + 1, level: marks.length, text: lines[at].slice(start.length).trim() };
    },
  },
  {
    starts: (lines, at) => RULE.test(lines[at].replace(/[ \t]/g, "")),
    read: (lines, at) => ({ type: "rule", end: at + 1 }),
  },
  {
    starts: (lines, at) => QUOTE.test(lines[at]),
    read(lines, at) {
      let end = at;
      while (end < lines.length && QUOTE.test(lines[end])) end += 1;
      return { type: "quote", end, text: lines.slice(at, end).map((line) => line.replace(QUOTE, "")).join("\n") };
    },
  },
  { starts: (lines, at) => ITEM.test(lines[at]), read: readList },
  { starts: isTable, read: readTable },
];

function interrupts(lines, at) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || QUOTE.test(line) || FIRST_ITEM.test(line)) return true;
  return RULE.test(line.replace(/[ \t]/g, "")) || isTable(lines, at);
}

function closes(line, fence) {
  const marks = line.trim();
  return marks.length >= fence.length && [...marks].every((mark) => mark === fence[0]);
}

/** A list goes on over items of its kind, over lines that are set in, and over blank lines between those. */
function readList(lines, at) {
  const [, indent, marker] = ITEM.exec(lines[at]);
  const base = indent.length;
  const items = [];
  let loose = false;
  let end = at;
  for (let next = at; next < lines.length; next += 1) {
    const line = lines[next];
    if (blank(line)) continue;
    const gap = next > end;
    const own = indentOf(line) < base + 2;
    const item = own ? ITEM.exec(line) : null;
    if (item && kind(item[2]) === kind(marker) && !RULE.test(line.replace(/[ \t]/g, ""))) {
      items.push({ offset: item[0].length + 1, lines: [line.slice(item[0].length).trim()] });
    } else if (own && (gap || item || interrupts(lines, next))) break;
    else {
      const { offset, lines: inside } = items.at(-1);
      for (let skipped = end; skipped < next; skipped += 1) inside.push("");
      inside.push(dedent(line, offset));
    }
    loose ||= gap;
    end = next + 1;
  }
  const start = /\d/.test(marker) ? Number.parseInt(marker, 10) : null;
  return { type: "list", end, start, loose, items: items.map((item) => item.lines.join("\n")) };
}

function kind(marker) {
  return /\d/.test(marker) ? "number" : "bullet";
}

function isTable(lines, at) {
  const ruler = lines[at + 1];
  if (ruler === undefined || !lines[at].includes("|") || !/^[ \t|:-]+$/.test(ruler)) return false;
  const cells = row(ruler);
  return cells.every((cell) => /^:?-+:?$/.test(cell)) && cells.length === row(lines[at]).length;
}

function readTable(lines, at) {
  let end = at + 2;
  while (end < lines.length && lines[end].includes("|") && !blank(lines[end])) end += 1;
  const align = row(lines[at + 1]).map((cell) => {
    if (!cell.endsWith(":")) return "start";
    return cell.startsWith(":") ? "center" : "end";
  });
  // Cells beyond the head's are dropped and missing ones not made, so that no text makes a larger table.
  const body = lines.slice(at + 2, end).map((line) => row(line).slice(0, align.length));
  return { type: "table", end, align, head: row(lines[at]), body };
}

/** "| a | b\|c |" -> ["a", "b|c"] */
function row(line) {
  const cells = line.trim().replace(/\\\|/g, "\0").split("|");
  if (cells[0] === "") cells.shift();
  if (cells.at(-1) === "") cells.pop();
  return cells.map((cell) => cell.replaceAll("\0", "|").trim());
}

function blank(line) {
  return line.trim() === "";
}

const WIDTHS = { " ": 1, "\t": 4 };

function indentOf(line) {
  let width = 0;
  for (let at = 0; line[at] in WIDTHS; at += 1) width += WIDTHS[line[at]];
  return width;
}

function dedent(line, width) {
  let at = 0;
  for (let removed = 0; removed < width && line[at] in WIDTHS; at += 1) removed += WIDTHS[line[at]];
  return line.slice(at);
}

// ---- blocks to elements

function build(block, depth) {
  return BUILDERS[block.type](block, depth);
}

const BUILDERS = {
  // Inside of an item or a quote it would keep the text from deciding their direction.
  paragraph: ({ text }, depth) => inline(text.trimEnd(), depth ? element("p") : directed("p")),
  heading: ({ level, text }) => inline(text.replace(/(^|[ \t])#+$/, ""), directed(`h${Math.min(level + 2, 6)}`)),
  rule: () => element("hr"),
  quote: ({ text }, depth) => inner(text, directed("blockquote"), depth, true),
  list({ start, loose, items }, depth) {
    const list = element(start === null ? "ul" : "ol");
    if (start > 1) list.start = start;
    for (const item of items) list.append(inner(item, directed("li"), depth, loose));
    return list;
  },
  code({ language, text }) {
    const copy = translated(element("button", "copy-code"), "copy");
    copy.type = "button";
    const head = element("div", "code-head", [element("span", "", [language]), copy]);
    const pre = element("pre", "", [element("code", "", [document.createTextNode(text)])]);
    pre.tabIndex = 0; // wide code is scrolled by keyboard too
    const box = element("div", "code", [head, pre]);
    box.dir = "ltr";
    return box;
  },
  table({ align, head, body }) {
    const tableRow = (cells, name) =>
      element("tr", "", cells.map((cell, index) => inline(cell, directed(name, `align-${align[index]}`))));
    const thead = element("thead", "", [tableRow(head, "th")]);
    const tbody = element("tbody", "", body.map((cells) => tableRow(cells, "td")));
    const scroller = element("div", "table", [element("table", "", [thead, tbody])]);
    scroller.tabIndex = 0;
    return scroller;
  },
};

function inner(text, parent, depth, loose) {
  const blocks = depth < DEEPEST_BLOCK ? split(text) : [{ type: "paragraph", text }];
  for (const block of blocks) {
    if (block.type === "paragraph" && !loose) inline(block.text.trimEnd(), parent);
    else parent.append(build(block, depth + 1));
  }
  return parent;
}

function element(name, className = "", children = []) {
  const made = document.createElement(name);
  if (className) made.className = className;
  for (const child of children) made.append(child);
  return made;
}

/** An element that reads from right to left where its text does. */
function directed(name, className = "") {
  const made = element(name, className);
  made.dir = "auto";
  return made;
}

// ---- what stands in a line

const SPECIAL = /[\\`*_~[<]|!\[|https?:\/\//g;
const PUNCTUATION = /[!-/:-@[-`{-~]/;
const WORD = /[\p{L}\p{N}]/u;
const TARGET = /\(\s*(?:<([^<>\n]*)>|([^\s()<>]*(?:\([^\s()]*\)[^\s()<>]*)*))(?:\s+"[^"]*"|\s+'[^']*')?\s*\)/y;
const IN_ANGLES = /<((?:https?:\/\/|mailto:)[^\s<>]+)>/y;
const LINE_BREAK = /<br ?\/?>/iy;
const BARE_URL = /https?:\/\/[\w\-.~:/?#[\]@!$&'()*+,;=%|]+/y;

/** Appends `text` to `parent`, its emphasis, code and links as elements. Returns `parent`. */
function inline(text, parent, links = true) {
  return assemble(pieces(text, links), parent);
}

/** Cuts `text` into strings, elements and runs of emphasis marks: { mark, left, opens, closes }. */
function pieces(text, links) {
  const { codes, partners } = survey(text);
  const found = [];
  const open = { "*": [], _: [], "~": [] };
  let at = 0; // everything before it is in `found`
  const add = (piece, start, end) => {
    if (start > at) found.push(text.slice(at, start));
    found.push(piece);
    at = end;
  };
  for (const { 0: special, index } of text.matchAll(SPECIAL)) {
    if (index < at) continue; // part of what was read before
    const piece = read(text, special, index, { codes, partners, links });
    if (piece) add(piece.content ?? piece, index, piece.end);
    if (piece?.mark) pair(piece, open, found.length - 1);
  }
  if (at < text.length) found.push(text.slice(at));
  return found;
}

/** Where code spans end, and which bracket closes which, ignoring escaped ones and those in code. */
function survey(text) {
  const runs = new Map(); // length of a run of backticks -> where such runs start, the nearest last
  for (const { 0: run, index } of text.matchAll(/`+/g)) {
    if (!runs.has(run.length)) runs.set(run.length, []);
    runs.get(run.length).push(index);
  }
  for (const starts of runs.values()) starts.reverse();
  const codes = new Map();
  const partners = new Map();
  const brackets = [];
  let inCode = 0; // up to here
  for (const { 0: mark, index } of text.matchAll(/\\[^]|`+|[[\]]/g)) {
    if (index < inCode) continue;
    if (mark === "[") brackets.push(index);
    else if (mark === "]" && brackets.length) partners.set(brackets.pop(), index);
    else if (mark[0] === "`") {
      const starts = runs.get(mark.length) ?? [];
      while (starts.length && starts.at(-1) <= index) starts.pop();
      if (starts.length) {
        codes.set(index, starts.at(-1));
        inCode = starts.at(-1) + mark.length;
      }
    }
  }
  return { codes, partners };
}

/** What begins with `special` at `start`: { content, end }, a run of marks, or null for plain text. */
function read(text, special, start, { codes, partners, links }) {
  switch (special[0]) {
    case "\\": {
      const escaped = text[start + 1];
      return escaped && PUNCTUATION.test(escaped) ? { content: escaped, end: start + 2 } : null;
    }
    case "`":
      return code(text, start, codes);
    case "<":
      return inAngles(text, start, links);
    case "h":
      return links ? bareUrl(text, start) : null;
    case "[":
      return links ? link(text, start, partners) : null;
    case "!":
      return links ? link(text, start + 1, partners) : null; // an image is a link: nothing is fetched
    default:
      return run(text, start);
  }
}

function code(text, start, codes) {
  const length = runLength(text, start);
  const end = codes.get(start);
  if (end === undefined) return { content: text.slice(start, start + length), end: start + length };
  const content = text.slice(start + length, end).replaceAll("\n", " ");
  const padded = content.startsWith(" ") && content.endsWith(" ") && content.trim();
  const made = element("code", "", [padded ? content.slice(1, -1) : content]);
  made.dir = "ltr";
  return { content: made, end: end + length };
}

function link(text, start, partners) {
  const close = partners.get(start);
  if (close === undefined || text[close + 1] !== "(") return null;
  const target = matchAt(TARGET, text, close + 1);
  if (!target) return null;
  const address = (target[1] ?? target[2]).replace(/\\([!-/:-@[-`{-~])/g, "$1");
  const made = anchor(address);
  if (!made) return null;
  const label = text.slice(start + 1, close).trim();
  inline(label || address, made, false);
  return { content: made, end: close + 1 + target[0].length };
}

function inAngles(text, start, links) {
  const lineBreak = matchAt(LINE_BREAK, text, start);
  if (lineBreak) return { content: element("br"), end: start + lineBreak[0].length };
  const url = links && matchAt(IN_ANGLES, text, start);
  const made = url && anchor(url[1], url[1]);
  return made ? { content: made, end: start + url[0].length } : null;
}

function bareUrl(text, start) {
  if (start > 0 && WORD.test(text[start - 1]) && text.charCodeAt(start - 1) < 128) return null;
  const url = withoutTail(matchAt(BARE_URL, text, start)?.[0] ?? "");
  return url ? { content: anchor(url, url) ?? url, end: start + url.length } : null;
}

/** Drops what belongs to the sentence around an address: full stops, and brackets opened before it. */
function withoutTail(url) {
  const count = { "(": 0, ")": 0, "[": 0, "]": 0 };
  for (const character of url) if (character in count) count[character] += 1;
  let end = url.length;
  for (; end > 0; end -= 1) {
    const last = url[end - 1];
    if (last === ")" && count[")"] > count["("]) count[")"] -= 1;
    else if (last === "]" && count["]"] > count["["]) count["]"] -= 1;
    else if (!"*_~.,;:!?'|".includes(last)) break;
  }
  return url.slice(0, end);
}

/** An <a> to another site or a mail address; null for every other address, such as javascript: or file:. */
function anchor(address, label = "") {
  const url = parseUrl(address);
  if (!["http:", "https:", "mailto:"].includes(url?.protocol)) return null;
  const made = element("a", "", [label]);
  made.href = url.href;
  made.title = url.href;
  made.target = "_blank";
  made.rel = "noopener noreferrer";
  return made;
}

function parseUrl(address) {
  try {
    return new URL(address);
  } catch {
    return null;
  }
}

// ---- emphasis

const TAGS = { "*1": "em", "*2": "strong", _1: "em", _2: "strong", "~2": "del" };

/** A run of * _ or ~. Chinese has no spaces between words, so * needs only a character to lean on. */
function run(text, start) {
  const mark = text[start];
  const length = runLength(text, start);
  const end = start + length;
  if (length > 3 || (mark === "~" && length !== 2)) return { content: text.slice(start, end), end };
  const [before, after] = [text[start - 1] ?? " ", text[end] ?? " "];
  const opens = !/\s/.test(after) && !(mark === "_" && WORD.test(before));
  const closes = !/\s/.test(before) && !(mark === "_" && WORD.test(after));
  return { mark, length, left: length, end, canOpen: opens, canClose: closes, opens: [], closes: 0 };
}

/** Closes what the run closes, and remembers it if it may open something. `open`: such runs, by mark. */
function pair(piece, open, index) {
  const stack = open[piece.mark];
  while (piece.canClose && piece.left && stack.length) {
    const opener = stack.at(-1);
    if (!matches(opener.piece, piece)) break;
    const size = Math.min(2, opener.piece.left, piece.left);
    opener.piece.left -= size;
    opener.piece.opens.push(TAGS[piece.mark + size]);
    piece.left -= size;
    piece.closes += 1;
    // Marks inside that were never closed are plain text from now on: elements do not overlap.
    for (const other of Object.values(open)) while (other.length && other.at(-1).index > opener.index) other.pop();
    if (!opener.piece.left) stack.pop();
  }
  if (piece.canOpen && piece.left) stack.push({ piece, index });
}

/** CommonMark's rule 9: in *a**b* the two in the middle close nothing. */
function matches(opener, closer) {
  const both = (piece) => piece.canOpen && piece.canClose;
  if (!both(opener) && !both(closer)) return true;
  return (opener.length + closer.length) % 3 !== 0 || opener.length % 3 === 0;
}

function assemble(found, parent) {
  const parents = [parent];
  for (const piece of found) {
    if (!piece.mark) {
      parents.at(-1).append(piece);
      continue;
    }
    parents.splice(parents.length - piece.closes);
    parents.at(-1).append(piece.mark.repeat(piece.left));
    for (const name of piece.opens.reverse()) {
      const made = parents.length < DEEPEST_MARK ? element(name) : parents.at(-1);
      if (made !== parents.at(-1)) parents.at(-1).append(made);
      parents.push(made);
    }
  }
  return parent;
}

function runLength(text, start) {
  let end = start + 1;
  while (text[end] === text[start]) end += 1;
  return end - start;
}

function matchAt(pattern, text, position) {
  pattern.lastIndex = position;
  return pattern.exec(text);
}
