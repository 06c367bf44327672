"""One checkpoint's noise: the lines against scipy and simulations, published data, and what is not predicted."""

from __future__ import annotations

import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.scaling import noise_data
from ggufloop.scaling.noise import UNKNOWABLE, fit_kld, fit_loss, held_out

SNR = np.array([45.4, 35.0, 28.8, 27.4, 22.9, 21.3, 16.4])
BITS = np.array([8.5, 6.56, 5.5, 5.5, 4.5, 4.5, 3.44])


def ln_noise(snr: np.ndarray) -> np.ndarray:
    return -snr * math.log(10) / 10


def test_line_is_the_regression_and_its_intervals_are_students() -> None:
    y = 1.4 + 0.83 * ln_noise(SNR) + np.random.default_rng(1).normal(0, 0.2, len(SNR))
    ours = fit_kld(SNR, np.exp(y), BITS)
    theirs = scipy.stats.linregress(ln_noise(SNR), y)
    t = scipy.stats.t.ppf(0.975, len(SNR) - 2)
    assert (ours.u.mean, ours.eta.mean) == pytest.approx((theirs.intercept, theirs.slope))
    assert ours.eta.high - ours.eta.mean == pytest.approx(t * theirs.stderr)
    assert ours.u.mean - ours.u.low == pytest.approx(t * theirs.intercept_stderr)
    assert (ours.r2, ours.n, ours.snr, ours.left_out) == (
        pytest.approx(theirs.rvalue**2), 7, pytest.approx((16.4, 45.4)), 0)  # fmt: skip
    assert ours.at(30.0) == pytest.approx(math.exp(theirs.intercept + theirs.slope * ln_noise(np.array(30.0))))


def test_published_ladder() -> None:
    """llama.cpp's table of Llama-3-8B: log10 KLD = 0.643 - 0.836 SNR/10 with R2 .994 over 8 to 3 bits."""
    ladder = noise_data.read("llama3-8b")
    assert ladder.floor == 0.000551
    assert [r.name for r in ladder.left_out] == ["q2_K"]
    assert ladder.unknown == ("q5_K_M", "q4_K_M", "q3_K_M")
    line = fit_kld(*ladder.columns("kld"), ladder.floor)
    assert (line.n, line.left_out, round(line.r2, 3)) == (6, 2, 0.994)
    assert line.u.low <= 0.643 * math.log(10) <= line.u.high
    assert line.eta.low <= 0.836 <= line.eta.high
    for snr in (16.43, 22.0, 30.0, 45.41):  # 0.012 of a decade apart at most, 3 %
        assert math.log10(line.at(snr)) == pytest.approx(0.643 - 0.836 * snr / 10, abs=0.012)


def test_ladder_predicts_what_was_left_out_of_it() -> None:
    ladder = noise_data.read("llama3-8b")
    x, y, bits = ladder.columns("kld")
    held = held_out(partial(fit_kld, floor=ladder.floor), x, y, bits)
    assert [ladder.points[h.index].name for h in held] == ["q8_0", "q6_K", "q5_0", "q4_K_S", "q4_0", "q3_K_S"]
    for h in held:
        others = np.arange(len(x)) != h.index
        alone = fit_kld(np.array(x)[others], np.array(y)[others], bits[others], ladder.floor)
        assert h.predicted == alone.predict(x[h.index])
        assert h.predicted.low < h.measured - ladder.floor < h.predicted.high


def test_curve_is_scipys() -> None:
    """The same least squares and, from its covariance, the same intervals in the logarithms of kappa and eta."""
    snr = np.array([math.inf, *SNR])
    r = 10 ** (-snr / 10)
    y = 2.1 * (1 + 5 * r**0.9) + np.random.default_rng(2).normal(0, 0.003, len(r))
    ours = fit_loss(snr, y)

    def curve(r: np.ndarray, l0: float, kappa: float, eta: float) -> np.ndarray:
        return l0 * (1 + np.exp(kappa) * r ** np.exp(eta))

    found, covariance = scipy.optimize.curve_fit(curve, r, y, (2.0, 1.0, 0.0))
    half = scipy.stats.t.ppf(0.975, len(r) - 3) * np.sqrt(np.diag(covariance))
    assert ours.l0.mean == pytest.approx(found[0], rel=1e-6)
    assert (math.log(ours.kappa.mean), math.log(ours.eta.mean)) == pytest.approx(found[1:], rel=1e-4)
    assert ours.l0.high - ours.l0.mean == pytest.approx(half[0], rel=1e-3)
    assert math.log(ours.kappa.high / ours.kappa.mean) == pytest.approx(half[1], rel=1e-3)
    assert math.log(ours.eta.mean / ours.eta.low) == pytest.approx(half[2], rel=1e-3)
    assert ours.at(math.inf) == ours.l0.mean


def test_curve_recovers_its_constants() -> None:
    snr = np.array([math.inf, *SNR])
    ours = fit_loss(snr, 1.83 * (1 + 7.5 * 10 ** (-snr / 10 * 1.08)), [16, *BITS])
    assert (ours.l0.mean, ours.kappa.mean, ours.eta.mean) == pytest.approx((1.83, 7.5, 1.08), rel=1e-6)


