"""One checkpoint at several quantisations: how its loss and its KL divergence grow with the noise of its weights.

    line = fit_kld(snr_db, kld, bits)            # ln KLD = u + eta ln r, with r = 10^(-SNR/10)
    curve = fit_loss(snr_db, loss, bits)         # L(r) = L0 (1 + kappa r^eta)
    line.predict(21.3, bits=4.5)                 # an Estimate: the interval of one more file, not of the line
    held_out(fit_kld, snr_db, kld, bits)         # every file predicted from the others

A ladder is one model at one size: a slice on which nothing of a scaling law but these numbers shows (`UNKNOWABLE`).
Both forms hold from 8 down to 3 bits. At 2 bits models break in ways of their own, so files below `LEAST_BITS` or
`LEAST_SNR` are left out of the fit, and asking for a prediction there is an error. Needs numpy alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggufloop.errors import UsageError
from ggufloop.measure.stats import Estimate, Values, t_quantile

LEAST_BITS = 3.0
"""Fewest bits per weight the forms hold for: Q3_K and IQ3_XXS are above, every 2-bit format is below."""

LEAST_SNR = 12.0
"""The same as noise (dB), for files whose bits do not tell: a small model's Q2_K file is half Q6_K embeddings."""

UNKNOWABLE = (
    "One checkpoint cannot tell alpha, beta, gamma or delta of a scaling law, N*, D*, or whether it is overtrained or "
    "at capacity: those need at least 4 sizes x 8 token budgets per noise level. Looping is not in the law at all."
)

_ETA = (0.05, 6.0)  # beyond, r^eta is a constant or a step and says nothing


@dataclass(frozen=True)
class Line:
    """ln KLD = u + eta ln r. r2 and rmse are of ln KLD; snr: the range fitted, in dB; left_out: files not used."""

    u: Estimate
    eta: Estimate
    r2: float
    rmse: float
    n: int
    snr: tuple[float, float]
    left_out: int
    _moments: tuple[float, float, float]  # mean of ln r, sum of squares around it, standard deviation of a point

    def at(self, snr_db: float) -> float:
        """KLD on the line."""
        return math.exp(self.u.mean + self.eta.mean * float(_ln_noise(snr_db)))

    def predict(self, snr_db: float, bits: float | None = None) -> Estimate:
        """KLD of one more file. Raises UsageError at 2 bits."""
        check_reach(snr_db, bits)
        x, (middle, spread, sd) = float(_ln_noise(snr_db)), self._moments
        half = t_quantile((1 + self.u.level) / 2, self.n - 2) * sd
        half *= math.sqrt(1 + 1 / self.n + (x - middle) ** 2 / spread)
        value = self.u.mean + self.eta.mean * x
        return Estimate(_exp(value), _exp(value - half), _exp(value + half), self.n, self.u.level)


@dataclass(frozen=True)
class Curve:
    """L(r) = L0 (1 + kappa r^eta), in the loss's unit. r2 and rmse are of the loss; the rest as in `Line`."""

    l0: Estimate
    kappa: Estimate
    eta: Estimate
    r2: float
    rmse: float
    n: int
    snr: tuple[float, float]
    left_out: int
    _covariance: tuple[tuple[float, ...], ...]  # of L0, ln kappa, ln eta, residual variance included

    def at(self, snr_db: float) -> float:
        """Loss on the curve."""
        return float(self.l0.mean * (1 + self.kappa.mean * _noise(snr_db) ** self.eta.mean))

    def predict(self, snr_db: float, bits: float | None = None) -> Estimate:
        """Loss of one more file. Raises UsageError at 2 bits."""
        check_reach(snr_db, bits)
        row = _curve_gradient(_noise(np.array([snr_db])), self.l0.mean, self.kappa.mean, self.eta.mean)[0]
        variance = self.rmse**2 * self.n / (self.n - 3) + float(row @ np.array(self._covariance) @ row)
        half = t_quantile((1 + self.l0.level) / 2, self.n - 3) * math.sqrt(variance)
        value = self.at(snr_db)
        return Estimate(value, value - half, value + half, self.n, self.l0.level)


@dataclass(frozen=True)
class HeldOut:
    """One file predicted from the others."""

    index: int
    measured: float
    predicted: Estimate


def check_reach(snr_db: float, bits: float | None = None) -> None:
    """Raise UsageError where no prediction is made: below `LEAST_BITS` bits per weight or `LEAST_SNR` dB."""
    if math.isnan(snr_db) or (bits is not None and not bits > 0):
        raise UsageError(f"SNR {snr_db:g} dB at {bits} bits is no noise level.", "give what `ggufloop snr` prints.")
    if bits is not None and bits < LEAST_BITS:
        what = f"{bits:g} bits per weight are below {LEAST_BITS:g}"
    elif snr_db < LEAST_SNR:
        what = f"{snr_db:g} dB are below {LEAST_SNR:g} dB, the noise of 2-bit formats"
    else:
        return
    raise UsageError(f"{what}, where a ladder predicts nothing: 2 bits break each model its own way.", "measure it.")


