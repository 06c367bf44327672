"""Arithmetic of rows of logits: log-probabilities of tokens, entropy, log-softmax.

    scores = log_probabilities(rows, targets)        # rows float32 (n, n_vocab), targets (n,)

It is llama-perplexity's: float32 logits and exponentials, sums and logarithm in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Scores:
    """One entry per scored token.

    logprob  float64, natural logarithm of the probability the model gave it.
    top      whether it was the likeliest (the first of several equally likely).
    """

    logprob: NDArray[np.float64]
    top: NDArray[np.bool_]

    @property
    def nll(self) -> NDArray[np.float64]:
        """Negative log-likelihood in nats per token."""
        return -self.logprob


class Normalisers(NamedTuple):
    """Of rows of logits: logit - top - log_sum is a log-probability."""

    tops: NDArray[np.float32]
    log_sums: NDArray[np.float64]

    @classmethod
    def of(cls, rows: Logits) -> Normalisers:
        """The largest logit of each row, and the logarithm of the sum of exp(logit - largest)."""
        tops = np.empty(len(rows), dtype=np.float32)
        sums = np.empty(len(rows), dtype=np.float64)
        scratch = np.empty(rows.shape[-1], dtype=np.float32)  # one row stays in the CPU's cache, a batch does not
        for i, row in enumerate(rows):
            tops[i] = row.max()
            np.subtract(row, tops[i], out=scratch)
            sums[i] = expf(scratch, out=scratch).sum(dtype=np.float64)
        return cls(tops, np.log(sums))


def expf(x: Logits, out: Logits | None = None) -> Logits:
    """exp of float32, rounded from float64: C's expf but for one value in some hundreds, and the same on every CPU.

    numpy's own for float32 is off by some units in the last place, more or fewer by CPU: enough to move the sum over a
    vocabulary of 262,144, as a float32, for one token in eight."""
    return np.exp(x, out=np.empty_like(x) if out is None else out, dtype=np.float64, casting="same_kind")


def log_probabilities(rows: Logits, targets: NDArray[np.intp], norms: Normalisers | None = None) -> Scores:
    """Score token targets[i] under the logits rows[i]. norms: of these rows, if they are known already."""
    tops, log_sums = norms or Normalisers.of(rows)
    chosen = rows[np.arange(len(rows)), targets]
    return Scores((chosen - tops).astype(np.float64) - log_sums, rows.argmax(axis=1) == targets)


def entropy(row: Logits) -> float:
    """Entropy in nats of the distribution of one row of logits."""
    row = np.maximum(row - row.max(), -1e4)  # finite, for p log p is 0 where p is
    p = np.exp(row)
    total = p.sum(dtype=np.float64)
    return float(np.log(total) - np.dot(p, row) / total)


def log_softmax(rows: Logits) -> NDArray[np.float64]:
    """Log-probabilities of all tokens, in float64, over the last axis."""
    exact = rows.astype(np.float64)
    exact -= exact.max(axis=-1, keepdims=True)
    exact -= np.log(np.exp(exact).sum(axis=-1, keepdims=True))
    return exact
