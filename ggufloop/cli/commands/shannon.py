"""`ggufloop shannon fit|predict|plot|ladder`: scaling laws on measured losses, and what they cannot tell."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from ggufloop.cli import terminal
from ggufloop.cli.progress import shown
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.figures import style
from ggufloop.measure.stats import Estimate
from ggufloop.reading import finite
from ggufloop.scaling import analysis, noise, noise_data
from ggufloop.scaling import fit as shannon_fit
from ggufloop.scaling.analysis import Level, Optimum, Pooled, Prediction, Settings, analyse, constants, loose
from ggufloop.scaling.data import COUNTS, Data, choose, read
from ggufloop.scaling.laws import LAWS, Law, find
from ggufloop.table import FORMS, Cell, Column, Table

SCHEMA_VERSION = 1
OPEN = "not determined"

_LAWS = (Column("level"), Column("law"), Column("constants"), Column("n"), Column("R2", ".3f"), Column("RMSE", ".4f"),
         Column("AICc", ".1f"), Column("held-out RMSE", ".3g"), Column("held-out n"), Column("copied", ".3g"),
         Column("starts that agree"))  # fmt: skip
_POOLED = (Column("law"), Column("fit"), Column("constants"), Column("n"), Column("R2", ".3f"), Column("RMSE", ".4f"),
           Column("AICc", ".1f"), Column("held-out RMSE", ".3g"), Column("held-out R2", ".3g"),
           Column("held-out n"))  # fmt: skip
_SLOPES = (Column("level"), Column("N", ".4g"), Column("D", ".4g"), Column("loss"), Column("dlnL/dlnN"),
           Column("dlnL/dlnD"), Column("N* at this D"), Column("D* at this N"))  # fmt: skip
_RUNGS = (Column("type"), Column("bits", ".4g"), Column("SNR dB", ".2f"), Column("measured", ".5f"),
          Column("from the others", ".5f"), Column("low", ".5f"), Column("high", ".5f"))  # fmt: skip

T = TypeVar("T")


def _words(text: str | None) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()] if text else []


def _numbers(text: str | None, what: str) -> list[float]:
    """Positive numbers separated by commas. Raises UsageError."""
    out = []
    for word in _words(text):
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise UsageError(f"{what} {word!r} is not a number above 0.", "give billions, such as 1.4.")
        out.append(value)
    return out


def _check_form(form: str) -> None:
    if form not in ("text", *FORMS):
        raise UsageError(f"output form {form!r} is not known.", nearest(form, ("text", *FORMS)))


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


# what is printed


def _head(data: Data, results: Sequence[Level]) -> str:
    n = sum(len(r.points) for r in results)
    lines = [
        f"data    {data.name}: {n} points, levels {', '.join(r.points.level for r in results)}",
        f"units   N: billions of {data.count} parameters, D: billions of tokens, loss: nats per token",
        *([f"source  {data.source}"] if data.source else []),
    ]
    return "\n".join(lines) + "\n"


def _law_rows(results: Sequence[Level]) -> Table:
    rows: list[list[Cell]] = []
    for result in results:
        for name, fit in result.fits.items():
            test = result.tests.get(name)
            held: list[Cell] = [None, None, None] if test is None else [test.rmse, test.tested, test.copied]
            rows.append([result.points.level, name, len(fit.law.parameters), fit.n, fit.r2, fit.rmse, fit.aicc, *held,
                         f"{fit.agreed} of {fit.starts}"])  # fmt: skip
    return Table(_LAWS, rows)


def _pooled_rows(pooled: Sequence[Pooled]) -> Table:
    return Table(
        _POOLED,
        [
            [p.name, p.how, p.parameters, p.n, p.r2, p.rmse, p.aicc, p.held_out, p.held_out_r2, p.tested or None]
            for p in pooled
        ],
    )


def _shown(e: Estimate, form: str) -> str:
    return f"{e.mean:{form}} [{e.low:{form}}, {e.high:{form}}]"


def _optimum(o: Optimum) -> str:
    if o.estimate is not None:
        return _shown(o.estimate, ".3g")
    return "none in range" if o.share < 0.5 else f"unsure ({100 * o.share:.0f} % of refits have one)"


def _prediction_rows(level: str, predictions: Sequence[Prediction]) -> list[list[Cell]]:
    return [
        [level, p.size, p.budget, _shown(p.loss, ".3f"), _shown(p.by_n, "+.4f"), _shown(p.by_d, "+.4f"),
         _optimum(p.best_size), _optimum(p.best_budget)]
        for p in predictions
    ]  # fmt: skip


def _corners(result: Level) -> list[Prediction]:
    """The smallest and the largest size at the largest budget."""
    p = result.points
    budget = math.exp(p.budgets[-1])
    return [analysis.predict(result, math.exp(n), budget) for n in (p.sizes[0], p.sizes[-1])]


def _constants(results: Sequence[Level]) -> str:
    """One row per level, for each law that is some level's main one."""
    parts = []
    for main in dict.fromkeys(r.main for r in results):
        mine = [r for r in results if r.main == main]
        names = mine[0].fit.law.parameters
        rows: list[list[Cell]] = []
        for result in mine:
            found = constants(result)
            open_ = loose(found)
            rows.append([result.points.level, *[OPEN if k in open_ else _shown(found[k], ".3g") for k in names]])
        table = Table((Column("level"), *map(Column, names)), rows).render("md")
        parts.append(f"Constants of {main}, {mine[0].fit.law.formula}:\n\n{table}")
    return "\n".join(parts)


