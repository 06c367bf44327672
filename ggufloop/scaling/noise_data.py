"""A ladder read from a file: what was measured of one model at several quantisations.

    ladder = read("llama3-8b")                   # the example that is shipped, or a CSV as `ggufloop compare` prints
    line = fit_kld(*ladder.columns("kld"), floor=ladder.floor)

Columns: type, SNR dB (inf for the reference), bits per weight, KLD, and loss or PPL; KLD or loss may be missing. Of a
file with a column loop only the plain rows are read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import UsageError
from ggufloop.scaling.data import MOST_BITS, MOST_LOSS, column_names, lacking, number, table, text_of
from ggufloop.scaling.noise import LEAST_BITS, LEAST_SNR

EXAMPLES = {"llama3-8b": "llama3_8b_ladder.csv"}
"""Ladders that are shipped, by name."""

_COLUMNS = {
    "type": ("type", "quant", "file", "name"),
    "snr_db": ("snr_db", "window_snr_db", "snr"),
    "bits": ("bits", "bits_per_weight", "bpw"),
    "kld": ("kld", "mean_kld", "kl"),
    "loss": ("loss", "nll"),
    "ppl": ("ppl", "perplexity"),
    "loop": ("loop",),
}
_RANGES = {
    "snr_db": (-1000.0, math.inf), "bits": (0.0, MOST_BITS), "kld": (0.0, MOST_LOSS), "loss": (0.0, MOST_LOSS),
    "ppl": (-math.inf, math.exp(700)),
}  # fmt: skip
_EMPTY = ("", "nan", "none", "-")


@dataclass(frozen=True)
class LadderPoint:
    """One file: SNR of its weights (dB), bits per weight, mean KLD and loss in nats. None: not measured."""

    name: str
    snr_db: float
    bits: float | None
    kld: float | None
    loss: float | None


@dataclass(frozen=True)
class Ladder:
    """Files whose noise is known. floor: KLD of the reference with itself, 0 if it is not a row; source: from where."""

    name: str
    points: tuple[LadderPoint, ...]
    unknown: tuple[str, ...]  # files without an SNR
    floor: float
    source: str

    @property
    def used(self) -> list[LadderPoint]:
        """Files a fit may use."""
        return [r for r in self.points if r.snr_db >= LEAST_SNR and (r.bits is None or r.bits >= LEAST_BITS)]

    @property
    def left_out(self) -> list[LadderPoint]:
        """Files of fewer than 3 bits."""
        return [r for r in self.points if r not in self.used]

    def columns(self, of: str) -> tuple[list[float], list[float], NDArray[np.float64]]:
        """SNR, values of 'kld' or 'loss', and bits (infinite if unknown) of the files that have the value."""
        have = [(r, getattr(r, of)) for r in self.points if getattr(r, of) is not None]
        bits = np.array([math.inf if r.bits is None else r.bits for r, _ in have])
        return [r.snr_db for r, _ in have], [value for _, value in have], bits


def read(source: str) -> Ladder:
    """A ladder by name or from a CSV file. Raises GgufloopError, UsageError."""
    text = text_of(source, EXAMPLES, "give the CSV of `ggufloop compare`.")
    remarks, rows = table(text, source, "give a header type,snr_db,bits,kld,loss and a row per file.")
    at = column_names(rows[0], _COLUMNS)
    of_type, of_loop = at["type"], at.pop("loop")
    for name in ("type", "snr_db"):
        if at[name] is None:
            raise lacking(source, name, rows[0], "type, snr_db, kld or loss")
    if at["kld"] is None and at["loss"] is None and at["ppl"] is None:
        raise UsageError(f"{source} has no column kld, loss or ppl.", f"its columns: {', '.join(rows[0])}.")
    points, unknown = [], []
    for i, row in enumerate(rows, 1):
        if of_loop is not None and row[of_loop] not in ("plain", *_EMPTY):
            continue
        cell = {
            name: _number(row[key], f"row {i} of {source}: {name}", _RANGES[name])
            for name, key in at.items()
            if key and name != "type"
        }
        name, snr = row[of_type], cell["snr_db"]
        if snr is None:
            unknown.append(name)
            continue
        ppl = cell.get("ppl")
        if ppl is not None and not ppl > 0:
            raise UsageError(f"row {i} of {source}: perplexity {ppl:g} is not above 0.", "correct or drop it.")
        loss = cell.get("loss")
        loss = math.log(ppl) if loss is None and ppl is not None else loss
        points.append(LadderPoint(name, snr, cell.get("bits"), cell.get("kld"), loss))
    floor = next((r.kld for r in points if r.snr_db == math.inf and r.kld is not None), 0.0)
    return Ladder(source, tuple(points), tuple(unknown), floor, remarks)


def _number(text: str, what: str, limits: tuple[float, float]) -> float | None:
    if text.strip().lower() in _EMPTY:
        return None
    value = number(text, what)
    if not limits[0] <= value <= limits[1]:
        raise UsageError(
            f"{what} {value:g} is not in {limits[0]:g} to {limits[1]:g}.", "correct it, or leave the cell empty."
        )
    return value
