"""What a data set says about the laws: fits of all of them level by level, and what a reader must not overlook.

    results = [analyse(points, laws) for points in levels]
    notes = findings(results[0]) + comparisons(results)

The notes are computed from the data at hand: which laws tie, whether predictions beyond the data failed, which
constants the data do not hold, and whether gamma - alpha says what it is often taken to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ggufloop.errors import UsageError
from ggufloop.measure.stats import Estimate, Values, mean_interval, t_quantile
from ggufloop.progress import Progress, Step, silent
from ggufloop.scaling import fit as shannon_fit
from ggufloop.scaling.data import Points, together
from ggufloop.scaling.fit import Extrapolation, Fit, bootstrap, check, extrapolate, fit_law, goodness
from ggufloop.scaling.laws import Law, at_one_level, best_budget, best_size

TIE_R2 = 0.01
"""Laws whose R2 differ by at most this, and whose errors no interval tells apart, tie."""

LOOSE = 10.0
"""A constant whose interval reaches further than this factor to one side is called not determined."""

RESAMPLES = 200
_LEVEL = 0.95
_FLAT = 1e-9  # of the largest eigenvalue: what is below is rounding, and nothing holds the constants in it
_SHARE = 0.9  # of the resamples must have an optimum before one is named


@dataclass(frozen=True)
class Settings:
    """How fits are made: random starts, bootstrap resamples, seed, and whether to test beyond the data."""

    starts: int = shannon_fit.STARTS
    resamples: int = RESAMPLES
    seed: int = 0
    held_out: bool = True


@dataclass(frozen=True)
class Level:
    """One level.

    fits    by law; a law that the points cannot hold is in `refused` instead, with the reason
    tests   extrapolations, by law; empty where too little would be left to fit
    main    the law whose bands, slopes and optima are shown
    draws   theta of the main law refitted to resampled data
    """

    points: Points
    fits: dict[str, Fit]
    refused: dict[str, str]
    tests: dict[str, Extrapolation]
    main: str
    draws: Values

    @property
    def fit(self) -> Fit:
        """The main law's."""
        return self.fits[self.main]


@dataclass(frozen=True)
class Optimum:
    """N* or D* in billions. None: none in the range of the data.

    estimate    with a percentile interval over the resamples that have one
    share       of the resamples that have one in the range
    """

    estimate: Estimate | None
    share: float


@dataclass(frozen=True)
class Prediction:
    """What a law says at one size and budget. slopes: change of loss in % per % more of N and of D."""

    size: float
    budget: float
    loss: Estimate
    by_n: Estimate
    by_d: Estimate
    best_size: Optimum
    best_budget: Optimum
    outside: str


def analyse(
    points: Points,
    laws: Sequence[Law],
    settings: Settings = Settings(),
    main: str | None = None,
    progress: Progress = silent,
) -> Level:
    """Fit every law to one level. main: the law to look at closely, else shannon, else the one of least AICc.

    Raises UsageError if no law, or not the one named, can be fitted.
    """
    fits: dict[str, Fit] = {}
    refused: dict[str, str] = {}
    tests: dict[str, Extrapolation] = {}
    seen: dict[object, str] = {}
    for i, law in enumerate(laws):
        one = at_one_level(law)
        if why := check(one, points):
            refused[law.name] = why
            continue
        progress(Step(f"fitting {points.level}, {law.name}", i, len(laws) + 1, "law"))
        same = seen.setdefault(getattr(one, "terms", one.name), law.name)
        if same != law.name:  # qid and precision at one level
            fits[law.name] = replace(fits[same], law=one)
            if same in tests:
                tests[law.name] = tests[same]
            continue
        fits[law.name] = fit_law(one, points, settings.starts, settings.seed)
        test = extrapolate(one, [points], settings.starts, settings.seed) if settings.held_out else None
        if test is not None:
            tests[law.name] = test
    if not fits or (main is not None and main not in fits):
        why = refused[main] if main in refused else "; ".join(refused.values())
        raise UsageError(f"{why}.", "measure more sizes and budgets, or fit a law of fewer parameters with --law.")
    if main is None:
        main = "shannon" if "shannon" in fits else min(fits, key=lambda name: fits[name].aicc)
    progress(Step(f"fitting {points.level}, bands", len(laws), len(laws) + 1, "law"))
    return Level(points, fits, refused, tests, main, bootstrap(fits[main], settings.resamples, settings.seed))


