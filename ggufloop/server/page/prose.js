// An answer as it is meant to be read: Markdown as elements, and in it the words that the other answer has not.
//
// What a model writes is hostile. Markup in it is shown as text; of what the Markdown becomes, a list of tags and
// attributes is let through (DOMPurify); no picture is loaded; a link leads to the web and opens elsewhere.

import { Marked } from "./marked.esm.js";
import DOMPurify from "./purify.es.js";
import { copier, el } from "./dom.js";

const TAGS = [
  "p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em", "strong",
  "del", "a", "table", "thead", "tbody", "tr", "th", "td",
];
const ATTRIBUTES = ["href", "title", "class", "start", "align"];
const RULES = {
  ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ADD_URI_SAFE_ATTR: ["start", "align"],
  ALLOWED_URI_REGEXP: /^(https?|mailto):/i,
  ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_DOM_FRAGMENT: true,
};
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escape = (text) => text.replace(/[&<>"]/g, (sign) => ESCAPES[sign]);

const markdown = new Marked({
  gfm: true,
  breaks: true, // a line of a chat is a line
  renderer: {
    html: ({ text, block }) => (block ? `<p class="raw">${escape(text.trimEnd())}</p>` : escape(text)),
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "&#9745; " : "&#9744; "),
    br: () => "<br>\n", // two lines are two words to the comparison
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (!node.hasAttribute("href")) return;
  node.setAttribute("target", "_blank");
  node.setAttribute("rel", "noopener noreferrer nofollow");
});

const isShown = ({ type }) => type !== "space" && type !== "def";

/** The blocks of a text, as marked tells them apart; element() makes one. */
export function blocksOf(text) {
  const tokens = markdown.lexer(text).filter(isShown);
  return tokens.map((token) => ({ ...token, element: () => finished(render(token).element, []) }));
}

/**
 * Show texts in `box`, each instead of the one before. read(text) -> { text }: what of it is read, without its markup;
 * show(marks): put it there, marks being [{ text, differs }] over that, or null.
 *
 * Blocks that stay as they were (all but the last, while a text is written) are made once and left alone in the page.
 */
export function createProse(box) {
  let source = null;
  let blocks = []; // [{ key, element, text }]
  let shown = []; // of each child of the box, what it shows

  function read(text) {
    if (text !== source) {
      source = text;
      try {
        blocks = made(text);
      } catch { // a model that repeats itself writes "1. 1. 1. ...", a list too deep for the stack
        blocks = [{ key: text, text, element: el("p", { class: "raw" }, text) }];
      }
    }
    return { text: blocks.map((block) => block.text).join("\n") };
  }

  function made(text) {
    const tokens = markdown.lexer(text);
    const links = JSON.stringify(tokens.links); // they may stand anywhere
    const known = new Map(blocks.map((block) => [block.key, block]));
    return tokens.filter(isShown).map((token) => {
      const key = token.raw + links;
      return known.get(key) ?? { key, ...render(token) };
    });
  }

  function show(marks) {
    const ranges = rangesOf(marks ?? []);
    let at = 0;
    const wanted = blocks.map((block) => {
      const end = at + block.text.length;
      const mine = ranges.filter(([from, to]) => from < end && to > at).map(([from, to]) => [from - at, to - at]);
      at = end + 1;
      return { block, mine, key: `${block.key}\0${mine}` };
    });
    wanted.forEach(({ block, mine, key }, i) => {
      if (shown[i] === key) return;
      const element = finished(block.element, mine);
      if (i < box.children.length) box.children[i].replaceWith(element);
      else box.append(element);
    });
    while (box.children.length > wanted.length) box.lastElementChild.remove();
    shown = wanted.map(({ key }) => key);
  }

  return { read, show };
}

function render(token) {
  const fragment = DOMPurify.sanitize(markdown.parser([token]), RULES);
  const element = fragment.firstElementChild ?? el("p", {}, fragment.textContent);
  return { element, text: element.textContent.trimEnd() };
}

/** Marked runs as [from, to) of the whole text. */
function rangesOf(runs) {
  let at = 0;
  return runs.flatMap(({ text, differs }) => {
    at += text.length;
    return differs ? [[at - text.length, at]] : [];
  });
}

/** A copy of a block with marks over these ranges of its text, a button at its code, and room for its tables. */
function finished(block, ranges) {
  const element = block.cloneNode(true);
  const texts = [];
  const walker = document.createTreeWalker(element, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) texts.push(walker.currentNode);
  let at = 0;
  for (const node of texts) {
    const { data } = node;
    const inside = data.trim() ? ranges.filter(([from, to]) => from < at + data.length && to > at) : [];
    if (inside.length) node.replaceWith(...marked(data, inside.map(([from, to]) => [from - at, to - at])));
    at += data.length;
  }
  const out = el("div", {}, element);
  for (const pre of out.querySelectorAll("pre")) {
    const code = pre.textContent.replace(/\n$/, ""); // a shell would run what ends in a line end
    const [, language = ""] = /language-(\S+)/.exec(pre.firstElementChild?.className ?? "") ?? [];
    const head = el("div", { class: "code-head" }, el("span", {}, language), copier(() => code, "The code is copied."));
    const frame = el("div", { class: "code" }, head);
    pre.replaceWith(frame);
    frame.append(pre);
    pre.tabIndex = 0; // to be scrolled by keyboard
  }
  for (const table of out.querySelectorAll("table")) {
    const frame = el("div", { class: "sheet", tabIndex: 0, role: "region", "aria-label": "Table of the answer" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return out.firstElementChild;
}

function marked(text, ranges) {
  const out = [];
  let at = 0;
  for (const [from, to] of ranges) {
    const [begin, end] = [Math.max(from, 0), Math.min(to, text.length)];
    if (begin > at) out.push(text.slice(at, begin));
    for (const part of text.slice(begin, end).split(/(\s*\n\s*)/)) { // what indents a line of code is no word
      if (part) out.push(part.trim() ? el("mark", {}, part) : part);
    }
    at = end;
  }
  return at < text.length ? [...out, text.slice(at)] : out;
}
