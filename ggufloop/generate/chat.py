"""A conversation: its turns, its settings, and how it is answered, compared, saved and loaded. Prints nothing.

    chat = Conversation(llm, ChatTemplate.of(llm) or PLAIN, Sampling(temp=0.0), system="Be brief.")
    answer = chat.ask("Why is the sky blue?", emit=print)
    plain = chat.replay(None); looped = chat.replay(LoopSpec.parse("12:16 k=3"))
    first_difference(plain.tokens, looped.tokens)

A turn is a user's message with its answer, so a conversation alternates by construction and every list of messages
a template sees is one it was written for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ggufloop.backend.settings import RANDOM_SEED
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import write_text
from ggufloop.generate.complete import Answer, Emit, Stopped, TextGenerator, Totals, complete, encode, prompt_tokens
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import LoopSpec
from ggufloop.models.template import ChatTemplate, Message

SCHEMA_VERSION = 1
_LARGEST_SAVED_CHAT = 64 * 2**20


def _silent(text: str) -> None:
    pass


def _never() -> bool:
    return False


@dataclass(frozen=True)
class Turn:
    """A user's message and the answer to it; `seed` is the one it was drawn with, `prefill` what was given of it."""

    user: str
    answer: str
    seed: int
    prefill: str = ""


class Conversation:
    """Turns, and the settings the next one is answered with.

    turns are only ever added whole; `dropped` counts the oldest ones the context had no room for. The i-th answer is
    drawn with seed + i, so a conversation repeats itself when its seed and its inputs do, and a regenerated answer
    is a new one. `name` is the model's, for saving. `prefill` is what the next answer begins with, used once.
    """

    def __init__(
        self,
        model: TextGenerator,
        template: ChatTemplate,
        sampling: Sampling,
        system: str | None = None,
        name: str = "",
    ) -> None:
        self.model = model
        self.template = template
        self.sampling = sampling.seeded()
        self.system = system
        self.name = name
        self.turns: list[Turn] = []
        self.dropped = 0
        self.answers: list[Answer] = []
        """Every answer generated, regenerated and replayed ones too."""
        self.prefill = ""
        self.last_loop = model.loop
        """The loop in use or, when it is off, the one used last."""
        self._drawn = 0

    def ask(self, text: str, emit: Emit = _silent, stopped: Stopped = _never) -> Answer:
        """Answer `text` and add the turn, unless it ends without a token. Raises GgufloopError, Interrupted."""
        encode(text, "the message")
        if not text.strip():
            raise UsageError("the message is empty.", "write something to answer.")
        seed, prefill = self._next_seed(), self.prefill
        answer = self._answer(self.turns, text, prefill, seed, emit, stopped)
        self._drawn += 1
        if answer.finish != "interrupted" or answer.text:
            self.turns.append(Turn(text, answer.text, seed, prefill))
            self.prefill = ""
        return answer

    def regenerate(self, emit: Emit = _silent, stopped: Stopped = _never) -> Answer:
        """Replace the last answer by one drawn with the next seed; it stays if that fails. Raises as `ask`."""
        last = self._last()
        seed, prefill = self._next_seed(), self.prefill or last.prefill
        answer = self._answer(self.turns[:-1], last.user, prefill, seed, emit, stopped)
        self._drawn += 1
        self.turns[-1] = Turn(last.user, answer.text, seed, prefill)
        self.prefill = ""
        return answer

    def replay(self, loop: LoopSpec | None, emit: Emit = _silent, stopped: Stopped = _never) -> Answer:
        """Answer the last message again with `loop` and the same seed; conversation and loop stay as they are.

        The prompt is read from the start: with kv first and last, what the cache holds depends on how it was cut.
        Raises as `ask`.
        """
        last = self._last()
        before = self.model.loop
        try:
            self.model.set_loop(loop)
            self.model.reset()
            return self._answer(self.turns[:-1], last.user, last.prefill, last.seed, emit, stopped)
        finally:
            self.model.set_loop(before)

    def set_loop(self, loop: LoopSpec | None) -> None:
        """Answer with `loop` from now on. Raises UsageError if the model cannot."""
        self.model.set_loop(loop)
        self.last_loop = loop or self.last_loop

    def set_system(self, text: str | None) -> None:
        """Replace the system prompt; None removes it."""
        if text is not None:
            encode(text, "the system prompt")
        self.system = text
        self.dropped = 0

    def set_prefill(self, text: str) -> None:
        """Begin the next answer with `text`. Raises UsageError."""
        encode(text, "the beginning of the answer")
        self.prefill = text

    def set_think(self, think: bool) -> None:
        """Let the model think, or not, from the next answer on. Raises UsageError if its template has no switch."""
        self.template = self.template.having(self.template.arguments_for(think))

    def set_sampling(self, name: str, text: str) -> None:
        """Change one sampling setting. Raises UsageError."""
        before = self.sampling.seed
        self.sampling = self.sampling.changed(name, text).seeded()
        if name == "seed" or self.sampling.seed != before:
            self._drawn = 0

    def clear(self) -> None:
        """Forget the turns; settings stay, and seeds count from the first again."""
        self.turns = []
        self.dropped = 0
        self._drawn = 0

    def messages(self) -> list[Message]:
        """Everything said, as chat completion messages."""
        return _messages(self.system, self.turns)

    def totals(self) -> dict[LoopSpec | None, Totals]:
        """Sums over all answers, by the loop they were generated with."""
        loops = dict.fromkeys(answer.loop for answer in self.answers)
        return {loop: Totals.of([a for a in self.answers if a.loop == loop]) for loop in loops}

    def save(self, path: Path) -> None:
        """Write the conversation as JSON, whole or not at all. Raises GgufloopError; never replaces a foreign file."""
        data = {
            "schema_version": SCHEMA_VERSION,
            "model": self.name,
            "loop": None if self.model.loop is None else str(self.model.loop),
            "messages": self.messages(),
        }
        if os.path.exists(path):  # False for a name no file can have
            _read_saved(path)
        write_text(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")

    def load(self, path: Path) -> str:
        """Take turns, system prompt and loop from a file `save` wrote; -> the name of the model it was saved with.

        Nothing changes unless all of it is valid. Raises GgufloopError.
        """
        data = _read_saved(path)
        system, pairs = _pairs(data["messages"], path)
        loop = None if data["loop"] is None else LoopSpec.parse(data["loop"])
        self.set_loop(loop)
        self.clear()
        self.system = system
        self.turns = [Turn(user, answer, self.sampling.seed) for user, answer in pairs]
        return str(data["model"])

    def _next_seed(self) -> int:
        return (self.sampling.seed + self._drawn) % RANDOM_SEED

    def _last(self) -> Turn:
        if not self.turns:
            raise UsageError("there is no answer yet.", "ask something first.")
        return self.turns[-1]

    def _answer(self, turns: list[Turn], text: str, prefill: str, seed: int, emit: Emit, stopped: Stopped) -> Answer:
        """The answer to `text`; what is given of it, or opened for its thinking, is a part of it."""
        prompt, tokens, dropped = self._prompt(turns, text, prefill)
        begun = prefill or self.template.opened(prompt)
        told: list[str] = []

        def after(text: str) -> None:
            told.append(text)
            emit(begun + text if len(told) == 1 else text)

        answer = complete(
            self.model,
            tokens,
            replace(self.sampling, seed=seed),
            stop=self.template.stop,
            strip=not prefill,
            emit=after,
            stopped=stopped,
        )
        if begun and not told:
            emit(begun)
        answer = replace(answer, text=begun + answer.text, dropped=max(dropped - self.dropped, 0))
        self.dropped = dropped
        self.answers.append(answer)
        return answer

    def _prompt(self, turns: list[Turn], text: str, prefill: str) -> tuple[str, list[int], int]:
        """The prompt that asks for the answer to `text`, its tokens, and how many of the oldest turns are left out.

        Room is kept for `n` tokens of the answer, but no more than a quarter of the context. The newest message is
        never left out.
        """
        n_ctx = self.model.n_ctx()
        room = n_ctx // 4 if self.sampling.n == -1 else min(self.sampling.n, n_ctx // 4)
        dropped = min(self.dropped, len(turns))
        while True:
            kept = (replace(turn, answer=self.template.recalled(turn.answer)) for turn in turns[dropped:])
            messages = _messages(self.system, kept)
            messages.append({"role": "user", "content": text})
            if prefill:
                messages.append({"role": "assistant", "content": prefill})
            prompt = self.template.render(messages)
            tokens = prompt_tokens(self.model, prompt)
            if len(tokens) + room <= n_ctx or dropped == len(turns):
                return prompt, tokens, dropped
            dropped += 1


def _messages(system: str | None, turns: Iterable[Turn]) -> list[Message]:
    messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    for turn in turns:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    return messages


def _read_saved(path: Path) -> dict[str, Any]:
    """The JSON object of a saved chat with its fields' types checked. Raises GgufloopError."""
    try:
        with path.open("rb") as f:
            content = f.read(_LARGEST_SAVED_CHAT + 1)
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        reason = getattr(e, "strerror", None) or e
        raise GgufloopError(f"cannot read {path}: {reason}.", "name a file that /save wrote.") from e
    try:
        data = json.loads(content) if len(content) <= _LARGEST_SAVED_CHAT else None
    except (ValueError, RecursionError):
        data = None
    if not isinstance(data, dict) or not {"schema_version", "model", "loop", "messages"} <= data.keys():
        raise GgufloopError(f"{path} is not a saved chat.", "name a file that /save wrote, or a new one to save to.")
    if data["schema_version"] != SCHEMA_VERSION:
        raise GgufloopError(
            f"{path} has schema version {data['schema_version']}, and this ggufloop reads {SCHEMA_VERSION}.",
            "load it with the version that saved it.",
        )
    if not isinstance(data["loop"], (str, type(None))) or not isinstance(data["messages"], list):
        raise GgufloopError(f"{path} is damaged: its loop or its messages are of the wrong kind.", "save it again.")
    return data


def _pairs(messages: list[Any], path: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """(system prompt, (user, assistant) texts) of saved messages. Raises GgufloopError unless they alternate so."""
    roles, texts = [], []
    for m in messages:
        content = m.get("content") if isinstance(m, dict) else None
        if not isinstance(content, str):
            raise GgufloopError(f"{path} is damaged: a message has no text.", "save it again.")
        encode(content, f"a message of {path}")
        roles.append(m.get("role"))
        texts.append(content)
    system = texts.pop(0) if roles[:1] == ["system"] else None
    if roles[len(roles) - len(texts) :] != ["user", "assistant"] * (len(texts) // 2):
        raise GgufloopError(
            f"{path} is damaged: its messages do not alternate between user and assistant.",
            "each user message needs an answer after it.",
        )
    return system, list(zip(texts[::2], texts[1::2], strict=True))
