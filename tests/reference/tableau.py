"""A tableau run literally, on anything that adds and scales: what the compute graph of the patch does with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ggufloop.solvers import Tableau


def apply(tableau: Tableau, g: Callable[[Any], Any], x0: Any) -> Any:
    """The state after a loop over g that begins at x0."""
    residuals: list[Any] = []
    for row in tableau.A:
        y = x0
        for a, r in zip(row, residuals, strict=False):
            y = y + float(a) * r
        residuals.append(g(y) - y)
    out = x0
    for b, r in zip(tableau.B, residuals, strict=True):
        out = out + float(b) * r
    return out
