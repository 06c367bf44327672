"""Sensitivities in words and tables: table(study), numbers(study), summary(study)."""

from __future__ import annotations

from ggufloop.study.file import Study
from ggufloop.study.sensitivity import BASE, ModelPart, contrast, lower_type, parts
from ggufloop.table import Cell, Column, Table

_FEW = 3
_ENOUGH = 10


def table(study: Study) -> Table:
    """A row per part, for eyes; intervals 95 %, each alone."""
    found = parts(study)
    mean = sum(p.more.mean for p in found) / max(1, len(found))
    rows: list[list[Cell]] = [
        [p.name, f"{p.more.mean:+.5f} [{p.more.low:+.5f}, {p.more.high:+.5f}]", p.more.mean / mean if mean else None,
         "window" if p.in_window else ""]
        for p in found
    ]  # fmt: skip
    return Table(
        (Column("part"), Column(f"KLD by {lower_type(study)}"), Column("of the mean", ".2f"), Column("")), rows
    )


def numbers(study: Study) -> Table:
    """A row per part, every number in a column of its own."""
    names = ("model", "text", "part", "layer", "type", "in window", "chunks", "KLD", "low", "high")
    rows: list[list[Cell]] = [
        [study.header.model, study.header.text, p.name, p.layer, lower_type(study), p.in_window, p.more.n, p.more.mean,
         p.more.low, p.more.high]
        for p in parts(study)
    ]  # fmt: skip
    return Table(tuple(Column(name) for name in names), rows)


def summary(study: Study) -> list[str]:
    """What bears it, what does not, and whether the window is like the other layers, a sentence each."""
    found, h = parts(study), study.header
    if not found:
        return ["no part has two chunks yet, and one says nothing about other texts: run it again to go on."]
    ranked = sorted(found, key=lambda p: p.more.mean)
    what, n = lower_type(study), found[0].more.n
    out = [
        f"one part at a time at {what}, all else at {BASE}; KLD to {study.types[0]} beyond that of {BASE} throughout; "
        f"{n} chunks of {h.n_ctx} tokens of {h.text}, paired, chunks as neighbours; intervals 95 %, each alone.",
        f"bear it best: {_listed(ranked[:_FEW])}; worst: {_listed(ranked[: -_FEW - 1 : -1])}.",
    ]
    if n < _ENOUGH:
        out.append(f"{n} chunks are few: they are taken as correlated, which makes intervals wide. Add some.")
    more = contrast(study)
    if more is not None:
        a, b = h.window
        word = "more sensitive than" if more.low > 0 else "less sensitive than" if more.high < 0 else (
            "not shown to differ from"
        )  # fmt: skip
        out.append(
            f"window {a}:{b}: its layers are {word} the others that may loop, by {more.mean:+.5f} "
            f"[{more.low:+.5f}, {more.high:+.5f}] nats a layer (means of {sum(p.in_window for p in found)} and of "
            f"{sum(p.may_loop and not p.in_window for p in found)} layers, the first and the last left out)."
        )
    return out


def _listed(found: list[ModelPart]) -> str:
    return ", ".join(f"{p.name} ({p.more.mean:+.5f})" for p in found)
