// The conversation: asks the server for a message's answers, both at once, and shows them with what differs marked.

import { $, alertLine, announce, copier, el } from "./dom.js";
import { ApiError, oneLine, streamChat } from "./api.js";
import { createConversations } from "./conversations.js";
import { compare } from "./diff.js";
import { createProse } from "./prose.js";
import { VARIANTS, figures, messagesFor, newAnswer, saveSettings, speed } from "./store.js";
import { spell } from "./loop.js";

const NAMES = { plain: "Plain", looped: "Looped" };
const OTHER = { plain: "Answer without the loop too", looped: "Answer looped too" };
const STATES = { waiting: "waiting", streaming: "writing", stopped: "stopped", error: "failed" };
const FINAL = ["done", "stopped"];
const GONE = [0, 404, 503]; // no answer, another model, loading: it may be another server by now
const LIVE_PAIRS = 1_000_000; // a comparison while text still arrives may not take longer than a frame or two
const DRAW_EVERY = 90; // ms, and DRAW_SHARE times what drawing takes: a long text may not hold the page up
const DRAW_SHARE = 8;
const KEEP_EVERY = 1000; // ms

/**
 * Wire the chat up. controls: as `createControls` gives them; model(): its name; onLocked(): the server wants a key;
 * onLost(): it may be gone.
 */
