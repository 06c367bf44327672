// What a loop is, on this side: its settings, their spelling, its cost. The words are LoopSpec's. No DOM.

/** Solver -> evaluations of the window in one of its K steps. */
export const SOLVERS = {
  euler: 1, naive: 1, repeat: 1, midpoint: 2, heun: 2, rk4: 4, "input-anchor": 1, "heavy-ball": 1,
};
export const KV_POLICIES = ["first", "last", "each", "frozen"];

/** Decode policy -> the name of the value it takes, its first setting and whether that is a whole number. */
export const DECODES = {
  full: null,
  bypass: null,
  first: { name: "Tokens", value: 16, least: 1, whole: true },
};
export const MOST_EVALUATIONS = 64;

/** What the settings do, a phrase each. */
export const MEANINGS = {
  k: "steps the solver takes through the window; 1 is the plain model",
  solver: {
    euler: "K small steps that add up to one pass",
    naive: "K full passes, undamped",
    repeat: "K full passes, as if the layers were there K times",
    midpoint: "K steps, each with two evaluations",
    heun: "K steps, each with two evaluations",
    rk4: "K steps, each with four evaluations",
    "input-anchor": "K steps, each from the state the window was entered with",
    "heavy-ball": "K small steps with momentum",
  },
  kv: {
    first: "the cache keeps the first pass",
    last: "the cache keeps the result, for one more pass",
    each: "every pass has a cache of its own, which the server must be started for",
    frozen: "later passes read the first one's keys and values",
  },
  decode: {
    full: "prompt and answer loop",
    bypass: "the prompt loops, the answer is written plain",
    first: "the prompt loops, and the answer's first tokens",
  },
};

/** One line on what the chosen solver, kv and decode do. */
export function meaning({ solver, kv, decode }) {
  const told = { solver, kv: solver === "repeat" ? "each" : kv, decode };
  return Object.entries(told).map(([name, value]) => `${value}: ${MEANINGS[name][value]}`).join("; ");
}

const OWN = ["window", "k", "solver", "kv", "decode"];
const ORDER = [
  "k", "mode", "solver", "damping", "beta", "mu", "passes", "kv", "decode", "routing", "attention", "sinks", "halt",
];
const FURTHER = ["mode", "damping", "beta", "mu", "passes", "routing", "attention", "sinks", "halt"];

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
    if (OWN.includes(name)) throw new Error(`'${name}' has a control of its own.`);
    if (!FURTHER.includes(name)) throw new Error(`'${name}' is not a setting. Known: ${FURTHER.join(", ")}.`);
    out[name] = Number.isFinite(Number(value)) ? Number(value) : value;
  }
  return out;
}

/** The loop of a request, from the settings. Throws an Error of one line. */
export function toLoop(settings) {
  const { window, k, solver, kv, decode, further } = settings;
  if (!Number.isInteger(k) || k < 1 || k > MOST_EVALUATIONS / SOLVERS[solver]) {
    throw new Error(`K is a whole number from 1 to ${MOST_EVALUATIONS / SOLVERS[solver]} with solver ${solver}.`);
  }
  const rule = DECODES[decode];
  let policy = decode;
  if (rule) {
    const value = settings.decodeValue[decode];
    if (!Number.isFinite(value) || value < rule.least || (rule.whole && !Number.isInteger(value))) {
      throw new Error(`Decode ${decode} takes a ${rule.whole ? "whole number" : "number"} of ${rule.least} or more.`);
    }
    policy = `${decode}:${value}`;
  }
  return {
    window: `${window[0]}:${window[1]}`, k, solver, kv: solver === "repeat" ? "each" : kv, decode: policy,
    ...parseFurther(further),
  };
}

/** The settings that spell a loop: the inverse of `spell` over `toLoop`. */
export function fromText(text) {
  const [window, ...words] = text.split(" ");
  const given = Object.fromEntries(words.map((word) => {
    const [name, value] = word.split("=");
    return [name.toLowerCase(), value];
  }));
  const { k = "3", solver = "euler", decode = "full", ...rest } = given;
  const { kv = "first", ...further } = rest;
  const [policy, value] = decode.split(":");
  return {
    window: window.split(":").map(Number), k: Number(k), solver, kv, decode: policy,
    decodeValue: value === undefined ? {} : { [policy]: Number(value) },
    further: Object.entries(further).map(([name, each]) => `${name}=${each}`).join(" "),
  };
}

/** The spelling that `LoopSpec.parse` reads, defaults left out; "" for the plain model. */
export function spell(loop) {
  if (!loop) return "";
  if (typeof loop === "string") return loop;
  const usual = { solver: "euler", kv: loop.solver === "repeat" ? "each" : "first", decode: "full" };
  const words = ORDER.filter((name) => name in loop && loop[name] !== usual[name]);
  return [loop.window, ...words.map((name) => `${name}=${loop[name]}`)].join(" ");
}

/** How often the window runs for a looped token; null where settings decide that the page does not compute. */
export function evaluations(loop) {
  if (["passes", "halt", "beta"].some((name) => name in loop)) return null;
  const n = loop.k * SOLVERS[loop.solver];
  return n > 1 && loop.kv === "last" ? n + 1 : n;
}
