"""Fitted laws and predictions in words, tables and for JSON; what one checkpoint's ladder says is noise_report's."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ggufloop.measure.stats import Estimate
from ggufloop.reading import finite
from ggufloop.scaling import analysis
from ggufloop.scaling.analysis import Level, Optimum, Pooled, Prediction, Settings, constants, loose
from ggufloop.scaling.data import Data
from ggufloop.table import Cell, Table, columns

SCHEMA_VERSION = 1
OPEN = "not determined"

_LAWS = columns("level", "law", "constants", "n", "R2:.3f", "RMSE:.4f", "AICc:.1f", "held-out RMSE:.3g", "held-out n",
                "copied:.3g", "starts that agree")  # fmt: skip
_POOLED = columns("law", "fit", "constants", "n", "R2:.3f", "RMSE:.4f", "AICc:.1f", "held-out RMSE:.3g",
                  "held-out R2:.3g", "held-out n")  # fmt: skip
_SLOPES = columns("level", "N:.4g", "D:.4g", "loss", "dlnL/dlnN", "dlnL/dlnD", "N* at this D", "D* at this N")


def _head(data: Data, results: Sequence[Level]) -> str:
    n = sum(len(r.points) for r in results)
    lines = [
        f"data    {data.name}: {n} points, levels {', '.join(r.points.level for r in results)}",
        f"units   N: billions of {data.count} parameters, D: billions of tokens, loss: nats per token",
        *([f"source  {data.source}"] if data.source else []),
    ]
    return "\n".join(lines) + "\n"


def law_table(results: Sequence[Level]) -> Table:
    """A row per level and law."""
    rows: list[list[Cell]] = []
    for result in results:
        for name, fit in result.fits.items():
            test = result.tests.get(name)
            held: list[Cell] = [None, None, None] if test is None else [test.rmse, test.tested, test.copied]
            rows.append([result.points.level, name, len(fit.law.parameters), fit.n, fit.r2, fit.rmse, fit.aicc, *held,
                         f"{fit.agreed} of {fit.starts}"])  # fmt: skip
    return Table(_LAWS, rows)


def _pooled_rows(pooled: Sequence[Pooled]) -> Table:
    return Table(
        _POOLED,
        [
            [p.name, p.how, p.parameters, p.n, p.r2, p.rmse, p.aicc, p.held_out, p.held_out_r2, p.tested or None]
            for p in pooled
        ],
    )


def shown(e: Estimate, form: str) -> str:
    """A mean and its interval."""
    return f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"


def _optimum(o: Optimum) -> str:
    if o.estimate is not None:
        return shown(o.estimate, ".3g")
    return "none in range" if o.share < 0.5 else f"unsure ({100 * o.share:.0f} % of refits have one)"


def _prediction_rows(level: str, predictions: Sequence[Prediction]) -> list[list[Cell]]:
    return [
        [level, p.size, p.budget, shown(p.loss, ".3f"), shown(p.by_n, "+.4f"), shown(p.by_d, "+.4f"),
         _optimum(p.best_size), _optimum(p.best_budget)]
        for p in predictions
    ]  # fmt: skip


def _corners(result: Level) -> list[Prediction]:
    """The smallest and the largest size at the largest budget."""
    p = result.points
    budget = math.exp(p.budgets[-1])
    return [analysis.predict(result, math.exp(n), budget) for n in (p.sizes[0], p.sizes[-1])]


def _constants(results: Sequence[Level]) -> str:
    """One row per level, for each law that is some level's main one."""
    parts = []
    for main in dict.fromkeys(r.main for r in results):
        mine = [r for r in results if r.main == main]
        names = mine[0].fit.law.parameters
        rows: list[list[Cell]] = []
        for result in mine:
            found = constants(result)
            open_ = loose(found)
            rows.append([result.points.level, *[OPEN if k in open_ else shown(found[k], ".3g") for k in names]])
        table = Table(columns("level", *names), rows).render("md")
        parts.append(f"Constants of {main}, {mine[0].fit.law.formula}:\n\n{table}")
    return "\n".join(parts)


def bullets(lines: Sequence[str]) -> str:
    """A list for eyes."""
    return "".join(f"* {line}\n" for line in lines)


