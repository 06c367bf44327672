"""A setting of a loop, as everything that spells, checks or shows it knows it: a row of the table that `LoopSpec` is.

    mode: str = row(str, "block", "How the window is iterated", words={"block": Word("..."), ...}, in_plan=True)
    settings(LoopSpec)["mode"].check("blok")      # UsageError: mode 'blok' is not known. did you mean block? ...

The text, the command line, the JSON schema, the C struct and the page's controls are made of these rows, so a setting
has one name, one range and one line of help wherever it is met. What it may be beside others is `LoopSpec`'s.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from operator import index
from typing import Any

import numpy as np

from ggufloop.errors import UsageError, nearest

_DECIMAL = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d{1,3})?", re.ASCII | re.IGNORECASE)
_SIGNED_DECIMAL = re.compile(rf"[+-]?{_DECIMAL.pattern}", re.ASCII | re.IGNORECASE)
_SIGNED_WHOLE = re.compile(r"[+-]?\d{1,18}", re.ASCII)
_COUNT = re.compile(r"\d{1,9}", re.ASCII)

_FORMS = {
    int: (_SIGNED_WHOLE, "whole number", 3),
    float: (_SIGNED_DECIMAL, "number", 0.5),
    str: (re.compile(r".*"), "word", ""),
}


@dataclass(frozen=True)
class Argument:
    """The number that follows a word after a colon, as in first:16. sign: its letter; start: what the page offers."""

    kind: type
    sign: str
    name: str
    least: int
    start: float

    def reads(self, text: str) -> bool:
        """Whether the text is such a number."""
        form = _COUNT if self.kind is int else _DECIMAL
        return form.fullmatch(text) is not None and math.isfinite(float(text)) and float(text) >= self.least


@dataclass(frozen=True)
class Word:
    """One of the words a setting may be.

    served: whether a request to the server may say it. evaluations: of the window in one step, where it is a solver.
    """

    meaning: str
    argument: Argument | None = None
    served: bool = True
    evaluations: int | None = None


@dataclass(frozen=True)
class Setting:
    """One row.

    kind     int, float or str; tuple is the window.
    help     one line without its end: words and default are put behind it.
    words    what it may be, if it is a word; else a number of low to high, and hint says what to take instead.
    default  where nothing is said; None: none, and `usually` is the help's word for what happens then.
    unless   (setting, word, default): another default where another setting is that word.
    label    its name in a sentence; flag, metavar: on the command line.
    many     whether a command that runs several loops takes a list of it.
    in_plan  whether it is a field of `struct llama_loop_params`, words as their number; the others shape (A, B).
    control  whether the page has a control for it, and what that begins with where there is no default.
    """

    kind: type
    help: str
    words: Mapping[str, Word] = field(default_factory=dict)
    low: float = 0
    high: float = math.inf
    hint: str = ""
    usually: str = ""
    unless: tuple[str, str, Any] | None = None
    label: str = ""
    flag: str = ""
    metavar: str = ""
    many: bool = False
    in_plan: bool = False
    control: bool = False
    start: Any = None
    name: str = ""
    default: Any = None
    required: bool = False

    def usual(self, loop: object) -> Any:
        """The default beside the other settings of `loop`."""
        if self.unless is not None and getattr(loop, self.unless[0]) == self.unless[1]:
            return self.unless[2]
        return self.default

    def known(self, *, bare: bool = False) -> list[str]:
        """The words it may be, with the rule of what follows one: 'first:n (n >= 1)'; bare: 'first:n'."""
        found = []
        for word, choice in self.words.items():
            sign = choice.argument.sign if choice.argument else ""
            rule = "" if bare or not choice.argument else f" ({sign} >= {choice.argument.least})"
            found.append(f"{word}:{sign}{rule}" if sign else word)
        return found

    def read(self, text: str, like: str = "") -> Any:
        """The value a text spells. like: how to introduce the example of an error. Raises UsageError."""
        form, rule, example = _FORMS[self.kind]
        if not form.fullmatch(text):
            raise UsageError(
                f"{self.name} {text!r} is not a {rule}.", f"write it like {like or f'{self.name}='}{example}."
            )
        return self.kind(text)

    def check(self, value: Any) -> Any:
        """The value, if it is one by itself, whatever the other settings are. Raises UsageError."""
        if self.words:
            return self._word(value)
        name, low, high = self.label or self.name, self.low, self.high
        if self.kind is int:
            if not is_whole(value) or not low <= value <= high:
                raise UsageError(f"{name} {value!r} is not a whole number in the range {low} to {high}.", self.hint)
            return index(value)
        real = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not real or not low <= value <= high:
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            raise UsageError(f"{name} {shown} is not a number in the range {low:g} to {high:g}.", self.hint)
        return float(value)

    def _word(self, value: Any) -> str:
        if not isinstance(value, str):
            raise UsageError(f"{self.name} {value!r} is not a word.", f"give {self.name} as text.")
        word, colon, number = value.partition(":")
        choice = self.words.get(word)
        if choice is None or not (choice.argument.reads(number) if choice.argument else not colon):
            raise UsageError(f"{self.name} {value!r} is not known.", nearest(value, self.known()))
        return value

    def in_struct(self, value: Any) -> int | float:
        """The value in `struct llama_loop_params`: the number of a word in the C enum, 0 for none."""
        return list(self.words).index(value) if self.words else value or 0

    def line(self) -> str:
        """The line of help."""
        words = f": {', '.join(self.known(bare=True))}" if self.words else ""
        default = self.usually or (f"{self.default:g}" if isinstance(self.default, float) else self.default)
        other = "" if self.unless is None else "; with {} {}: {}".format(*self.unless)
        return self.help + words + ("" if default is None else f" (default {default}{other})") + "."

    def schema(self) -> dict[str, Any]:
        """Its JSON schema; the keywords no standard has are for the page: control, unless, evaluations, value."""
        out: dict[str, Any] = {"description": self.line()}
        if self.kind is tuple:
            return out | {"type": "string", "pattern": "^[0-9]+:[0-9]+$"}
        if self.words:
            out |= {"type": "string", "oneOf": [_word(name, each) for name, each in self.words.items() if each.served]}
        else:
            out |= {"type": "integer" if self.kind is int else "number", "minimum": self.low}
            if math.isfinite(self.high):
                out["maximum"] = self.high
        start = self.start if self.default is None else self.default
        more = {"default": start, "unless": self.unless, "control": self.control or None}
        return out | {name: value for name, value in more.items() if value is not None}


def _word(name: str, word: Word) -> dict[str, Any]:
    out: dict[str, Any] = {"title": name, "description": word.meaning}
    if word.evaluations is not None:
        out["evaluations"] = word.evaluations
    if word.argument is None:
        return out | {"const": name}
    kind = "integer" if word.argument.kind is int else "number"
    value = {"title": word.argument.name, "type": kind, "minimum": word.argument.least, "default": word.argument.start}
    return out | {"pattern": f"^{name}:[0-9.]+$", "value": value}


def row(kind: type, default: Any, help: str, **more: Any) -> Any:
    """A dataclass field that is a setting: what `Setting` says of it. default: MISSING where one has to be given."""
    setting = Setting(kind, help, **more, default=None if default is MISSING else default, required=default is MISSING)
    if setting.unless is not None:
        default = None  # the class resolves it
    return field(default=default, metadata={"setting": setting})


_TABLES: dict[type, dict[str, Setting]] = {}


def settings(loop: type) -> dict[str, Setting]:
    """The table of a class of loops by name, in the order in which they are spelled; the window is the first."""
    if loop not in _TABLES:
        rows = [(each.name, each.metadata["setting"]) for each in fields(loop) if "setting" in each.metadata]
        _TABLES[loop] = {name: replace(row, name=name, flag=row.flag or f"--{name}") for name, row in rows}
    return _TABLES[loop]


def is_whole(value: object) -> bool:
    """Whether it is a whole number: Python's or numpy's, and not a truth value."""
    return hasattr(value, "__index__") and not isinstance(value, (bool, np.bool_))
