"""From a request's checked body to what the engine thread is asked, and how its answer is to be told.

    order = reader.chat(body, header)         # raises UsageError, Invalid, TooLong
    order.ask, order.tool                     # for the worker; the name of the tool that must be called, if any

Everything that can be refused is refused here, before anything waits in a queue. Reading a request takes the model's
tokenizer and its template, which is work for a thread of its own when texts are long; nothing here changes the model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from ggufloop.engine import LoopedLlama
from ggufloop.errors import UsageError
from ggufloop.generate import encode
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling
from ggufloop.sequences import Draw
from ggufloop.server.grammar import compile_schema
from ggufloop.server.jobs import Ask
from ggufloop.server.loops import Served
from ggufloop.server.validate import Invalid
from ggufloop.template import PLAIN, ChatTemplate

_NAMES = {
    "temperature": "temp",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
}


class TooLong(UsageError):
    """A prompt that leaves no room for an answer."""


@dataclass(frozen=True)
class Order:
    """A request: what is asked of the engine, and the form its answer takes.

    model: as the answer names it. tool: the answer is a call of this tool. echo: text in front of the answer.
    """

    ask: Ask
    model: str
    stream: bool
    include_usage: bool
    user: str | None
    tool: str | None = None
    echo: str = ""


class Reader:
    """Reads requests for one loaded model.

    sampling: what holds where a request says nothing. n_ctx: tokens of one conversation. prompt_tokens: most tokens
    of a prompt; None: what fits.
    """

    def __init__(
        self, llm: LoopedLlama, served: Served, sampling: Sampling, n_ctx: int, prompt_tokens: int | None
    ) -> None:
        self.llm = llm
        self.served = served
        self.sampling = sampling
        self.n_ctx = n_ctx
        self.most = n_ctx - 1 if prompt_tokens is None else min(prompt_tokens, n_ctx - 1)
        self.template = ChatTemplate.of(llm)

    def chat(self, body: dict[str, Any], header: str | None) -> Order:
        """The order of a chat completion. Raises UsageError and its kinds."""
        loop = self._loop(body, header)
        template = self.template or PLAIN
        tools, tool = _tools(body)
        grammar = _grammar(body.get("response_format"))
        if tool is not None:
            grammar = compile_schema(tool.get("parameters") or {"type": "object"})
        text = template.render(_messages(body["messages"]), tools=tools)
        tokens = self.tokenize(text, True, True)
        if len(tokens) > 1 and tokens[0] == tokens[1] == self.llm.token_bos():
            del tokens[0]  # the template writes it, and so does the tokenizer
        n = body.get("max_completion_tokens") or body.get("max_tokens")
        logprobs = int(body.get("top_logprobs") or 0) if body.get("logprobs") else None
        ask = Ask(
            self._fitting(tokens), loop, self._draw(body, n, grammar),
            stop=(*template.stop, *_stops(body)), strip=True, logprobs=logprobs,
            turns=body.get("cache_prompt") is not False,
        )  # fmt: skip
        return self._order(body, ask, tool=None if tool is None else str(tool["name"]))

    def completion(self, body: dict[str, Any], header: str | None) -> Order:
        """The order of a completion. Raises UsageError and its kinds."""
        loop = self._loop(body, header)
        prompt = body["prompt"]
        if isinstance(prompt, list) and isinstance(prompt[0], str):
            prompt = prompt[0]
        if isinstance(prompt, str):
            tokens = self.tokenize(prompt, True, True)
        else:
            tokens = [int(token) for token in prompt]
            self.check_tokens(tokens)
        if not tokens:
            raise Invalid("prompt", "has no tokens")
        logprobs, echo = None if body.get("logprobs") is None else int(body["logprobs"]), ""
        if body.get("echo"):
            if logprobs is not None:
                raise Invalid("echo", "cannot be combined with logprobs: those of the prompt are not computed")
            echo = prompt if isinstance(prompt, str) else self.text(tokens)
        ask = Ask(
            self._fitting(tokens), loop,
            self._draw(body, body.get("max_tokens"), _grammar(body.get("response_format"))),
            stop=_stops(body), logprobs=logprobs, turns=body.get("cache_prompt") is not False,
        )  # fmt: skip
        return self._order(body, ask, echo=echo)

    def tokenize(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        """The tokens of a text."""
        tokens: list[int] = self.llm.tokenize(encode(text, "the text"), add_bos=add_special, special=parse_special)
        return tokens

    def check_tokens(self, tokens: list[int]) -> None:
        """Raise Invalid for a token that is not in the vocabulary."""
        n_vocab = self.llm.n_vocab()
        bad = next((t for t in tokens if not 0 <= t < n_vocab), None)
        if bad is not None:
            raise Invalid("tokens", f"holds {bad}, which is not in the vocabulary of {n_vocab}")

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, control tokens written out."""
        self.check_tokens(tokens)
        return self.llm.detokenize(tokens, special=True).decode("utf-8", "replace") if tokens else ""

    def _loop(self, body: dict[str, Any], header: str | None) -> LoopSpec | None:
        loop = self.served.choose(body, header)
        if loop is not None:
            self.llm.check(loop)
        return loop

    def _fitting(self, tokens: list[int]) -> tuple[int, ...]:
        if len(tokens) > self.most:
            raise TooLong(
                f"the prompt has {len(tokens)} tokens, and {self.most} are the most here.",
                "shorten it, or start the server with a larger context (-c).",
            )
        return tuple(tokens)

    def _draw(self, body: dict[str, Any], n: int | None, grammar: str | None) -> Draw:
        values = {ours: body[theirs] for theirs, ours in _NAMES.items() if body.get(theirs) is not None}
        values = {k: int(v) if k == "top_k" else float(v) for k, v in values.items()}
        sampling = replace(self.sampling, **values)
        if body.get("seed") is not None:
            sampling = replace(sampling, seed=int(body["seed"]))
        elif self.sampling.seed == -1:
            sampling = replace(sampling, seed=-1)
        if n is not None:
            sampling = replace(sampling, n=int(n))
        return Draw(
            sampling.seeded(),
            float(body.get("frequency_penalty") or 0.0),
            float(body.get("presence_penalty") or 0.0),
            self._bias(body.get("logit_bias") or {}),
            grammar,
        )

    def _bias(self, given: dict[str, float]) -> tuple[tuple[int, float], ...]:
        for text in given:
            if not (text.isascii() and text.isdecimal() and len(text) < 10):
                raise Invalid("logit_bias", f"has the key {text[:20]!r}, which is no token id")
        bias = {int(text): float(value) for text, value in given.items()}
        self.check_tokens(list(bias))
        return tuple(bias.items())

    def _order(self, body: dict[str, Any], ask: Ask, tool: str | None = None, echo: str = "") -> Order:
        options = body.get("stream_options") or {}
        return Order(
            ask, body.get("model") or self.served.name, bool(body.get("stream")), bool(options.get("include_usage")),
            body.get("user"), tool, echo,
        )  # fmt: skip


