#!/usr/bin/env python3
"""The tables of docs/results-family.md from the CSV of train_family.py: losses, what quantising costs, how that grows.

python3 scripts/bootstrap.py python research/family/family_tables.py docs/data/family.csv
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import click
import numpy as np

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.measure.stats import Estimate, t_quantile
from ggufloop.table import Column, Table

Row = dict[str, str]

POWERS = np.linspace(-1, 4, 2001)  # exponents that are tried


def growth(tokens: np.ndarray, changes: np.ndarray, errors: np.ndarray) -> Estimate:
    """Exponent p of change = k D^p, all budgets weighted by their errors, with the 95 % interval of its profile.

    The changes themselves are fitted, not their logarithms: leaving out those not above 0 would select for noise. The
    profile is widened by the residuals where they exceed the errors.
    """
    x = np.exp(POWERS[:, None] * (np.log(tokens) - np.log(tokens).mean()))
    weights = 1 / errors**2
    scales = (x * changes * weights).sum(1) / (x * x * weights).sum(1)
    misfit = (weights * (changes - scales[:, None] * x) ** 2).sum(1)
    best, df = int(misfit.argmin()), len(tokens) - 2
    inside = POWERS[misfit <= misfit[best] + t_quantile(0.975, df) ** 2 * max(1.0, float(misfit[best]) / df)]
    return Estimate(float(POWERS[best]), float(inside[0]), float(inside[-1]), len(tokens))


def pivot(rows: list[Row], kind: str) -> Table:
    """A row per budget, a column per size: of F32 the loss, of another type the change with 1.96 standard errors."""
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    chosen = {(row["size"], int(row["tokens"])): row for row in rows if row["type"] == kind}

    def cell(size: str, tokens: int) -> str | None:
        row = chosen.get((size, tokens))
        if row is None:
            return None
        value, error = ("loss", "loss_se") if kind == "F32" else ("change", "change_se")
        form = ".3f" if kind == "F32" else "+.4f"
        return f"{float(row[value]):{form}} +- {1.96 * float(row[error]):{form[1:] if form[0] == '+' else form}}"

    budgets = sorted({tokens for _, tokens in chosen})
    columns = (Column("tokens"), *(Column(size) for size in sizes))
    return Table(columns, [[tokens, *(cell(size, tokens) for size in sizes)] for tokens in budgets])


def growths(rows: list[Row]) -> Table:
    """Exponents by type and size; left out where the interval is wider than 2, which determines nothing."""
    found = []
    for kind in dict.fromkeys(row["type"] for row in rows if row["change"]):
        for size in dict.fromkeys(row["size"] for row in rows):
            mine = [row for row in rows if (row["type"], row["size"]) == (kind, size)]
            e = growth(*(np.array([float(row[name]) for row in mine]) for name in ("D", "change", "change_se")))
            if POWERS[0] < e.low and e.high < POWERS[-1] and e.high - e.low < 2:
                found.append([kind, size, e.mean, e.low, e.high, e.n])
    return Table(
        (Column("type"), Column("size"), *(Column(c, ".2f") for c in ("exponent", "low", "high")), Column("budgets")),
        found,
    )


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, dir_okay=False))
def main(source: Path) -> None:
    """Print the tables."""
    try:
        rows = list(csv.DictReader(source.read_text().splitlines()))
        missing = {"size", "type", "tokens", "D", "loss", "loss_se", "change", "change_se"} - set(
            rows[0] if rows else ()
        )
        if missing:
            raise UsageError(
                f"{source} has no column {min(missing)}.", "give the CSV of research/family/train_family.py."
            )
        click.echo(f"Loss in F32, nats per token:\n\n{pivot(rows, 'F32').render('md')}")
        for kind in dict.fromkeys(row["type"] for row in rows if row["change"]):
            click.echo(f"Change by {kind}, paired:\n\n{pivot(rows, kind).render('md')}")
        click.echo(f"Change = k D^p, exponents p with 95 % intervals:\n\n{growths(rows).render('md')}")
    except GgufloopError as e:
        sys.exit(f"error: {e.message}\n  {e.hint}")


if __name__ == "__main__":
    main()
