// Talking to the server this page came from, and to no other: addresses are relative. No DOM.

const KEY = "ggufloop.key";
let key = "";
try {
  key = sessionStorage.getItem(KEY) ?? "";
} catch { /* storage can be forbidden; the key then lasts as long as the page */ }

/** What a request failed with, in one line; `status` is 0 where no answer came at all. */
export class ApiError extends Error {
  constructor(message, status) {
    super(oneLine(message));
    this.status = status;
  }
}

export function hasKey() {
  return key !== "";
}

/** Send this API key from now on; it is forgotten when the tab closes. "" forgets it now. */
export function setKey(text) {
  key = text;
  try {
    if (text) sessionStorage.setItem(KEY, text);
    else sessionStorage.removeItem(KEY);
  } catch { /* as above */ }
}

/** Text from elsewhere as one line of bearable length. */
export function oneLine(text) {
  const line = String(text).replace(/\s+/g, " ").trim();
  return line.length > 300 ? `${line.slice(0, 299)}\u2026` : line;
}

/** fetch with the key; throws ApiError unless the answer is 2xx, or AbortError. */
export async function request(path, init = {}) {
  const headers = new Headers(init.headers);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...init, headers, credentials: "omit" });
  } catch (e) {
    if (e.name === "AbortError") throw e;
    throw new ApiError("The server cannot be reached. Is it still running?", 0);
  }
  if (response.ok) return response;
  throw new ApiError(await errorText(response), response.status);
}

async function errorText(response) {
  let told = "";
  try {
    const { error, detail } = JSON.parse(await response.text());
    told = typeof error === "string" ? error : (error?.message ?? detail ?? "");
  } catch { /* not JSON */ }
  if (response.status === 401) return told || "This server wants an API key.";
  return told || `The server answered ${response.status} ${response.statusText}.`;
}

export async function getJson(path) {
  try {
    return await (await request(path, { cache: "no-store" })).json();
  } catch (e) {
    if (e instanceof SyntaxError) throw new ApiError(`The answer to ${path} is not JSON.`, 200);
    throw e;
  }
}

/** The data of each event of a server-sent stream. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  let data = [];
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    held += value;
    const lines = held.split(/\r\n|\n|\r(?!$)/);
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
      else if (line === "" && data.length) {
        yield data.join("\n");
        data = [];
      }
    }
  }
}

/**
 * One streamed chat completion. onText(text) is called for each piece, onThought(text) for each of what a thinking
 * model writes before it; resolves to { finish, usage, timings }, the last two null where the server does not say.
 * Throws ApiError, or AbortError when `signal` stops it.
 */
export async function streamChat(body, { signal, onText, onThought }) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const out = { finish: null, usage: null, timings: null };
  try {
    for await (const data of events(response)) {
      if (data === "[DONE]") return out;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? chunk.error, 200);
      const choice = chunk.choices?.[0];
      if (choice?.delta?.reasoning_content) onThought(choice.delta.reasoning_content);
      if (choice?.delta?.content) onText(choice.delta.content);
      out.finish = choice?.finish_reason ?? out.finish;
      out.usage = chunk.usage ?? out.usage;
      out.timings = chunk.timings ?? out.timings;
    }
  } catch (e) {
    if (e.name === "AbortError" || e instanceof ApiError) throw e;
    throw new ApiError(e instanceof SyntaxError ? "The server sent something that is not JSON." : BROKEN, 0);
  }
  if (out.finish === null) throw new ApiError(BROKEN, 0);
  return out;
}

const BROKEN = "The answer broke off: the server closed the connection.";