def _bullets(lines: Sequence[str]) -> str:
    return "".join(f"* {line}\n" for line in lines)


def _fit_text(data: Data, results: Sequence[Level], pooled: Sequence[Pooled]) -> str:
    main = ", ".join(dict.fromkeys(r.main for r in results))
    parts = [_head(data, results), _law_rows(results).render("md")
             + "copied: RMSE of predicting each held-out point by the nearest one that was fitted\n"]  # fmt: skip
    if pooled:
        parts.append(f"All levels together:\n\n{_pooled_rows(pooled).render('md')}")
    slopes = [row for r in results for row in _prediction_rows(r.points.level, _corners(r))]
    parts += [f"Local slopes of {main} at the largest budget, 95 % bootstrap bands:\n\n"
              f"{Table(_SLOPES, slopes).render('md')}", _constants(results)]  # fmt: skip
    for r in results:
        notes = [*analysis.findings(r), *[f"Not fitted: {why}." for why in r.refused.values()]]
        parts.append(f"What to know about {r.points.level}:\n\n{_bullets(notes)}")
    if notes := analysis.comparisons(results):
        parts.append(f"As measured, without a law:\n\n{_bullets(notes)}")
    return "\n".join(parts)


def _fit_json(data: Data, results: Sequence[Level], pooled: Sequence[Pooled], settings: Settings) -> str:
    levels = []
    for r in results:
        found = constants(r)
        levels.append({
            "level": r.points.level,
            "bits": float(r.points.bits[0]),
            "n": len(r.points),
            "sizes": len(r.points.sizes),
            "budgets": len(r.points.budgets),
            "laws": {
                name: {"formula": f.law.formula, "constants": f.parameters, "n": f.n, "r2": f.r2, "rmse": f.rmse,
                       "aicc": f.aicc, "at_bound": f.bounds, "starts": f.starts, "agreed": f.agreed,
                       "held_out": r.tests.get(name)}
                for name, f in r.fits.items()
            },
            "not_fitted": r.refused,
            "main": r.main,
            "constants": {k: {**dataclasses.asdict(e), "determined": k not in loose(found)} for k, e in found.items()},
            "largest_budget": _corners(r),
            "findings": analysis.findings(r),
        })  # fmt: skip
    whole = {
        "schema_version": SCHEMA_VERSION,
        "data": data.name,
        "source": data.source,
        "n_counts": data.count,
        "settings": settings,
        "levels": levels,
        "pooled": list(pooled),
        "measured": analysis.comparisons(results),
    }
    return json.dumps(finite(whole), indent=2) + "\n"