def constants(result: Level) -> dict[str, Estimate]:
    """Constants of the main law with 95 % intervals, the wider of the bootstrap's and the delta method's.

    Where a direction of the parameters is flat, refits do not walk along it and look certain; the delta method sees it,
    and the interval of what lies in it is 0 to infinity.
    """
    fit, p = result.fit, result.points
    slope = fit.law.values(fit.theta, p.n, p.d, p.bits)[1]
    free = fit.n - len(fit.theta)
    scale = np.sqrt(np.einsum("np,np->p", slope, slope)) + 1e-300
    size, direction = np.linalg.eigh((slope / scale).T @ (slope / scale))
    flat = size < _FLAT * size[-1]
    variance = (direction[:, ~flat] ** 2 / size[~flat]).sum(axis=1) * fit.rmse**2 * fit.n / free
    half = t_quantile((1 + _LEVEL) / 2, free) * np.sqrt(variance) / scale
    half[(direction[:, flat] ** 2).sum(axis=1) > 1e-3] = math.inf
    low, high = np.quantile(result.draws, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2), axis=0)
    low, high = np.minimum(low, fit.theta - half), np.maximum(high, fit.theta + half)
    return {
        name: Estimate(math.exp(t), math.exp(a), math.exp(b) if b < 700 else math.inf, fit.n)
        for name, t, a, b in zip(fit.law.parameters, fit.theta.tolist(), low.tolist(), high.tolist(), strict=True)
    }


def loose(estimates: dict[str, Estimate]) -> list[str]:
    """Constants whose interval reaches further than the factor LOOSE."""
    return [name for name, e in estimates.items() if e.high > LOOSE * e.mean or not e.low > 0 or e.mean > LOOSE * e.low]


def _band(value: float, drawn: Values, n: int) -> Estimate:
    low, high = np.quantile(drawn, ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2))
    return Estimate(value, float(min(low, value)), float(max(high, value)), n)


def predict(result: Level, size: float, budget: float) -> Prediction:
    """The main law at size N and budget D, in billions, with bands; optima are looked for in the range of the data."""
    fit, p, draws = result.fit, result.points, result.draws
    n, d, bits = np.array([math.log(size)]), np.array([math.log(budget)]), p.bits[:1]
    law = fit.law

    def banded(value: Values, drawn: Values) -> Estimate:
        return _band(float(value[0]), drawn[:, 0], fit.n)

    by_n, by_d = law.slopes(fit.theta, n, d, bits)
    drawn_n, drawn_d = law.slopes(draws, n, d, bits)
    sizes, budgets = ((float(x[0]), float(x[-1])) for x in (p.sizes, p.budgets))
    out = [
        f"{name} = {value:g} is outside the data ({math.exp(a):.3g} to {math.exp(b):.3g})"
        for name, value, (a, b) in (("N", size, sizes), ("D", budget, budgets))
        if not a - 1e-9 <= math.log(value) <= b + 1e-9
    ]
    return Prediction(
        size,
        budget,
        banded(law.loss(fit.theta, n, d, bits), law.loss(draws, n, d, bits)),
        banded(by_n, drawn_n),
        banded(by_d, drawn_d),
        _optimum(lambda theta: best_size(law, theta, float(d[0]), sizes, float(bits[0])), fit, draws),
        _optimum(lambda theta: best_budget(law, theta, float(n[0]), budgets, float(bits[0])), fit, draws),
        "; ".join(out),
    )


def _optimum(find: Callable[[Values], float | None], fit: Fit, draws: Values) -> Optimum:
    found = [x for x in map(find, draws) if x is not None]
    share, value = len(found) / len(draws), find(fit.theta)
    if value is None or share < _SHARE:
        return Optimum(None, share)
    return Optimum(_band(value, np.array(found), fit.n).mapped(math.exp), share)


# pooled over levels


@dataclass(frozen=True)
class Pooled:
    """A law over all levels: refitted for each, or (qid, precision) one fit that knows the bits."""

    name: str
    how: str
    parameters: int
    n: int
    r2: float
    rmse: float
    aicc: float
    held_out: float | None
    held_out_r2: float | None
    tested: int


