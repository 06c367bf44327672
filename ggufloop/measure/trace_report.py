"""A trace in words and tables.

text(result, llm, path)                          # for eyes, a table per question
table(result).render("md")                       # a row per state
numbers(result, path)                            # the same for programs
record(result, llm, path)                        # for json
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop.loop import loop_text
from ggufloop.measure.trace import LAYER, Point, TokenMean, Trace
from ggufloop.opening import record_head
from ggufloop.table import Cell, Table, columns

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

_MOVED = columns("+/-:.4f", "cosine:.5f", "+/-:.5f", "all as one:.5f")
_STEPS = (*columns("layers", "pass", "step:.4f"), *_MOVED)
_CHANGE = (*columns("layer", "pass", "residual:.4f"), *_MOVED)
_LENS = columns("state", "layer", "pass", "entropy:.3f", "+/-:.3f", "KL to the end:.3f", "+/-:.3f")
_ALL = columns("state", "layer", "pass", "n", "residual:.4f", "residual_ci:.4f", "whole_residual:.4f", "cosine:.5f",
               "cosine_ci:.5f", "entropy:.3f", "entropy_ci:.3f", "kl:.3f", "kl_ci:.3f")  # fmt: skip


def _pair(estimate: TokenMean | None) -> tuple[float | None, float | None]:
    return (None, None) if estimate is None else (estimate.mean, estimate.half)


def _change(p: Point) -> list[Cell]:
    return [*_pair(p.residual), *_pair(p.cosine), p.whole_residual]


def _lens(p: Point) -> list[Cell]:
    return [*_pair(p.entropy), *_pair(p.kl)]


def table(result: Trace) -> Table:
    """One row per state, all columns: the form for programs."""
    rows = [[p.kind, p.layer, p.evaluation, result.tokens, *_pair(p.residual), p.whole_residual, *_pair(p.cosine),
             *_lens(p)] for p in result.points]  # fmt: skip
    return Table(_ALL, rows)


def numbers(result: Trace, path: Path) -> Table:
    """The same rows for programs, of which model and loop they are."""
    found = table(result)
    head: list[Cell] = [path.name, loop_text(result.loop)]
    return Table((*columns("model", "loop"), *found.columns), [[*head, *row] for row in found.rows])


def _halts(result: Trace, tau: float) -> list[str]:
    """What halt=tau does on this text, a line per unit."""
    n = max(step.evaluation for step in result.steps)
    return [
        f"--halt {tau:g}: {ran} of {n} passes of layers {first}:{last} run."
        for (first, last), ran in result.passes(tau).items()
    ]


def text(result: Trace, llm: LoopedLlama, path: Path, tau: float | None = None) -> str:
    """The form for eyes: what was run, then a table per question."""
    once = "no loop" if result.loop is None else str(result.loop)
    parts = [
        f"model   {path.name}, {llm.n_layer()} layers\n"
        f"loop    {once}\n"
        f"text    {result.tokens} tokens; +/- is a 95 % interval (normal) of a mean over them\n"
    ]
    if result.loop is not None:
        moved = [p for p in result.points if p.kind != LAYER]
        steps = Table(
            _STEPS,
            [[f"{s.first}:{s.last}", s.evaluation, *_change(p)] for s, p in zip(result.steps, moved, strict=True)],
        )
        halts = "".join(f"{line}\n" for line in _halts(result, tau)) if tau is not None else ""
        parts.append(f"How far each pass moves the state of the window (--halt compares the step):\n\n"
                     f"{steps.render('md')}{halts}")  # fmt: skip
        changed = [p for p in result.points if p.kind == LAYER and p.residual is not None]
        change = Table(_CHANGE, [[p.layer, p.evaluation, *_change(p)] for p in changed])
        parts.append(f"Change of each layer's output to the pass before:\n\n{change.render('md')}")
    if result.points[0].entropy is not None:
        read = Table(_LENS, [[p.kind, p.layer, p.evaluation, *_lens(p)] for p in result.points])
        parts.append(f"What each state would predict (logit lens), in nats:\n\n{read.render('md')}")
    return "\n".join(parts)


def record(result: Trace, llm: LoopedLlama, path: Path, tau: float | None = None) -> dict[str, Any]:
    """For JSON."""
    loop = result.loop
    data: dict[str, Any] = {
        **record_head(path),
        "loop": None if loop is None else str(loop),
        "window": None if loop is None else loop.window,
        "evaluations": 1 if loop is None else loop.tableau().evaluations,
        "layers": llm.n_layer(),
        "n": result.tokens,
        "interval": "mean +/- 1.96 standard errors over tokens",
        "steps": [{"first": s.first, "last": s.last, "pass": s.evaluation, "step": s.size} for s in result.steps],
        "halt": tau,
        "halted_passes": None,
        "states": table(result).records(),
    }
    if tau is not None and loop is not None:
        data["halted_passes"] = [
            {"first": first, "last": last, "passes": n} for (first, last), n in result.passes(tau).items()
        ]
    return data
