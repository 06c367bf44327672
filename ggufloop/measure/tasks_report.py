"""What tasks found, in words and for programs: text(name, comparison), record(...), write_samples(path, runs)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ggufloop.files import file_sha256, write_text
from ggufloop.measure.tasks import SEED, Comparison, Run
from ggufloop.reading import finite

SCHEMA_VERSION = 1


def text(name: str, c: Comparison) -> str:
    """The paired block of one task, for eyes."""
    gold = "not scored" if c.gold is None else f"{c.gold.show('+.4f')}  (mean change in nats, paired bootstrap)"
    lines = [
        f"{name}: looped against plain on the same questions (95 % intervals)",
        f"  plain accuracy       {c.plain.show()}  (Wilson)",
        f"  looped accuracy      {c.looped.show()}  (Wilson)",
        f"  difference           {c.difference.show('+.4f')}  (paired bootstrap)",
        f"  flips                {c.gained} became right, {c.lost} became wrong; McNemar exact p = {c.p:.4g}",
        f"  right answer's logp  {gold}",
    ]
    if not c.gained + c.lost:
        lines.append(f"  no question flipped: the share that does is below {c.flips_below:.4f}.")
    elif c.needed is None:
        lines.append("  both answer equally many questions right.")
    else:
        size = f"{abs(c.difference.mean):.4f}, {c.needed} questions would see it with 80 % power"
        lines.append(f"  if the true difference is {size}.")
    if not c.conclusive:
        lines.append(f"  {c.n} questions do not tell the two apart.")
    return "\n".join(lines) + "\n"


def _estimate(e: Any) -> dict[str, float | int] | None:
    return None if e is None else {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n, "level": e.level}


def record(
    path: Path, runs: dict[str, Run], compared: dict[str, Comparison], settings: dict[str, Any]
) -> dict[str, Any]:
    """For JSON."""
    from ggufloop.engine import ACTIVE

    data = {
        "schema_version": SCHEMA_VERSION,
        "model": path.name,
        "model_sha256": file_sha256(path),
        "patch_id": ACTIVE.patch_id,
        "seed": SEED,
        **settings,
        "runs": [
            {
                "loop": loop,
                "results": run.results["results"],
                "versions": run.results["versions"],
                "n": {name: len(items) for name, items in run.items.items()},
            }
            for loop, run in runs.items()
        ],
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
            }
            for name, c in compared.items()
        },
    }
    found: dict[str, Any] = finite(data)
    return found


def write_samples(path: Path, runs: dict[str, Run]) -> None:
    """Write every question with its answers, one per line. Raises GgufloopError."""
    samples = (finite({"loop": loop, **sample}) for loop, run in runs.items() for sample in run.samples)
    write_text(path, "".join(json.dumps(each, default=str, ensure_ascii=False) + "\n" for each in samples))
