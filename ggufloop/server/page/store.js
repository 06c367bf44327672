// What the browser keeps: settings and conversations; and a conversation as files. No DOM.

import { START, spell } from "./loop.js";

const SETTINGS = "ggufloop.settings";
const CONVERSATION = "ggufloop.conversation"; // .ID; a page that knew one alone kept it without
export const CURRENT = "ggufloop.current";
const VERSION = 1;
const FINAL = ["done", "stopped", "error"];

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

const keyOf = (id) => (id ? `${CONVERSATION}.${id}` : CONVERSATION);

/** The id of the conversation that is kept under a key of the storage; null if none is. */
export const idOf = (key) => (
  key === CONVERSATION ? "" : key?.startsWith(`${CONVERSATION}.`) ? key.slice(CONVERSATION.length + 1) : null);

/** A conversation nobody has said anything in. title: "" until it is given one. */
export const newConversation = () => ({ id: drawId(), title: "", updated: 0, turns: [] });

const drawId = () => `${Date.now().toString(36)}${crypto.getRandomValues(new Uint32Array(1))[0].toString(36)}`;

/** A conversation kept here, or null. An answer that was being written when the page closed was stopped by that. */
export function loadConversation(id) {
  const kept = read(keyOf(id));
  if (kept?.version !== VERSION || !Array.isArray(kept.turns) || !kept.turns.every(isTurn)) return null;
  for (const turn of kept.turns) {
    for (const answer of Object.values(turn.answers)) {
      if (answer && !FINAL.includes(answer.state)) answer.state = "stopped";
    }
  }
  const { title, updated, turns } = kept;
  return { id, title: typeof title === "string" ? title : "", updated: Number(updated) || 0, turns };
}

/** All of them, the one that was written to last first. */
export function listConversations() {
  let keys = [];
  try {
    keys = Object.keys(localStorage);
  } catch { /* forbidden */ }
  const found = keys.map(idOf).filter((id) => id !== null).map(loadConversation);
  return found.filter((each) => each?.turns.length).sort((a, b) => b.updated - a.updated);
}

/** The id of the conversation that was opened last, here or in another tab; null if none was. */
export function currentId() {
  const id = read(CURRENT);
  return typeof id === "string" ? id : null;
}

export const setCurrent = (id) => write(CURRENT, id);

/** The conversation that was open last, else the newest, else a new one. */
export function lastConversation() {
  const id = currentId();
  return (id !== null && loadConversation(id)) || listConversations()[0] || newConversation();
}

/** Keep it; false if the browser would not. */
export function saveConversation({ id, title, updated, turns }) {
  return write(keyOf(id), { version: VERSION, title, updated, turns });
}

export function rename(id, title) {
  return write(keyOf(id), { ...read(keyOf(id)), title });
}

export function forget(id) {
  try {
    localStorage.removeItem(keyOf(id));
  } catch { /* forbidden: there is none */ }
}

/** What it is called: its title, or its first words. */
export function titleOf({ title, turns }) {
  const line = (title || turns[0]?.user || "New conversation").replace(/\s+/g, " ").trim();
  return line.length > 60 ? `${line.slice(0, 59)}\u2026` : line;
}

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
export function toJson({ title, turns }, { model, system, exported }) {
  return `${JSON.stringify({
    schema_version: VERSION, title: title || null, model, system: system || null, exported,
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

/** What `toJson` wrote, as { conversation, system }. Throws an Error of one line. */
export function fromJson(content) {
  let data;
  try {
    data = JSON.parse(content);
  } catch {
    throw new Error("it is not JSON.");
  }
  if (data?.schema_version !== VERSION || !Array.isArray(data.turns) || !data.turns.length) {
    throw new Error("it is no conversation that this page exported as JSON.");
  }
  const turns = data.turns.map((turn, i) => {
    try {
      return turnOf(turn);
    } catch {
      throw new Error(`message ${i + 1} is not as this page exports it.`);
    }
  });
  const text = (value) => (typeof value === "string" ? value : "");
  return {
    conversation: { ...newConversation(), updated: Date.now(), title: text(data.title), turns },
    system: text(data.system),
  };
}

function turnOf({ user, seed, sampling, continued_from: kept, answers }) {
  const isSeed = Number.isInteger(seed) && seed >= 0 && seed < 2 ** 32 - 1;
  if (typeof user !== "string" || !isSeed || !VARIANTS.includes(kept)) throw new Error("turn");
  const number = (value) => (Number.isFinite(value) ? value : null);
  const found = answers.map((a) => {
    if (!VARIANTS.includes(a.variant) || typeof a.text !== "string") throw new Error("answer");
    return [a.variant, {
      ...newAnswer(null), loop: String(a.loop ?? ""), state: FINAL.includes(a.state) ? a.state : "stopped",
      thought: String(a.thinking ?? ""), text: a.text, finish: a.finish_reason ?? null, error: String(a.error ?? ""),
      tokens: number(a.tokens) ?? 0, firstSeconds: number(a.first_token_seconds), seconds: number(a.seconds),
      rate: number(a.tokens_per_second), together: a.streamed_together === true,
    }];
  });
  return { user, seed, sampling: sampling ?? undefined, kept, answers: Object.fromEntries(found) };
}

/** The conversation as Markdown, texts quoted so that their own headings stay theirs. */
export function toMarkdown({ title, turns }, { model, system, exported }) {
  const quote = (text) => text.trimEnd().split("\n").map((line) => `> ${line}`.trimEnd()).join("\n");
  const parts = [`# ${title || "Conversation"}`, `Model ${model}, exported ${exported}.`];
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
