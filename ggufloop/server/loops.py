"""Which loop a request runs with: its body, its header, its model's suffix, or the server's own.

served = Served("smollm2-135m", default=None, suggested=(12, 16))
served.choose({"model": "smollm2-135m@14:20x3"}, header=None)      # LoopSpec 14:20 k=3
served.names()                                                      # what /v1/models lists
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec

DEFAULT_K = 3
OFF = ("off", "plain", "none", "null")
FIELDS = tuple(f.name for f in fields(LoopSpec) if f.init)


class UnknownModel(UsageError):
    """A request names a model that is not served here."""


def loop_from_json(value: Any, suggested: tuple[int, int] | None) -> LoopSpec | None:
    """The loop a JSON value means: null, text as LoopSpec.parse reads it, or an object of its fields.

    window 'auto' is the suggested one; k is 3 where nothing is said. Raises UsageError.
    """
    if value is None or (isinstance(value, str) and value.strip().lower() in OFF):
        return None
    if isinstance(value, str):
        words = value.split()
        if words[:1] == ["auto"]:
            words[0] = "{}:{}".format(*_suggestion(suggested))
        if words and not any(word.lower().startswith("k=") for word in words):
            words.append(f"k={DEFAULT_K}")
        return LoopSpec.parse(" ".join(words))
    if not isinstance(value, dict):
        raise UsageError("loop is neither null, nor text, nor an object.", 'write it like {"window": "14:20", "k": 3}.')
    unknown = sorted(set(value) - set(FIELDS))
    if unknown:
        raise UsageError(f"loop has no field {unknown[0][:40]!r}.", f"its fields: {', '.join(FIELDS)}.")
    given = {name: v for name, v in value.items() if v is not None}
    if "window" not in given:
        raise UsageError("loop has no window.", 'write it like {"window": "14:20", "k": 3}, or null for none.')
    if given["window"] == "auto":
        given["window"] = _suggestion(suggested)
    return LoopSpec(**{"k": DEFAULT_K, **given})


def loop_to_json(loop: LoopSpec | None) -> dict[str, Any] | None:
    """Everything a loop is, for an answer's usage; `text` is what LoopSpec.parse reads."""
    if loop is None:
        return None
    values = {name: getattr(loop, name) for name in FIELDS}
    return {"text": str(loop), **values, "window": "{}:{}".format(*loop.window)}


def suffix(loop: LoopSpec | None) -> str:
    """A loop as it is written behind a model's name: '@12:16x3', '@12:16x3,kv=each', '@off'."""
    if loop is None:
        return "@off"
    window, _, *others = str(loop).split()
    return ",".join([f"@{window}x{loop.k}", *others])


def parse_suffix(text: str) -> LoopSpec | None:
    """What follows the '@' of a model's name. Raises UsageError."""
    if text in OFF:
        return None
    head, *others = text.split(",")
    window, x, k = head.partition("x")
    if not x:
        k = str(DEFAULT_K)
    return LoopSpec.parse(" ".join([window, f"k={k}", *others]))


@dataclass(frozen=True)
class Served:
    """The model of a server by name, the loop it was started with, and the window suggested for it."""

    name: str
    default: LoopSpec | None
    suggested: tuple[int, int] | None

    def names(self) -> list[str]:
        """The model's names: plain, with the loops it is known with, and without any."""
        loops = [self.default]
        if self.suggested is not None:
            loops += [LoopSpec(self.suggested, DEFAULT_K), LoopSpec(self.suggested, DEFAULT_K, kv="frozen")]
        names = [self.name, *(self.name + suffix(loop) for loop in loops if loop is not None), f"{self.name}@off"]
        return list(dict.fromkeys(names))

    def choose(self, body: dict[str, Any], header: str | None) -> LoopSpec | None:
        """The loop of a request. Raises UsageError, UnknownModel."""
        name, at, rest = str(body.get("model") or self.name).partition("@")
        if name != self.name:
            raise UnknownModel(f"model {name[:80]!r} is not served here.", f"this is {self.name}; see /v1/models.")
        if "loop" in body:
            return loop_from_json(body["loop"], self.suggested)
        if header is not None:
            return loop_from_json(header, self.suggested)
        return parse_suffix(rest) if at else self.default


def _suggestion(suggested: tuple[int, int] | None) -> tuple[int, int]:
    if suggested is None:
        raise UsageError("window 'auto' means nothing for this model: it is too small.", "give a window like 14:20.")
    return suggested