def _stops(body: dict[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates take them: content as text, developer as system."""
    out = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        calls = message.get("tool_calls")
        if content is None and not calls:
            raise Invalid(f"messages[{i}].content", "is missing")
        role = "system" if message["role"] == "developer" else message["role"]
        plain: dict[str, Any] = {"role": role, "content": content or ""}
        if calls:
            plain["tool_calls"] = [_call(call) for call in calls]
        plain.update({key: message[key] for key in ("name", "tool_call_id") if message.get(key)})
        out.append(plain)
    return out


def _call(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])  # templates write them with tojson
    except (ValueError, RecursionError):
        arguments = function["arguments"]
    return {**call, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(body: dict[str, Any]) -> tuple[list[dict[str, Any]] | None, dict[str, Any] | None]:
    """The tools a template is told of, and the function that must be called. Raises Invalid."""
    tools, choice = body.get("tools") or None, body.get("tool_choice")
    if choice in (None, "auto"):
        return tools, None
    if choice == "none":
        return None, None
    functions = [tool["function"] for tool in tools or []]
    if choice == "required":
        if len(functions) != 1:
            raise Invalid("tool_choice", "'required' needs exactly one tool; name the function to call")
        return tools, functions[0]
    name = choice["function"]["name"]
    function = next((f for f in functions if f["name"] == name), None)
    if function is None:
        raise Invalid("tool_choice", f"names {name[:80]!r}, which is not among the tools")
    return tools, function


def _grammar(form: dict[str, Any] | None) -> str | None:
    """The grammar of a response_format, None for text."""
    if form is None or form["type"] == "text":
        return None
    schema = form.get("schema")
    if form["type"] == "json_schema":
        schema = (form.get("json_schema") or {}).get("schema", schema)
        if schema is None:
            raise Invalid("response_format.json_schema.schema", "is missing")
    return compile_schema(schema or {"type": "object"})
