// What a loop is, on this side: its settings, their spelling, its cost. The words are LoopSpec's. No DOM.

import SCHEMA from "./settings.js"; // of the table of settings, written by `serve`: loop.schema() as a module

/** Setting -> what it is: its words with their meaning, or its range; its default. */
export const SETTINGS = SCHEMA.properties;
const NAMES = Object.keys(SETTINGS).filter((name) => name !== "window");
/** The settings with a control of their own; the others are typed. */
export const CONTROLS = NAMES.filter((name) => SETTINGS[name].control);
const FURTHER = NAMES.filter((name) => !SETTINGS[name].control);

/** Word -> what it means, as `description`; of a solver its `evaluations`; of one with a number after it, `value`. */
export const words = (name) => Object.fromEntries((SETTINGS[name].oneOf ?? []).map((word) => [word.title, word]));
const SOLVERS = words("solver");

/** The settings before anything is chosen; of words with a number after them, the numbers. */
export const START = Object.fromEntries(CONTROLS.flatMap((name) => {
  const values = Object.entries(words(name)).filter(([, word]) => word.value);
  const numbers = Object.fromEntries(values.map(([title, { value }]) => [title, value.default]));
  return [[name, SETTINGS[name].default], ...(values.length ? [[`${name}Value`, numbers]] : [])];
}));

/** What a setting is where nothing is said, beside the others of a loop. */
export function usual(name, loop) {
  const [other, word, then] = SETTINGS[name].unless ?? [];
  return other && (loop[other] ?? SETTINGS[other].default) === word ? then : SETTINGS[name].default;
}

/** The most K a solver may have. */
export const mostK = (solver) => Math.floor(SETTINGS.k.maximum / SOLVERS[solver].evaluations);

/** A setting as it counts: solver repeat has a slot per pass by definition. */
export const counted = (name, settings) => (
  name === "kv" && settings.solver === "repeat" ? usual(name, settings) : settings[name]
);

/** One line on what the chosen words do. */
export function meaning(settings) {
  const told = CONTROLS.filter((name) => SETTINGS[name].oneOf).map((name) => [name, counted(name, settings)]);
  return told.map(([name, value]) => `${value}: ${words(name)[value].description}`).join("; ");
}

/** Four layers, or a third of the model, centred at 0.48 of the depth: `--window auto` without a published window. */
export function autoWindow(layers) {
  const width = Math.min(4, Math.max(1, Math.floor(layers / 3)));
  const first = Math.min(Math.max(1, Math.round(0.48 * layers - width / 2)), layers - 1 - width);
  return [first, first + width];
}

/** Make a window fit a model: 1 <= start < end <= layers - 1. */
export function clampWindow([start, end], layers) {
  const first = Math.max(1, Math.min(start, layers - 2));
  return [first, Math.max(first + 1, Math.min(end, layers - 1))];
}

/** "beta=0.5 mode=layer" -> { beta: 0.5, mode: "layer" }. Throws an Error of one line. */
export function parseFurther(text) {
  const out = {};
  for (const word of text.split(/\s+/).filter(Boolean)) {
    const [, name, value] = /^([^=]+)=(.+)$/.exec(word) ?? [];
    if (!name) throw new Error(`'${word}' is not of the form name=value.`);
    if (name === "window" || CONTROLS.includes(name)) throw new Error(`'${name}' has a control of its own.`);
    if (!FURTHER.includes(name)) throw new Error(`'${name}' is not a setting. Known: ${FURTHER.join(", ")}.`);
    out[name] = Number.isFinite(Number(value)) ? Number(value) : value;
  }
  return out;
}

const isOf = (value, { type, minimum }, most = Infinity) => (
  Number.isFinite(value) && value >= minimum && value <= most && (type === "number" || Number.isInteger(value)));
const kind = ({ type }) => (type === "integer" ? "whole number" : "number");

/** A setting in a request: what is chosen, with its number. Throws an Error of one line. */
function said(name, settings) {
  const chosen = counted(name, settings);
  const rule = SETTINGS[name];
  if (!rule.oneOf) {
    const most = name === "k" ? mostK(settings.solver) : rule.maximum;
    if (isOf(chosen, rule, most)) return chosen;
    const to = most === undefined ? "on" : `to ${most}`;
    const solver = name === "k" ? ` with solver ${settings.solver}` : "";
    throw new Error(`${title(name)} is a ${kind(rule)} from ${rule.minimum} ${to}${solver}.`);
  }
  const value = words(name)[chosen]?.value;
  if (!value) return chosen;
  const given = settings[`${name}Value`][chosen];
  if (isOf(given, value)) return `${chosen}:${given}`;
  throw new Error(`${title(name)} ${chosen} takes a ${kind(value)} of ${value.minimum} or more.`);
}

/** A setting's name on the page: K, Solver. */
export const title = (name) => (name.length < 3 ? name.toUpperCase() : name[0].toUpperCase() + name.slice(1));

/** The loop of a request, from the settings. Throws an Error of one line. */
export function toLoop(settings) {
  const { window, further } = settings;
  const chosen = CONTROLS.map((name) => [name, said(name, settings)]);
  return { window: `${window[0]}:${window[1]}`, ...Object.fromEntries(chosen), ...parseFurther(further) };
}

/** The settings that spell a loop: the inverse of `spell` over `toLoop`. */
export function fromText(text) {
  const [window, ...given] = text.split(" ");
  const loop = Object.fromEntries(given.map((word) => {
    const [name, value] = word.split("=");
    return [name.toLowerCase(), value];
  }));
  const out = { window: window.split(":").map(Number) };
  for (const name of CONTROLS) {
    const [word, value] = String(loop[name] ?? SETTINGS[name].default).split(":");
    out[name] = SETTINGS[name].oneOf ? word : Number(word);
    if (`${name}Value` in START) out[`${name}Value`] = value === undefined ? {} : { [word]: Number(value) };
  }
  const further = Object.entries(loop).filter(([name]) => !CONTROLS.includes(name));
  return { ...out, further: further.map(([name, value]) => `${name}=${value}`).join(" ") };
}

/** The spelling that `LoopSpec.parse` reads, defaults left out; "" for the plain model. */
export function spell(loop) {
  if (!loop) return "";
  if (typeof loop === "string") return loop;
  const told = NAMES.filter((name) => name in loop && (name === "k" || loop[name] !== usual(name, loop)));
  return [loop.window, ...told.map((name) => `${name}=${loop[name]}`)].join(" ");
}

/** How often the window runs for a looped token; null where settings decide that the page does not compute. */
export function evaluations(loop) {
  if (["passes", "halt", "beta"].some((name) => name in loop)) return null;
  const n = loop.k * SOLVERS[loop.solver].evaluations;
  return n > 1 && loop.kv === "last" ? n + 1 : n;
}