def fit_kld(
    snr_db: ArrayLike, kld: ArrayLike, bits: ArrayLike | None = None, floor: float = 0.0, level: float = 0.95
) -> Line:
    """The line through ln KLD, by least squares, with Student's intervals.

    snr_db, kld     weight SNR in dB and mean KL divergence in nats of each file. An SNR of infinity (the reference
                    itself) has no logarithm and is left out, as 2-bit files are
    bits            bits per weight of each file, if known
    floor           KLD that the measurement itself has (the reference against itself), taken off each

    Raises UsageError for fewer than 3 usable files, values no file can have, or files of one SNR.
    """
    x, y, used = _usable(snr_db, kld, bits, "KLD", 3, finite=True)
    if not 0 <= floor < y.min():
        raise UsageError(f"floor {floor:g} is not below every KLD (the smallest is {y.min():g}).", "measure it again.")
    x, y = _ln_noise(x), np.log(y - floor)
    n, middle = len(x), float(x.mean())
    spread = float(((x - middle) ** 2).sum())
    eta = float(((x - middle) * y).sum()) / spread
    u = float(y.mean()) - eta * middle
    off = float(((y - u - eta * x) ** 2).sum())
    sd = math.sqrt(off / (n - 2))
    t = t_quantile((1 + level) / 2, n - 2)
    half_u, half_eta = t * sd * math.sqrt(1 / n + middle**2 / spread), t * sd / math.sqrt(spread)
    return Line(
        Estimate(u, u - half_u, u + half_u, n, level),
        Estimate(eta, eta - half_eta, eta + half_eta, n, level),
        _r2(y, off),
        math.sqrt(off / n),
        n,
        _range(x),
        int((~used).sum()),
        (middle, spread, sd),
    )


def fit_loss(snr_db: ArrayLike, loss: ArrayLike, bits: ArrayLike | None = None, level: float = 0.95) -> Curve:
    """The curve through the losses, by least squares, with intervals by the delta method (kappa, eta in logarithms).

    The full-precision file is a point of SNR infinity, and the best one for L0. For a given eta the curve is a straight
    line in r^eta, so only eta is searched. kappa and eta trade off: their intervals are wide long before a prediction's
    is.

    Raises UsageError for fewer than 4 usable files, values no file can have, files of one SNR, and losses that do not
    rise with the noise, which have no eta.
    """
    x, y, used = _usable(snr_db, loss, bits, "loss", 4, finite=False)
    r, n = _noise(x), len(x)

    def off(eta: float) -> float:
        return _straight(r**eta, y)[2]

    grid = np.geomspace(*_ETA, 200)
    z, dy = r ** grid[:, None], y - y.mean()
    z -= z.mean(axis=1, keepdims=True)
    i = int(((z @ dy) ** 2 / (z**2).sum(axis=1)).argmax())  # what a straight line in r^eta explains
    eta = _least(off, float(grid[max(i - 1, 0)]), float(grid[min(i + 1, len(grid) - 1)]))
    l0, slope, residual = _straight(r**eta, y)
    flat = float(((y - y.mean()) ** 2).sum())
    if slope <= 0 or l0 <= 0 or residual >= flat or not 1.01 * _ETA[0] < eta < 0.99 * _ETA[1]:
        raise UsageError(
            "these losses do not rise with the noise as L0 (1 + kappa r^eta) does.",
            "there is no loss of quantisation to fit; add the full-precision file (SNR inf) or files of fewer bits.",
        )
    kappa = slope / l0
    rows = _curve_gradient(r, l0, kappa, eta)
    covariance = np.linalg.pinv(rows.T @ rows) * residual / (n - 3)
    half = t_quantile((1 + level) / 2, n - 3) * np.sqrt(np.diag(covariance))
    return Curve(
        Estimate(l0, l0 - float(half[0]), l0 + float(half[0]), n, level),
        _positive(kappa, float(half[1]), n, level),
        _positive(eta, float(half[2]), n, level),
        _r2(y, residual),
        math.sqrt(residual / n),
        n,
        _range(_ln_noise(x)),
        int((~used).sum()),
        tuple(tuple(float(v) for v in row) for row in covariance),
    )


