// The model's layers as a strip, the window marked and its passes stacked above it; two sliders move its edges.

import { $ } from "./dom.js";
import { clampWindow } from "./loop.js";

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 64; // px
const BASE = 16; // of a layer

function rect(x, y, width, height, name) {
  const node = document.createElementNS(SVG, "rect");
  for (const [key, value] of Object.entries({ x, y, width, height, class: name })) {
    node.setAttribute(key, value);
  }
  return node;
}

/** The space between neighbours that are so far apart; those that have no room for it run together. */
const gapOf = (pitch) => (pitch > 9 ? 2 : pitch > 4 ? 1 : 0);

/** Wire the strip up. onChange([start, end]) is called when the user moves the window. */
export function createStrip(onChange) {
  const start = $("window-start");
  const end = $("window-end");
  const svg = $("layers");
  let layers = 0;
  let window_ = [1, 2];
  let passes = 1;

  function place(input, least, most, value, spoken) {
    input.min = least;
    input.max = most;
    input.value = value;
    input.setAttribute("aria-valuetext", spoken);
    input.style.setProperty("--left", `${(100 * least) / layers}%`);
    input.style.setProperty("--span", `${(100 * (most - least)) / layers}%`);
  }

  function draw() {
    const [a, b] = window_;
    place(start, 1, layers - 2, a, `layer ${a}`);
    place(end, 2, layers - 1, b, `layer ${b - 1}`);
    const width = svg.clientWidth || 1000;
    svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
    const cell = width / layers;
    const base = HEIGHT - BASE;
    const gap = gapOf(cell);
    const nodes = [];
    for (let i = 0; i < layers; i++) {
      nodes.push(rect(i * cell, base, cell - gap, BASE, i >= a && i < b ? "layer inside" : "layer"));
    }
    const row = Math.min(BASE, (base - 2) / Math.max(passes - 1, 1));
    for (let pass = 1; pass < passes; pass++) {
      for (let i = a; i < b; i++) {
        nodes.push(rect(i * cell, base - pass * row - 1, cell - gap, row - gapOf(row), "layer pass"));
      }
    }
    const grip = rect(a * cell, 0, (b - a) * cell, HEIGHT, "grip");
    grip.addEventListener("pointerdown", drag);
    svg.replaceChildren(...nodes, grip);
    const label = $("axis-window");
    label.textContent = b - a === 1 ? `layer ${a}` : `layers ${a} to ${b - 1}`;
    const middle = (50 * (a + b)) / layers;
    label.style.setProperty("--at", `${middle}%`);
    label.dataset.side = middle < 18 ? "left" : middle > 82 ? "right" : "middle";
    $("axis-last").textContent = layers - 1;
    $("axis-first").hidden = middle < 28;
    $("axis-last").hidden = middle > 72;
  }

  function move(next) {
    const [a, b] = clampWindow(next, layers);
    const changed = a !== window_[0] || b !== window_[1];
    window_ = [a, b];
    draw();
    if (changed) onChange(window_);
  }

  function shift(by) {
    const [a, b] = window_;
    const step = Math.max(1 - a, Math.min(by, layers - 1 - b));
    move([a + step, b + step]);
  }

  function drag(event) {
    if (event.button !== 0) return;
    event.preventDefault();
    const cell = svg.getBoundingClientRect().width / layers;
    const from = event.clientX;
    const [a, b] = window_;
    const onMove = (e) => {
      const wanted = Math.round((e.clientX - from) / cell);
      const step = Math.max(1 - a, Math.min(wanted, layers - 1 - b));
      move([a + step, b + step]);
    };
    const onUp = () => {
      document.removeEventListener("pointermove", onMove);
      document.removeEventListener("pointerup", onUp);
      document.removeEventListener("pointercancel", onUp);
    };
    document.addEventListener("pointermove", onMove);
    document.addEventListener("pointerup", onUp);
    document.addEventListener("pointercancel", onUp);
  }

  // An edge stops one layer before the other: a window is never empty.
  start.addEventListener("input", () => move([Math.min(Number(start.value), window_[1] - 1), window_[1]]));
  end.addEventListener("input", () => move([window_[0], Math.max(Number(end.value), window_[0] + 1)]));
  for (const input of [start, end]) {
    input.addEventListener("keydown", (event) => {
      const by = { ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1 }[event.key];
      if (!by || !event.shiftKey) return;
      event.preventDefault();
      shift(by);
    });
  }

  new ResizeObserver(() => layers && draw()).observe(svg);
  return {
    /** Show a model of so many layers with this window, which runs `passes` times. */
    set(nLayers, window, nPasses) {
      layers = nLayers;
      $("strip").hidden = false;
      window_ = clampWindow(window, layers);
      passes = nPasses;
      draw();
      return window_;
    },
  };
}
