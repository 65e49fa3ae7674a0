// What leaves the page: files and the clipboard.

/** Saves `content` as a file named after `title`. */
export function download(title, extension, type, content) {
  const name = title.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "").slice(0, 60) || "chatglm";
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = `${name}.${extension}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000); // the browser may still be reading
}

/** Copies to the clipboard; plain http, as on a phone in the same network, has only the old way. */
export async function copy(content) {
  if (navigator.clipboard) return navigator.clipboard.writeText(content);
  const field = document.createElement("textarea");
  field.value = content;
  field.className = "unseen";
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
