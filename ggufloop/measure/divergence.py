"""How far one model's predictions are from another's on the same tokens: llama-perplexity's KL block, field by field.

    base = Packed.empty(n, n_vocab); base.put(part, rows, norms)         # distributions, 2 bytes a number
    record = Record.empty(n); record.put(part, rows, norms, targets, base)
    print(KLStatistics.of(record).block())

llama-perplexity keeps the base model's log-probabilities in a file, as 16 bits between the largest and 16 nats less,
and everything derived from them carries that rounding (about 1e-4 nats). It is done here too, in the same float32
steps, whether they come from such a file or from a model in this process: numbers of the two tools can be compared
digit by digit, the last to one (see `logits.expf`), and a chunk's distributions take half the memory.
Its KL leaves out tokens to which the base gives less than exp(-16), so it comes out a little small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ggufloop.logits import Logits, Normalisers, expf
from ggufloop.measure.dependence import chunk_mean

FLOOR = np.float32(16)
"""Nats below the likeliest token at which llama-perplexity stops telling probabilities apart."""

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Packed:
    """Distributions in 16 bits: log p = scale * steps + lowest. Arrays of (n,), (n,) and (n, n_vocab)."""

    scale: Floats
    lowest: Floats
    steps: NDArray[np.uint16]

    @classmethod
    def empty(cls, n: int, n_vocab: int) -> Packed:
        """Room for n distributions."""
        return cls(np.empty(n, np.float32), np.empty(n, np.float32), np.empty((n, n_vocab), np.uint16))

    def put(self, part: slice, rows: Logits, norms: Normalisers) -> None:
        """Pack the distributions of `rows` into the places `part`."""
        scratch = np.empty(rows.shape[-1], dtype=np.float32)
        for i, row, top, log_sum in zip(range(part.start, part.stop), rows, *norms, strict=True):
            low = max(row.min(), top - FLOOR)
            self.lowest[i] = low - top - np.float32(log_sum)
            self.scale[i] = (top - low) / np.float32(65535)
            if not self.scale[i]:
                self.steps[i] = 0
                continue
            np.subtract(row, low, out=scratch)
            np.maximum(scratch, 0, out=scratch)
            np.multiply(scratch, np.float32(1) / self.scale[i], out=scratch)
            self.steps[i] = np.rint(scratch, out=scratch)

    def part(self, part: slice) -> Packed:
        """A view of some of them."""
        return Packed(self.scale[part], self.lowest[part], self.steps[part])

    def nll(self, targets: NDArray[np.intp]) -> Floats:
        """Negative log-likelihood of token targets[i] under distribution i, float32."""
        chosen = self.steps[np.arange(len(targets)), targets]
        return np.asarray(-(self.scale * chosen.astype(np.float32) + self.lowest), dtype=np.float32)


@dataclass(frozen=True)
class Record:
    """What was compared, one entry per token: model and base on the token that came, and on the whole distribution.

    nll, nll_base  float32, nats.           same_top  whether both find the same token likeliest.
    kl             float64, nats, of the model from the base.
    """

    nll: Floats
    nll_base: Floats
    kl: Doubles
    same_top: NDArray[np.bool_]

    @classmethod
    def empty(cls, n: int) -> Record:
        """Room for n tokens."""
        return cls(np.empty(n, np.float32), np.empty(n, np.float32), np.empty(n), np.empty(n, np.bool_))

    @property
    def p_diff(self) -> Floats:
        """Probability of the token under the model minus that under the base, float32."""
        return expf(-self.nll) - expf(-self.nll_base)

    def put(self, part: slice, rows: Logits, norms: Normalisers, targets: NDArray[np.intp], base: Packed) -> None:
        """Compare logits with the base's distributions, base[i] with rows[i], into the places `part`."""
        ends = norms.tops + norms.log_sums.astype(np.float32)
        self.nll_base[part] = base.nll(targets)
        for i, row, target, end in zip(range(part.start, part.stop), rows, targets, ends, strict=True):
            steps = base.steps[i - part.start]
            self.nll[i] = end - row[target]
            log_p = steps * base.scale[i - part.start]
            log_p += base.lowest[i - part.start]
            kept = log_p > -FLOOR
            log_p, seen = log_p[kept], row[kept]
            terms = np.subtract(log_p, seen, out=seen)
            terms += end
            terms *= expf(log_p)
            self.kl[i] = terms.sum(dtype=np.float64)
            self.same_top[i] = row.argmax() == steps.argmax()


