"""What tasks found, in words and for programs: text(name, comparison), record(...), numbers(result),
write_samples(path, runs)."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ggufloop.files import write_text
from ggufloop.measure.endpoints import NUDGE, ChanceGuard, NoiseFloor
from ggufloop.measure.published import Published, published
from ggufloop.measure.stats import Estimate, wilson
from ggufloop.measure.tasks import Comparison, Run
from ggufloop.measure.verdict import Verdict
from ggufloop.reading import finite
from ggufloop.table import Cell, Table, columns

if TYPE_CHECKING:
    from ggufloop.measure.eval_run import EvalResult


def text(name: str, c: Comparison, available: int | None = None, noise: NoiseFloor | None = None) -> str:
    """The paired block of one task, for eyes. available: how many questions it has; noise: of the loop run twice."""
    choice = "not scored: no answers are offered"
    if c.choice is not None:
        choice = f"{c.choice.gain.show('+.4f')}  (nats; by it alone: {c.choice.phrase('question', available)})"
    floor = [] if noise is None else [f"  noise floor          {noise.difference.show('+.4f')}  (damping moved "
                                      f"by {NUDGE:g}: {noise.changed} answers differ)"]  # fmt: skip
    warning = c.guard.sentence() if c.guard is not None else ""
    lines = [
        f"{name}: looped against plain on the same questions (95 % intervals)",
        f"  plain accuracy       {c.plain.show()}  (Wilson)",
        f"  looped accuracy      {c.looped.show()}  (Wilson)",
        f"  difference           {c.difference.show('+.4f')}  (exact limits of both counts)",
        f"  flips                {c.gained} became right, {c.lost} became wrong; McNemar exact p = {c.p:.4g}",
        f"  choice log-prob.     {choice}",
        f"  verdict on accuracy  {c.verdict.phrase('question', available)}",
        *floor,
        *textwrap.wrap(warning, 100, initial_indent="  ", subsequent_indent="  "),
    ]
    return "\n".join(lines) + "\n"


def others(header: Mapping[str, Any], tasks: Iterable[str]) -> str:
    """What is published of this model on these tasks, to be read beside the table; '' if nothing is."""
    lines = [
        line
        for name, scores in _published(header, tasks).items()
        for score in scores
        for line in textwrap.wrap(f"{name}: {score.line()}", 78, initial_indent="  ", subsequent_indent="      ")
    ]
    return "\n".join(["published, perhaps with other prompts or shots:", *lines, ""]) if lines else ""


def _published(header: Mapping[str, Any], tasks: Iterable[str]) -> dict[str, list[Published]]:
    found = {task: published(header["model"], header["n_layer"], task) for task in tasks}
    return {task: scores for task, scores in found.items() if scores}


def _verdict(v: Verdict | None) -> dict[str, Any] | None:
    if v is None:
        return None
    return {"word": v.word, "gain": _estimate(v.gain), "p": v.gain.p, "near": [v.near.low, v.near.high],
            "worth": v.worth, "needed": v.needed}  # fmt: skip


def _guard(g: ChanceGuard | None) -> dict[str, Any] | None:
    if g is None:
        return None
    return {"accuracy": _estimate(g.accuracy), "chance": g.chance, "letters": g.letters, "at_chance": g.at_chance}


def _estimate(e: Any) -> dict[str, float | int] | None:
    return None if e is None else {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n, "level": e.level}


def _noise(found: NoiseFloor | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"difference": _estimate(found.difference), "typical": found.typical, "changed": found.changed}


def record(
    header: Mapping[str, Any], runs: dict[str, Run], compared: dict[str, Comparison], noise: Mapping[str, NoiseFloor]
) -> dict[str, Any]:
    """For JSON. header: the first line of its journal."""
    said = ("schema_version", "model", "model_sha256", "patch_id", "seed", "limit", "drawn", "num_fewshot",
            "chat_template", "served")  # fmt: skip
    data = {
        **{name: header[name] for name in said},
        **({"chat_template_kwargs": header["chat_template_kwargs"]} if "chat_template_kwargs" in header else {}),
        "runs": [
            {"loop": loop, "results": run.results["results"], "versions": run.results["versions"],
             "n": {name: len(items) for name, items in run.items.items()}}
            for loop, run in runs.items()
        ],
        "published": {
            task: [dataclasses.asdict(score) for score in scores]
            for task, scores in _published(header, dict.fromkeys(t for r in runs.values() for t in r.items)).items()
        },
        "paired": {
            name: {
                "n": c.n,
                "plain": _estimate(c.plain),
                "looped": _estimate(c.looped),
                "difference": _estimate(c.difference),
                "gained": c.gained,
                "lost": c.lost,
                "mcnemar_p": c.p,
                "gold_logprob": _estimate(c.gold),
                "n_for_80_percent_power": c.needed,
                "verdict": _verdict(c.verdict),
                "choice": _verdict(c.choice),
                "guard": _guard(c.guard),
                "noise_floor": _noise(noise.get(name)),
            }
            for name, c in compared.items()
        },
    }  # fmt: skip
    found: dict[str, Any] = finite(data)
    return found


def numbers(found: EvalResult) -> Table:
    """A row per loop and name that was asked for. score: the share of right answers, with Wilson's interval; gain, low,
    high: of it over plain, on the same questions, where both were run; choice: of the choice log-probability."""
    names = ("model", "measure", "loop", "n", "available", "score", "score low", "score high", "plain", "gain", "low",
             "high", "p", "gained", "lost", "choice gain", "choice low", "choice high", "verdict", "worth",
             "needed")  # fmt: skip
    rows: list[list[Cell]] = []
    for loop, run in found.runs.items():
        for name, items in run.items.items():
            right = sum(item.right for item in items)
            score = wilson(int(right), len(items)) if items else None
            c = found.compared.get(name) if [loop] == list(found.runs)[1:2] else None
            row: list[Cell] = [found.header["model"], name, loop, len(items), found.available.get(name)]
            row += [None] * 3 if score is None else [score.mean, score.low, score.high]
            if c is None:
                row += [None] * 13
            else:
                v = c.verdict
                row += [c.plain.mean, c.difference.mean, c.difference.low, c.difference.high, c.p, c.gained, c.lost,
                        *_three(None if c.choice is None else c.choice.gain), v.word, v.worth, v.needed]  # fmt: skip
            rows.append(row)
    return Table(columns(*names), rows)


def _three(e: Estimate | None) -> list[Cell]:
    return [None] * 3 if e is None else [e.mean, e.low, e.high]


def write_samples(path: Path, runs: dict[str, Run]) -> None:
    """Write every question with its answers, one per line. Raises GgufloopError."""
    samples = (finite({"loop": loop, **sample}) for loop, run in runs.items() for sample in run.samples)
    write_text(path, "".join(json.dumps(each, default=str, ensure_ascii=False) + "\n" for each in samples))