export function createChat({ settings, controls, model, onLocked, onLost }) {
  const talks = createConversations({
    onOpen: replaceTurns,
    isBusy: () => running !== null,
    about: () => ({
      model: model() ?? "", system: settings.system, exported: `${new Date().toISOString().slice(0, 19)}Z`,
    }),
    onSystem: controls.setSystem,
  });
  let turns = talks.turns();
  const views = new Map(); // turn -> its elements
  let running = null; // { abort, turn } while answers are written
  let keepTimer = 0;
  let leaving = false;

  // keeping

  function keep() {
    clearTimeout(keepTimer);
    keepTimer = 0;
    talks.keep();
  }

  function keepSoon() {
    keepTimer ||= setTimeout(keep, KEEP_EVERY);
  }

  // drawing

  function shown() {
    return settings.view === "both" ? VARIANTS : [settings.view];
  }

  function createTurn(turn, index) {
    const view = { answers: {}, compared: "", diff: null };
    for (const v of VARIANTS) {
      const prose = el("div", { class: "prose" });
      const note = el("p", { class: "note", hidden: true });
      const text = el("div", { class: "text" }, prose, note);
      const kept = el("input", {
        type: "radio", name: `kept-${index}`, checked: turn.kept === v,
        onchange: () => {
          turn.kept = v;
          keep();
        },
      });
      const part = {
        spec: el("span", { class: "spec" }), state: el("span", { class: "state" }), text, note,
        prose: createProse(prose),
        thought: el("p", { class: "thought" }), thinking: el("summary"),
        figures: el("span", { class: "figures" }),
        copy: copier(() => turn.answers[v].text, `${NAMES[v]} answer copied.`),
        kept: el("label", { class: "kept", hidden: true }, kept, "go on from this"),
        add: el("button", { type: "button", class: "add", hidden: true, onclick: () => run(turn, [v]) }),
      };
      part.thoughts = el("details", { class: "thoughts", hidden: true }, part.thinking, part.thought);
      part.section = el("section", { class: `answer ${v}`, "aria-label": `${NAMES[v]} answer` },
        el("header", {}, el("h3", {}, NAMES[v]), part.spec, part.state, part.kept),
        part.thoughts, text, part.add, el("footer", { class: "answer-foot" }, part.figures, part.copy));
      view.answers[v] = part;
    }
    view.differ = el("span", { class: "differ" });
    view.actions = el("span", { class: "actions", hidden: true },
      el("button", { type: "button", class: "quiet", onclick: () => run(turn, shown()) }, "Again, same seed"),
      el("button", { type: "button", class: "quiet", onclick: () => {
        turn.seed = drawSeed();
        run(turn, shown());
      } }, "Again, new seed"));
    view.article = el("article", { class: "turn", "aria-label": `Message ${index + 1}` },
      view.asked = el("header", { class: "asked" }),
      el("div", { class: "answers" }, view.answers.plain.section, view.answers.looped.section),
      el("footer", { class: "turn-foot" }, view.differ, view.actions));
    $("log").append(view.article);
    views.set(turn, view);
    view.edit = el("button", { type: "button", class: "quiet", onclick: () => edit(turn) }, "Edit");
    view.asked.append(el("h2", { class: "user" }, turn.user), view.edit);
    return view;
  }

  /** The message as a field; sent again, it takes the place of what it was and of all that came after it. */
  function edit(turn) {
    const view = views.get(turn);
    const before = [...view.asked.childNodes];
    const later = turns.length - 1 - turns.indexOf(turn);
    const field = el("textarea", { "aria-label": "Message", rows: 1 + Math.min(turn.user.split("\n").length, 8) });
    const done = () => {
      view.asked.replaceChildren(...before);
      view.edit.focus();
    };
    const form = el("form", { class: "edit", onsubmit: (event) => {
      event.preventDefault();
      const text = field.value;
      if (running || !text.trim() || !asked(shown())) return;
      for (const dropped of turns.splice(turns.indexOf(turn) + 1)) {
        views.get(dropped).article.remove();
        views.delete(dropped);
      }
      Object.assign(turn, { user: text, answers: {} });
      before[0].textContent = text;
      done();
      run(turn, shown());
    } }, field, el("div", {},
      el("button", { type: "submit" }, "Send again"),
      el("button", { type: "button", class: "quiet", onclick: done }, "Cancel"),
      later ? el("span", { class: "hint" }, `The ${later === 1 ? "message" : `${later} messages`} after it will go.`)
        : null));
    field.value = turn.user;
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") done();
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      form.requestSubmit();
    });
    view.asked.replaceChildren(form);
    field.focus();
  }

  function drawTurn(turn) {
    const view = views.get(turn);
    const { plain, looped } = turn.answers;
    const open = VARIANTS.map((v) => isOpen(turn.answers[v]));
    const both = settings.view === "both" && plain?.text && looped?.text;
    const read = VARIANTS.map((v) => view.answers[v].prose.read(turn.answers[v]?.text ?? "").text);
    const state = both ? JSON.stringify([...read, open]) : "";
    if (state !== view.compared) {
      view.compared = state;
      view.diff = both ? compare(...read, open, open.includes(true) ? LIVE_PAIRS : undefined) : null;
    }
    const diff = view.diff;
    VARIANTS.forEach((v, i) => drawAnswer(turn, v, diff && (i ? diff.right : diff.left)));
    const finished = both && FINAL.includes(plain.state) && FINAL.includes(looped.state);
    view.differ.textContent = finished ? `${differing(diff)} ${ratio(plain, looped)}` : "";
    const last = turn === turns[turns.length - 1];
    view.actions.hidden = !last || running !== null;
    view.edit.hidden = running !== null;
  }

  function drawAnswer(turn, v, marked) {
    const part = views.get(turn).answers[v];
    const answer = turn.answers[v];
    const state = answer?.state ?? "missing";
    part.section.dataset.state = state;
    part.section.setAttribute("aria-busy", String(isOpen(answer)));
    part.spec.textContent = answer?.loop ?? "";
    part.state.textContent = STATES[state] ?? "";
    part.prose.show(marked);
    const thought = answer?.thought ?? "";
    part.thoughts.hidden = !thought;
    if (part.thought.textContent !== thought) part.thought.textContent = thought;
    part.thinking.textContent = isOpen(answer) && !answer.text ? "Thinking" : `Thought, ${words(thought)}`;
    const silent = thought && !answer.text && FINAL.includes(state);
    part.note.hidden = !silent && state !== "error";
    part.note.className = state === "error" ? "note error" : "note hint";
    part.note.textContent = state === "error" ? answer.error : silent ? "It wrote no answer after its thinking." : "";
    part.text.hidden = state === "missing";
    part.figures.textContent = FINAL.includes(state) ? figures(answer) : progress(answer);
    const choice = settings.view === "both" && VARIANTS.every((each) => turn.answers[each]?.text);
    part.copy.hidden = !answer?.text || isOpen(answer) || !navigator.clipboard; // there is none over plain http
    part.kept.hidden = !choice || isOpen(answer);
    part.kept.firstChild.checked = turn.kept === v;
    part.add.hidden = state !== "missing" && state !== "error";
    part.add.textContent = state === "error" ? "Try again" : OTHER[v];
    part.add.disabled = running !== null;
  }

  function drawAll() {
    $("log").dataset.view = settings.view;
    $("empty").hidden = turns.length > 0;
    talks.refresh();
    turns.forEach((turn, i) => {
      if (!views.has(turn)) createTurn(turn, i);
      drawTurn(turn);
    });
    $("send").hidden = running !== null;
    $("stop").hidden = running === null;
  }

  /** Draw a turn soon, once for all that comes until then, and follow the text if the reader is at the end. */
  const drawSoon = (() => {
    const due = new Set();
    let took = 0; // ms
    return (turn) => {
      if (due.has(turn)) return;
      due.add(turn);
      setTimeout(() => {
        due.delete(turn);
        const began = performance.now();
        following(() => views.has(turn) && drawTurn(turn));
        took = performance.now() - began;
      }, Math.max(DRAW_EVERY, DRAW_SHARE * took));
    };
  })();

  function following(draw) {
    const box = $("scroll");
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
    draw();
    if (atEnd) box.scrollTop = box.scrollHeight;
  }

  // asking

  /** What is asked of the server, as the controls say; null, and a line of why, if they are wrong. */
  function asked(variants) {
    try {
      const sampling = controls.sampling();
      return { sampling, loop: variants.includes("looped") ? controls.loop() : null };
    } catch (e) {
      alertLine(e.message);
      return null;
    }
  }

  async function run(turn, variants) {
    const wanted = running ? null : asked(variants);
    if (!wanted) return;
    const { sampling, loop } = wanted;
    alertLine("");
    const abort = new AbortController();
    running = { abort, turn };
    if (document.activeElement?.closest(".turn")) focusPrompt(); // what was pressed is about to go
    const { seed: _, ...drawn } = sampling; // the seed is the turn's
    turn.sampling = drawn;
    const body = {
      messages: messagesFor(turns, turns.indexOf(turn), settings.system), ...drawn, seed: turn.seed,
      ...(model() ? { model: model() } : {}),
    };
    for (const v of variants) turn.answers[v] = newAnswer(v === "looped" ? loop : null);
    if (!variants.includes(turn.kept) && !turn.answers[turn.kept]) turn.kept = variants[variants.length - 1];
    drawAll();
    $("scroll").scrollTop = $("scroll").scrollHeight;
    announce(variants.length > 1 ? "Both answers are being written." : "The answer is being written.");
    const together = variants.length > 1;
    await Promise.all(variants.map((v) => {
      const asked = { ...body, loop: v === "looped" ? spell(loop) : null };
      return write(turn, v, asked, abort.signal, together);
    }));
    running = null;
    if (turns.includes(turn)) keep(); // and not another that was opened meanwhile
    following(drawAll);
    announce(spoken(turn, variants));
  }

  async function write(turn, v, body, signal, together) {
    const answer = turn.answers[v];
    const began = performance.now();
    let first = 0;
    let last = 0;
    let pieces = 0;
    answer.together = together;
    const grow = (field) => (text) => {
      last = performance.now();
      first ||= last;
      answer.firstSeconds ??= (first - began) / 1000;
      answer.state = "streaming";
      answer[field] += text;
      answer.tokens = ++pieces; // a piece is a token nearly always; the usage corrects it
      answer.rate = rateOf(pieces, last - first);
      drawSoon(turn);
      keepSoon();
    };
    try {
      const { finish, usage, timings } = await streamChat(body, {
        signal, onText: grow("text"), onThought: grow("thought"),
      });
      answer.finish = finish;
      answer.tokens = usage?.completion_tokens ?? timings?.predicted_n ?? pieces;
      answer.rate = timings?.predicted_per_second ?? rateOf(answer.tokens, last - first);
      if (usage?.loop && v === "looped") answer.loop = usage.loop;
      answer.state = "done";
    } catch (e) {
      answer.state = e.name === "AbortError" || (leaving && e.status === 0) ? "stopped" : "error";
      if (answer.state === "error") {
        answer.error = oneLine(e.message);
        if (!(e instanceof ApiError)) console.error(e);
        if (e.status === 401) onLocked();
        else if (GONE.includes(e.status)) onLost();
      }
    }
    answer.seconds = (performance.now() - began) / 1000;
    drawSoon(turn);
    if (turns.includes(turn)) keepSoon();
  }

  function stop() {
    running?.abort.abort();
    focusPrompt();
  }

  function send(text) {
    if (running || !text.trim()) return;
    const seed = controls.sampling().seed;
    turns.push({
      user: text, seed: seed === null ? drawSeed() : (seed + turns.length) % (2 ** 32 - 1),
      kept: settings.view === "plain" ? "plain" : "looped", answers: {},
    });
    $("prompt").value = "";
    fit();
    run(turns[turns.length - 1], shown());
    if (!running) { // refused before it was asked: nothing is said, nothing is lost
      turns.pop();
      $("prompt").value = text;
      fit();
    }
  }

  function submit() {
    try {
      send($("prompt").value);
    } catch (e) {
      alertLine(e.message);
    }
  }

  // the composer

  /** On a touch screen this would open the keyboard over the answers. */
  function focusPrompt() {
    if (matchMedia("(hover: hover)").matches) $("prompt").focus();
  }

  function fit() {
    const prompt = $("prompt");
    prompt.style.height = "auto";
    prompt.style.height = `${prompt.scrollHeight + 2}px`;
  }

  $("prompt").addEventListener("input", fit);
  $("prompt").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    submit();
  });
  $("composer").addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
  $("stop").addEventListener("click", stop);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) stop();
  });
  for (const radio of document.querySelectorAll("input[name=view]")) {
    radio.checked = radio.value === settings.view;
    radio.addEventListener("change", () => {
      settings.view = radio.value;
      saveSettings(settings);
      drawAll();
    });
  }

  function replaceTurns() {
    running?.abort.abort();
    clearTimeout(keepTimer);
    keepTimer = 0;
    turns = talks.turns();
    views.clear();
    $("log").replaceChildren();
    drawAll();
    $("scroll").scrollTop = $("scroll").scrollHeight;
  }

  // A page that goes takes its requests along, and the browser reports them as failed; they were stopped by that.
  addEventListener("beforeunload", () => {
    leaving = true;
    setTimeout(() => (leaving = false), 2000); // it can stay after all
  });
  addEventListener("pagehide", () => {
    if (keepTimer) keep();
  });

  function measure() {
    const box = $("scroll"); // its gutter, so that its text ends where the composer does
    document.documentElement.style.setProperty("--scrollbar", `${box.offsetWidth - box.clientWidth}px`);
  }
  new ResizeObserver(measure).observe($("scroll"));
  drawAll();
  $("scroll").scrollTop = $("scroll").scrollHeight;
  return { send, redraw: drawAll };
}

