// Small helpers over the DOM. Text enters the page through text nodes only; nothing here takes markup.

export const $ = (id) => document.getElementById(id);

/** An element: el("p", { class: "hint", onclick: f }, "text", child, null). */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else if (name === "hidden" || name === "checked" || name === "disabled" || name === "tabIndex") node[name] = value;
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Say something to a screen reader; errors interrupt it. */
export function announce(text, error = false) {
  $(error ? "announce-error" : "announce").textContent = text;
}

/** One line that stays until it is dismissed; "" removes it. */
export function alertLine(text) {
  $("alert").hidden = !text;
  $("alert-text").textContent = text;
  if (text) announce(text, true);
}

/** Offer a text as a file. */
export function download(name, type, content) {
  const url = URL.createObjectURL(new Blob([content], { type }));
  const link = el("a", { href: url, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** A button that copies what read() gives, hidden where the browser does not copy (plain http). */
export function copier(read, said, name = "copy") {
  const copy = () => navigator.clipboard.writeText(read()).then(
    () => announce(said), (e) => alertLine(`The browser does not copy: ${e.message}`),
  );
  return el("button", { type: "button", class: `quiet ${name}`, hidden: !navigator.clipboard, onclick: copy }, "Copy");
}
