"""`ggufloop advise STUDY [STUDY2]`: what to spend on next, bits, a loop or a bigger model, from measured studies."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import terminal
from ggufloop.cli.help import Command
from ggufloop.cli.options import split_list
from ggufloop.cli.types import Size, output_option, show
from ggufloop.errors import UsageError
from ggufloop.study import advise as rule
from ggufloop.study import advise_report
from ggufloop.study.advise import Thresholds
from ggufloop.study.file import read

_DEFAULTS = Thresholds()


def _file(path: Path) -> Path:
    """A study's file; a folder means the one that compare writes there."""
    return path / "study.jsonl" if path.is_dir() else path


def _check(thresholds: Thresholds) -> None:
    """Raise UsageError for a threshold that no measurement could be compared with."""
    for flag, value, low, high in (
        ("--max-kld", thresholds.kld, 0, math.inf),
        ("--min-snr", thresholds.snr, -math.inf, math.inf),
        ("--max-share", thresholds.share, 0, 1),
        ("--sigma", thresholds.sigma, 0, 4.5),
        ("--worth", thresholds.worth, 0, math.inf),
        ("--max-amplification", thresholds.a_k, 0, math.inf),
    ):
        if not low < value < high:
            raise UsageError(f"{flag} {value:g} is not in the range {low:g}<x<{high:g}.", "see ggufloop advise --help.")


def _threshold(flag: str, name: str, help_: str) -> Callable[[Any], Any]:
    return click.option(
        flag, name, type=float, default=getattr(_DEFAULTS, name), show_default=True, metavar="X", help=help_
    )


@click.command(name="advise", cls=Command)
@click.argument("studies", nargs=-1, metavar="STUDY [STUDY2]", type=click.Path(path_type=Path))
@click.option("--type", "types", metavar="TYPE,...", help="Advise on these files of the smaller model (default: all).")
@click.option("--loop", metavar="LOOP", help="Judge this loop, chosen elsewhere, on all chunks, as the study names it.")
@click.option("--bigger-type", metavar="TYPE", help="The bigger model's file to compare with (default: the same type).")
@click.option("--size-budget", "most", type=Size(), metavar="SIZE",
              help="Bytes a file may have, such as 4GB; of the bigger model the best that fits.")  # fmt: skip
@_threshold("--max-kld", "kld", "More bits if the KLD to the reference is above this, nats.")
@_threshold("--min-snr", "snr", "More bits if the window's weight SNR is below this, dB.")
@_threshold("--max-share", "share", "More bits if they explain this share of the gap to the bigger model.")
@_threshold("--sigma", "sigma", "Standard errors the gain of a loop must be above 0.")
@_threshold("--worth", "worth", "Nats per token: a gain whose interval stays below this counts as none.")
@_threshold("--max-amplification", "a_k", "Most A_K, amplification of quantisation noise, of a loop.")
@click.option("--explain", is_flag=True, help="Print every criterion of the rule, not only those that decide.")
@output_option("json")
def command(
    studies: tuple[Path, ...], types: str | None, loop: str | None, bigger_type: str | None, most: int | None,
    explain: bool, form: str, **thresholds: float,
) -> None:  # fmt: skip
    """Say what to spend on next for each quantised file of a study that `ggufloop compare` measured.

    \b
    1. More bits, if quantisation is heavy or bits explain most of the gap to a bigger model;
    2. else the loop, if its gain is real, amplifies no noise, and beats a bigger model per millisecond;
    3. else the bigger model, if it is better for its size and its time;
    4. else nothing.

    A criterion whose interval holds its threshold is not decided: "not enough data to tell" is an answer. STUDY2 is a
    study of another size of the model on the same text; without it no bigger model is considered. Models are compared
    in bits per byte.

    \b
    ggufloop advise studies/small
    ggufloop advise studies/small studies/big --type Q4_K_M --explain
    """
    if not 1 <= len(studies) <= 2:
        raise UsageError(f"{len(studies)} studies are given.", "name one, or two of models of different size.")
    limits = Thresholds(**thresholds)
    _check(limits)
    found = sorted((read(_file(path)) for path in studies), key=lambda s: s.header.n_params)
    for dropped in (s.dropped for s in found if s.dropped):
        terminal.note(dropped)
    study, bigger = found[0], found[1] if len(found) == 2 else None
    asked = [] if types is None else split_list(types, "--type")
    advices = [
        rule.advise(study, type_, limits, bigger, bigger_type, loop, most) for type_ in rule.types_of(study, asked)
    ]
    show(form, lambda: advise_report.text(advices, study, bigger, explain),
         lambda: advise_report.record(advices, study, bigger, limits))  # fmt: skip
