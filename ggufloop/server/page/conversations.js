// The conversations kept in this browser: which one is open; the list to open, rename and delete them; files.

import { $, alertLine, announce, download, el } from "./dom.js";
import {
  CURRENT, currentId, forget, fromJson, idOf, lastConversation, listConversations, loadConversation, newConversation,
  rename, saveConversation, setCurrent, titleOf, toJson, toMarkdown,
} from "./store.js";

const SURE = 4000; // ms in which "Delete?" is asked once more

/**
 * Wire the panel up. onOpen(): another conversation is open; isBusy(): answers are being written to it; about(): what
 * an export says of the rest; onSystem(text): an import brings its system prompt.
 * -> { turns(), keep(), refresh() }: those of the open one, to be changed, and then to be kept, or only named.
 */
export function createConversations({ onOpen, isBusy, about, onSystem }) {
  let open = lastConversation();

  function keep() {
    if (!open.turns.length) return;
    open.updated = Date.now();
    store();
    setCurrent(open.id);
    if (isBusy() || $("talks").querySelector("form")) drawTitle();
    else draw();
  }

  function store() {
    if (!open.turns.length || saveConversation(open)) return;
    alertLine("The browser does not keep this conversation: its storage is full or forbidden.");
  }

  function show(conversation) {
    store();
    open = conversation;
    setCurrent(open.id);
    onOpen();
    draw();
  }

  function begin() {
    show(newConversation());
    announce("A new conversation.");
    $("prompt").focus();
  }

  // drawing

  function drawTitle() {
    $("talk-title").textContent = titleOf(open);
    for (const id of ["export-json", "export-md", "new"]) $(id).disabled = open.turns.length === 0;
  }

  function draw() {
    drawTitle();
    if (!$("talks-panel").open) return;
    const kept = listConversations();
    $("talks").replaceChildren(...kept.map(row));
    if (!kept.length) $("talks").append(el("li", { class: "hint" }, "None yet: it is kept from its first message on."));
  }

  function row(conversation) {
    const { id, turns, updated } = conversation;
    const name = titleOf(conversation);
    const opener = el("button", {
      type: "button", class: "talk", "aria-current": id === open.id ? "true" : null,
      onclick: () => id !== open.id && show(loadConversation(id) ?? newConversation()),
    }, name);
    const facts = el("span", { class: "talk-facts" },
      `${turns.length} ${turns.length === 1 ? "message" : "messages"}, ${when(updated)}`);
    const line = el("li", {}, opener, facts);
    line.append(
      el("button", { type: "button", class: "quiet", "aria-label": `Rename ${name}`, onclick: () => {
        line.replaceChildren(renamer(conversation, name));
        line.querySelector("input").select();
      } }, "Rename"),
      sure("Delete", name, () => remove(id)));
    return line;
  }

  function renamer({ id }, name) {
    const input = el("input", { type: "text", maxlength: 200, value: name, "aria-label": "Title" });
    const done = (title) => {
      if (title !== null && id === open.id) open.title = title;
      if (title !== null && !rename(id, title)) alertLine("The browser does not keep the title: its storage is full.");
      draw();
      announce(title === null ? "" : "Renamed.");
    };
    input.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // it would stop the answers
      done(null);
    });
    return el("form", { class: "rename", onsubmit: (event) => {
      event.preventDefault();
      done(input.value.trim());
    } }, input, el("button", { type: "submit" }, "Rename"),
    el("button", { type: "button", class: "quiet", onclick: () => done(null) }, "Cancel"));
  }

  function remove(id) {
    forget(id);
    announce("The conversation is deleted.");
    if (id !== open.id) {
      draw();
      return;
    }
    open = listConversations()[0] ?? newConversation();
    onOpen();
    draw();
  }

  $("talks-panel").addEventListener("toggle", draw);
  $("new").addEventListener("click", begin);

  // files

  $("import").addEventListener("click", () => $("import-file").click());
  $("import-file").addEventListener("change", async () => {
    const [file] = $("import-file").files;
    $("import-file").value = ""; // the same file again is a change then
    if (!file) return;
    try {
      const { conversation, system } = fromJson(await file.text());
      show(conversation);
      alertLine("");
      store();
      if (system) onSystem(system);
      announce(`${file.name} is imported${system ? ", its system prompt too" : ""}.`);
    } catch (e) {
      alertLine(`${file.name} cannot be imported: ${e.message}`);
    }
  });

  const day = () => new Date().toISOString().slice(0, 10);
  for (const [suffix, type, render] of [["json", "application/json", toJson], ["md", "text/markdown", toMarkdown]]) {
    $(`export-${suffix}`).addEventListener("click", () => (
      download(`conversation-${day()}.${suffix}`, type, render(open, about()))));
  }

  // Another tab of this browser: what it adds to this conversation is taken over, and where nothing is said here yet,
  // the conversation that is begun there.
  addEventListener("storage", ({ key }) => {
    const id = key === CURRENT ? currentId() : idOf(key);
    if (isBusy() || id === null) return;
    const wanted = id === open.id || (key === CURRENT && !open.turns.length);
    const found = wanted ? loadConversation(id) : null;
    if (found || (wanted && id === open.id && key !== CURRENT)) {
      open = found ?? newConversation();
      onOpen();
    }
    draw();
  });
  draw();
  return { turns: () => open.turns, keep, refresh: drawTitle };
}

/** A button that does what it says when it is pressed twice. */
function sure(label, name, act) {
  let asked = 0;
  const button = el("button", { type: "button", class: "quiet", "aria-label": `${label} ${name}`, onclick: () => {
    if (asked) {
      act();
      return;
    }
    button.textContent = `${label}?`;
    announce(`Press again to ${label.toLowerCase()} ${name}.`);
    asked = setTimeout(() => {
      asked = 0;
      button.textContent = label;
    }, SURE);
  } }, label);
  return button;
}

function when(time) {
  if (!time) return "before";
  const date = new Date(time);
  const today = new Date().toDateString() === date.toDateString();
  return today ? date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" })
    : date.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
}