def fit_text(data: Data, results: Sequence[Level], pooled: Sequence[Pooled]) -> str:
    """Fits for eyes."""
    main = ", ".join(dict.fromkeys(r.main for r in results))
    parts = [_head(data, results), law_table(results).render("md")
             + "copied: RMSE of predicting each held-out point by the nearest one that was fitted\n"]  # fmt: skip
    if pooled:
        parts.append(f"All levels together:\n\n{_pooled_rows(pooled).render('md')}")
    slopes = [row for r in results for row in _prediction_rows(r.points.level, _corners(r))]
    parts += [f"Local slopes of {main} at the largest budget, 95 % bootstrap bands:\n\n"
              f"{Table(_SLOPES, slopes).render('md')}", _constants(results)]  # fmt: skip
    for r in results:
        notes = [*analysis.findings(r), *[f"Not fitted: {why}." for why in r.refused.values()]]
        parts.append(f"What to know about {r.points.level}:\n\n{bullets(notes)}")
    if notes := analysis.comparisons(results):
        parts.append(f"As measured, without a law:\n\n{bullets(notes)}")
    return "\n".join(parts)


def fit_record(data: Data, results: Sequence[Level], pooled: Sequence[Pooled], settings: Settings) -> dict[str, Any]:
    """Fits for JSON."""
    levels = []
    for r in results:
        found = constants(r)
        levels.append({
            "level": r.points.level,
            "bits": float(r.points.bits[0]),
            "n": len(r.points),
            "sizes": len(r.points.sizes),
            "budgets": len(r.points.budgets),
            "laws": {
                name: {"formula": f.law.formula, "constants": f.parameters, "n": f.n, "r2": f.r2, "rmse": f.rmse,
                       "aicc": f.aicc, "at_bound": f.bounds, "starts": f.starts, "agreed": f.agreed,
                       "held_out": r.tests.get(name)}
                for name, f in r.fits.items()
            },
            "not_fitted": r.refused,
            "main": r.main,
            "constants": {k: {**dataclasses.asdict(e), "determined": k not in loose(found)} for k, e in found.items()},
            "largest_budget": _corners(r),
            "findings": analysis.findings(r),
        })  # fmt: skip
    whole = {
        "schema_version": SCHEMA_VERSION,
        "data": data.name,
        "source": data.source,
        "n_counts": data.count,
        "settings": settings,
        "levels": levels,
        "pooled": list(pooled),
        "measured": analysis.comparisons(results),
    }
    record: dict[str, Any] = finite(whole)
    return record


Predictions = Sequence[tuple[Level, Sequence[Prediction]]]
"""What is predicted for each level."""


def prediction_table(found: Predictions) -> Table:
    """A row per level and point."""
    return Table(_SLOPES, [row for r, ps in found for row in _prediction_rows(r.points.level, ps)])


def prediction_record(data: Data, law: str, found: Predictions) -> dict[str, Any]:
    """Predictions for JSON."""
    levels = [
        {"level": r.points.level, "n": len(r.points), "held_out": r.tests.get(law), "predictions": ps}
        for r, ps in found
    ]
    whole: dict[str, Any] = finite(
        {"schema_version": SCHEMA_VERSION, "data": data.name, "law": law, "n_counts": data.count, "levels": levels}
    )
    return whole


def prediction_text(data: Data, law: str, found: Predictions) -> str:
    """Predictions for eyes, and what speaks against them."""
    notes = []
    for r, ps in found:
        test = r.tests.get(law)
        outside = "; ".join(dict.fromkeys(p.outside for p in ps if p.outside))
        if outside:
            notes.append(f"{r.points.level}: {outside}. A band does not cover what the law gets wrong there.")
        if test is not None:
            notes.append(
                f"{r.points.level}: held out (n = {test.tested}), {law} missed by {test.rmse:.3g} nat; copying the "
                f"nearest measured point by {test.copied:.3g}." + (" Do not extrapolate." if test.failed else "")
            )
    head, table = _head(data, [r for r, _ in found]), prediction_table(found).render("md")
    return f"{head}\n{law}, 95 % bootstrap bands:\n\n{table}\n{bullets(notes)}"