# the commands


def _common(command: Callable[..., T]) -> Callable[..., T]:
    options = [
        click.argument("data", metavar="DATA"),
        click.option("--level", "levels", metavar="NAME,...", help="Only these levels of the data, such as 2-bit."),
        click.option("--n", "count", metavar="|".join(COUNTS), help="What N counts: chooses between the columns "
                     "N_total and N_non_embedding."),
        click.option("--starts", type=click.IntRange(min=1), default=shannon_fit.STARTS, show_default=True, metavar="N",
                     help="Random starts of each fit, besides all ones and all 0.1."),
        click.option("--resamples", type=click.IntRange(min=20), default=analysis.RESAMPLES, show_default=True,
                     metavar="N", help="Bootstrap refits behind each band."),
        click.option("-s", "--seed", type=click.IntRange(min=0), default=0, show_default=True, metavar="N",
                     help="Of starts and resamples."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def _output(command: Callable[..., T]) -> Callable[..., T]:
    return click.option("-o", "--output", "form", default="text", show_default=True,
                        metavar="text|md|csv|json|jsonl", help="How to print it.")(command)  # fmt: skip


class _Commands(click.Group):
    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            raise click.UsageError(f"No such command {args[0]!r}; {nearest(args[0], self.commands)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(name="shannon", cls=_Commands)
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
@_output
def fit(data: str, laws: str | None, quick: bool, form: str, **flags: Any) -> None:
    """Fit the laws to each level, all in the same way, and say what the data can and cannot tell.

    The Shannon law is refitted for each level. qid and precision are one law where all bits are the same; fitted to all
    levels at once they know the bits, 16 where none are given. Held out are the largest size and the largest 30 % of
    the budgets: fitted is what has neither, tested what has both.
    """
    _check_form(form)
    chosen = [find(name) for name in _words(laws)] or list(LAWS.values())
    loaded, settings = _load(data, flags), _settings(flags, not quick)
    results = _analyse(loaded, chosen, settings, chosen[0].name if len(chosen) == 1 else None)
    if form in ("text", "json") and len(results) > 1:
        with terminal.progress("fitting all levels ..."):
            pooled = analysis.pool(results, chosen, settings)
    else:
        pooled = []
    if form == "text":
        click.echo(_fit_text(loaded, results, pooled), nl=False)
    elif form == "json":
        click.echo(_fit_json(loaded, results, pooled, settings), nl=False)
    else:
        click.echo(_law_rows(results).render(form), nl=False)


@command.command(name="predict", short_help="Loss, local slopes, N* and D* with their bands.")
@_common
@click.option("--N", "sizes", metavar="B,...", required=True, help="Sizes in billions of parameters.")
@click.option("--D", "budgets", metavar="B,...", required=True, help="Budgets in billions of tokens.")
@click.option("--law", default="shannon", show_default=True, metavar="NAME", help=f"One of {', '.join(LAWS)}.")
@_output
def predict(data: str, sizes: str, budgets: str, law: str, form: str, **flags: Any) -> None:
    """Loss, local slopes, N* and D* by one law, with 95 % bootstrap bands.

    A band is what the residuals of the fit leave open if the law is right. Beyond the data it is not: read the
    held-out error beside it. N* is the size at which loss is least for that budget, D* the budget beyond which a model
    of that size gets worse; both are looked for in the range of the data only.
    """
    _check_form(form)
    at = [(n, d) for n in _numbers(sizes, "--N") for d in _numbers(budgets, "--D")]
    if not at:
        raise UsageError("no size or no budget is given.", "give billions, such as --N 1.4 --D 100.")
    chosen, loaded = find(law), _load(data, flags)
    results = _analyse(loaded, [chosen], _settings(flags), chosen.name)
    found = [(r, [analysis.predict(r, n, d) for n, d in at]) for r in results]
    if form == "json":
        whole = {
            "schema_version": SCHEMA_VERSION, "data": loaded.name, "law": law, "n_counts": loaded.count,
            "levels": [{"level": r.points.level, "n": len(r.points), "held_out": r.tests.get(law), "predictions": ps}
                       for r, ps in found],
        }  # fmt: skip
        click.echo(json.dumps(finite(whole), indent=2))
        return
    table = Table(_SLOPES, [row for r, ps in found for row in _prediction_rows(r.points.level, ps)])
    if form != "text":
        click.echo(table.render(form), nl=False)
        return
    notes = []
    for r, ps in found:
        test = r.tests.get(law)
        outside = "; ".join(dict.fromkeys(p.outside for p in ps if p.outside))
        if outside:
            notes.append(f"{r.points.level}: {outside}. A band does not cover what the law gets wrong there.")
        if test is not None:
            notes.append(
                f"{r.points.level}: held out (n = {test.tested}), {law} missed by {test.rmse:.3g} nat; copying the "
                f"nearest measured point by {test.copied:.3g}." + (" Do not extrapolate." if test.failed else "")
            )
    click.echo(
        f"{_head(loaded, results)}\n{law}, 95 % bootstrap bands:\n\n{table.render('md')}\n{_bullets(notes)}", nl=False
    )


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
@_output
def of_one(data: str, snr: str | None, bits: float | None, target: Path | None, form: str) -> None:
    """One checkpoint at several quantisations: ln KLD = u + eta ln r and L(r) = L0 (1 + kappa r^eta), r = 10^(-SNR/10).

    LADDER is a CSV with type, SNR dB, bits per weight, KLD and loss or PPL, as `ggufloop compare -o csv` prints it, or
    `llama3-8b`. Every file is predicted from the others. Files of fewer than 3 bits are left out, and not predicted.
    """
    _check_form(form)
    wanted = [_snr(word) for word in _words(snr)]
    for value in wanted:
        noise.check_reach(value, bits)
    if target is not None:
        style.check_target(target)
    read_ = noise_data.read(data)
    fits, errors = [], []
    for fit_ in (_kld, _loss):
        try:
            fits += fit_(read_)
        except UsageError as e:
            errors.append(e)
    if not fits:
        raise errors[0] if errors else UsageError(f"{data} has no values of KLD or loss.", "measure some.")
    if target is not None:
        line = fits[0].fitted
        if not isinstance(line, noise.Line):
            raise GgufloopError(f"{data} has no line of KLD to draw.", "leave out --plot.")
        from ggufloop.figures.scaling import ladder_figure

        style.save(ladder_figure(read_, line, f"{Path(data).name}: one model, {len(read_.points)} files"), target)
        terminal.note(f"wrote {target}.")
    notes = [*[f"Not fitted: {e.message}" for e in errors], noise.UNKNOWABLE]
    outside = [f"{v:g}" for v in wanted if not all(f.fitted.snr[0] <= v <= f.fitted.snr[1] for f in fits)]
    if outside:
        low, high = fits[0].fitted.snr
        notes.insert(0, f"Outside the files fitted ({low:.1f} to {high:.1f} dB): {', '.join(outside)} dB.")
    if read_.left_out:
        notes.append(f"Left out, below 3 bits: {', '.join(r.name for r in read_.left_out)}.")
    if read_.unknown:
        notes.append(f"Left out, without an SNR: {', '.join(read_.unknown)}.")
    if form == "text":
        head = f"data    {data}, {len(read_.points)} files\n" + (f"source  {read_.source}\n" if read_.source else "")
        click.echo("\n".join([head, *[_ladder_text(f, wanted, bits) for f in fits], _bullets(notes)]), nl=False)
    elif form == "json":
        records = [
            {
                "of": f.of,
                "fit": {k: v for k, v in finite(f.fitted).items() if not k.startswith("_")},
                "held_out": Table(_RUNGS, f.rows).records(),
                "predictions": [{"snr_db": v, **finite(f.fitted.predict(v, bits))} for v in wanted],
            }
            for f in fits
        ]
        whole = {"schema_version": SCHEMA_VERSION, "data": data, "floor": read_.floor, "fits": records, "notes": notes}
        click.echo(json.dumps(whole, indent=2))
    else:
        cells = [[f.of, *row] for f in fits for row in f.rows]
        click.echo(Table((Column("of"), *_RUNGS), cells).render(form), nl=False)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """One quantity of a ladder: what to call it, the fit in words, and each file predicted from the others."""

    of: str
    fitted: noise.Line | noise.Curve
    said: str
    held: list[noise.HeldOut]
    rows: list[list[Cell]]


def _rows(read_: noise_data.Ladder, of: str, held: Sequence[noise.HeldOut], floor: float = 0.0) -> list[list[Cell]]:
    have = [r for r in read_.points if getattr(r, of) is not None]
    return [
        [have[h.index].name, have[h.index].bits, have[h.index].snr_db, h.measured - floor, h.predicted.mean,
         h.predicted.low, h.predicted.high]
        for h in held
    ]  # fmt: skip


def _held(fit_: Callable[..., Any], x: Any, y: Any, bits: Any) -> list[noise.HeldOut]:
    """Each file predicted from the others, none if they are too few to leave one out."""
    try:
        return noise.held_out(fit_, x, y, bits)
    except UsageError:
        return []


def _kld(read_: noise_data.Ladder) -> list[_Fitted]:
    x, y, bits = read_.columns("kld")
    if not y:
        return []
    floor = read_.floor
    line = noise.fit_kld(x, y, bits, floor)
    held = _held(functools.partial(noise.fit_kld, floor=floor), x, y, bits)
    said = (
        f"ln KLD = u + eta ln r: u = {_shown(line.u, '.3f')}, eta = {_shown(line.eta, '.3f')}\n"
        f"that is log10 KLD = {line.u.mean / math.log(10):.3f} - {line.eta.mean:.3f} SNR/10"
    ) + (f"; KLD less {floor:g}, the reference's own" if floor else "")
    return [_Fitted("KLD", line, said, held, _rows(read_, "kld", held, floor))]


def _loss(read_: noise_data.Ladder) -> list[_Fitted]:
    x, y, bits = read_.columns("loss")
    if not y:
        return []
    curve = noise.fit_loss(x, y, bits)
    held = _held(noise.fit_loss, x, y, bits)
    said = (
        f"L(r) = L0 (1 + kappa r^eta): L0 = {_shown(curve.l0, '.4f')}, kappa = {_shown(curve.kappa, '.3g')}, "
        f"eta = {_shown(curve.eta, '.3f')}"
    )
    return [_Fitted("loss", curve, said, held, _rows(read_, "loss", held))]


def _ladder_text(f: _Fitted, wanted: Sequence[float], bits: float | None) -> str:
    measured = [float(row[3] or 0) for row in f.rows]  # always a number there; a row's cells may be anything
    inside = sum(h.predicted.low <= value <= h.predicted.high for h, value in zip(f.held, measured, strict=True))
    predictions = [f"{value:g} dB: {f.of} {_shown(f.fitted.predict(value, bits), '.4f')}\n" for value in wanted]
    held = f"{f.of} of each file predicted from the others, 95 % intervals: {inside} of {len(f.held)} inside\n\n"
    held += Table(_RUNGS, f.rows).render("md")
    if not f.held:
        held = "Too few files to predict one from the others.\n"
    fitted = f"{f.said}\nR2 = {f.fitted.r2:.3f}, RMSE {f.fitted.rmse:.3g}, n = {f.fitted.n} files\n\n"
    return fitted + held + "".join(predictions)


def _snr(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"--snr {word!r} is not a number.", "give decibels, such as 22.9.") from None
