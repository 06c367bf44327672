"""Kinds of values of options, refused as they are parsed with the rule or the nearest word; and -o, which all share,
with what it prints.

@click.option("-fa", type=OneOf(("auto", "on", "off")))
@click.option("--size-budget", type=Size())
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ggufloop import reading
from ggufloop.cli.width import tell
from ggufloop.errors import UsageError, nearest

if TYPE_CHECKING:
    from ggufloop.table import Table

OUTPUT = ("text", "json", "jsonl", "csv", "md")
"""The forms of -o: text for eyes, the others for programs and documents."""
C = TypeVar("C", bound=Callable[..., Any])
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class OneOf(click.ParamType[str]):
    """One of a few words. upper: they are typed in either case. what: what such a word is, for the message; click's
    names the option."""

    name = "word"

    def __init__(self, known: Sequence[str], upper: bool = False, what: str = "") -> None:
        self.known, self.upper, self.what = tuple(known), upper, what

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = value.upper() if self.upper else value
        if word not in self.known and self.what:
            raise UsageError(f"{self.what} {value!r} is not known.", nearest(word, self.known))
        if word not in self.known:
            self.fail(f"{value!r} is not known; {nearest(word, self.known)}", param, ctx)
        return word

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in self.known if word.startswith(incomplete)]


class Size(click.ParamType[int]):
    """Bytes, written like 500MB, 4GiB or plain."""

    name = "size"

    def convert(self, value: str | int, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", value, re.IGNORECASE)
        size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
        if size < 1:
            raise UsageError(f"{value!r} is not a size.", "write it like 500MB or 4GB.")
        return size


class JsonObject(click.ParamType[dict[str, Any]]):
    """A JSON object, such as {"enable_thinking": false}."""

    name = "json"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, Any]:
        try:
            found = reading.json(value) if isinstance(value, str) else value
        except ValueError as e:
            self.fail(f"{value!r} cannot be read: {e}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f"{value!r} is no JSON object; write it like '{{\"enable_thinking\": false}}'", param, ctx)
        return found


def show(
    form: str,
    text: Callable[[], str],
    record: Callable[[], Any],
    table: Callable[[], Table] | None = None,
    numbers: Callable[[], Table] | None = None,
) -> None:
    """Print a result in a form of -o: text with its line feeds, a record as JSON, a table in the other forms.

    numbers: the table for programs, if it is not the one that md has."""
    if form == "text":
        tell(text())
    elif form == "json" or table is None:
        click.echo(json.dumps(record(), indent=2))
    else:
        show_table(form, table if form == "md" or numbers is None else numbers)


def show_table(form: str, table: Callable[[], Table]) -> None:
    """Print a table in a form of -o: as it is for eyes, for programs with plain names and a loop's settings apart."""
    from ggufloop.flat import flat

    click.echo((table() if form == "md" else flat(table())).render(form), nl=False)


def output_option(*forms: str, help: str = "How to print it.") -> Callable[[C], C]:
    """Add -o to a command, as its parameter `form`. forms: those of OUTPUT that it has; text is always there."""
    known = tuple(form for form in OUTPUT if form in ("text", *(forms or OUTPUT)))
    kind = OneOf(known, what="output form")
    return click.option("-o", "--output", "form", type=kind, default="text", show_default=True,
                        metavar="|".join(known), help=help)  # fmt: skip
