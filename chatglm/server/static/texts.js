// Every word of the page, in English and Chinese, and how elements get theirs.

const EN = {
  answer: "Answer",
  answering: "Answering",
  askHint: "Ask something",
  busy: "The server has no room at the moment; try again {when}.",
  cancel: "Cancel",
  chooseLanguage: "中文",
  close: "Close",
  copied: "Copied",
  copy: "Copy",
  conversations: "Conversations",
  defaultLength: "as fits",
  defaultSeed: "random",
  delete: "Delete",
  deleteAll: "Delete all conversations",
  deleteAllQuestion: "Delete all {count} conversations? This cannot be undone.",
  deleteQuestion: "Delete “{title}”? This cannot be undone.",
  edit: "Edit the question",
  empty: "The answer is empty.",
  exportAll: "Export all",
  exportJson: "Export as JSON",
  exportMarkdown: "Export as Markdown",
  fewerRounds: "The conversation is longer than the model's context; rounds left out at its beginning: {count}.",
  import: "Import",
  imported: "Conversations imported: {count}.",
  importFailed: "This file holds no conversations that can be read.",
  key: "API key",
  keyHint: "This server asks for a key. It is kept until the tab is closed.",
  later: "in {count} seconds",
  length: "The answer reached its length limit.",
  loading: "The model is being loaded …",
  lost: "The connection broke off; what had come is kept.",
  maxTokens: "Longest answer, in tokens",
  menu: "Conversations",
  model: "Model",
  modelContext: "Context",
  modelDevice: "Computed on",
  modelFamily: "Family",
  modelMemory: "Memory",
  modelParameters: "Parameters",
  modelVersion: "Version",
  more: "This conversation",
  next: "Next version",
  newConversation: "New conversation",
  notKept: "This browser lets the page store nothing: export what you want to keep.",
  offline: "The server cannot be reached.",
  parameters: "{count} parameters",
  partlyUnreadable: "Stored conversations that are damaged and not shown: {count}.",
  previous: "Previous version",
  question: "Question",
  regenerate: "Answer again",
  rename: "Rename",
  reset: "Back to the defaults",
  retry: "Try again",
  save: "Save",
  scrollDown: "To the end",
  seed: "Seed",
  send: "Send",
  settings: "Settings",
  skip: "To the question",
  soon: "soon",
  speed: "{count} tokens/s",
  stop: "Stop",
  stopped: "Stopped.",
  storageFull: "The browser's storage is full: delete or export conversations, or new answers will not be kept.",
  suggestions: ["Hello", "What is the capital of France?", "I can't sleep", "Write a for loop in Python"],
  system: "System prompt",
  temperature: "Temperature",
  themeAuto: "Colours: as the system",
  themeDark: "Colours: dark",
  themeLight: "Colours: light",
  title: "Title",
  tokens: "{count} tokens",
  topP: "Top-p",
  unexpected: "The server answered {status}.",
  versions: "{number} / {count}",
  warning: "Language models make mistakes. Check what matters.",
  welcome: "What would you like to talk about?",
};

