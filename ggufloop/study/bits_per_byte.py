"""Bits per byte of text, of several model files, and what can be said of their differences and ratios with intervals.

    losses = Losses.of([q, reference], bigger)        # cells of studies on the same text
    losses.contrast((1, -1, 0))                       # q minus reference
    losses.ratio((1, -1, 0), (1, 0, -1))              # that, as a share of q minus the bigger model
    rate(gain, cost)                                  # an interval over another one

Bits per byte do not depend on the tokenizer, so models of different families can be compared. Items are chunks of text,
neighbours in it (`measure/dependence.py`).
Where all models cut the text into the same tokens the chunks are paired; otherwise the same chunk is another piece of
text for each, and the two are independent samples of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ggufloop.errors import UsageError
from ggufloop.measure.dependence import covariance_of_means
from ggufloop.measure.stats import Estimate, Values, t_quantile
from ggufloop.study.file import Cell

LEVEL = 0.95


@dataclass(frozen=True)
class Losses:
    """Bits per byte of several files with the covariance of these means. df: degrees of freedom of their intervals."""

    means: Values
    covariance: Values
    n: int
    df: int

    @classmethod
    def of(cls, own: Sequence[Cell], bigger: Cell | None) -> Losses:
        """Of cells of the same chunks, and then of a bigger model's cell: paired if its chunks are the same text.

        Raises UsageError for fewer than 2 chunks of either.
        """
        if bigger is None:
            return cls._sample(own)
        both = _aligned([*own, bigger])
        if both is not None:
            return cls._sample(both)
        a, b = cls._sample(own), cls._sample([bigger])
        k = len(a.means)
        covariance = np.zeros((k + 1, k + 1))
        covariance[:k, :k], covariance[k:, k:] = a.covariance, b.covariance
        return cls(np.concatenate([a.means, b.means]), covariance, min(a.n, b.n), min(a.df, b.df))

    @classmethod
    def _sample(cls, cells: Sequence[Cell]) -> Losses:
        n = len(cells[0].chunks)
        if n < 2:
            raise UsageError(f"n = {n} chunk is too few for an interval.", "measure some dozen chunks.")
        n_bytes = np.array([cell.values("n_bytes") for cell in cells])
        bits = np.array([cell.values("nll") * cell.values("n") / math.log(2) for cell in cells])
        means = bits.sum(axis=1) / n_bytes.sum(axis=1)
        # A ratio of sums, linearised: its error is that of the mean of these (Cochran, Sampling Techniques, 6.4).
        rest = (bits - means[:, None] * n_bytes) / n_bytes.mean(axis=1, keepdims=True)
        covariance, df = covariance_of_means(rest, [0] * n)
        return cls(means, covariance, n, df)

    @property
    def _t(self) -> float:
        return t_quantile((1 + LEVEL) / 2, self.df)

    def contrast(self, weights: Sequence[float]) -> Estimate:
        """weights . means, with Student's interval."""
        w = np.asarray(weights)
        mean, half = float(w @ self.means), self._t * math.sqrt(max(0.0, float(w @ self.covariance @ w)))
        return Estimate(mean, mean - half, mean + half, self.n)

    def log_ratio(self, a: int, b: int) -> Estimate:
        """ln(means[a] / means[b]), by the delta method."""
        w = np.zeros(len(self.means))
        w[a] += 1 / self.means[a]
        w[b] -= 1 / self.means[b]
        half = self._t * math.sqrt(max(0.0, float(w @ self.covariance @ w)))
        mean = math.log(self.means[a] / self.means[b])
        return Estimate(mean, mean - half, mean + half, self.n)

    def ratio(self, above: Sequence[float], below: Sequence[float]) -> Estimate | None:
        """(above . means) / (below . means) with Fieller's interval (Fieller 1954): it holds x exactly if
        `contrast(above - x below)` holds 0. None where the denominator is not told from 0."""
        a, b = np.asarray(above), np.asarray(below)
        x, y = float(a @ self.means), float(b @ self.means)
        xx, yy, xy = (float(u @ self.covariance @ v) * self._t**2 for u, v in ((a, a), (b, b), (a, b)))
        square = y * y - yy
        if square <= 0:
            return None
        root = math.sqrt(max(0.0, (x * y - xy) ** 2 - square * (x * x - xx)))
        return Estimate(x / y, (x * y - xy - root) / square, (x * y - xy + root) / square, self.n)


def _aligned(cells: Sequence[Cell]) -> list[Cell] | None:
    """The cells cut down to the chunks they share, None if those are not the same tokens of the text."""
    by_index = [{c.index: c for c in cell.chunks} for cell in cells]
    shared = sorted(set.intersection(*map(set, by_index)))
    if len(shared) < 2 or any(len({(at[i].n, at[i].n_bytes) for at in by_index}) > 1 for i in shared):
        return None
    return [Cell(cell.type, cell.loop, tuple(at[i] for i in shared)) for cell, at in zip(cells, by_index, strict=True)]


def rate(gain: Estimate, cost: Estimate) -> Estimate:
    """gain / cost with the interval of all ratios of their two; what gains and costs nothing has an infinite one."""

    def at(g: float, c: float) -> float:
        return g / c if c > 0 else math.copysign(math.inf, g) if g else 0.0

    corners = [at(g, c) for g in (gain.low, gain.high) for c in (cost.low, cost.high)]
    return Estimate(at(gain.mean, cost.mean), min(corners), max(corners), min(gain.n, cost.n), gain.level)
