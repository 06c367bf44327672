"""`ggufloop shannon fit|predict|plot|ladder`: scaling laws on measured losses, and what they cannot tell."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import terminal
from ggufloop.cli.help import Group
from ggufloop.cli.options import adder
from ggufloop.cli.progress import shown
from ggufloop.cli.types import OneOf, output_option, show
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.figures import style
from ggufloop.progress import doing
from ggufloop.scaling import analysis, report
from ggufloop.scaling import fit as shannon_fit
from ggufloop.scaling.analysis import Level, Settings, analyse
from ggufloop.scaling.data import COUNTS, Data, choose, read
from ggufloop.scaling.laws import LAWS, Law, find
from ggufloop.scaling.noise import Line
from ggufloop.scaling.noise_report import LadderReport


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def _numbers(
    text: str | None, what: str, hint: str = "give billions, such as 1.4.", above_0: bool = True
) -> list[float]:
    """Numbers separated by commas. Raises UsageError."""
    out = []
    for word in _words(text):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (above_0 and value <= 0):
            raise UsageError(f"{what} {word!r} is not a number{' above 0' * above_0}.", hint)
        out.append(value)
    return out


def _settings(flags: dict[str, Any], held_out: bool = True) -> Settings:
    return Settings(flags["starts"], flags["resamples"], flags["seed"], held_out)


def _load(source: str, flags: dict[str, Any]) -> Data:
    data = read(source, flags["count"])
    return dataclasses.replace(data, levels=choose(data.levels, _words(flags["levels"])))


def _analyse(data: Data, laws: Sequence[Law], settings: Settings, main: str | None) -> list[Level]:
    out = []
    for points in data.levels:
        with shown() as progress:
            out.append(analyse(points, laws, settings, main, progress))
    return out


_common: Callable[[Any], Any] = adder([
    click.argument("data", metavar="DATA"),
    click.option("--level", "levels", metavar="NAME,...", help="Only these levels of the data, such as 2-bit."),
    click.option("--n", "count", type=OneOf(COUNTS), metavar="|".join(COUNTS),
                 help="What N counts: chooses between the columns N_total and N_non_embedding."),
    click.option("--starts", type=click.IntRange(min=1), default=shannon_fit.STARTS, show_default=True, metavar="N",
                 help="Random starts of each fit, besides all ones and all 0.1."),
    click.option("--resamples", type=click.IntRange(min=20), default=analysis.RESAMPLES, show_default=True,
                 metavar="N", help="Bootstrap refits behind each band."),
    click.option("-s", "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
                 help="Of starts and resamples."),
])  # fmt: skip


@click.group(name="shannon", cls=Group)
def command() -> None:
    """Scaling laws of loss over size, tokens and bits, fitted to measurements; docs/shannon.md says what they can tell.

    DATA is a CSV or JSON file of N, D, loss and perhaps bits, or `pythia`, the example that is shipped.

    \b
    ggufloop shannon fit pythia
    ggufloop shannon predict pythia --level 2-bit --N 6.86 --D 100,200
    ggufloop shannon plot pythia loss.png
    ggufloop shannon ladder llama3-8b
    """


@command.command(name="fit", short_help="Fit the laws, and say what the data can and cannot tell.")
@_common
@click.option("--law", "laws", metavar="NAME,...", help=f"Only these of {', '.join(LAWS)}.")
@click.option("--no-held-out", "quick", is_flag=True, help="Do not test how the laws extrapolate: half the time.")
@output_option()
def fit(data: str, laws: str | None, quick: bool, form: str, **flags: Any) -> None:
    """Fit the laws to each level, all in the same way, and say what the data can and cannot tell.

    The Shannon law is refitted for each level. qid and precision are one law where all bits are the same; fitted to all
    levels at once they know the bits, 16 where none are given. Held out are the largest size and the largest 30 % of
    the budgets: fitted is what has neither, tested what has both.
    """
    chosen = [find(name) for name in _words(laws)] or list(LAWS.values())
    loaded, settings = _load(data, flags), _settings(flags, not quick)
    results = _analyse(loaded, chosen, settings, chosen[0].name if len(chosen) == 1 else None)
    if form in ("text", "json") and len(results) > 1:
        with shown() as progress, doing(progress, "fitting all levels ..."):
            pooled = analysis.pool(results, chosen, settings)
    else:
        pooled = []
    show(form, lambda: report.fit_text(loaded, results, pooled),
         lambda: report.fit_record(loaded, results, pooled, settings), lambda: report.law_table(results))  # fmt: skip


@command.command(name="predict", short_help="Loss, local slopes, N* and D* with their bands.")
@_common
@click.option("--N", "sizes", metavar="B,...", required=True, help="Sizes in billions of parameters.")
@click.option("--D", "budgets", metavar="B,...", required=True, help="Budgets in billions of tokens.")
@click.option("--law", default="shannon", show_default=True, metavar="NAME", help=f"One of {', '.join(LAWS)}.")
@output_option()
def predict(data: str, sizes: str, budgets: str, law: str, form: str, **flags: Any) -> None:
    """Loss, local slopes, N* and D* by one law, with 95 % bootstrap bands.

    A band is what the residuals of the fit leave open if the law is right. Beyond the data it is not: read the
    held-out error beside it. N* is the size at which loss is least for that budget, D* the budget beyond which a model
    of that size gets worse; both are looked for in the range of the data only.
    """
    at = [(n, d) for n in _numbers(sizes, "--N") for d in _numbers(budgets, "--D")]
    if not at:
        raise UsageError("no size or no budget is given.", "give billions, such as --N 1.4 --D 100.")
    chosen, loaded = find(law), _load(data, flags)
    results = _analyse(loaded, [chosen], _settings(flags), chosen.name)
    found = [(r, [analysis.predict(r, n, d) for n, d in at]) for r in results]
    show(form, lambda: report.prediction_text(loaded, law, found),
         lambda: report.prediction_record(loaded, law, found), lambda: report.prediction_table(found))  # fmt: skip


@command.command(name="plot", short_help="Draw loss over size and tokens.")
@_common
@click.argument("target", type=click.Path(path_type=Path), metavar="FILE.png")
@click.option("--law", default="shannon", show_default=True, metavar="NAME", help=f"One of {', '.join(LAWS)}.")
def plot(data: str, target: Path, law: str, **flags: Any) -> None:
    """Draw loss over size and tokens: the law as contours, the measured points on top, N* and D* where they exist.

    N* and D* are the fit's own lines; `predict` says how sure they are.
    """
    style.check_target(target)
    from ggufloop.figures.scaling import contours

    chosen, loaded = find(law), _load(data, flags)
    results = _analyse(loaded, [chosen], _settings(flags, held_out=False), chosen.name)
    style.save(contours(results, f"{Path(loaded.name).name}: {chosen.formula}"), target)
    terminal.note(f"wrote {target}.")


@command.command(name="ladder", short_help="One checkpoint: loss and KLD over the noise of its weights.")
@click.argument("data", metavar="LADDER")
@click.option("--snr", metavar="dB,...", help="Predict files of these SNRs too.")
@click.option("--bits", type=float, metavar="B", help="Bits per weight of those files: below 3 nothing is predicted.")
@click.option("--plot", "target", type=click.Path(path_type=Path), metavar="FILE.png", help="Draw KLD over SNR too.")
@output_option()
def of_one(data: str, snr: str | None, bits: float | None, target: Path | None, form: str) -> None:
    """One checkpoint at several quantisations: ln KLD = u + eta ln r and L(r) = L0 (1 + kappa r^eta), r = 10^(-SNR/10).

    LADDER is a CSV with type, SNR dB, bits per weight, KLD and loss or PPL, as `ggufloop compare -o csv` prints it, or
    `llama3-8b`. Every file is predicted from the others. Files of fewer than 3 bits are left out, and not predicted.
    """
    wanted = _numbers(snr, "--snr", "give decibels, such as 22.9.", above_0=False)
    if target is not None:
        style.check_target(target)
    told = LadderReport.of(data, wanted, bits)
    if target is not None:
        line = told.fits[0].fitted
        if not isinstance(line, Line):
            raise GgufloopError(f"{data} has no line of KLD to draw.", "leave out --plot.")
        from ggufloop.figures.scaling import ladder_figure

        n = len(told.ladder.points)
        style.save(ladder_figure(told.ladder, line, f"{Path(data).name}: one model, {n} files"), target)
        terminal.note(f"wrote {target}.")
    show(form, told.text, told.record, told.table)
