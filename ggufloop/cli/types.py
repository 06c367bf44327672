"""Kinds of values of options; a wrong one is refused as it is parsed, with the rule or the nearest word.

@click.option("-fa", type=OneOf(("auto", "on", "off")))
@click.option("--size-budget", type=Size())
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from ggufloop.errors import nearest

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


class OneOf(click.ParamType[str]):
    """One of a few words. upper: they are typed in either case."""

    name = "word"

    def __init__(self, known: Sequence[str], upper: bool = False) -> None:
        self.known, self.upper = tuple(known), upper

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        word = value.upper() if self.upper else value
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
            self.fail(f"{value!r} is not a size; write it like 500MB or 4GB.", param, ctx)
        return size