def pool(results: Sequence[Level], laws: Sequence[Law], settings: Settings) -> list[Pooled]:
    """Every law that all levels can hold, over all of them."""
    points = together([r.points for r in results])
    out = []
    for law in laws:
        if all(law.name in r.fits for r in results):
            fits = [r.fits[law.name] for r in results]
            off = np.concatenate([fit.residuals() for fit in fits])
            tests = [r.tests[law.name] for r in results if law.name in r.tests]
            count = sum(len(fit.law.parameters) for fit in fits)
            out.append(_pooled(law.name, "refitted per level", count, points, off, tests))
        if law.needs_bits and len(np.unique(points.bits)) > 1:
            fit = fit_law(law, points, settings.starts, settings.seed)
            test = extrapolate(law, [r.points for r in results], settings.starts, settings.seed)
            tests = [test] if test is not None and settings.held_out else []
            out.append(_pooled(law.name, "one fit, X = bits", len(law.parameters), points, fit.residuals(), tests))
    return out


def _pooled(name: str, how: str, count: int, points: Points, off: Values, tests: Sequence[Extrapolation]) -> Pooled:
    held = np.array([v for t in tests for v in t.residuals])
    measured = np.array([v for t in tests for v in t.measured])
    spread = float(((measured - measured.mean()) ** 2).sum()) if len(measured) else 0.0
    r2, rmse, aicc, n = goodness(float((off**2).sum()), points.loss, count)
    missed = float(np.sqrt((held**2).mean())) if len(held) else None
    held_r2 = 1 - float((held**2).sum()) / spread if spread > 0 else None
    return Pooled(name, how, count, n, r2, rmse, aicc, missed, held_r2, len(held))


# what must not be overlooked


def findings(result: Level) -> list[str]:
    """Notes on one level, each a sentence with its numbers."""
    return [*_ties(result), *_beyond(result), *_diagnostic(result), *_undetermined(result)]


def _ties(result: Level) -> list[str]:
    fit = result.fit
    names: dict[str, list[str]] = {"tie": [], "better": []}
    alike: dict[float, list[str]] = {}  # qid and precision are one law at one level
    for name, other in result.fits.items():
        if name != result.main:
            alike.setdefault(other.rmse, []).append(name)
    for group in alike.values():
        name, other = " = ".join(group), result.fits[group[0]]
        gap = other.residuals() ** 2 - fit.residuals() ** 2
        sizes = [float(gap[result.points.n == size].mean()) for size in result.points.sizes]
        e = mean_interval(sizes)
        said = f"{name} (R2 {other.r2:.3f}; squared error {e.mean:+.5f} [{e.low:+.5f}, {e.high:+.5f}], n = {e.n} sizes)"
        if e.high < 0:
            names["better"].append(said)
        elif e.low <= 0 and abs(other.r2 - fit.r2) <= TIE_R2:
            names["tie"].append(said)
    out = []
    if names["tie"]:
        out.append(f"Ties with {result.main} (R2 {fit.r2:.3f}): {', '.join(names['tie'])}. These data do not choose.")
    if names["better"]:
        out.append(f"Fits better than {result.main} (R2 {fit.r2:.3f}): {', '.join(names['better'])}.")
    return out


def _beyond(result: Level) -> list[str]:
    if not result.tests:
        return ["Nothing was held out: too few sizes or budgets, or not asked for. Nothing is known about predictions."]
    tests = result.tests
    first = next(iter(tests.values()))
    least, most = (f(tests, key=lambda name: tests[name].rmse) for f in (min, max))
    what = f"the largest size at the largest budgets (n = {first.tested}, predicted from {first.fitted} smaller points)"
    if at_edge := int(result.points.censored.sum()):
        what = f"{what[:-1]}; {at_edge} points of one loss at the edge of the range test nothing)"
    failed = [name for name, test in tests.items() if test.failed]
    span = f"RMSE {tests[least].rmse:.2g} ({least}) to {tests[most].rmse:.2g} nat ({most})"
    copied = f"copying the nearest measured point misses by {first.copied:.2g}"
    if len(failed) == len(tests):
        return [
            f"Every law failed to extrapolate to {what}: {span}, while {copied}. Predict nothing beyond these data."
        ]
    if failed:
        return [f"Failed to extrapolate to {what}: {', '.join(failed)}, no better than copying the nearest measured "
                f"point ({first.copied:.2g} nat). All laws: {span}."]  # fmt: skip
    return [f"Extrapolated to {what}: {span}; {copied}."]


