// What the browser keeps: settings and the conversation; and the conversation as files. No DOM.

import { START, spell } from "./loop.js";

const SETTINGS = "ggufloop.settings";
export const CONVERSATION = "ggufloop.conversation";
const VERSION = 1;

export const VARIANTS = ["plain", "looped"];

const DEFAULTS = {
  view: "both", windows: {}, ...START, further: "",
  temperature: null, seed: null, maxTokens: null, topK: null, topP: null, minP: null, // null: what the server does
  system: "", panels: {},
};

function read(name) {
  try {
    return JSON.parse(localStorage.getItem(name));
  } catch {
    return null; // forbidden, or not ours
  }
}

/** Keep a value; false if the browser would not (full, or forbidden). */
function write(name, value) {
  try {
    localStorage.setItem(name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

/** The settings kept here; a value of another type than the default's is replaced by it. */
export function loadSettings() {
  const kept = read(SETTINGS);
  const out = structuredClone(DEFAULTS);
  if (typeof kept !== "object" || kept === null) return out;
  for (const name of Object.keys(out)) {
    const given = kept[name] ?? null;
    const kind = out[name] === null ? "number" : typeof out[name];
    if (given !== null && typeof given === kind && Array.isArray(given) === Array.isArray(out[name])) out[name] = given;
  }
  for (const name of Object.keys(START)) {
    if (typeof START[name] === "object") out[name] = { ...START[name], ...out[name] };
  }
  if (!["both", ...VARIANTS].includes(out.view)) out.view = DEFAULTS.view;
  const isWindow = (pair) => Array.isArray(pair) && pair.length === 2 && pair.every(Number.isInteger);
  out.windows = Object.fromEntries(Object.entries(out.windows).filter(([, pair]) => isWindow(pair)));
  return out;
}

export const saveSettings = (settings) => write(SETTINGS, settings);

const isAnswer = (a) => typeof a?.text === "string" && typeof a.state === "string" && typeof a.loop === "string";
const isTurn = (t) => typeof t?.user === "string" && typeof t.answers === "object" && t.answers !== null
  && VARIANTS.every((v) => !t.answers[v] || isAnswer(t.answers[v]));

/** The turns kept here, or none. An answer that was being written when the page closed was stopped by that. */
export function loadConversation() {
  const kept = read(CONVERSATION);
  if (kept?.version !== VERSION || !Array.isArray(kept.turns) || !kept.turns.every(isTurn)) return [];
  for (const turn of kept.turns) {
    for (const answer of Object.values(turn.answers)) {
      if (answer && !["done", "stopped", "error"].includes(answer.state)) answer.state = "stopped";
    }
  }
  return kept.turns;
}

export const saveConversation = (turns) => write(CONVERSATION, { version: VERSION, turns });

/** A new answer, nothing written yet. loop: of the request, null for plain. */
export function newAnswer(loop) {
  return {
    loop: spell(loop), state: "waiting", thought: "", text: "", finish: null, error: "",
    tokens: 0, firstSeconds: null, seconds: null, rate: null, together: false,
  };
}

/** Which of a turn's answers the conversation goes on from; null if there is none with text. */
export function keptAnswer(turn) {
  const other = VARIANTS.find((v) => v !== turn.kept);
  return [turn.kept, other].map((v) => turn.answers[v]).find((a) => a && a.text.trim()) ?? null;
}

/** The messages a turn is answered to: system prompt, the turns before it as they were kept, and its own. */
export function messagesFor(turns, index, system) {
  const out = system.trim() ? [{ role: "system", content: system }] : [];
  for (const turn of turns.slice(0, index)) {
    const kept = keptAnswer(turn);
    if (kept) out.push({ role: "user", content: turn.user }, { role: "assistant", content: kept.text });
  }
  return [...out, { role: "user", content: turns[index].user }];
}

/** The conversation as JSON: every answer with its loop and its figures. */
export function toJson(turns, { model, system, exported }) {
  return `${JSON.stringify({
    schema_version: VERSION, model, system: system || null, exported,
    turns: turns.map((turn) => ({
      user: turn.user, seed: turn.seed, sampling: turn.sampling ?? null, continued_from: turn.kept,
      answers: VARIANTS.filter((v) => turn.answers[v]).map((v) => {
        const a = turn.answers[v];
        return {
          variant: v, loop: a.loop || null, state: a.state, finish_reason: a.finish, error: a.error || null,
          thinking: a.thought || null, text: a.text,
          tokens: a.tokens, seconds: a.seconds, first_token_seconds: a.firstSeconds, tokens_per_second: a.rate,
          streamed_together: a.together,
        };
      }),
    })),
  }, null, 2)}\n`;
}

/** The conversation as Markdown, texts quoted so that their own headings stay theirs. */
export function toMarkdown(turns, { model, system, exported }) {
  const quote = (text) => text.trimEnd().split("\n").map((line) => `> ${line}`.trimEnd()).join("\n");
  const parts = ["# Conversation", `Model ${model}, exported ${exported}.`];
  if (system) parts.push("## System prompt", quote(system));
  for (const turn of turns) {
    parts.push("## You", quote(turn.user));
    for (const v of VARIANTS.filter((v) => turn.answers[v])) {
      const a = turn.answers[v];
      parts.push(`### ${v === "plain" ? "Plain" : `Looped, \`${a.loop}\``}`);
      if (a.thought) parts.push("Thinking:", quote(a.thought));
      if (a.text) parts.push(...(a.thought ? ["Answer:"] : []), quote(a.text));
      parts.push(`${figures(a)}.`);
    }
  }
  return `${parts.join("\n\n")}\n`;
}

export const speed = (rate) => `${rate.toFixed(rate < 100 ? 1 : 0)} tokens/s`;

/** "31.2 tokens/s, 128 tokens, first after 0.21 s": what is known of it. */
export function figures(answer) {
  const out = [];
  if (answer.state === "error") out.push(`failed: ${answer.error.replace(/\.$/, "")}`);
  if (answer.rate !== null) out.push(speed(answer.rate));
  if (answer.tokens) out.push(answer.tokens === 1 ? "1 token" : `${answer.tokens} tokens`);
  if (answer.firstSeconds !== null) out.push(`first after ${answer.firstSeconds.toFixed(2)} s`);
  if (answer.state === "stopped") out.push("stopped");
  if (answer.state === "done" && answer.finish === "length") out.push("cut at the token limit");
  return out.join(", ") || "nothing written";
}
