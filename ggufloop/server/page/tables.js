// Results as something to look at: JSON, JSONL and CSV as tables, Markdown as headings, paragraphs, lists and tables.

import { el } from "./dom.js";
import { splitJournal, sumUp } from "./journals.js";

const MOST_ROWS = 500;
const KINDS = ["record", "kind", "type"]; // fields that say what a line of a JSONL file is

const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const missing = (value) => value === null || value === undefined || value === "";
const isNumber = (value) => typeof value === "number" || (typeof value === "string" && NUMBER.test(value));

/**
 * A table element. columns: names; rows: arrays of values. Numbers are shown with five digits, those written as text
 * as they are written; a column of them sorts as numbers.
 */
export function table(columns, rows, caption = null) {
  const numeric = columns.map((_, i) => rows.some((row) => !missing(row[i]))
    && rows.every((row) => missing(row[i]) || isNumber(row[i])));
  const body = el("tbody");
  const heads = columns.map((name, i) => el("th", { scope: "col", class: numeric[i] ? "number" : null },
    el("button", { type: "button", onclick: () => sort(i) }, name)));
  let order = { column: -1, down: false };

  function draw(list) {
    body.replaceChildren(...list.slice(0, MOST_ROWS).map((row) => el("tr", {}, ...row.map((value, i) => el("td", {
      class: numeric[i] ? "number" : String(value).length > 48 ? "long" : null,
      title: typeof value === "number" ? String(value) : null, // with every digit
    }, shown(value))))));
  }

  function sort(column) {
    order = { column, down: order.column === column && !order.down };
    const sign = order.down ? -1 : 1;
    draw([...rows].sort((x, y) => {
      const [a, b] = [x[column], y[column]];
      if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
      return sign * (numeric[column] ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
    }));
    heads.forEach((head, i) => {
      if (i === column) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  draw(rows);
  const cut = rows.length > MOST_ROWS ? `${MOST_ROWS} of ${rows.length} rows shown.` : "";
  return el("div", {},
    el("div", { class: "sheet", tabindex: 0, role: "region", "aria-label": caption ?? "Table" },
      el("table", {}, caption ? el("caption", {}, caption) : null, el("thead", {}, el("tr", {}, ...heads)), body)),
    cut ? el("p", { class: "hint" }, cut) : null);
}

function shown(value) {
  if (value === null || value === undefined) return "";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value !== "number") return String(value);
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? String(value) : value.toExponential(4);
  const size = Math.abs(value);
  return size >= 1e5 || size < 1e-4 ? value.toExponential(3) : String(Number(value.toPrecision(5)));
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);

/** A record with its objects unfolded: { a: { b: 1 } } -> { "a.b": 1 }; an estimate becomes one cell. */
export function flatten(record, prefix = "", out = {}) {
  for (const [name, value] of Object.entries(record)) {
    if (isObject(value) && "mean" in value && "low" in value && "high" in value) {
      out[prefix + name] = value.mean;
      out[`${prefix}${name} 95 %`] = value.low === null ? null : `${shown(value.low)} to ${shown(value.high)}`;
      if ("n" in value) out[`${prefix}${name} n`] = value.n;
    } else if (isObject(value)) flatten(value, `${prefix}${name}.`, out);
    else if (Array.isArray(value)) {
      const plain = value.every((item) => !isObject(item) && !Array.isArray(item)) && value.length <= 8;
      out[prefix + name] = plain ? value.map(shown).join(", ") : `${value.length} items`;
    } else out[prefix + name] = value;
  }
  return out;
}

/** Records as tables: one for each kind they name or, if they name none, for each run of records that look alike. */
export function recordTables(records) {
  const groups = [];
  for (const record of records) {
    const flat = flatten(isObject(record) ? record : { value: record });
    const kindField = KINDS.find((name) => typeof flat[name] === "string");
    const kind = kindField ? flat[kindField] : null;
    let group = groups.find((g) => (kind !== null ? g.kind === kind : g.kind === null && alike(g.columns, flat)));
    if (!group) groups.push((group = { kind, columns: new Set(), records: [] }));
    for (const name of Object.keys(flat)) if (name !== kindField) group.columns.add(name);
    group.records.push(flat);
  }
  return groups.map(({ kind, columns, records: list }) => {
    const names = [...columns];
    if (list.length === 1 && names.length > 3) {
      const fields = names.map((name) => [name, list[0][name]]);
      return table(["field", "value"], fields, kind);
    }
    return table(names, list.map((flat) => names.map((name) => flat[name] ?? null)), kind);
  });
}

function alike(columns, record) {
  const names = Object.keys(record);
  const common = names.filter((name) => columns.has(name)).length;
  return common * 2 >= Math.max(names.length, columns.size);
}

/** A JSON file: a list of records, or an object whose lists are tables and whose other fields are one. */
export function jsonView(text) {
  const data = JSON.parse(text);
  if (Array.isArray(data)) return recordTables(data);
  if (!isObject(data)) return [el("pre", {}, String(data))];
  const isList = (value) => Array.isArray(value) && value.some(isObject);
  const fields = Object.fromEntries(Object.entries(data).filter(([, value]) => !isList(value)));
  const out = Object.keys(fields).length ? [table(["field", "value"], Object.entries(flatten(fields)))] : [];
  for (const [name, value] of Object.entries(data)) {
    if (isList(value)) out.push(el("h3", {}, name), ...recordTables(value));
  }
  return out;
}

/** A JSONL file. A last line that is still being written is left out; any other that is no JSON is an Error. */
export function jsonlView(text) {
  const lines = text.split("\n");
  const records = [];
  lines.forEach((line, i) => {
    if (!line.trim()) return;
    try {
      records.push(JSON.parse(line));
    } catch {
      if (i < lines.length - 1) throw new Error(`Line ${i + 1} is not JSON.`);
    }
  });
  if (!records.length) return [el("p", { class: "hint" }, "Nothing in it yet.")];
  const { slices, others } = splitJournal(records);
  return [...(slices.length ? journalView(slices) : []), ...recordTables(others)];
}

/** A CSV file: its first line names the columns; a field in quotes can hold commas, line ends and "" for a quote. */
export function csvView(text) {
  const rows = [[]];
  for (const [, quoted, plain, end] of text.matchAll(/(?:"((?:[^"]|"")*)"|([^,\r\n]*))(,|\r\n|\n|\r|$)/g)) {
    rows[rows.length - 1].push(quoted === undefined ? plain : quoted.replaceAll('""', '"'));
    if (end !== "," && end) rows.push([]);
    if (!end) break;
  }
  const [head, ...body] = rows.filter((row) => row.length > 1 || row[0]);
  if (!head) return [el("p", { class: "hint" }, "Nothing in it yet.")];
  return [table(head, body.map((row) => head.map((_, i) => cellOf(row[i] ?? ""))))];
}

/** A field as the number it is, or as its text. */
function cellOf(text) {
  if (/^[+-]?inf$/i.test(text)) return text.startsWith("-") ? -Infinity : Infinity;
  return NUMBER.test(text) ? Number(text) : text;
}

function journalView(slices) {
  const rows = sumUp(slices);
  const name = (measure) => measure.replace(/^.*[\\/]/, ""); // a text is told by its path
  return [
    el("p", {}, "A sweep's scores so far: the gain of each loop over plain, paired, on the items both were scored on; "
      + "above 0 is better. The best of many is too good to be quoted: the verdict that ",
      el("code", {}, "ggufloop sweep"), " prints is corrected for all loops asked about."),
    table(["measure", "loop", "items", "score", "gain", "95 % low", "95 % high", "seconds"],
      rows.map((r) => [name(r.measure), r.loop, r.n, r.score, r.gain, r.low, r.high, r.seconds]), "Gain over plain"),
  ];
}

const OTHER_BLOCK = /^(#{1,6}\s|```|\s*[-*]\s|\|)/;

/** Markdown, the part of it that reports use. Every text becomes a text node: markup in it stays visible. */
export function markdownView(text) {
  const out = [];
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  for (let i = 0; i < lines.length; ) {
    const line = lines[i];
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!line.trim()) i++;
    else if (heading) {
      out.push(el(heading[1].length === 1 ? "h3" : "h4", {}, ...inline(heading[2])));
      i++;
    } else if (/^```/.test(line)) {
      const end = lines.findIndex((each, j) => j > i && /^```/.test(each));
      const last = end < 0 ? lines.length : end;
      out.push(el("pre", {}, lines.slice(i + 1, last).join("\n")));
      i = last + 1;
    } else if (/^ {4}/.test(line)) {
      const [block, next] = take(lines, i, (each) => /^ {4}/.test(each));
      out.push(el("pre", {}, block.map((each) => each.slice(4)).join("\n")));
      i = next;
    } else if (line.trim().startsWith("|") && /^[\s|:-]*-[\s|:-]*$/.test(lines[i + 1] ?? "")) {
      const [block, next] = take(lines, i, (each) => each.trim().startsWith("|"));
      const [head, , ...rows] = block.map(cells);
      out.push(table(head, rows));
      i = next;
    } else if (/^\s*[-*]\s+/.test(line)) {
      const [block, next] = take(lines, i, (each) => /^\s*[-*]\s+/.test(each) || /^\s{2,}\S/.test(each));
      const items = [];
      for (const each of block) {
        if (/^\s*[-*]\s+/.test(each)) items.push(each.replace(/^\s*[-*]\s+/, ""));
        else items[items.length - 1] += ` ${each.trim()}`;
      }
      out.push(el("ul", {}, ...items.map((item) => el("li", {}, ...inline(item)))));
      i = next;
    } else {
      const [block, next] = take(lines, i, (each, j) => j === i || (each.trim() && !OTHER_BLOCK.test(each)));
      out.push(el("p", {}, ...inline(block.map((each) => each.trim()).join(" "))));
      i = next;
    }
  }
  return out;
}

function take(lines, from, belongs) {
  let end = from;
  while (end < lines.length && belongs(lines[end], end)) end++;
  return [lines.slice(from, end), end];
}

function cells(line) {
  return line.trim().replace(/^\||\|$/g, "").split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

/** Code in backticks and **bold**; links and pictures stay as they are written. */
function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).filter(Boolean).map((part) => {
    if (part.length > 2 && part.startsWith("`")) return el("code", {}, part.slice(1, -1));
    if (part.length > 4 && part.startsWith("**")) return el("strong", {}, part.slice(2, -2));
    return part;
  });
}
