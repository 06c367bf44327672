"""Few combinations of settings in which every pair of values still meets.

    covering.pairwise([("k=3", "k=2 solver=heun"), ("mode=block", "mode=layer"), KV], allowed)

Most bugs of such a product show as soon as two settings are what they need; the product grows with the number of
settings, this list with the sizes of the two largest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations, product

Combination = tuple[str, ...]


def pairs(combination: Combination) -> set[tuple[int, str, int, str]]:
    """The pairs of values a combination shows, each value with the axis it is of."""
    return {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(combination), 2)}


def pairwise(axes: Sequence[Sequence[str]], allowed: Callable[[str], bool]) -> list[str]:
    """Combinations, one value of each axis joined by blanks, that meet every pair some allowed combination has.

    Each is the one that adds most pairs, the first of them among equals, so the list never changes by itself.
    """
    left = [c for c in product(*axes) if allowed(" ".join(c))]
    missing = set().union(*map(pairs, left))
    chosen = []
    while missing:
        best = max(left, key=lambda c: len(pairs(c) & missing))
        missing -= pairs(best)
        chosen.append(" ".join(best))
    return [" ".join(c.split()) for c in chosen]
