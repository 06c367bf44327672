"""Fitting the laws of `laws.py`, all in the same way: least squares in nats from the same many starts.

    fit = fit_law(find("shannon"), points)       # points: `shannon_data.Points` of one level
    test = extrapolate(find("shannon"), [points])  # fitted without the largest size and budgets, tested on those
    draws = bootstrap(fit, seed=1)               # theta of refits, for bands of anything computed from theta

The optimiser decides how good a law looks: from one start the same law's R2 can be 0.98 or negative. So every law gets
`STARTS` random starts and the two a paper would use, all ones and all 0.1, and the best end counts. All starts run at
once as one array, by Levenberg-Marquardt with the laws' exact derivatives, so a fit takes a fraction of a second. Units
are centred on the data first, so that starts mean the same for a family of millions and one of billions. Needs numpy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import UsageError
from ggufloop.measure.stats import Values
from ggufloop.scaling.data import Points, together
from ggufloop.scaling.laws import COEFFICIENT, EXPONENT, Law, at_one_level

STARTS = 24
LEAST_SIZES, LEAST_BUDGETS = 4, 8
"""What a law of `_LARGE` parameters needs in one level to be told apart from others; smaller laws need 3 of each."""

_LARGE = 8
_FEW = 3
_SHORT, _LONG = 60, 300  # steps of every start, and of the best of them
_STALL = 20  # steps in which the squares must shrink by 1e-5 for a start to go on
_KEPT = 5


@dataclass(frozen=True)
class Fit:
    """A law fitted to points.

    theta   logarithms of the parameters
    rmse    root of the mean square residual, nats per token
    aicc    n ln(SSE/n) + 2k + 2k(k+1)/(n-k-1), k the parameters and the variance: to compare laws on the same points
    bounds  parameters that ended at a bound of the search: the data do not hold them
    agreed  how many of the starts ended within 1 % of the best RMSE
    """

    law: Law
    points: Points
    theta: Values
    r2: float
    rmse: float
    aicc: float
    n: int
    bounds: tuple[str, ...]
    agreed: int
    starts: int

    @property
    def parameters(self) -> dict[str, float]:
        """Constants by name, N and D in billions."""
        return dict(zip(self.law.parameters, (float(v) for v in np.exp(self.theta)), strict=True))

    def residuals(self) -> Values:
        """Fitted minus measured, nats."""
        p = self.points
        return self.law.loss(self.theta, p.n, p.d, p.bits) - p.loss


@dataclass(frozen=True)
class Extrapolation:
    """A law fitted to the smaller sizes and budgets, and tested on the largest ones.

    copied      RMSE of predicting each test point by the nearest measured one that was fitted: a law that does no
                better has failed
    residuals   predicted minus measured, in the order of the test points
    """

    rmse: float
    copied: float
    fitted: int
    tested: int
    residuals: tuple[float, ...]
    measured: tuple[float, ...]

    @property
    def failed(self) -> bool:
        """Whether copying the nearest point would have done as well."""
        return self.rmse >= self.copied


def goodness(sse: float, loss: Values, parameters: int) -> tuple[float, float, float, int]:
    """R2, RMSE, AICc and n of so many parameters fitted to these losses with this sum of squared errors."""
    n, k, spread = len(loss), parameters + 1, float(((loss - loss.mean()) ** 2).sum())
    least = max(sse, n * 1e-24)  # of a perfect fit the logarithm is not taken
    aicc = n * math.log(least / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1) if n > k + 1 else math.inf
    return 1 - sse / spread if spread > 0 else math.nan, math.sqrt(sse / n), aicc, n


def needed(law: Law) -> int:
    """Fewest points to fit a law to: AICc divides by n - p - 2."""
    return len(law.parameters) + 3


def check(law: Law, points: Points) -> str:
    """Why these points cannot hold a law, '' if they can."""
    p = len(law.parameters)
    sizes, budgets = LEAST_SIZES, LEAST_BUDGETS
    if p < _LARGE:
        sizes = budgets = _FEW
    if len(points.sizes) < sizes or len(points.budgets) < budgets:
        return (
            f"{law.name} has {p} parameters and needs {sizes} sizes x {budgets} token budgets; "
            f"{points.level} has {len(points.sizes)} x {len(points.budgets)}"
        )
    if len(points) < needed(law):
        return f"{law.name} has {p} parameters and needs {needed(law)} points; {points.level} has {len(points)}"
    return ""


def fit_law(law: Law, points: Points, starts: int = STARTS, seed: int = 0, checked: bool = True) -> Fit:
    """The best of many starts. Raises UsageError if the points cannot hold the law."""
    if law.needs_bits and len(np.unique(points.bits)) < 2:
        law = at_one_level(law)
    if checked and (why := check(law, points)):
        raise UsageError(f"{why}.", "measure more, or fit a law of fewer parameters.")
    frame = _Frame(law, points)
    theta = _starts(frame, starts, np.random.default_rng(seed))
    theta, sse = _minimise(frame, theta, points.loss, _SHORT)
    best = np.argsort(sse)[:_KEPT]
    theta[best], sse[best] = _minimise(frame, theta[best], points.loss, _LONG)
    winner = int(np.argmin(sse))
    centred = theta[winner]
    at_bound = np.isclose(centred, frame.low, atol=1e-3) | np.isclose(centred, frame.high, atol=1e-3)
    return Fit(
        law,
        points,
        frame.leave(centred),
        *goodness(float(sse[winner]), points.loss, len(law.parameters)),
        tuple(name for name, there in zip(law.parameters, at_bound, strict=True) if there),
        int((sse <= 1.0201 * sse.min()).sum()),
        len(theta),
    )


def split(points: Points, sizes: int = 1, share: float = 0.3) -> tuple[Points, Points]:
    """Points to fit and points to test on: neither of the largest sizes and budgets, and both of them.

    sizes: how many of the largest sizes are held out; share: of the budgets, the largest. Points with one of the two
    are not used: they would make the test easier. Censored points (`Points.censored`) test nothing and are not in the
    second part, which may be empty. Raises UsageError for too few sizes or budgets.
    """
    all_sizes, budgets = points.sizes, points.budgets
    held = max(1, round(share * len(budgets)))
    if len(all_sizes) <= sizes or len(budgets) <= held:
        raise UsageError(
            f"{points.level} has {len(all_sizes)} size{'s' * (len(all_sizes) != 1)} and {len(budgets)} token "
            f"budget{'s' * (len(budgets) != 1)}, too few to hold any out.",
            "measure more of them.",
        )
    large, late = points.n >= all_sizes[-sizes] - 1e-9, points.d >= budgets[-held] - 1e-9
    return points.where(~large & ~late), points.where(large & late & ~points.censored)


def extrapolate(law: Law, levels: Sequence[Points], starts: int = STARTS, seed: int = 0) -> Extrapolation | None:
    """How a law predicts what it has not seen, of one level or of several it is fitted to at once.

    None where too little is left to fit or nothing to test.
    """
    try:
        parts = [split(points) for points in levels]
    except UsageError:
        return None
    train, test = (together(side) for side in zip(*parts, strict=True))
    one = at_one_level(law) if len(np.unique(train.bits)) < 2 else law
    if len(train) < needed(one) or len(train.sizes) < _FEW or not len(test):
        return None
    fit = fit_law(law, train, starts, seed, checked=False)
    off = fit.law.loss(fit.theta, test.n, test.d, test.bits) - test.loss
    gap = np.hypot(test.n[:, None] - train.n, test.d[:, None] - train.d)
    gap[test.bits[:, None] != train.bits] = np.inf
    copied = train.loss[gap.argmin(axis=1)] - test.loss
    return Extrapolation(
        float(np.sqrt((off**2).mean())),
        float(np.sqrt((copied**2).mean())),
        len(train),
        len(test),
        tuple(float(v) for v in off),
        tuple(float(v) for v in test.loss),
    )


def bootstrap(fit: Fit, resamples: int = 200, seed: int = 0) -> Values:
    """theta of refits to resampled data, (resamples, p); the bands of what is computed from them are percentiles.

    Residuals, blown up for the degrees of freedom, keep or change their sign at random (the wild bootstrap), together
    for a block of neighbouring budgets of one size, since those come from one training run and err alike. Each refit
    starts from the fit, so a band does not know of other valleys.
    """
    points, rng = fit.points, np.random.default_rng(seed)
    free = fit.n - len(fit.law.parameters)
    if free < 1:
        raise UsageError(f"{fit.n} points leave nothing to resample.", f"{len(fit.law.parameters) + 1} are needed.")
    fitted = fit.law.loss(fit.theta, points.n, points.d, points.bits)
    off = (points.loss - fitted) * math.sqrt(fit.n / free)
    blocks = _blocks(points)
    sign = rng.choice([-1.0, 1.0], size=(resamples, int(blocks.max()) + 1))[:, blocks]
    frame = _Frame(fit.law, points)
    start = np.tile(frame.enter(fit.theta), (resamples, 1))
    theta, _ = _minimise(frame, start, fitted + sign * off, _SHORT)
    return frame.leave(theta)


def _blocks(points: Points) -> NDArray[np.intp]:
    """Which block each point is in: runs of about sqrt(budgets) neighbouring budgets of one size and level."""
    out = np.zeros(len(points), np.intp)
    last = 0
    for size, level in np.unique(np.stack([points.n, points.bits], axis=1), axis=0):
        mine = np.flatnonzero((points.n == size) & (points.bits == level))
        mine = mine[np.argsort(points.d[mine], kind="stable")]
        length = max(1, round(math.sqrt(len(mine))))
        out[mine] = last + np.arange(len(mine)) // length
        last = int(out[mine].max()) + 1
    return out


class _Frame:
    """A law and its points in centred units, with the bounds of the search there."""

    def __init__(self, law: Law, points: Points) -> None:
        self.law = law
        self._n, self._d = (float(points.n.mean()), float(points.d.mean())) if law.unit_free else (0.0, 0.0)
        self.n, self.d, self.bits = points.n - self._n, points.d - self._d, points.bits
        self.loss = points.loss
        bounds = [EXPONENT if name in law.exponents else COEFFICIENT for name in law.parameters]
        self.low, self.high = (np.array(side) for side in zip(*bounds, strict=True))

    def enter(self, theta: Values) -> Values:
        return np.clip(self.law.shifted(theta, self._n, self._d) if self.law.unit_free else theta, self.low, self.high)

    def leave(self, theta: Values) -> Values:
        return self.law.shifted(theta, -self._n, -self._d) if self.law.unit_free else theta.copy()


def _starts(frame: _Frame, count: int, rng: np.random.Generator) -> Values:
    """A Latin hypercube of exponents in 0.03..2 and coefficients in 0.02..20 as large as the data, ones, and 0.1."""
    law, p = frame.law, len(frame.law.parameters)
    cells = np.stack([rng.permutation(count) for _ in range(p)], axis=1)
    share = (cells + rng.uniform(size=(count, p))) / count
    is_power = np.array([name in law.exponents for name in law.parameters])
    low, high = np.where(is_power, math.log(0.03), math.log(0.02)), np.where(is_power, math.log(2.0), math.log(20.0))
    drawn = low + share * (high - low)
    with np.errstate(over="ignore"):
        mean = law.values(drawn, frame.n, frame.d, frame.bits)[0].mean(axis=-1)
    drawn = law.scaled(drawn, np.log(frame.loss.mean()) - np.log(mean))
    given = frame.enter(np.stack([np.zeros(p), np.full(p, math.log(0.1))]))
    return np.asarray(np.clip(np.concatenate([drawn, given]), frame.low, frame.high))


def _minimise(frame: _Frame, theta: Values, y: Values, steps: int) -> tuple[Values, Values]:
    """Levenberg-Marquardt from every start at once. y: (points,) or (starts, points). Returns theta and SSE."""
    theta, y = theta.copy(), np.broadcast_to(y, (len(theta), y.shape[-1]))
    p = theta.shape[1]
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        value, slope = frame.law.values(theta, frame.n, frame.d, frame.bits)
        off = value - y
        sse = (off**2).sum(axis=1)
        damping = np.full(len(theta), 1e-2)
        active = np.flatnonzero(np.isfinite(sse))
        sse[~np.isfinite(sse)] = np.inf
        before = sse.copy()
        for i in range(1, steps + 1):
            if i % _STALL == 0:
                active = active[sse[active] < (1 - 1e-5) * before[active]]
                before = sse.copy()
            if not len(active):
                break
            j, r = slope[active], off[active]
            normal, down = j.transpose(0, 2, 1) @ j, np.einsum("snp,sn->sp", j, r)
            diagonal = np.einsum("spp->sp", normal)
            floor = 1e-12 * diagonal.max(axis=1, keepdims=True) + 1e-30
            extra = damping[active, None] * np.maximum(diagonal, floor)
            step = -np.linalg.solve(normal + extra[:, :, None] * np.eye(p), down[:, :, None])[:, :, 0]
            tried = np.clip(theta[active] + np.clip(step, -3, 3), frame.low, frame.high)
            value, new_slope = frame.law.values(tried, frame.n, frame.d, frame.bits)
            new_off = value - y[active]
            new_sse = (new_off**2).sum(axis=1)
            better = new_sse < sse[active]
            won = active[better]
            theta[won], slope[won], off[won], sse[won] = (x[better] for x in (tried, new_slope, new_off, new_sse))
            damping[active] = np.where(better, np.maximum(damping[active] / 4, 1e-10), damping[active] * 5)
            active = active[damping[active] < 1e12]
    return theta, sse