def held_out(
    fit: Callable[..., Line] | Callable[..., Curve], snr_db: ArrayLike, values: ArrayLike, bits: ArrayLike | None = None
) -> list[HeldOut]:
    """Each usable file of finite SNR predicted from the others, in their order. fit: `fit_kld` or `fit_loss`.

    Raises UsageError if without one of them there is nothing to fit.
    """
    x, y = np.asarray(snr_db, np.float64), np.asarray(values, np.float64)
    b = None if bits is None else np.asarray(bits, np.float64)
    out = []
    for i in np.flatnonzero(np.isfinite(x) & _within(x, b)).tolist():
        others = np.arange(len(x)) != i
        fitted = fit(x[others], y[others], None if b is None else b[others])
        out.append(HeldOut(i, float(y[i]), fitted.predict(float(x[i]), None if b is None else float(b[i]))))
    return out


def _noise(snr_db: ArrayLike) -> Values:
    """r = 10^(-SNR/10), noise power over signal power."""
    return np.asarray(10 ** (-np.asarray(snr_db, np.float64) / 10))


def _ln_noise(snr_db: ArrayLike) -> Values:
    return np.asarray(-np.asarray(snr_db, np.float64) * math.log(10) / 10)


def _range(ln_noise: Values) -> tuple[float, float]:
    """Finite SNRs, in dB, from low to high."""
    snr = -ln_noise[np.isfinite(ln_noise)] * 10 / math.log(10)
    return float(snr.min()), float(snr.max())


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


def _positive(value: float, half: float, n: int, level: float) -> Estimate:
    """An estimate whose interval is symmetric in its logarithm."""
    return Estimate(value, value * _exp(-half), value * _exp(half), n, level)


def _r2(y: Values, residual: float) -> float:
    return 1 - residual / float(((y - y.mean()) ** 2).sum())


def _within(snr_db: Values, bits: Values | None) -> NDArray[np.bool_]:
    """Which files are of more than 2 bits."""
    inside = snr_db >= LEAST_SNR
    return inside if bits is None else inside & (bits >= LEAST_BITS)


def _usable(
    snr_db: ArrayLike, values: ArrayLike, bits: ArrayLike | None, what: str, least: int, finite: bool
) -> tuple[Values, Values, NDArray[np.bool_]]:
    """SNR and values of the files to fit, and which those are. finite: an infinite SNR is not one of them."""
    x, y = np.asarray(snr_db, np.float64), np.asarray(values, np.float64)
    b = None if bits is None else np.asarray(bits, np.float64)
    if x.ndim != 1 or x.shape != y.shape or (b is not None and b.shape != x.shape):
        sizes: Sequence[object] = [x.shape, y.shape, *([] if b is None else [b.shape])]
        raise UsageError(
            f"SNR, {what} and bits of shapes {', '.join(map(str, sizes))} do not pair up.", "give one of each per file."
        )
    if np.isnan(x).any() or (x == -np.inf).any():
        raise UsageError(f"{int(np.isnan(x).sum()) or 1} of {len(x)} SNRs are no numbers.", "measure them again.")
    if b is not None and not (b > 0).all():
        raise UsageError(f"{b[~(b > 0)][0]:g} bits per weight is not above 0.", "give what `ggufloop snr` prints.")
    used = _within(x, b) & (np.isfinite(x) | (not finite))
    bad = used & ~(np.isfinite(y) & (y > 0))
    if bad.any():
        raise UsageError(f"{what} {y[bad][0]:g} is not a positive number.", "find out why before fitting.")
    if int(used.sum()) < least:
        raise UsageError(
            f"{int(used.sum())} of {len(x)} files have a noise to fit and {LEAST_BITS:g} bits or more; "
            f"{least} are needed.",
            "add types such as Q8_0, Q6_K, Q5_K, Q4_K, Q3_K.",
        )
    if len(np.unique(x[used])) < least - 1:
        raise UsageError(
            f"{int(used.sum())} files have {len(np.unique(x[used]))} different SNRs; {least - 1} are needed.",
            "add types of other bit widths.",
        )
    return x[used], y[used], used


def _straight(z: Values, y: Values) -> tuple[float, float, float]:
    """Intercept, slope and residual sum of squares of y over z."""
    dz, dy = z - z.mean(), y - y.mean()
    spread = float(dz @ dz)
    slope = float(dz @ dy) / spread if spread > 0 else 0.0
    return float(y.mean() - slope * z.mean()), slope, float(((dy - slope * dz) ** 2).sum())


def _curve_gradient(r: Values, l0: float, kappa: float, eta: float) -> Values:
    """Derivatives of L0 (1 + kappa r^eta) by L0, ln kappa and ln eta, a row per r."""
    power = r**eta
    log = np.log(r, out=np.zeros_like(r), where=r > 0)
    return np.stack([1 + kappa * power, l0 * kappa * power, l0 * kappa * power * eta * log], axis=1)


def _least(f: Callable[[float], float], low: float, high: float) -> float:
    """Where f, with one valley between low and high, is least (golden section)."""
    golden = (math.sqrt(5) - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(50):
        if fa < fb:
            high, b, fb = b, a, fa
            a = high - golden * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + golden * (high - low)
            fb = f(b)
    return (low + high) / 2