class Value(NamedTuple):
    """A mean and its standard error, tokens taken as independent (llama-perplexity's convention)."""

    mean: float
    error: float


LEAST_BEYOND = 10
"""Tokens beyond a percentile, below which it is a statement about these few."""

PERCENTILES = (0.0, 0.001, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class KLStatistics:
    """The fields of llama-perplexity's block, 'Q' the model and 'base' the base; +/- is one standard error.

    Of correlation, kl and p_diff: fractions, not per cent. `*_at` maps PERCENTILES to values.
    """

    n: int
    ppl: Value
    ppl_base: Value
    correlation: float
    log_ratio: Value
    ratio: Value
    difference: Value
    kl: Value
    kl_at: dict[float, float]
    p_diff: Value
    p_diff_at: dict[float, float]
    p_diff_rms: Value
    same_top: Value

    @classmethod
    def of(cls, record: Record) -> KLStatistics:
        """From all tokens compared. Squares are taken in float32 where llama-perplexity's are."""
        n = len(record.nll)
        log_q = _mean(record.nll, record.nll * record.nll)
        log_base = _mean(record.nll_base, record.nll_base * record.nll_base)
        both = (record.nll * record.nll_base).mean(dtype=np.float64)
        covariance = float(both - log_q.mean * log_base.mean) / (n - 1) if n >= 10 else 0.0
        ppl = Value(math.exp(log_q.mean), math.exp(log_q.mean) * log_q.error)
        base = Value(math.exp(log_base.mean), math.exp(log_base.mean) * log_base.error)
        log_ratio = Value(log_q.mean - log_base.mean, _root(log_q.error, log_base.error, covariance))
        ratio = math.exp(log_ratio.mean)
        p_diff = record.p_diff
        square = p_diff * p_diff
        rms = _mean(square, square.astype(np.float64) ** 2)
        root = math.sqrt(rms.mean)
        same = float(record.same_top.mean())
        errors = log_q.error * log_base.error
        return cls(
            n=n,
            ppl=ppl,
            ppl_base=base,
            correlation=covariance / errors if errors else math.nan,
            log_ratio=log_ratio,
            ratio=Value(ratio, ratio * log_ratio.error),
            difference=Value(ppl.mean - base.mean, _root(ppl.error, base.error, ppl.mean * base.mean * covariance)),
            kl=_mean(record.kl, record.kl * record.kl),
            kl_at=_percentiles(record.kl.astype(np.float32)),
            p_diff=_mean(p_diff, square),
            p_diff_at=_percentiles(p_diff),
            p_diff_rms=Value(root, 0.5 / root * rms.error if root else math.nan),
            same_top=Value(same, math.sqrt(same * (1 - same) / (n - 1)) if n > 1 else math.nan),
        )

    def block(self) -> str:
        """The three sections, with llama-perplexity's labels and digits."""
        kl = [f"{_label(q)}KLD: {self.kl_at[q]:10.6f}" for q in reversed(PERCENTILES) if q not in (0.25, 0.75)]
        dp = [f"{_label(q)}{DP}: {100 * self.p_diff_at[q]:6.3f}%" for q in reversed(PERCENTILES)]
        lines = [
            "====== Perplexity statistics ======",
            f"Mean PPL(Q)                   : {_six(self.ppl)}",
            f"Mean PPL(base)                : {_six(self.ppl_base)}",
            f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * self.correlation:6.2f}%",
            f"Mean ln(PPL(Q)/PPL(base))     : {_six(self.log_ratio)}",
            f"Mean PPL(Q)/PPL(base)         : {_six(self.ratio)}",
            f"Mean PPL(Q)-PPL(base)         : {_six(self.difference)}",
            "",
            "====== KL divergence statistics ======",
            f"Mean    KLD: {_six(self.kl)}",
            *kl,
            "",
            "====== Token probability statistics ======",
            f"Mean    {DP}: {_percent(self.p_diff)}",
            *dp,
            f"RMS {DP}    : {_percent(self.p_diff_rms)}",
            f"Same top p: {_percent(self.same_top)}",
        ]
        return "\n".join(lines) + "\n"


