// The controls above the conversation: the loop and how tokens are drawn. Keeps them in the browser.

import { $, el } from "./dom.js";
import {
  CONTROLS, SETTINGS, START, autoWindow, clampWindow, counted, evaluations, fromText, meaning, mostK, spell, title,
  toLoop, words,
} from "./loop.js";
import { saveSettings } from "./store.js";
import { createStrip } from "./strip.js";

const UNSET = { temperature: 0.8, maxTokens: 512, topK: 40, topP: 0.95, minP: 0.05 }; // where the server does not say
const FIELDS = {
  temperature: "temperature", seed: "seed", maxTokens: "max-tokens", topK: "top-k", topP: "top-p", minP: "min-p",
};
/** Setting -> its name in a request, for those that are sent only where they are set. */
const SENT = { topK: "top_k", topP: "top_p", minP: "min_p" };

/** What a newcomer wants to know of a control before anything of its words. */
const TIPS = {
  k: "How many steps the window is run in, each smaller the more there are. 1 is the plain model.",
  solver: "How each step goes on from the one before it. euler, the usual one, is a damped repetition.",
  kv: "Which pass's keys and values later tokens look back at. first and frozen need no more memory.",
  decode: "Which tokens of the answer loop. Those of your message always do.",
};

/**
 * Wire the controls to `settings`, which they change. -> { setModel({ ... }), loop(), sampling(), setSystem(text) };
 * loop and sampling give what a request carries, or throw an Error of one line and show the control that is wrong.
 */
