// The page: connects to the server, switches between the tabs, asks for the API key when the server wants one.

import { $, alertLine, announce, el } from "./dom.js";
import { getJson, hasKey, request, setKey } from "./api.js";
import { createChat } from "./chat.js";
import { createControls } from "./controls.js";
import { createResults } from "./results.js";
import { loadSettings } from "./store.js";

const AGAIN = 1000; // ms between two looks at a server that loads or is away
const EXAMPLES = [
  "Why is the sky blue?",
  "A bat and a ball cost 1.10 together; the bat costs 1 more than the ball. What does the ball cost?",
  "List four uses for a brick.",
];

const settings = loadSettings();
const controls = createControls(settings);
let modelName = null;
let connecting = false;
const chat = createChat({ settings, controls, model: () => modelName, onLocked: askForKey, onLost: connect });
const results = createResults({ onLocked: askForKey });

// the model

function showModel(state, text) {
  if ($("model").textContent === text) return;
  $("model").dataset.state = state;
  $("model").textContent = text;
}

/** Find out what is served, and go on asking while the server loads or is away. */
async function connect() {
  if (connecting) return;
  connecting = true;
  while (await isToWait()) await new Promise((resolve) => setTimeout(resolve, AGAIN));
  connecting = false;
}

async function isToWait() {
  try {
    await request("health", { cache: "no-store" });
    useModel(await getJson("props"));
    return false;
  } catch (e) {
    if (e.status === 503) showModel("loading", "The model is loading");
    else if (e.status === 0) showModel("error", "Server unreachable, trying again");
    else if (e.status === 401) {
      showModel("locked", "Locked");
      askForKey();
    } else {
      showModel("error", "No model");
      alertLine(e.message ?? String(e));
    }
    return e.status === 503 || e.status === 0;
  }
}

function useModel(props) {
  const { n_ctx, params = {} } = props.default_generation_settings ?? {};
  modelName = props.model_alias;
  const context = n_ctx ? `, context ${n_ctx}` : "";
  showModel("ready", `${modelName}, ${props.n_layer} layers${context}`);
  document.title = `${modelName} \u2013 ggufloop`;
  controls.setModel({
    name: modelName, layers: props.n_layer, started: props.loop || null, // the loop `serve` was given, as text
    suggested: props.loop_menu?.[0]?.split(" ")[0],
    sampling: {
      temperature: params.temperature, maxTokens: params.n_predict > 0 ? params.n_predict : undefined,
      topK: params.top_k, topP: params.top_p, minP: params.min_p,
    },
  });
}

// the key

function askForKey() {
  $("key-button").hidden = false;
  const refused = "The server does not take that key; give another";
  $("key-label").textContent = hasKey() ? refused : "This server wants an API key";
  openKey(true);
}

function openKey(open) {
  $("key-form").hidden = !open;
  $("key-button").setAttribute("aria-expanded", String(open));
  if (open) $("key").focus();
}

$("key-button").hidden = !hasKey();
$("key-button").addEventListener("click", () => openKey($("key-form").hidden));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key").value.trim());
  $("key").value = "";
  openKey(false);
  alertLine("");
  announce("The key is used from now on.");
  connect();
  if (!$("results").hidden) results.refresh();
  $("prompt").focus();
});
$("alert-close").addEventListener("click", () => {
  alertLine("");
  $("prompt").focus();
});

// the tabs

const TABS = ["chat", "results"];

function place() {
  try {
    return decodeURIComponent(location.hash.slice(1)).split("/");
  } catch {
    return []; // somebody else's address
  }
}

async function route() {
  const [tab, ...rest] = place();
  const chosen = TABS.includes(tab) ? tab : "chat";
  for (const name of TABS) {
    $(name).hidden = name !== chosen;
    $(`tab-${name}`).setAttribute("aria-selected", String(name === chosen));
    $(`tab-${name}`).tabIndex = name === chosen ? 0 : -1;
  }
  if (chosen === "results") {
    await results.refresh();
    results.show(rest.join("/"));
  }
}

TABS.forEach((name, i) => {
  $(`tab-${name}`).addEventListener("click", () => {
    if ($(name).hidden) location.hash = name;
  });
  $(`tab-${name}`).addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const next = { Home: 0, End: 1 }[event.key] ?? 1 - i;
    $(`tab-${TABS[next]}`).focus();
    location.hash = TABS[next];
  });
});
addEventListener("hashchange", route);

$("examples").append(...EXAMPLES.map((text) => el("li", {}, el("button", { type: "button", onclick: () => {
  $("prompt").value = text;
  $("prompt").focus();
  $("prompt").dispatchEvent(new Event("input"));
} }, text))));

route();
connect();
if ($("results").hidden && matchMedia("(hover: hover)").matches) $("prompt").focus();
