"""Items that resemble each other, and intervals that know it.

    paired_mean(diff)                            # of independent items: Student's interval
    paired_mean(diff, documents)                 # of chunks in the order of their texts
    chunk_mean(diff)                             # of chunks of one text
    paired_ratio(a, b, documents)                # mean of a over mean of b
    covariance_of_means(rows, documents)         # of several means over the same items

The first chunks of a text are no sample of it, and neighbours resemble each other: correlations of .2 to .4 have been
seen, under which Student's interval for a mean of no effect leaves out 0 to one side in 5 to 10 % of cases instead of
2.5. So what counts as an item here is a document; with few documents it is a block of neighbouring chunks, and with few
chunks the worst correlation seen is taken for granted. `tests/measure/test_dependence.py` simulates all three.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggufloop.errors import UsageError
from ggufloop.measure.stats import Estimate, PairedEstimate, Values, numbers, pairs, t_quantile, t_within

Labels = NDArray[np.intp]

CORRELATION = 0.4
"""Of neighbouring chunks: what is assumed of fewer than `FEW` chunks, which cannot tell."""

FEW = 64
"""Chunks of few documents from which on blocks are long enough to be nearly independent, and enough for an interval."""

DOCUMENTS = 10
"""From so many documents on, a document is an item."""


def paired_mean(diff: ArrayLike, documents: ArrayLike | None = None, level: float = 0.95) -> PairedEstimate:
    """Mean difference with Student's interval; sd is such that sd / sqrt(n) is its standard error.

    documents: of each item, items in the order of the text; None: items are independent. Over clusters the standard
    error is that of their sums around the mean (Cochran 1977, ratio estimate), its degrees of freedom those of the
    effective number of clusters, (sum of n_g^2)^2 / sum of n_g^4 (after Carter, Schnepel and Steigerwald 2017).
    Clusters are documents from `DOCUMENTS` on; else blocks of about sqrt(n) neighbours (batch means, Flegal and Jones
    2010), widened by the correlation of neighbouring blocks; under `FEW` items the variance is that of
    independent ones times (1 + r) / (1 - r), r = `CORRELATION`, of as many items fewer.

    Differences that are all the same have no spread: the interval is that point, p no less than 2^(1-n).

    Raises UsageError for fewer than 2 items, values that are not finite, other lengths, or a level outside 0..1.
    """
    x = numbers(diff, "items", 2)
    n, mean = len(x), float(x.mean())
    covariance, df = covariance_of_means(x[None], documents)
    error = math.sqrt(float(covariance[0, 0]))
    quantile = t_quantile((1 + level) / 2, df)
    if error == 0:
        return PairedEstimate(mean, mean, mean, n, level, p=2.0 ** (1 - n) if mean else 1.0)
    p = 1 - t_within(abs(mean) / error, df)
    half = quantile * error
    return PairedEstimate(mean, mean - half, mean + half, n, level, p=max(p, 0.0), sd=error * math.sqrt(n))


def chunk_mean(diff: ArrayLike) -> PairedEstimate:
    """`paired_mean` of the chunks of one text, in its order."""
    return paired_mean(diff, np.zeros(np.shape(diff)))


def covariance_of_means(rows: Values, documents: ArrayLike | None = None) -> tuple[Values, int]:
    """Covariance of the means of rows [m, n] over the same n items, [m, m], and the degrees of freedom of their
    intervals, all as `paired_mean` has it; blocks are widened by a row's largest correlation. Raises UsageError."""
    n = rows.shape[1]
    if documents is None:
        return np.atleast_2d(np.cov(rows, ddof=1)) / n, n - 1
    labels = np.unique(np.asarray(documents), return_inverse=True)[1]
    if len(labels) != n:
        raise UsageError(f"{n} differences and {len(labels)} documents are not pairs.", "name one for each item.")
    if labels.max() + 1 >= DOCUMENTS:
        covariance, df, _ = _clustered(rows, labels)
        return covariance, df
    if n >= FEW:
        covariance, df, correlation = _clustered(rows, _blocks(labels, math.isqrt(n)))
        return covariance * (1 + 2 * max(0.0, correlation)), df
    shrunk = (1 - CORRELATION) / (1 + CORRELATION)
    return np.atleast_2d(np.cov(rows, ddof=1)) / (n * shrunk), max(1, int(n * shrunk) - 1)


def paired_ratio(a: ArrayLike, b: ArrayLike, documents: ArrayLike | None = None, level: float = 0.95) -> Estimate:
    """r = mean(a) / mean(b) of paired items, with the interval that `paired_mean` gives (a - r b) / mean(b) around it
    (ratio estimate by linearisation, Cochran 1977): what a and b share on an item cancels. Equal a and b give 1.

    Raises UsageError as `paired_mean`, and for a mean of b that is not above 0.
    """
    x, y = pairs(a, b, 2)
    if y.mean() <= 0:
        raise UsageError(f"a ratio to {y.mean():g} is not defined.", "the denominator must be above 0 on average.")
    ratio = float(x.sum() / y.sum())
    e = paired_mean((x - ratio * y) / y.mean(), documents, level)
    return Estimate(ratio, ratio + e.low, ratio + e.high, e.n, level)


def _blocks(labels: Labels, length: int) -> Labels:
    """Blocks of about `length` neighbours, none over two documents, numbered in the order of the items."""
    out, begun = np.empty(len(labels), np.intp), 0
    starts = np.flatnonzero(np.diff(labels, prepend=labels[0] - 1))
    for start, end in zip(starts, [*starts[1:], len(labels)], strict=True):
        k = max(1, round((end - start) / length))
        out[start:end] = begun + np.arange(end - start) * k // (end - start)
        begun += k
    return out


def _clustered(rows: Values, labels: Labels) -> tuple[Values, int, float]:
    """Covariance of the means over clusters, its degrees of freedom, and the correlation of neighbouring sums, the
    largest of a row."""
    sizes = np.bincount(labels)
    sums = np.array([np.bincount(labels, x) for x in rows]) - sizes * rows.mean(axis=1, keepdims=True)
    k, products = len(sizes), sums @ sums.T
    weights = sizes.astype(np.float64) ** 2
    df = max(1, round(float(weights.sum() ** 2 / (weights @ weights))) - 1)
    near = [float(s[1:] @ s[:-1]) / square + 1 / k if square else 0.0
            for s, square in zip(sums, products.diagonal(), strict=True)]  # fmt: skip
    return k / (k - 1) * products / rows.shape[1] ** 2, df, max(near)
