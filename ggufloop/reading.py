"""Files of records, checked as they are read: whatever their bytes are, what is wrong with them is one line.

    data = content(path, "name a study.")                # its bytes; a folder, a pipe, no permission: GgufloopError
    table = toml(data)                                   # json(data), text(data): ValueError with words for the user
    header = build(Header, table)                        # a dataclass whose fields have the types it says
    found = read_lines(path, data, "study", check)       # JSON lines, each as `check` understands it

What is read holds only what a program can go on with: whole numbers of 64 bits, finite floats, text that can be written
again, no key twice, no nesting that Python's own recursion would end at.

Records are appended line by line, so damage is most often at the end, where a crash or a full disk left it: what is
valid before it counts, and the reader says what it left out. A damaged line with valid ones behind it is refused by
its number. Nobody can tell what it was, and dropping the rest would lose hours of measurements.
"""

from __future__ import annotations

import dataclasses
import json as json_
import math
import re
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from ggufloop.errors import GgufloopError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

T = TypeVar("T")

DEEPEST = 20
"""Tables and lists within each other that are read. No file of ours has more than five."""
_MOST_DOTS = 100
_QUOTED = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'')
_BOM = b"\xef\xbb\xbf"


def content(path: Path, hint: str) -> bytes:
    """All bytes of a regular file. Raises GgufloopError with this hint; FileNotFoundError stays what it is."""
    try:
        if path.exists() and not path.is_file():  # reading a named pipe would wait for ever, /dev/zero has no end
            raise GgufloopError(f"cannot read {path}: it is {'a folder' if path.is_dir() else 'no file'}.", hint)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise GgufloopError(f"cannot read {path}: {getattr(e, 'strerror', None) or e}.", hint) from e


def json(data: bytes | str) -> Any:
    """A JSON value. Raises ValueError saying what and where."""
    try:
        value = json_.loads(text(data), object_pairs_hook=_once, parse_constant=_no_number, parse_int=_whole)
    except json_.JSONDecodeError as e:
        where = f"line {e.lineno}, column {e.colno}" if e.lineno > 1 else f"column {e.colno}"
        raise ValueError(f"{e.msg} at {where}") from None
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return _usable(value)


def toml(data: bytes | str) -> dict[str, Any]:
    """A TOML table. Raises ValueError saying what and where."""
    words = text(data)
    if any(part.count(".") > _MOST_DOTS for part in re.split(r"[\n,=]", _QUOTED.sub("", words))):
        raise ValueError(_TOO_DEEP)  # a key a.a.a..., whose every prefix the parser keeps
    try:
        table: dict[str, Any] = _usable(tomllib.loads(words))
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    return table


_TOO_LARGE = "it has a number of more than 64 bits"
_TOO_DEEP = f"it is nested over {DEEPEST} levels deep"


def text(data: bytes | str, bom: bool = False) -> str:
    """UTF-8 text without the mark that some editors begin it with, unless `bom`. Raises ValueError saying where."""
    if isinstance(data, str):
        return data
    if not bom:
        data = data.removeprefix(_BOM)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"it is not UTF-8 text: byte 0x{data[e.start]:02x} at position {e.start}") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{shown(next(key for key in keys if keys.count(key) > 1))} is there twice")
    return table


def _whole(word: str) -> int:
    if len(word) > 20:  # before Python refuses thousands of digits in its own words
        raise ValueError(_TOO_LARGE)
    return int(word)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number")


def _usable(value: Any) -> Any:
    """The value, if a program can go on with all of it. Raises ValueError."""
    left = [(value, 0)]
    while left:  # no recursion, which is what a deep value would end
        item, depth = left.pop()
        if isinstance(item, str):
            if "\0" in item or not (item.isascii() or item.encode("utf-8", "ignore").decode() == item):
                raise ValueError(f"{shown(item)} is no text")
        elif isinstance(item, int):
            if not -(2**63) <= item < 2**63:
                raise ValueError(_TOO_LARGE)
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise ValueError(f"{item} is no number")
        elif isinstance(item, (dict, list)):
            if depth == DEEPEST:
                raise ValueError(_TOO_DEEP)
            left += [(x, depth + 1) for x in item]  # of a table, its keys
            if isinstance(item, dict):
                left += [(x, depth + 1) for x in item.values()]
    return value


def shown(value: Any) -> str:
    """A value as a message quotes it: in ASCII, on one line, of bounded length."""
    quoted = ascii(value)
    return quoted if len(quoted) <= 60 else f"{quoted[:56]}...{quoted[-1]}"


