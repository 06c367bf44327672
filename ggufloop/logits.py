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
            np.exp(scratch, out=scratch)
            sums[i] = scratch.sum(dtype=np.float64)
        return cls(tops, np.log(sums))

    @classmethod
    def as_in_c(cls, rows: Logits) -> Normalisers:
        """The same to the last bit of a C program: numpy's float32 exp is off by an ulp or two, C's expf is not."""
        tops = rows.max(axis=1)
        sums = np.empty(len(rows), dtype=np.float64)
        for i, row in enumerate(rows):
            sums[i] = np.exp((row - tops[i]).astype(np.float64)).astype(np.float32).sum(dtype=np.float64)
        return cls(tops, np.log(sums))


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