class ChunkValues(NamedTuple):
    """Means with their standard errors over chunks, neighbours of one text (`dependence.chunk_mean`), in the units of
    `KLStatistics`: log_ratio, kl, p_diff, same_top. Tokens of a chunk are alike, so llama-perplexity's are too narrow.
    """

    log_ratio: Value
    kl: Value
    p_diff: Value
    same_top: Value

    @classmethod
    def of(cls, record: Record, chunks: int) -> ChunkValues:
        """Of a record of equally many tokens from each of 2 chunks at least."""
        columns = (record.nll.astype(np.float64) - record.nll_base, record.kl, record.p_diff, record.same_top)
        means = [np.asarray(x, np.float64).reshape(chunks, -1).mean(axis=1) for x in columns]
        found = map(chunk_mean, means)
        return cls(*(Value(e.mean, e.sd / math.sqrt(chunks)) for e in found))

    def lines(self, n: int, chunks: int) -> str:
        """What follows llama-perplexity's block: its means with these errors, and how far its percentiles hold."""
        last = 100 * (1 - LEAST_BEYOND / n)
        return (
            f"====== Errors over {chunks} chunks ======\n"
            f"Mean ln(PPL(Q)/PPL(base))     : {_six(self.log_ratio)}\n"
            f"Mean    KLD: {_six(self.kl)}\n"
            f"Mean    {DP}: {_percent(self.p_diff)}\n"
            f"Same top p: {_percent(self.same_top)}\n"
            f"Fewer than {LEAST_BEYOND} of {n} tokens lie beyond percentiles above {last:.4g} or below "
            f"{100 - last:.4g} %.\n"
        )


PM, DP = "\N{PLUS-MINUS SIGN}", "\N{GREEK CAPITAL LETTER DELTA}p"


def _label(share: float) -> str:
    named = {0.0: "Minimum", 0.5: "Median", 1.0: "Maximum"}
    return (named.get(share) or f"{100 * share:4.1f}%").ljust(8)


def _six(value: Value) -> str:
    return f"{value.mean:10.6f} {PM} {value.error:10.6f}"


def _percent(value: Value) -> str:
    return f"{100 * value.mean:6.3f} {PM} {100 * value.error:5.3f} %"


def _mean(x: Floats | Doubles, squares: Floats | Doubles) -> Value:
    """Mean and its standard error, 0 for ten values or fewer; a negative variance, which rounding can give, is 0."""
    n = len(x)
    mean = float(x.mean(dtype=np.float64))
    variance = float(squares.mean(dtype=np.float64)) - mean * mean
    return Value(mean, math.sqrt(variance / (n - 1)) if variance > 0 and n > 10 else 0.0)


def _root(a: float, b: float, covariance: float) -> float:
    """Standard error of a difference; nan where rounding makes its square negative, as llama-perplexity prints it."""
    square = a * a + b * b - 2 * covariance
    return math.sqrt(square) if square >= 0 else math.nan


def _percentiles(x: Floats) -> dict[float, float]:
    """Linearly interpolated, in float32."""
    x = np.sort(x)
    found = {}
    for share in PERCENTILES:
        place = np.float32(share) * np.float32(len(x) - 1)
        i = int(place)
        rest = place - np.float32(i)
        after = x[min(i + 1, len(x) - 1)]
        found[share] = float((np.float32(1) - rest) * x[i] + rest * after)
    return found
