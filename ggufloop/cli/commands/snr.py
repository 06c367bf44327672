"""`ggufloop snr MODEL`: how far quantised weights are from their originals, by tensor, layer and window."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import click

from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import window_suggestion
from ggufloop.cli.options import complete_model, model_from_flags, model_options
from ggufloop.cli.progress import shown
from ggufloop.cli.types import output_option, show
from ggufloop.figures import style
from ggufloop.figures.snr import snr_figure
from ggufloop.files import files_sha256
from ggufloop.loop import LoopSpec
from ggufloop.models.gguf import read_model
from ggufloop.quant.snr import EXACT, FORMAT, STEPS, Share, TensorSnr, by_layer, tensor_snr, total, window_share
from ggufloop.reading import finite
from ggufloop.table import Cell, Table, columns

SCHEMA_VERSION = 1

_LAYERS = columns("layer", "SNR dB:.2f", "bits per weight:.3f", "types", "weakest tensor", "its SNR dB:.2f")
_TENSORS = columns("tensor", "layer", "type", "shape", "weights", "bits per weight:.3f", "SNR dB:.2f", "signal:.6g",
                   "noise:.6g", "method")  # fmt: skip


def _table(tensors: list[TensorSnr]) -> Table:
    rows = [[t.name, t.layer, t.type, "x".join(map(str, t.shape)), t.n, t.bits, t.snr_db, t.signal, t.noise, t.method]
            for t in tensors]  # fmt: skip
    return Table(_TENSORS, rows)


def _numbers(path: Path, reference: Path | None, tensors: list[TensorSnr], window: tuple[int, int] | None) -> Table:
    """The same for programs, of which files it is, and what is in the window."""
    found, inside = _table(tensors), range(*window or (0, 0))
    rows: list[list[Cell]] = [
        [path.name, None if reference is None else reference.name, *row,
         None if window is None else t.layer is not None and t.layer in inside]
        for t, row in zip(tensors, found.rows, strict=True)
    ]  # fmt: skip
    return Table((*columns("model", "reference"), *found.columns, *columns("in window")), rows)


def _layer_row(share: Share, tensors: list[TensorSnr]) -> list[Cell]:
    inside = [t for t in tensors if t.layer == share.layer and t.is_matrix and not math.isnan(t.snr_db)]
    weakest = min(inside, key=lambda t: t.snr_db, default=None)
    name = None if weakest is None else weakest.name.removeprefix(f"blk.{share.layer}.").removesuffix(".weight")
    where = "outside" if share.layer is None else str(share.layer)
    return [where, share.snr_db, share.bits, ", ".join(share.types), name, None if weakest is None else weakest.snr_db]


def _decibel(value: float) -> str:
    return "no noise" if math.isinf(value) else f"{value:.2f} dB"


def _line(name: str, share: Share) -> str:
    return f"{name:<10}{_decibel(share.snr_db)}, {share.bits:.3f} bits per weight, {', '.join(share.types)}\n"


def _flattery(reference: Path) -> str:
    """What to say of a reference that is quantised: types whose grid is like its own reproduce it too well."""
    types = {t.type for header in read_model(reference) for t in header.tensors} - set(EXACT)
    kinds = ", ".join(sorted(types))
    return f" (quantised itself, {kinds}: types with a grid like that come out better than they are)" if types else ""


def _text(path: Path, reference: Path | None, tensors: list[TensorSnr], window: tuple[int, int] | None) -> str:
    out = f"{'model':<10}{path.name}\n"
    if reference is None:
        methods = {t.method for t in tensors}
        how = "the steps of its blocks" if STEPS in methods else "its types"
        more = ", and of some types what is usual for them" if {STEPS, FORMAT} <= methods else ""
        out += f"{'reference':<10}none: estimated from {how}{more}\n"
    else:
        out += f"{'reference':<10}{reference.name}{_flattery(reference)}\n"
    out += _line("all", total(tensors))
    if window is not None:
        out += _line(f"{window[0]}:{window[1]}", window_share(tensors, window))
    rows = [_layer_row(share, tensors) for share in by_layer(tensors)]
    return f"{out}\n{Table(_LAYERS, rows).render('md')}"


def _share(share: Share) -> dict[str, Any]:
    return {"snr_db": finite(share.snr_db), "bits_per_weight": share.bits, "types": share.types, "weights": share.n,
            "signal": share.signal, "noise": share.noise, "estimated": share.estimated}  # fmt: skip


def _record(
    path: Path, reference: Path | None, tensors: list[TensorSnr], window: tuple[int, int] | None
) -> dict[str, Any]:
    def sha256(model: Path) -> str:
        return files_sha256([h.path for h in read_model(model)])

    return {
        "schema_version": SCHEMA_VERSION,
        "model": path.name,
        "model_sha256": sha256(path),
        "reference": None if reference is None else reference.name,
        "reference_sha256": None if reference is None else sha256(reference),
        "all": _share(total(tensors)),
        "window": None if window is None else {"layers": window, **_share(window_share(tensors, window))},
        "layers": [{"layer": share.layer, **_share(share)} for share in by_layer(tensors)],
        "tensors": [
            {"name": t.name, "layer": t.layer, "type": t.type, "shape": t.shape, "weights": t.n,
             "bits_per_weight": t.bits, "snr_db": finite(t.snr_db), "signal": t.signal, "noise": t.noise,
             "method": t.method}
            for t in tensors
        ],
    }  # fmt: skip


@click.command(name="snr", cls=Command)
@model_options
@click.option("--ref", "reference", metavar="MODEL", shell_complete=complete_model,
              help="The same model with more bits: an F16 file, or any other spelling of MODEL.")  # fmt: skip
@click.option("--window", metavar="A:B", help="Say the SNR of layers A to B-1 too, and shade them; or 'auto'.")
@output_option(help="How to print it; text has a row per layer, the others one per tensor.")
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw it too; the suffix says the format. Needs matplotlib (the extra 'lab').")  # fmt: skip
def command(reference: str | None, window: str | None, form: str, plot: Path | None, **flags: Any) -> None:
    """Signal to noise of a quantised model's weights, by tensor and layer, in dB.

    With --ref it is measured, without it estimated from the steps that the file stores. Norms and biases count nowhere.
    docs/quantisation.md says how to read it.

    \b
    ggufloop snr model-Q4_K_M.gguf --ref model-F16.gguf --window 12:16 --plot snr.png
    ggufloop snr smollm2-135m
    """
    if plot is not None:
        style.check_target(plot)
    given = None if window in (None, "auto") else LoopSpec.parse(f"{window} k=2").window
    path = model_from_flags(**flags)
    other = None if reference is None else model_from_flags(reference, None, None, flags["offline"])
    layers = window_suggestion(path)() if window == "auto" else given
    with shown() as progress:
        tensors = tensor_snr(path, other, progress=progress)
    if layers is not None:
        window_share(tensors, layers)
    if plot is not None:
        title = f"{path.stem} against {other.stem}" if other is not None else f"{path.stem}, estimated"
        style.save(snr_figure(tensors, title, layers), plot)
    asked = (path, other, tensors, layers)
    show(form, lambda: _text(*asked), lambda: _record(*asked), lambda: _table(tensors),
         lambda: _numbers(*asked))  # fmt: skip