@pytest.mark.parametrize("of", ["kld", "loss"])
def test_intervals_of_one_more_file_cover(of: str) -> None:
    """95 % of 400 simulated ladders; outside 362 to 393 would be one in 2,000."""
    rng, hits = np.random.default_rng(3), 0
    for _ in range(400):
        if of == "kld":
            true = 1.4 + 0.83 * ln_noise(np.array([*SNR, 25.0])) + rng.normal(0, 0.2, len(SNR) + 1)
            found, value = fit_kld(SNR, np.exp(true[:-1])).predict(25.0), math.exp(true[-1])
        else:
            snr = np.array([math.inf, *SNR, 25.0])
            true = 1.83 * (1 + 7.5 * 10 ** (-snr / 10 * 1.08)) + rng.normal(0, 0.004, len(snr))
            found, value = fit_loss(snr[:-1], true[:-1]).predict(25.0), true[-1]
        hits += found.low <= value <= found.high
    assert 362 <= hits <= 393


def test_two_bits_are_left_out_and_not_predicted() -> None:
    """Whatever a 2-bit file did, the line is the same; asked for by bits or by noise, there is no prediction."""
    y = np.exp(1.4 + 0.83 * ln_noise(SNR))
    line = fit_kld(SNR, y, BITS)
    more = fit_kld([*SNR, 10.5, 18.0], [*y, 3.0, 5.0], [*BITS, 4.2, 2.6])
    assert more.eta.mean == pytest.approx(line.eta.mean)
    assert more.left_out == 2
    for snr, bits in ((10.5, None), (11.9, 4.0), (18.0, 2.625)):
        with pytest.raises(UsageError, match="a ladder predicts nothing") as e:
            line.predict(snr, bits)
        assert e.value.hint == "measure it."
    assert line.predict(13.4, 3.0625).mean == pytest.approx(line.at(13.4))
    assert "Looping is not in the law" in UNKNOWABLE


def test_no_line_where_there_is_none() -> None:
    y = np.exp(1.4 + 0.83 * ln_noise(SNR))
    for fit, message in (
        (partial(fit_kld, SNR[:2], y[:2]), "2 of 2 files have a noise to fit and 3 bits or more; 3 are needed"),
        (partial(fit_loss, SNR[:3], y[:3]), "3 of 3 files have a noise to fit and 3 bits or more; 4 are needed"),
        (partial(fit_kld, [20.0] * 3, y[:3]), "3 files have 1 different SNRs; 2 are needed"),
        (partial(fit_kld, SNR, [*y[:6], -0.1]), "KLD -0.1 is not a positive number"),
        (partial(fit_kld, SNR, [*y[:6], math.nan]), "KLD nan is not a positive number"),
        (partial(fit_loss, SNR, [*y[:6], math.inf]), "loss inf is not a positive number"),
        (partial(fit_kld, [*SNR[:6], math.nan], y), "1 of 7 SNRs are no numbers"),
        (partial(fit_kld, SNR, y[:3]), "SNR, KLD and bits of shapes"),
        (partial(fit_kld, SNR, y, [0.0] * 7), "0 bits per weight is not above 0"),
        (partial(fit_kld, SNR, y, BITS, 1.0), "floor 1 is not below every KLD"),
        (partial(fit_loss, SNR, 2 - y), "do not rise with the noise"),
        (partial(fit_loss, SNR, [2.0] * 7), "do not rise with the noise"),
    ):
        with pytest.raises(UsageError, match=message):
            fit()


def test_ladder_files(tmp_path: Path) -> None:
    """The CSV of a study: looped rows, other columns and empty cells are passed over; a perplexity is a loss."""
    path = tmp_path / "study.csv"
    path.write_text(
        "# a remark\nmodel,type,bits per weight,SNR dB,loop,PPL,KLD\nm,F32,32,inf,plain,10,\n"
        "m,Q8_0,8.5,45,plain,10.1,0.001\nm,Q8_0,8.5,45,12:16 k=3,11,0.1\nm,Q4_K_M,5.2,24,plain,11,nan\n"
    )
    ladder = noise_data.read(str(path))
    assert [asdict(r) for r in ladder.points] == [
        {"name": "F32", "snr_db": math.inf, "bits": 32.0, "kld": None, "loss": math.log(10)},
        {"name": "Q8_0", "snr_db": 45.0, "bits": 8.5, "kld": 0.001, "loss": math.log(10.1)},
        {"name": "Q4_K_M", "snr_db": 24.0, "bits": 5.2, "kld": None, "loss": math.log(11)},
    ]
    assert (ladder.floor, ladder.source) == (0.0, "a remark")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no rows"),
        ("type,noise,kld\nQ8_0,45,0.1\n", "has no column snr_db"),
        ("type,snr_db\nQ8_0,45\n", "has no column kld, loss or ppl"),
        ("type,snr_db,kld\nQ8_0,loud,0.1\n", "row 1 of .*: snr_db 'loud' is not a number"),
        ("type,snr_db,ppl\nQ8_0,45,-3\n", "row 1 of .*: perplexity -3 is not above 0"),
    ],
)
def test_bad_ladder_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ladder.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        noise_data.read(str(path))


def test_no_ladder_there() -> None:
    with pytest.raises(GgufloopError, match="cannot read lama3-8b") as e:
        noise_data.read("lama3-8b")
    assert e.value.hint.startswith("did you mean llama3-8b?")