export function createControls(settings) {
  let model = null;
  let served = UNSET;
  const strip = createStrip((window) => {
    settings.windows[model.name] = window;
    refresh();
  });

  for (const name of CONTROLS) {
    $("further-field").before(...field(name));
    if (SETTINGS[name].oneOf) choose(name);
    else bind(name, () => settings[name], (text) => (settings[name] = number(text)));
    if (hasValue(name)) {
      bind(`${name}-value`, null, (text) => (settings[`${name}Value`][settings[name]] = number(text)));
    }
  }
  bind("further", () => settings.further, (text) => (settings.further = text));
  for (const [name, id] of Object.entries(FIELDS)) {
    bind(id, () => settings[name] ?? "", (text) => (settings[name] = text === "" ? null : number(text)));
  }
  bind("system", () => settings.system, (text) => (settings.system = text));

  for (const name of ["loop", "sampling"]) {
    const panel = $(`${name}-panel`);
    const roomy = matchMedia("(min-width: 700px) and (min-height: 700px)").matches;
    panel.open = settings.panels[name] ?? (name === "loop" && roomy);
    panel.querySelector("summary").addEventListener("click", () => {
      settings.panels[name] = !panel.open; // it opens after this
      saveSettings(settings);
    });
    $(name).addEventListener("submit", (event) => event.preventDefault());
  }

  function choose(name) {
    if (!(settings[name] in words(name))) settings[name] = START[name];
    $(name).value = settings[name];
    $(name).addEventListener("change", () => {
      settings[name] = $(name).value;
      refresh();
    });
  }

  function bind(id, read, write) {
    if (read) $(id).value = read();
    $(id).addEventListener("input", () => {
      write($(id).value.trim());
      refresh();
    });
  }

  function current() {
    return { ...settings, window: model.window };
  }

  function refresh() {
    if (model) model.window = clampWindow(settings.windows[model.name] ?? model.window, model.layers);
    for (const name of CONTROLS.filter(hasValue)) {
      const rule = words(name)[settings[name]].value;
      const input = $(`${name}-value`);
      $(`${name}-value-field`).hidden = !rule;
      if (!rule) continue;
      $(`${name}-value-name`).textContent = rule.title;
      if (document.activeElement !== input) input.value = settings[`${name}Value`][settings[name]];
    }
    $("kv").disabled = settings.solver === "repeat";
    $("kv").value = counted("kv", settings);
    $("k").max = mostK(settings.solver);
    $("meaning").textContent = `${meaning(settings)}.`;
    showLoop();
    showSampling();
    saveSettings(settings);
  }

  function showLoop() {
    if (!model) return;
    let loop = null;
    let wrong = "";
    try {
      loop = toLoop(current());
    } catch (e) {
      wrong = e.message;
    }
    $("loop-error").hidden = !wrong;
    $("loop-error").textContent = wrong;
    $("further").setAttribute("aria-invalid", String(Boolean(wrong) && !wrong.startsWith("K ")));
    $("k").setAttribute("aria-invalid", String(wrong.startsWith("K ")));
    $("loop-summary").textContent = loop ? spell(loop) : "not yet a loop";
    const runs = loop ? (evaluations(loop) ?? loop.k * words("solver")[loop.solver].evaluations) : 1;
    strip.set(model.layers, model.window, runs);
    $("cost").replaceChildren(...(loop ? cost(loop) : []));
  }

  function cost(loop) {
    const runs = evaluations(loop);
    if (runs === null) return [];
    if (runs === 1) return ["K 1 is the plain model"];
    const layers = model.layers + (runs - 1) * (model.window[1] - model.window[0]);
    const most = loop.kv === "frozen" || "attention" in loop ? "at most " : "";
    const times = `${(layers / model.layers).toFixed(2)}\u00d7`;
    return [el("strong", {}, times), ` the layers: ${most}${layers} for ${model.layers}`];
  }

  function showSampling() {
    const seed = settings.seed === null ? "seed drawn" : `seed ${settings.seed}`;
    const degree = settings.temperature ?? served.temperature;
    const temperature = degree === 0 ? "greedy" : `temperature ${degree}`;
    const system = settings.system.trim() ? ", system prompt" : "";
    let wrong = "";
    try {
      check();
    } catch (e) {
      wrong = e.message;
    }
    const most = `${settings.maxTokens ?? served.maxTokens} tokens at most`;
    $("sampling-summary").textContent = wrong || `${temperature}, ${seed}, ${most}${system}`;
  }

  function check() {
    for (const id of Object.values(FIELDS)) $(id).setAttribute("aria-invalid", "false");
    const { temperature, seed, maxTokens, topK, topP, minP } = settings; // null: not set here
    const isWhole = (value, least, end) => Number.isInteger(value) && value >= least && value < end;
    const within = (value, most) => value === null || (value >= 0 && value <= most);
    const rules = [
      ["temperature", within(temperature, 5), "Temperature is a number from 0 to 5."],
      ["seed", seed === null || isWhole(seed, 0, 2 ** 32 - 1), "Seed is a whole number from 0 to 4294967294."],
      ["maxTokens", maxTokens === null || isWhole(maxTokens, 1, 2 ** 31), "Most tokens is a whole number above 0."],
      ["topK", topK === null || isWhole(topK, 0, 2 ** 31), "Top-k is a whole number; 0 keeps all tokens."],
      ["topP", within(topP, 1), "Top-p is a number from 0 to 1."],
      ["minP", within(minP, 1), "Min-p is a number from 0 to 1."],
    ];
    for (const [name, fine, rule] of rules) {
      if (fine) continue;
      $(FIELDS[name]).setAttribute("aria-invalid", "true");
      throw new Error(rule);
    }
  }

  refresh();
  return {
    /** started: the loop the server runs by default, as text, or null; it holds until the user chooses another. */
    setModel({ name, layers, started, suggested, sampling }) {
      const told = Object.entries(sampling ?? {}).filter(([, value]) => Number.isFinite(value));
      served = { ...UNSET, ...Object.fromEntries(told.map(([id, value]) => [id, Number(value.toPrecision(6))])) };
      for (const [id, value] of Object.entries(served)) $(FIELDS[id]).placeholder = value;
      const loop = started ? fromText(started) : null;
      const window = loop?.window ?? suggested?.split(":").map(Number) ?? autoWindow(layers);
      model = { name, layers, window: clampWindow(window, layers) };
      if (loop && !settings.windows[name]) {
        for (const name of ["further", ...Object.keys(START)]) {
          if (typeof loop[name] === "object") Object.assign(settings[name], loop[name]);
          else $(name).value = settings[name] = loop[name];
        }
      }
      refresh();
    },
    setSystem(text) {
      $("system").value = settings.system = text;
      refresh();
    },
    /** The loop the looped answer is asked for. */
    loop() {
      if (!model) throw new Error("The model is not loaded yet.");
      try {
        return toLoop(current());
      } catch (e) {
        $("loop-panel").open = true;
        throw e;
      }
    },
    /** Fields of a request: temperature, max_tokens, what else is set, and the seed set or null. */
    sampling() {
      try {
        check();
      } catch (e) {
        $("sampling-panel").open = true;
        throw e;
      }
      const { temperature, maxTokens, seed } = settings;
      const more = Object.entries(SENT).filter(([name]) => settings[name] !== null);
      return {
        temperature: temperature ?? served.temperature, max_tokens: maxTokens ?? served.maxTokens, seed,
        ...Object.fromEntries(more.map(([name, field]) => [field, settings[name]])),
      };
    },
  };
}

const hasValue = (name) => `${name}Value` in START;

/** A setting's control; behind it, hidden, the field of the number that follows some of its words. */
function field(name) {
  const { oneOf, minimum, maximum, description } = SETTINGS[name];
  const input = oneOf
    ? el("select", { id: name }, ...oneOf.map((word) => (
      el("option", { value: word.title, title: word.description }, word.title))))
    : el("input", {
      id: name, type: "number", min: minimum, max: maximum, ...(SETTINGS[name].type === "integer"
        ? { step: 1, inputmode: "numeric" } : { step: "any", inputmode: "decimal" }),
    });
  const tip = TIPS[name] ?? description;
  const out = [el("label", { class: "field", title: tip }, el("span", { class: "term" }, title(name)), input)];
  if (hasValue(name)) {
    const value = el("input", { id: `${name}-value`, type: "number", min: 0, step: "any", inputmode: "decimal" });
    const label = el("span", { id: `${name}-value-name` });
    out.push(el("label", { class: "field", id: `${name}-value-field`, hidden: true }, label, value));
  }
  return out;
}

function number(text) {
  return text === "" ? NaN : Number(text);
}