const ZH = {
  answer: "回答",
  answering: "正在回答",
  askHint: "输入问题",
  busy: "服务器暂时没有空位，请{when}重试。",
  cancel: "取消",
  chooseLanguage: "English",
  close: "关闭",
  copied: "已复制",
  copy: "复制",
  conversations: "对话",
  defaultLength: "不限",
  defaultSeed: "随机",
  delete: "删除",
  deleteAll: "删除全部对话",
  deleteAllQuestion: "删除全部 {count} 个对话？此操作无法撤销。",
  deleteQuestion: "删除“{title}”？此操作无法撤销。",
  edit: "修改问题",
  empty: "回答为空。",
  exportAll: "全部导出",
  exportJson: "导出为 JSON",
  exportMarkdown: "导出为 Markdown",
  fewerRounds: "对话已超出模型的上下文，最早的 {count} 轮没有发送。",
  import: "导入",
  imported: "已导入 {count} 个对话。",
  importFailed: "这个文件里没有可以读取的对话。",
  key: "API 密钥",
  keyHint: "此服务器需要密钥。密钥只保留到标签页关闭为止。",
  later: " {count} 秒后",
  length: "回答达到了长度上限。",
  loading: "正在加载模型……",
  lost: "连接中断，已收到的内容已保留。",
  maxTokens: "回答的最大长度（token 数）",
  menu: "对话列表",
  model: "模型",
  modelContext: "上下文",
  modelDevice: "运行设备",
  modelFamily: "系列",
  modelMemory: "内存",
  modelParameters: "参数量",
  modelVersion: "版本",
  more: "当前对话",
  next: "下一版",
  newConversation: "新对话",
  notKept: "此浏览器不允许网页保存数据，请导出需要保留的对话。",
  offline: "无法连接服务器。",
  parameters: "{count}参数",
  partlyUnreadable: "有 {count} 个已保存的对话损坏，未显示。",
  previous: "上一版",
  question: "问题",
  regenerate: "重新回答",
  rename: "重命名",
  reset: "恢复默认",
  retry: "重试",
  save: "保存",
  scrollDown: "到末尾",
  seed: "随机种子",
  send: "发送",
  settings: "设置",
  skip: "跳到输入框",
  soon: "稍后",
  speed: "{count} token/秒",
  stop: "停止",
  stopped: "已停止。",
  storageFull: "浏览器存储空间已满：请删除或导出一些对话，否则新的回答无法保留。",
  suggestions: ["你好", "法国的首都是哪里？", "晚上睡不着应该怎么办", "用 Python 写一个循环"],
  system: "系统提示词",
  temperature: "温度",
  themeAuto: "颜色：跟随系统",
  themeDark: "颜色：深色",
  themeLight: "颜色：浅色",
  title: "标题",
  tokens: "{count} 个 token",
  topP: "Top-p",
  unexpected: "服务器返回了 {status}。",
  versions: "{number} / {count}",
  warning: "语言模型会出错，重要内容请核实。",
  welcome: "想聊点什么？",
};

const LANGUAGES = { en: EN, zh: ZH };
let language = "en";

/** "zh" where the browser prefers Chinese to English, else "en". */
export function preferredLanguage() {
  const preferred = navigator.languages.map((tag) => tag.slice(0, 2)).find((tag) => tag in LANGUAGES);
  return preferred ?? "en";
}

export function currentLanguage() {
  return language;
}

/** Switches the whole page. */
export function useLanguage(name) {
  language = name in LANGUAGES ? name : "en";
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  translate(document);
}

/** Fills in the texts that `root` asks for; the page's templates are copied without. */
export function translate(root) {
  for (const element of root.querySelectorAll("[data-text], [data-label], [data-hint]")) fill(element);
}

/** The text `key`, with {names} replaced by `values`. */
export function text(key, values = {}) {
  return LANGUAGES[language][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Questions to begin with. */
export function suggestions() {
  return LANGUAGES[language].suggestions;
}

/** Gives `element` the text `key` as its content, now and after the language was switched. */
export function translated(element, key) {
  element.dataset.text = key;
  fill(element);
  return element;
}

/** The same for what has no visible text: its name for screen readers, and a tooltip. */
export function labelled(element, key) {
  element.dataset.label = key;
  fill(element);
  return element;
}

function fill(element) {
  const { text: content, label, hint } = element.dataset;
  if (content) element.textContent = text(content);
  if (hint) element.placeholder = text(hint);
  if (label) {
    element.setAttribute("aria-label", text(label));
    if (element.tagName === "BUTTON") element.title = text(label);
  }
}

export function number(value, options = {}) {
  return new Intl.NumberFormat(document.documentElement.lang, options).format(value);
}

/** 3200000 -> "3.2M", "320万" */
export function roundNumber(value) {
  return number(value, { notation: "compact", maximumSignificantDigits: 3 });
}

/** 6400000 -> "6.4 MB" */
export function size(bytes) {
  const units = ["byte", "kilobyte", "megabyte", "gigabyte", "terabyte"];
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), units.length - 1);
  return number(bytes / 1000 ** power, { style: "unit", unit: units[power], maximumSignificantDigits: 3 });
}
