"""Answers in OpenAI's form, whole and as a stream of chunks; plain dictionaries in and out of nothing.

form = Form(order, "chat", rid, created)
form.whole(text, done, logprobs);   form.first(), form.piece(piece), form.last(done), form.usage_chunk(done)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggufloop.errors import GgufloopError
from ggufloop.server.jobs import Done, Logprob, Piece
from ggufloop.server.loops import loop_to_json
from ggufloop.server.requests import Order

Json = dict[str, Any]


def error(message: str, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """An error as OpenAI's API tells it."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(e: GgufloopError, kind: str, param: str | None = None, code: str | None = None) -> Json:
    """An error of ours: the value and the rule, then what to do."""
    return error(f"{e.message} {e.hint}".strip(), kind, param, code)


class Form:
    """One answer's form. kind: 'chat' or 'text'; rid, created: its id and time."""

    def __init__(self, order: Order, kind: str, rid: str, created: int) -> None:
        self.order = order
        self.chat = kind == "chat"
        self._head = {"id": rid, "created": created, "model": order.model}
        self._told = 0  # characters, for the offsets of text completions

    def usage(self, done: Done) -> Json:
        """Tokens, and the loop that ran."""
        prompt = len(self.order.ask.prompt)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": done.generated,
            "total_tokens": prompt + done.generated,
            "prompt_tokens_details": {"cached_tokens": done.cached},
            "loop": loop_to_json(self.order.ask.loop),
        }

    def _extra(self, done: Done) -> Json:
        t = done.timings

        def rate(tokens: int, seconds: float) -> float | None:
            return tokens / seconds if seconds > 0 else None

        return {
            "seed": self.order.ask.draw.sampling.seed,
            "timings": {
                "cache_n": done.cached,
                "prompt_n": t.prompt_tokens,
                "prompt_ms": 1000 * t.prompt_seconds,
                "prompt_per_second": rate(t.prompt_tokens, t.prompt_seconds),
                "predicted_n": t.generated_tokens,
                "predicted_ms": 1000 * t.generated_seconds,
                "predicted_per_second": rate(t.generated_tokens, t.generated_seconds),
            },
        }

    def whole(self, text: str, done: Done, logprobs: Sequence[Logprob]) -> Json:
        """The answer as one object."""
        choice: Json = {"index": 0, "finish_reason": self._finish(done), "logprobs": self._logprobs(logprobs)}
        if not self.chat:
            choice["text"] = self.order.echo + text
        elif self.order.tool is None:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
        else:
            call = {"id": self._call_id(), "type": "function", "function": {"name": self.order.tool, "arguments": text}}
            choice["message"] = {"role": "assistant", "content": None, "refusal": None, "tool_calls": [call]}
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self.usage(done), **self._extra(done)}

    def first(self) -> Json | None:
        """The chunk before any text: whose turn it is, or the echo; None if there is nothing to say."""
        if not self.chat:
            return self._chunk({"text": self.order.echo}) if self.order.echo else None
        delta: Json = {"role": "assistant", "content": ""}
        if self.order.tool is not None:
            function = {"name": self.order.tool, "arguments": ""}
            call = {"index": 0, "id": self._call_id(), "type": "function", "function": function}
            delta = {"role": "assistant", "content": None, "tool_calls": [call]}
        return self._chunk({"delta": delta})

    def piece(self, piece: Piece) -> Json:
        """A chunk of text."""
        logprobs = self._logprobs(piece.logprobs)
        if not self.chat:
            return self._chunk({"text": piece.text, "logprobs": logprobs})
        delta: Json = {"content": piece.text}
        if self.order.tool is not None:
            delta = {"tool_calls": [{"index": 0, "function": {"arguments": piece.text}}]}
        return self._chunk({"delta": delta, "logprobs": logprobs})

    def last(self, done: Done) -> Json:
        """The chunk that ends the text."""
        logprobs = self._logprobs(done.logprobs) if done.logprobs else None
        end: Json = {"delta": {}} if self.chat else {"text": ""}
        return {**self._chunk({**end, "logprobs": logprobs}, self._finish(done)), **self._extra(done)}

    def usage_chunk(self, done: Done) -> Json:
        """The chunk after it, if the client asked for it."""
        return {**self._chunk({}), "choices": [], "usage": self.usage(done)}

    def _chunk(self, choice: Json, finish: str | None = None) -> Json:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        full = {"index": 0, "finish_reason": finish, "logprobs": None, **choice}
        return {**self._head, "object": kind, "choices": [full]}

    def _finish(self, done: Done) -> str:
        return "tool_calls" if self.order.tool is not None and done.finish == "stop" else done.finish

    def _call_id(self) -> str:
        return "call_" + str(self._head["id"]).rpartition("-")[2][:24]

    def _logprobs(self, entries: Sequence[Logprob]) -> Json | None:
        if self.order.ask.logprobs is None:
            return None
        if self.chat:
            return {"content": [_content(e) for e in entries], "refusal": None}
        out: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for e in entries:
            text = _text(e.piece)
            out["tokens"].append(text)
            out["token_logprobs"].append(e.logprob)
            top: Json = {}
            for _, piece, value in e.top:
                top.setdefault(_text(piece), value)  # parts of characters look alike; the likelier comes first
            out["top_logprobs"].append(top)
            out["text_offset"].append(len(self.order.echo) + self._told)
            self._told += len(text)
        return out


def _content(e: Logprob) -> Json:
    top = [{"token": _text(piece), "bytes": list(piece), "logprob": value} for _, piece, value in e.top]
    return {"token": _text(e.piece), "bytes": list(e.piece), "logprob": e.logprob, "top_logprobs": top}


def _text(piece: bytes) -> str:
    return piece.decode("utf-8", "replace")
