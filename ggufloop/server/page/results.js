// The second tab: what sweeps and comparisons left in the server's results folder.

import { $, announce, download, el } from "./dom.js";
import { getJson, request } from "./api.js";
import { csvView, jsonView, jsonlView, markdownView } from "./tables.js";

const NO_FOLDER = "Start the server with --results DIR to see the sweeps and comparisons in a folder here.";
const EMPTY = "Tables (.jsonl, .json, .csv, .md), figures (.png) and reports (.html) written to this folder appear "
  + "here.";
/** A report is a document of its own: its markup is wanted, its scripts do not run where it is put. */
const REPORTS = globalThis.trustedTypes?.createPolicy("report", { createHTML: (text) => text })
  ?? { createHTML: (text) => text };
const KINDS = ["html", "md", "csv", "jsonl", "json", "png"]; // in which order a folder is read
const LABELS = { jsonl: "table", json: "table", csv: "table", md: "text", png: "figure", html: "report" };

/** The address of a result; its folders stay folders, and a report is offered as text. */
function address(name) {
  const path = name.split("/").map(encodeURIComponent).join("/");
  return `results/${path}${/\.html$/i.test(name) ? ".txt" : ""}`;
}

/** Wire the tab up. onLocked(): the server wants a key. -> { show(name), refresh() } */
export function createResults({ onLocked }) {
  let results = [];
  let current = "";
  let pictures = []; // the object URLs in use
  let asked = 0;

  async function refresh() {
    $("files").setAttribute("aria-busy", "true");
    try {
      const listing = await getJson("results.json");
      results = listing.results;
      $("folder").textContent = listing.folder ?? "Results";
      drawList();
      if (!listing.folder) note("No results folder", NO_FOLDER);
      else if (!results.length) note("Nothing here yet", EMPTY);
      else if (!results.some(({ name }) => name === current)) {
        if (current) note("Gone", `${current} is not in the folder any more.`);
        else overview();
      }
    } catch (e) {
      if (e.status === 401) onLocked();
      note("The results cannot be listed", e.message, true);
    }
    $("files").removeAttribute("aria-busy");
  }

  function drawList() {
    $("files").replaceChildren(...grouped(results).flatMap(([group, files]) => [
      group ? el("li", { class: "group" }, el("h3", {}, group)) : null, ...files.map(entry),
    ]).filter(Boolean));
  }

  function entry({ name, kind, size, modified }) {
    const inside = inGroup(name);
    const cut = inside.lastIndexOf("/") + 1;
    const chosen = name === current ? "true" : null;
    return el("li", {}, el("a", { href: link(name), "aria-current": chosen },
      el("span", { class: "file-name" },
        cut ? el("span", { class: "file-folder" }, inside.slice(0, cut)) : null, inside.slice(cut)),
      el("span", { class: "file-facts" }, `${LABELS[kind]}, ${bytes(size)}, ${when(modified)}`)));
  }

  /** What has a verdict, each in a sentence, model by model. */
  function overview() {
    release();
    const told = grouped(results).map(([group, files]) => [group, files.filter((file) => file.headline)]);
    const studies = told.filter(([, files]) => files.length);
    if (!studies.length) {
      note("Choose a result", `${results.length} ${results.length === 1 ? "file" : "files"}, the newest first.`);
      return;
    }
    $("result").replaceChildren(el("div", { class: "content" }, ...studies.flatMap(([group, files]) => [
      el("h2", {}, group || "Results"),
      ...files.flatMap(({ name, headline, modified }) => {
        const isReport = (each) => each.kind === "html" && folderOf(each.name) === folderOf(name);
        const report = name.endsWith("study.jsonl") ? results.find(isReport) : null; // a sweep has none
        return [
          el("p", { class: "headline" }, headline),
          el("p", { class: "hint" }, ...(report ? [el("a", { href: link(report.name) }, "Report"), ", "] : []),
            el("a", { href: link(name) }, inGroup(name)), `, ${when(modified)}`),
        ];
      }),
    ])));
  }

  function note(title, text, error = false) {
    release();
    if (error) announce(text, true);
    const line = el("p", { class: error ? "error" : null }, text);
    $("result").replaceChildren(el("div", { class: "empty" }, el("h2", {}, title), line));
  }

  function release() {
    pictures.forEach((url) => URL.revokeObjectURL(url));
    pictures = [];
  }

  async function show(name) {
    current = name;
    drawList();
    const result = results.find((each) => each.name === name);
    if (!result) {
      if (name) note("Not there", `${name} is not in the folder.`, true);
      return;
    }
    const mine = ++asked;
    note(name, "Reading");
    let content;
    try {
      content = await view(result);
    } catch (e) {
      if (e.status === 401) onLocked();
      if (mine === asked) note(name, e.message, true);
      return;
    }
    if (mine !== asked) return; // another was chosen meanwhile
    $("result").replaceChildren(
      el("header", {}, el("h2", {}, name),
        el("button", { type: "button", class: "quiet", onclick: () => fetchFile(result) }, "Download")),
      el("div", { class: "content" }, ...verdict(results, result), ...content));
    $("result").scrollTop = 0;
    announce(`${name} is shown.`);
  }

  async function figure(name) {
    const url = URL.createObjectURL(await (await request(address(name), { cache: "no-store" })).blob());
    pictures.push(url);
    return el("img", { src: url, alt: `Figure ${name}` });
  }

  /** The figures beside a text that it shows, by their names. */
  async function figuresIn(text, folder) {
    const base = ({ name }) => name.slice(folder.length);
    const wanted = results.filter((each) => (
      each.kind === "png" && folderOf(each.name) === folder && text.includes(`](${base(each)})`)));
    return new Map(await Promise.all(wanted.map(async (each) => [base(each), await figure(each.name)])));
  }

  async function view({ name, kind }) {
    if (kind === "png") {
      release();
      return [await figure(name)];
    }
    const response = await request(address(name), { cache: "no-store" });
    if (kind === "html") { // somebody's page: it is looked at, its scripts do not run and it has no origin
      const frame = el("iframe", { class: "report", sandbox: "", title: name });
      frame.srcdoc = REPORTS.createHTML(await response.text());
      return [frame];
    }
    const text = await response.text();
    try {
      if (kind === "md") return markdownView(text, await figuresIn(text, folderOf(name)));
      return { jsonl: jsonlView, json: jsonView, csv: csvView }[kind](text);
    } catch (e) {
      const told = e instanceof SyntaxError ? "This file is not JSON." : e.message;
      const line = el("p", { class: "error" }, `${told} Here it is as it is written.`);
      return [line, el("pre", {}, text.slice(0, 200_000))];
    }
  }

  async function fetchFile({ name }) {
    try {
      download(name.split("/").pop(), "application/octet-stream", await (await request(address(name))).blob());
    } catch (e) {
      note(name, e.message, true);
    }
  }

  $("refresh").addEventListener("click", async () => {
    await refresh();
    if (results.some(({ name }) => name === current)) show(current);
  });

  return { refresh, show };
}

