"""The ladder of one checkpoint: its fits, each file predicted from the others, in words, a table and for JSON.

report = LadderReport.of("llama3-8b", snr=[22.9])
report.text(), report.table().render("csv"), report.record()
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from ggufloop.errors import UsageError
from ggufloop.reading import finite
from ggufloop.scaling import noise, noise_data
from ggufloop.scaling.report import bullets, shown
from ggufloop.table import Cell, Table, columns

SCHEMA_VERSION = 1
_RUNGS = columns("type", "bits:.4g", "SNR dB:.2f", "measured:.5f", "from the others:.5f", "low:.5f", "high:.5f")


@dataclasses.dataclass(frozen=True)
class LadderReport:
    """What is fitted to a ladder, in `data` by that name; notes say what is not. wanted: SNRs to predict, of files of
    `bits` bits per weight."""

    data: str
    ladder: noise_data.Ladder
    fits: list[LadderFit]
    notes: list[str]
    wanted: Sequence[float]
    bits: float | None

    @classmethod
    def of(cls, data: str, snr: Sequence[float] = (), bits: float | None = None) -> LadderReport:
        """Read and fit. Raises UsageError for SNRs nothing is known of, GgufloopError for data that cannot be read."""
        for value in snr:
            noise.check_reach(value, bits)
        ladder = noise_data.read(data)
        fits: list[LadderFit] = []
        errors: list[UsageError] = []
        for fit in (_kld, _loss):
            try:
                fits += fit(ladder)
            except UsageError as e:
                errors.append(e)
        if not fits:
            raise errors[0] if errors else UsageError(f"{data} has no values of KLD or loss.", "measure some.")
        notes = [*[f"Not fitted: {e.message}" for e in errors], noise.UNKNOWABLE]
        outside = [f"{v:g}" for v in snr if not all(f.fitted.snr[0] <= v <= f.fitted.snr[1] for f in fits)]
        if outside:
            low, high = fits[0].fitted.snr
            notes.insert(0, f"Outside the files fitted ({low:.1f} to {high:.1f} dB): {', '.join(outside)} dB.")
        if ladder.left_out:
            notes.append(f"Left out, below 3 bits: {', '.join(r.name for r in ladder.left_out)}.")
        if ladder.unknown:
            notes.append(f"Left out, without an SNR: {', '.join(ladder.unknown)}.")
        return cls(data, ladder, fits, notes, snr, bits)

    def text(self) -> str:
        """All of it for eyes."""
        head = f"data    {self.data}, {len(self.ladder.points)} files\n"
        head += f"source  {self.ladder.source}\n" if self.ladder.source else ""
        return "\n".join([head, *[_ladder_text(f, self.wanted, self.bits) for f in self.fits], bullets(self.notes)])

    def table(self) -> Table:
        """A row per quantity and file."""
        return Table((*columns("of"), *_RUNGS), [[f.of, *row] for f in self.fits for row in f.rows])

    def record(self) -> dict[str, Any]:
        """For JSON."""
        records = [
            {
                "of": f.of,
                "fit": {k: v for k, v in finite(f.fitted).items() if not k.startswith("_")},
                "held_out": Table(_RUNGS, f.rows).records(),
                "predictions": [{"snr_db": v, **finite(f.fitted.predict(v, self.bits))} for v in self.wanted],
            }
            for f in self.fits
        ]
        return {"schema_version": SCHEMA_VERSION, "data": self.data, "floor": self.ladder.floor, "fits": records,
                "notes": self.notes}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LadderFit:
    """One quantity of a ladder: what to call it, the fit in words, and each file predicted from the others."""

    of: str
    fitted: noise.Line | noise.Curve
    said: str
    held: list[noise.HeldOut]
    rows: list[list[Cell]]


def _fit(ladder: noise_data.Ladder, of: str, fit: Callable[..., Any], floor: float, said: Any) -> list[LadderFit]:
    """What `fit` makes of the ladder's values of 'kld' or 'loss', if it has any. said: the fit in words."""
    x, y, bits = ladder.columns(of)
    if not y:
        return []
    fitted = fit(x, y, bits)
    try:
        held = noise.held_out(fit, x, y, bits)
    except UsageError:  # too few to leave one out
        held = []
    have = [r for r in ladder.points if getattr(r, of) is not None]
    rows: list[list[Cell]] = [
        [have[h.index].name, have[h.index].bits, have[h.index].snr_db, h.measured - floor, h.predicted.mean,
         h.predicted.low, h.predicted.high]
        for h in held
    ]  # fmt: skip
    return [LadderFit(_NAMES[of], fitted, said(fitted), held, rows)]


_NAMES = {"kld": "KLD", "loss": "loss"}


def _kld(ladder: noise_data.Ladder) -> list[LadderFit]:
    def said(line: noise.Line) -> str:
        return (
            f"ln KLD = u + eta ln r: u = {shown(line.u, '.3f')}, eta = {shown(line.eta, '.3f')}\n"
            f"that is log10 KLD = {line.u.mean / math.log(10):.3f} - {line.eta.mean:.3f} SNR/10"
        ) + (f"; KLD less {ladder.floor:g}, the reference's own" if ladder.floor else "")

    fit = functools.partial(noise.fit_kld, floor=ladder.floor)
    return _fit(ladder, "kld", fit, ladder.floor, said)


def _loss(ladder: noise_data.Ladder) -> list[LadderFit]:
    def said(curve: noise.Curve) -> str:
        return (
            f"L(r) = L0 (1 + kappa r^eta): L0 = {shown(curve.l0, '.4f')}, kappa = {shown(curve.kappa, '.3g')}, "
            f"eta = {shown(curve.eta, '.3f')}"
        )

    return _fit(ladder, "loss", noise.fit_loss, 0.0, said)


def _ladder_text(f: LadderFit, wanted: Sequence[float], bits: float | None) -> str:
    measured = [float(row[3] or 0) for row in f.rows]  # always a number there; a row's cells may be anything
    inside = sum(h.predicted.low <= value <= h.predicted.high for h, value in zip(f.held, measured, strict=True))
    predictions = [f"{value:g} dB: {f.of} {shown(f.fitted.predict(value, bits), '.4f')}\n" for value in wanted]
    held = f"{f.of} of each file predicted from the others, 95 % intervals: {inside} of {len(f.held)} inside\n\n"
    held += Table(_RUNGS, f.rows).render("md")
    if not f.held:
        held = "Too few files to predict one from the others.\n"
    fitted = f"{f.said}\nR2 = {f.fitted.r2:.3f}, RMSE {f.fitted.rmse:.3g}, n = {f.fitted.n} files\n\n"
    return fitted + held + "".join(predictions)