# Types


def build(kind: type[T], record: Mapping[str, Any]) -> T:
    """A dataclass from a record that has its fields, of their types. Raises ValueError naming the field."""
    hints = _hints(typing.cast(Any, kind))
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]  # T: any dataclass
    odd = next((key for key in record if key not in fields), None)
    if odd is not None:
        raise ValueError(f"{shown(odd)} is no field of it")
    missing = next((f.name for f in fields.values() if f.name not in record and f.default is dataclasses.MISSING), None)
    if missing is not None:
        raise ValueError(f"{missing} is missing")
    return kind(**{name: typed(value, hints[name], name) for name, value in record.items()})


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def typed(value: Any, kind: Any, name: str) -> Any:
    """A value of JSON as a type: float takes whole numbers, tuple takes lists. Raises ValueError."""
    of, inner = typing.get_origin(kind), typing.get_args(kind)
    if of in (types.UnionType, typing.Union):
        return None if value is None else typed(value, next(k for k in inner if k is not type(None)), name)
    if kind is float and type(value) in (int, float):
        return float(value)
    if of is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(typed(x, inner[0], name) for x in value)
        if len(value) == len(inner):
            return tuple(typed(x, k, name) for x, k in zip(value, inner, strict=True))
    if of is dict and isinstance(value, dict):
        return {key: typed(x, inner[1], f"{name} {shown(key)}") for key, x in value.items()}
    if kind is Any or (of is None and type(value) is kind):
        return value
    raise ValueError(f"{name} is {shown(value)}, not {_WORDS.get(kind, 'what it should be')}")


_WORDS = {int: "a whole number", float: "a number", str: "text"}


# Writing


def finite(value: Any) -> Any:
    """A value as JSON can hold it: nan and infinity, which it has no word for, are null; dataclasses are tables."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: finite(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def line(record: Mapping[str, Any]) -> bytes:
    """A record as a line of its file. What a name of a file has besides text is replaced. Raises ValueError for nan."""
    return json_.dumps(record, allow_nan=False, ensure_ascii=False).encode("utf-8", "replace") + b"\n"


def storable(text: str) -> str:
    """A text as a line can hold it, and as it comes back from there: zero bytes and half characters are replaced."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


@dataclass(frozen=True)
class Lines(Generic[T]):
    """What a file of JSON lines holds, each line with its number.

    end      bytes up to the end of the last of them: where the next one goes
    dropped  a sentence on what is behind them, '' if nothing is
    """

    records: list[tuple[int, T]]
    end: int
    dropped: str


def read_lines(path: Path, data: bytes, what: str, check: Callable[[dict[str, Any], bool], T]) -> Lines[T]:
    """The records of a file. check: understands a record, told whether it is the first, or raises ValueError.

    A line without its line feed is what a crash left of it. Raises GgufloopError if the first line is none of `what`
    (a GgufloopError of `check` gets the file's name), or a damaged one stands before a valid one.
    """
    records: list[tuple[int, T]] = []
    number = end = at = 0
    damage: tuple[int, str] | None = None
    whole = data.rfind(b"\n") + 1
    while at < whole:
        line = data[at : data.index(b"\n", at)]
        number, at = number + 1, at + len(line) + 1
        if not line.strip():
            continue
        try:
            record = json(line)
            if not isinstance(record, dict):
                raise ValueError("it is no record")
            read = check(record, not records)
        except GgufloopError as e:
            raise GgufloopError(f"{path}: {e.message}", e.hint) from e
        except ValueError as e:
            if not records:
                raise GgufloopError(
                    f"{path} is no {what}, or damaged: line {number}: {e}.", "name another file, or begin a new one."
                ) from None
            damage = damage or (number, str(e))
            continue
        if damage is not None:
            raise GgufloopError(
                f"line {damage[0]} of {path} is damaged: {damage[1]}.",
                f"line {number} behind it is not: take line {damage[0]} out; what it held is measured again.",
            )
        records.append((number, read))
        end = at
    if not records and data.strip() and not data.lstrip(_BOM).startswith(b"{"):
        raise GgufloopError(f"{path} is no {what}.", "name another file, or begin a new one.")
    dropped = ""
    if damage is not None:
        dropped = f"line {damage[0]} of {path} is damaged ({damage[1]}); it and what is behind it are left out."
    elif data[whole:].strip():
        dropped = f"the last line of {path} was cut short; it is left out."
    return Lines(records, end, dropped)
