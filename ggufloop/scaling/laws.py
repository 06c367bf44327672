"""Eight scaling laws of loss over model size and training tokens: values, derivatives, local slopes and optima.

    law = find("shannon")
    loss = law.loss(theta, n, d)                         # n = ln N, d = ln D, both in billions
    by_n, by_d = law.slopes(theta, n, d)                 # d ln L / d ln N and d ln L / d ln D
    best_size(law, theta, d, (n_least, n_most))          # where loss stops falling with size, or None

The Shannon law (arXiv 2605.23901) reads a model as a noisy channel, L = 1/C with the capacity

    C(N, D) = a N^alpha log2(1 + D^beta / (c (D N)^gamma + d D^delta + e))

b, the constant before D^beta, is fixed at 1: multiplying b, c, d and e by one number changes nothing, so a ninth
parameter would leave every covariance singular. `simpl` (a reconstruction) drops c and e as well. The others are the
baselines of that paper; qid and precision know the bits per weight X, and at one X are the same law.

All constants are positive, so laws are evaluated at theta, their logarithms, many at a time: theta is (..., p), the
result (..., points). Needs numpy alone. Fitting is in `fit.py`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from ggufloop.errors import UsageError, nearest
from ggufloop.measure.stats import Values, bisect

EXPONENT = (math.log(1e-3), math.log(20.0))
COEFFICIENT = (-40.0, 40.0)
"""Where theta is searched. A fit that ends at a bound has not found that parameter, and says so."""

_BIG = 60.0  # logarithm of the largest loss a trial may have: squares of it still add up


@dataclass(frozen=True, kw_only=True)
class Law(ABC):
    """A law: what it is called, and its constants in the order of theta.

    unit_free   it keeps its form in other units of N and D
    """

    name: str
    formula: str
    parameters: tuple[str, ...] = ()
    unit_free: bool = True

    @property
    def exponents(self) -> frozenset[str]:
        """Which of the parameters are exponents."""
        return _POWERS & set(self.parameters)

    @property
    def needs_bits(self) -> bool:
        """Whether it knows the bits per weight X."""
        return "g" in self.parameters

    @abstractmethod
    def values(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values, Values]:
        """Loss (..., points) and its derivative by theta (..., points, p)."""

    @abstractmethod
    def slopes_at(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values | float, ...]:
        """`slopes`, of arrays."""

    @abstractmethod
    def shifted(self, theta: Values, n: float, d: float) -> Values:
        """theta of the same law where ln N and ln D are counted from n and d."""

    @abstractmethod
    def scaled(self, theta: Values, by: Values) -> Values:
        """theta of a loss about exp(by) times as large, for the start of a fit."""

    def loss(self, theta: ArrayLike, n: ArrayLike, d: ArrayLike, bits: ArrayLike | None = None) -> Values:
        """Loss in nats per token, (..., points)."""
        return self.values(*_arrays(theta, n, d, bits))[0]

    def slopes(
        self, theta: ArrayLike, n: ArrayLike, d: ArrayLike, bits: ArrayLike | None = None
    ) -> tuple[Values, Values]:
        """d ln L / d ln N and d ln L / d ln D, each (..., points)."""
        by_n, by_d = self.slopes_at(*_arrays(theta, n, d, bits))
        return np.asarray(by_n), np.asarray(by_d)


def _arrays(
    theta: ArrayLike, n: ArrayLike, d: ArrayLike, bits: ArrayLike | None
) -> tuple[Values, Values, Values, Values | None]:
    n, d = np.broadcast_arrays(np.atleast_1d(np.asarray(n, np.float64)), np.asarray(d, np.float64))
    return np.asarray(theta, np.float64), n, d, None if bits is None else np.asarray(bits, np.float64)


@dataclass(frozen=True)
class _Term:
    """coefficient * N^(sn * en) * D^(sd * ed) * X^-g, or exp(-X / g) for the last factor. None: no such factor."""

    coefficient: str
    en: str | None = None
    sn: int = 0
    ed: str | None = None
    sd: int = 0
    bits: str = ""  # "", "power", "exponential"


@dataclass(frozen=True, kw_only=True)
class _Sum(Law):
    """A law that is a sum of powers; its parameters are those of its terms, in their order."""

    terms: tuple[_Term, ...]

    def __post_init__(self) -> None:
        found = (x for t in self.terms for x in (t.coefficient, t.en, t.ed, "g" if t.bits else None) if x)
        object.__setattr__(self, "parameters", tuple(dict.fromkeys(found)))

    def _parts(
        self, theta: Values, n: Values, d: Values, bits: Values | None
    ) -> list[tuple[Values, dict[str, Values], Values | float, Values | float]]:
        """Per term: its value, how its logarithm changes with each parameter, and with ln N and ln D."""
        column = {name: theta[..., i, None] for i, name in enumerate(self.parameters)}
        out = []
        for term in self.terms:
            log = column[term.coefficient] + np.zeros_like(n)
            by: dict[str, Values] = {term.coefficient: np.ones_like(n)}
            slope: list[Values | float] = [0.0, 0.0]
            for i, (name, sign, x) in enumerate(((term.en, term.sn, n), (term.ed, term.sd, d))):
                if name is not None:
                    slope[i] = sign * np.exp(column[name])
                    by[name] = by.get(name, 0.0) + slope[i] * x
                    log = log + slope[i] * x
            if term.bits:
                assert bits is not None
                rate = -np.exp(column["g"]) * np.log(bits) if term.bits == "power" else -bits * np.exp(-column["g"])
                by["g"] = rate if term.bits == "power" else -rate
                log = log + rate
            out.append((np.exp(np.minimum(log, _BIG)), by, slope[0], slope[1]))
        return out

    def values(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values, Values]:
        shape = np.broadcast_shapes((*theta.shape[:-1], 1), n.shape)
        loss, gradient = np.zeros(shape), np.zeros((*shape, len(self.parameters)))
        for value, by, *_ in self._parts(theta, n, d, bits):
            loss += value
            for name, change in by.items():
                gradient[..., self.parameters.index(name)] += value * change
        return loss, gradient

    def slopes_at(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values | float, ...]:
        parts = self._parts(theta, n, d, bits)
        total = sum(value for value, *_ in parts)
        by_n, by_d = sum(v * slope for v, _, slope, _ in parts), sum(v * slope for v, _, _, slope in parts)
        return by_n / total, by_d / total

    def shifted(self, theta: Values, n: float, d: float) -> Values:
        out: Values = theta.copy()
        for term in self.terms:
            for name, sign, by in ((term.en, term.sn, n), (term.ed, term.sd, d)):
                if name is not None:
                    change = sign * np.exp(theta[..., self.parameters.index(name)]) * by
                    out[..., self.parameters.index(term.coefficient)] += change
        return out

    def scaled(self, theta: Values, by: Values) -> Values:
        out: Values = theta.copy()
        for term in self.terms:
            out[..., self.parameters.index(term.coefficient)] += by
        return out


_CHANNEL = ("a", "alpha", "beta", "gamma", "delta", "c", "d", "e")


class _Channel(Law):
    """The Shannon law. What is not among `parameters` is fixed: c at 1, e at 0."""

    def _column(self, theta: Values, name: str) -> Values | float:
        if name in self.parameters:
            return np.asarray(theta[..., self.parameters.index(name), None])
        return 0.0 if name == "c" else -math.inf

    def parts(self, theta: Values, n: Values, d: Values) -> tuple[Values, Values, Values, Values]:
        """ln rho (signal over noise), and the shares f_c, f_d and f_e of the noise."""
        at = {name: self._column(theta, name) for name in _CHANNEL}
        noises = [
            at["c"] + np.exp(at["gamma"]) * (n + d),
            at["d"] + np.exp(at["delta"]) * d,
            at["e"] + np.zeros_like(n),
        ]
        total = np.logaddexp(np.logaddexp(noises[0], noises[1]), noises[2])
        fc, fd, fe = (np.exp(noise - total) for noise in noises)
        return np.asarray(np.exp(at["beta"]) * d - total), fc, fd, fe

    def _log_loss(self, theta: Values, n: Values, log_rho: Values) -> tuple[Values, Values]:
        """ln L, and g(rho) = rho / ((1 + rho) ln(1 + rho)), how fast ln log2(1 + rho) follows ln rho."""
        log_rho = np.clip(log_rho, -_BIG, _BIG)
        nats = np.logaddexp(0.0, log_rho)  # ln(1 + rho)
        g = np.exp(log_rho - nats) / nats
        bandwidth = self._column(theta, "a") + np.exp(self._column(theta, "alpha")) * n
        return np.asarray(math.log(math.log(2)) - bandwidth - np.log(nats)), np.asarray(g)

    def values(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values, Values]:
        log_rho, fc, fd, fe = self.parts(theta, n, d)
        log, g = self._log_loss(theta, n, log_rho)
        loss = np.exp(np.minimum(log, _BIG))
        power = {name: np.exp(self._column(theta, name)) for name in self.exponents}
        by = {
            "a": -np.ones_like(g),
            "alpha": -power["alpha"] * n,
            "beta": -g * power["beta"] * d,
            "gamma": g * fc * power["gamma"] * (n + d),
            "delta": g * fd * power["delta"] * d,
            "c": g * fc,
            "d": g * fd,
            "e": g * fe,
        }
        gradient = np.empty((*loss.shape, len(self.parameters)))
        for i, name in enumerate(self.parameters):
            gradient[..., i] = loss * by[name]
        return loss, gradient

    def slopes_at(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values | float, ...]:
        """-(alpha - gamma f_c g) and -g (beta - gamma f_c - delta f_d)."""
        log_rho, fc, fd, _ = self.parts(theta, n, d)
        g = self._log_loss(theta, n, log_rho)[1]
        alpha, beta, gamma, delta = (np.exp(self._column(theta, name)) for name in ("alpha", "beta", "gamma", "delta"))
        return gamma * fc * g - alpha, g * (gamma * fc + delta * fd - beta)

    def shifted(self, theta: Values, n: float, d: float) -> Values:
        at = {name: theta[..., i] for i, name in enumerate(self.parameters)}
        power = {name: np.exp(at[name]) for name in self.exponents}
        moved = {
            "a": power["alpha"] * n,
            "c": (power["gamma"] - power["beta"]) * d + power["gamma"] * n,
            "d": (power["delta"] - power["beta"]) * d,
            "e": -power["beta"] * d,
        }
        return np.stack([at[name] + moved.get(name, 0.0) for name in self.parameters], axis=-1)

    def scaled(self, theta: Values, by: Values) -> Values:
        out: Values = theta.copy()
        out[..., self.parameters.index("a")] -= by
        return out


class _OpenAI(Law):
    """((a/N)^(alpha/beta) + b/D)^beta, with theta in the order a, alpha, b, beta."""

    @staticmethod
    def _parts(theta: Values, n: Values, d: Values) -> tuple[Values, Values, Values, Values, Values]:
        """ln of the sum, the share of the first term in it, alpha, beta, and ln(a/N)."""
        a, alpha, b, beta = (theta[..., i, None] for i in range(4))
        alpha, beta = np.exp(alpha), np.exp(beta)
        first, second = alpha / beta * (a - n), b - d
        total = np.logaddexp(first, second)
        return total, np.exp(first - total), alpha, beta, a - n

    def values(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values, Values]:
        total, share, alpha, beta, a = self._parts(theta, n, d)
        loss = np.exp(np.clip(beta * total, -_BIG, _BIG))
        by = [loss * alpha * share, loss * alpha * share * a, loss * beta * (1 - share),
              loss * (beta * total - alpha * share * a)]  # fmt: skip
        return loss, np.stack(by, axis=-1)

    def slopes_at(self, theta: Values, n: Values, d: Values, bits: Values | None) -> tuple[Values | float, ...]:
        _, share, alpha, beta, _ = self._parts(theta, n, d)
        return -alpha * share, -beta * (1 - share)

    def shifted(self, theta: Values, n: float, d: float) -> Values:
        return np.asarray(theta - np.array([n, 0.0, d, 0.0]))

    def scaled(self, theta: Values, by: Values) -> Values:
        alpha, beta = np.exp(theta[..., 1]), np.exp(theta[..., 3])
        return np.asarray(theta + np.stack([by / alpha, 0 * by, by / beta, 0 * by], axis=-1))


_POWERS = frozenset(("alpha", "beta", "gamma", "delta", "alpha2", "beta2", "g"))


_SIZE, _TOKENS, _FLOOR = _Term("a", "alpha", -1), _Term("b", ed="beta", sd=-1), _Term("c")
_FALLING = _Term("a", "alpha", 1, "beta", -1)
_CHINCHILLA = "a/N^alpha + b/D^beta + c"


def _noisy(name: str, factor: str, bits: str) -> _Sum:
    noise = _Term("d", "alpha2", -1, "beta2", 1, bits)
    formula = f"{_CHINCHILLA} + d D^beta2/N^alpha2 {factor}"
    return _Sum(name=name, formula=formula, terms=(_SIZE, _TOKENS, _FLOOR, noise))


LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        _Channel(name="shannon", parameters=_CHANNEL,
                 formula="1 / (a N^alpha log2(1 + D^beta/(c (D N)^gamma + d D^delta + e)))"),
        _Channel(name="simpl", parameters=(*_CHANNEL[:5], "d"), unit_free=False,
                 formula="1 / (a N^alpha log2(1 + D^beta/((D N)^gamma + d D^delta)))"),
        _OpenAI(name="openai", parameters=("a", "alpha", "b", "beta"), formula="((a/N)^(alpha/beta) + b/D)^beta"),
        _Sum(name="chinchilla", formula=_CHINCHILLA, terms=(_SIZE, _TOKENS, _FLOOR)),
        _noisy("qid", "X^-g", "power"),
        _noisy("precision", "exp(-X/g)", "exponential"),
        _Sum(name="symmetric", formula="a N^alpha/D^beta + b D^beta/N^alpha + c",
             terms=(_FALLING, _Term("b", "alpha", -1, "beta", 1), _FLOOR)),
        _Sum(name="asymmetric", formula="a N^alpha/D^beta + b D^beta2/N^alpha2 + c",
             terms=(_FALLING, _Term("b", "alpha2", -1, "beta2", 1), _FLOOR)),
    )
}  # fmt: skip


def find(name: str) -> Law:
    """A law by its name. Raises UsageError."""
    if name not in LAWS:
        raise UsageError(f"law {name!r} is not known.", nearest(name, LAWS))
    return LAWS[name]


def at_one_level(law: Law) -> Law:
    """The law where all points have the same bits: X is then part of d, and g cannot be told."""
    if not law.needs_bits:
        return law
    assert isinstance(law, _Sum)
    return replace(law, terms=tuple(replace(term, bits="") for term in law.terms))


def best_size(
    law: Law, theta: ArrayLike, d: float, span: tuple[float, float], bits: float | None = None
) -> float | None:
    """ln N* in `span`, the size at which loss is least for the budget d = ln D; None if it lies at an end."""
    return _least(lambda n: law.slopes(theta, n, np.full_like(n, d), bits)[0], span)


def best_budget(
    law: Law, theta: ArrayLike, n: float, span: tuple[float, float], bits: float | None = None
) -> float | None:
    """ln D* in `span`, the tokens beyond which a model of size n = ln N gets worse; None if there are none."""
    return _least(lambda d: law.slopes(theta, np.full_like(d, n), d, bits)[1], span)


def _least(slope: Callable[[Values], Values], span: tuple[float, float]) -> float | None:
    """The first place in `span` where `slope` goes from negative to positive, bisected."""
    if not span[0] < span[1]:
        return None
    grid = np.linspace(*span, 129)
    falls = slope(grid) < 0
    turns = np.flatnonzero(falls[:-1] & ~falls[1:])
    if not len(turns):
        return None
    return bisect(lambda x: float(slope(np.array([x]))[0]) < 0, float(grid[turns[0]]), float(grid[turns[0] + 1]))