const isOpen = (answer) => answer?.state === "waiting" || answer?.state === "streaming";

const words = (text) => `${text.split(/\s+/).filter(Boolean).length} words`;

const rateOf = (tokens, ms) => (tokens > 1 && ms > 0 ? ((tokens - 1) * 1000) / ms : null);

function drawSeed() {
  return crypto.getRandomValues(new Uint32Array(1))[0] % (2 ** 32 - 1);
}

function progress(answer) {
  if (!answer || answer.state === "waiting") return "";
  return answer.rate === null ? "" : `${speed(answer.rate)}, ${answer.tokens} tokens`;
}

/** How fast the looped answer came against the plain one, where both were written in the same way. */
function ratio(plain, looped) {
  if (!plain?.rate || !looped?.rate || isOpen(plain) || isOpen(looped) || plain.together !== looped.together) return "";
  const how = looped.together ? ", side by side" : "";
  return `Looped at ${(looped.rate / plain.rate).toFixed(2)}\u00d7 the plain speed${how}.`;
}

function differing(diff) {
  if (!diff) return "Too long to compare word by word.";
  if (diff.same) return "The same words.";
  const [plain, looped] = diff.differ;
  if (plain + looped === 0) return "The same words, other signs.";
  const [of, ofLooped] = diff.words;
  return `Words the other answer lacks: ${plain} of ${of} plain, ${looped} of ${ofLooped} looped. Answers of two seeds `
    + "differ as much.";
}

function spoken(turn, variants) {
  const states = variants.map((v) => {
    const { state, error } = turn.answers[v];
    const ended = state === "done" ? "finished" : state === "error" ? `failed: ${error.replace(/\.$/, "")}` : state;
    return `${NAMES[v]} answer ${ended}`;
  });
  return `${states.join(". ")}.`;
}