/** What the folder of a result comes to, before what is in the file; a report says it itself, and so does an answer. */
function verdict(files, { name, kind, headline }) {
  const here = folderOf(name) && kind !== "jsonl"
    ? files.filter((each) => each.headline && folderOf(each.name) === folderOf(name)) : [];
  const isOfStudy = /(^|\/)(table|across)\.\w+$/.test(name); // a sweep may lie in the same folder
  const beside = here.length === 1 ? here[0] : here.find((each) => isOfStudy && each.name.endsWith("study.jsonl"));
  const told = kind === "html" || (kind === "md" && headline) ? "" : headline || beside?.headline;
  return told ? [el("p", { class: "headline" }, told)] : [];
}

const folderOf = (name) => name.slice(0, name.lastIndexOf("/") + 1);

/** Whose a file is: `compare` and `sweep --out` give each model a folder. "" for one that lies beside those. */
const groupOf = (name) => (name.includes("/") ? name.slice(0, name.indexOf("/")) : "");

/** [[group, files]]: the group with the newest file first, the files of a folder together, in the order of KINDS. */
function grouped(files) {
  const groups = new Map();
  for (const file of files) groups.set(groupOf(file.name), [...(groups.get(groupOf(file.name)) ?? []), file]);
  const rank = ({ name, kind }) => [folderOf(name), KINDS.indexOf(kind)];
  for (const list of groups.values()) {
    list.sort((x, y) => {
      const [[a, i], [b, j]] = [rank(x), rank(y)];
      return a < b ? -1 : a > b ? 1 : i - j || y.modified - x.modified;
    });
  }
  return [...groups];
}

const inGroup = (name) => name.slice(groupOf(name).length).replace(/^\//, "");

const link = (name) => `#results/${encodeURIComponent(name)}`;

function bytes(n) {
  if (n < 1000) return `${n} B`;
  return n < 1e6 ? `${(n / 1e3).toFixed(n < 1e4 ? 1 : 0)} kB` : `${(n / 1e6).toFixed(1)} MB`;
}

function when(seconds) {
  const date = new Date(seconds * 1000);
  const day = date.toLocaleDateString("en-GB", { day: "numeric", month: "short", year: "numeric" });
  return `${day} ${date.toLocaleTimeString("en-GB", { hour: "2-digit", minute: "2-digit" })}`;
}