def _diagnostic(result: Level) -> list[str]:
    if result.main not in ("shannon", "simpl"):
        return []
    fit, p = result.fit, result.points
    alpha, gamma = (fit.law.parameters.index(name) for name in ("alpha", "gamma"))
    drawn = np.exp(result.draws)
    value = math.exp(fit.theta[gamma]) - math.exp(fit.theta[alpha])
    gap = _band(value, drawn[:, gamma] - drawn[:, alpha], fit.n)
    slopes = fit.law.slopes(fit.theta, p.n, p.d)[0]
    falling = int((slopes < 0).sum())
    where = f"loss still falls with size at {falling} of the {len(p)} points fitted"
    said = f"gamma - alpha = {gap.show('+.3f')}"
    if gap.mean > 0 and falling:
        return [f"{said}: above 0, yet {where}. Its sign is no diagnostic; look at the local slope."]
    if gap.mean <= 0:
        return [f"{said}: not above 0, so by this law no size is too large; {where}."]
    return [f"{said}; {where}. Its sign alone is no diagnostic: above 0 is necessary for an N*, not sufficient."]


def _undetermined(result: Level) -> list[str]:
    out = []
    if names := loose(constants(result)):
        verb = "is" if len(names) == 1 else "are"
        out.append(
            f"Of {result.main}'s constants {', '.join(names)} {verb} not determined by these data (a 95 % interval "
            f"further than a factor of {LOOSE:g}); losses and slopes inside the data are."
        )
    ended = [f"{name} {', '.join(fit.bounds)}" for name, fit in result.fits.items() if fit.bounds]
    if ended:
        out.append(f"Ended at a bound of the search, so not determined either: {'; '.join(ended)}.")
    return out


def comparisons(results: Sequence[Level]) -> list[str]:
    """Notes over levels, from the measured points alone: what size and bits are worth at the largest budget.

    Equal losses are one contour of a figure, no measurement that size is worth nothing, and censored ones none at all.
    """
    out = []
    for result in results:
        sizes, loss, budget = _last(result.points)
        rising = np.flatnonzero((loss[:-1] < loss[-1]) & (sizes[:-1] <= sizes[-1] / 2))
        if len(rising):
            i = int(rising[0])
            out.append(
                f"{result.points.level}: at D = {budget:.4g} a model of N = {sizes[-1]:.3g} ({loss[-1]:.3f} nat) is no "
                f"better than one of {sizes[i]:.3g} ({loss[i]:.3f} nat), as measured on one checkpoint each."
            )
    for worse, better in zip(results[1:], results[:-1], strict=True):
        bits = (float(better.points.bits[0]), float(worse.points.bits[0]))
        shared = _shared(*(p.where(~p.censored) for p in (better.points, worse.points)))
        if shared is None or not 0 < bits[0] - bits[1] <= 2:
            continue
        gain, n, d = shared
        out.append(
            f"{bits[0] - bits[1]:g} more bit{'s' if bits[0] - bits[1] != 1 else ''} than {bits[1]:g}: "
            f"{gain:+.2f} nat better at N = {n:.3g}, D = {d:.4g}, as measured on one checkpoint each."
        )
    return out


def _last(points: Points) -> tuple[Values, Values, float]:
    """Sizes and losses at the largest budget that the largest size has, and that budget."""
    budget = points.d[points.n == points.sizes[-1]].max()
    at = points.d == budget
    order = np.argsort(points.n[at])
    return np.exp(points.n[at][order]), points.loss[at][order], math.exp(float(budget))


def _shared(better: Points, worse: Points) -> tuple[float, float, float] | None:
    """How much lower the loss is at the largest size and then budget that both levels have."""
    low, high = (dict(zip(zip(p.n.tolist(), p.d.tolist(), strict=True), p.loss.tolist(), strict=True))
                 for p in (better, worse))  # fmt: skip
    if not (both := low.keys() & high.keys()):
        return None
    n, d = max(both)
    return high[n, d] - low[n, d], math.exp(n), math.exp(d)
