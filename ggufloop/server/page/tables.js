// Results as something to look at: JSON, JSONL and CSV as tables, Markdown as it is read.

import { el } from "./dom.js";
import { SETTINGS } from "./loop.js";
import { splitJournal, sumUp } from "./journals.js";
import { blocksOf } from "./prose.js";

const MOST_ROWS = 500;
const WIDE = 8; // columns; of more those that say the same in every row are told below the table
const KINDS = ["record", "kind", "type"]; // fields that say what a line of a JSONL file is

/** A number and its error, as reports write them. */
const ESTIMATE = /^([+-]?[\d.]+(?:e[+-]?\d+)?) (\[[^\]]*\]|\+\/- .*)$/i;
const NUMBER = /^[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$/i;
const missing = (value) => value === null || value === undefined || value === "";
const isNumber = (value) => (
  typeof value === "number" || (typeof value === "string" && (NUMBER.test(value) || ESTIMATE.test(value))));
const numberOf = (value) => (typeof value === "number" ? value : parseFloat(value));

/**
 * A table element. columns: names; rows: arrays of values. Numbers are shown with five digits, those written as text
 * as they are written; a column of them sorts as numbers.
 */
export function table(columns, rows, caption = null) {
  const numeric = columns.map((_, i) => rows.some((row) => !missing(row[i]))
    && rows.every((row) => missing(row[i]) || isNumber(row[i])));
  const body = el("tbody");
  const heads = columns.map((name, i) => el("th", { scope: "col", class: numeric[i] ? "number" : null },
    el("button", { type: "button", onclick: () => sort(i) }, ...breakable(name))));
  let order = { column: -1, down: false };

  function draw(list) {
    body.replaceChildren(...list.slice(0, MOST_ROWS).map((row) => el("tr", {}, ...row.map((value, i) => el("td", {
      class: numeric[i] ? "number" : String(value).length > 48 ? "long" : null,
      title: typeof value === "number" ? String(value) : null, // with every digit
    }, ...cell(value))))));
  }

  function sort(column) {
    order = { column, down: order.column === column && !order.down };
    const sign = order.down ? -1 : 1;
    draw([...rows].sort((x, y) => {
      const [a, b] = [x[column], y[column]];
      if (missing(a) || missing(b)) return Number(missing(a)) - Number(missing(b));
      if (numeric[column]) return sign * (numberOf(a) - numberOf(b));
      return sign * (String(a).localeCompare(String(b), undefined, { numeric: true }));
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
      el("table", { class: columns.length > WIDE ? "dense" : null },
        caption ? el("caption", {}, caption) : null, el("thead", {}, el("tr", {}, ...heads)), body)),
    cut ? el("p", { class: "hint" }, cut) : null);
}

/** A name that may go on in the next line after each underscore. */
const breakable = (name) => name.split(/(?<=_)/).flatMap((part, i) => (i ? [el("wbr"), part] : [part]));

/** An estimate on two lines, so that its column is as narrow as its number. */
function cell(value) {
  const [, number, error] = (typeof value === "string" && ESTIMATE.exec(value)) || [];
  return number ? [`${number} `, el("small", {}, error)] : [shown(value)];
}

/**
 * A wide table made narrower: X, X low and X high become one column. -> { columns, rows }; `alike`, what is the same in
 * every row of a table of many columns, as [name, value].
 */
export function folded(columns, rows, most = Infinity) {
  const at = (name) => columns.indexOf(name);
  const gone = new Set();
  const merged = columns.map((name, i) => {
    const [low, high] = ["low", "high"].map((end) => Math.max(at(`${name}_${end}`), at(`${name} ${end}`)));
    if (low >= 0 && high >= 0) [low, high].forEach((j) => gone.add(j));
    const plain = name === "gain" && low < 0 && at("low") >= 0 && at("high") >= 0;
    if (plain) [at("low"), at("high")].forEach((j) => gone.add(j));
    return plain ? [i, at("low"), at("high")] : low >= 0 && high >= 0 ? [i, low, high] : [i];
  });
  const same = (i) => rows.length > 1 && columns.length > most && rows.every((row) => row[i] === rows[0][i]);
  const kept = merged.filter(([i]) => !gone.has(i) && !same(i));
  const value = (row, [i, low, high]) => (
    low === undefined || missing(row[low]) || missing(row[high]) ? row[i]
      : `${shown(row[i])} [${shown(row[low])}, ${shown(row[high])}]`);
  return {
    columns: kept.map(([i]) => columns[i]), rows: rows.map((row) => kept.map((from) => value(row, from))),
    alike: columns.map((name, i) => [name, rows[0]?.[i], i]).filter(([, , i]) => !gone.has(i) && same(i)),
  };
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
  const { slices, said, others } = splitJournal(records);
  return [...said.flatMap(verdictView), ...(slices.length ? journalView(slices, said) : []), ...recordTables(others)];
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
  const values = body.map((row) => head.map((_, i) => cellOf(row[i] ?? "")));
  return narrowed(head, values);
}

/** A table without what need not be columns. */
function narrowed(head, values) {
  const [loop, verdict] = [head.indexOf("loop"), head.indexOf("verdict")];
  const order = head.map((_, i) => i);
  if (loop >= 0 && verdict > loop) order.splice(loop + 1, 0, ...order.splice(verdict, 1)); // side by side
  const isPart = (i) => loop >= 0 && head.length > WIDE && head[i] in SETTINGS; // the loop's text says it
  const arranged = (row) => order.filter((i) => !isPart(i)).map((i) => row[i]);
  const { columns, rows, alike } = folded(arranged(head), values.map(arranged), WIDE);
  return [table(columns, rows), alike.length ? sameLine(alike) : null].filter(Boolean);
}

function sameLine(alike) {
  const told = alike.filter(([, value]) => !missing(value)).map(([name, value]) => `${name} ${shown(value)}`);
  return el("p", { class: "hint" }, `In every row: ${told.join(", ")}.`);
}

/** A field as the number it is, or as its text. */
function cellOf(text) {
  if (/^[+-]?inf$/i.test(text)) return text.startsWith("-") ? -Infinity : Infinity;
  return NUMBER.test(text) ? Number(text) : text;
}

const nameOf = (measure) => measure.replace(/^.*[\\/]/, ""); // a text is told by its path

function verdictView({ said, unit, loops }) {
  const { columns, rows } = folded(Object.keys(loops[0] ?? {}), loops.map(Object.values));
  return [table(columns, rows, `Verdicts on ${nameOf(said)}; gain in ${unit} over plain, above 0 is better`)];
}

/** Scores as they come. A measure that has its verdict needs no second interval beside it, which would be narrower. */
function journalView(slices, verdicts) {
  const isSaid = ({ measure }) => verdicts.some(({ said }) => said === measure);
  const rows = sumUp(slices).map((row) => (isSaid(row) ? { ...row, low: null, high: null } : row));
  const { columns, rows: cells } = folded(
    ["measure", "loop", "items", "score", "gain", "gain low", "gain high", "seconds"],
    rows.map((r) => [nameOf(r.measure), r.loop, r.n, r.score, r.gain, r.low, r.high, r.seconds]));
  const open = rows.every(isSaid) ? null : el("p", { class: "hint" },
    "The gain of each loop over plain, paired, on the items both were scored on, with the 95 % interval of that loop "
    + "alone. The best of many is too good to be quoted: the verdict is corrected for all loops asked about.");
  return [table(columns, cells, open ? "Scores so far" : "Scores"), open].filter(Boolean);
}

/** Markdown: its tables as tables to sort, everything else as it is read. figures: elements by the names it has. */
export function markdownView(text, figures = new Map()) {
  const cells = (row) => row.map((cell) => cell.text.replace(/^`(.*)`$|^\*\*(.*)\*\*$/, "$1$2"));
  return [el("div", { class: "prose" }, ...blocksOf(text).flatMap(({ type, header, rows, tokens, element }) => {
    if (type === "table") return narrowed(cells(header), rows.map(cells));
    const figure = tokens?.length === 1 && tokens[0].type === "image" ? figures.get(tokens[0].href) : null;
    return [figure ?? element()];
  }))];
}
