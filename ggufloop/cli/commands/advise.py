"""`ggufloop advise STUDY [STUDY2]`: what to spend on next, bits, a loop or a bigger model, from measured studies."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import terminal
from ggufloop.cli.options import split_list
from ggufloop.errors import UsageError, nearest
from ggufloop.measure.stats import Estimate
from ggufloop.reading import finite
from ggufloop.study import advise as rule
from ggufloop.study.advise import Advice, Criterion, Thresholds
from ggufloop.study.file import Study, read

SCHEMA_VERSION = 1
_FORMS = ("text", "json")
_DEFAULTS = Thresholds()
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def _bytes(text: str) -> int:
    """`500MB`, `4GiB` or plain bytes. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?|)b?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise UsageError(f"budget {text!r} is not a size.", "write it like 500MB or 4GB.")
    return size


def _file(path: Path) -> Path:
    """A study's file; a folder means the one that compare writes there."""
    return path / "study.jsonl" if path.is_dir() else path


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


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


# For eyes


def _number(value: Estimate | float | None, items: str) -> str:
    if value is None:
        return "-"
    return f"{value.show('.4g')} {items}" if isinstance(value, Estimate) else f"{value:.4g}"


def _criterion(c: Criterion) -> list[str]:
    """What was measured, where the line is, and which side it is on."""
    lines = [f"     {c.name}: {_number(c.value, c.items)}"]
    asks = f"       {c.rule}? " if c.rule else "       "
    lines.append(f"{asks}{c.answer}" + (f" ({c.note})" if c.note else ""))
    if c.needed is not None:
        lines.append(f"       about {c.needed} {c.items} would tell.")
    return lines


def _deciding(advice: Advice) -> list[Criterion]:
    """The criteria that made the verdict: those that said yes to it, no to what it is not, or that are open."""
    steps = {step.name: step for step in advice.steps}
    if advice.verdict == rule.NOT_ENOUGH:
        open_ = [c for step in advice.steps for c in step.criteria if c.answer == rule.OPEN]
        told = [c.note if c.value is None else c.name for c in open_]  # what was not measured is said once
        return [c for i, c in enumerate(open_) if told[i] not in told[:i]]
    named = {rule.MORE_BITS: rule.BITS, rule.LOOP: rule.LOOPING, rule.ROUTE_UP: rule.BIGGER}.get(advice.verdict)
    if named is not None:
        return [c for c in steps[named].criteria if c.answer == rule.YES and c.value is not None]
    against = [c for name in (rule.LOOPING, rule.BIGGER) if name in steps for c in steps[name].criteria]
    return [c for c in against if c.answer == rule.NO]


def _headline(advice: Advice) -> str:
    verdict = advice.verdict
    if verdict == rule.LOOP:
        verdict = f"loop, {advice.loop}"
    elif verdict == rule.ROUTE_UP and advice.bigger is not None:
        verdict = f"route up, to {advice.bigger.type} of the bigger model"
    elif verdict == rule.NOT_ENOUGH and advice.steps:
        verdict += f": {', or '.join(advice.could_be)}"
    file = advice.file
    return f"{file.type} ({_size(file.nbytes)}, {file.bits_per_weight:.2f} bits per weight): {verdict}"


def _bits(advice: Advice) -> list[str]:
    """What more bits could do, where they are in question."""
    if rule.MORE_BITS not in advice.could_be or advice.recoverable is None:
        return []
    nothing = " (the reference is no better on this text)" if advice.recoverable.high <= 0 else ""
    lines = [f"  recoverable by more bits, at most: {advice.recoverable.show('+.4f')} chunks, nats per token{nothing}"]
    if advice.enough_bits is not None:
        f = advice.enough_bits
        lines.append(f"  the smallest measured file that needs no more: {f.type}, {_size(f.nbytes)}")
    return lines


def _short(advice: Advice) -> list[str]:
    lines = [_headline(advice)]
    for c in _deciding(advice):
        note = f" ({c.note})" if c.note else ""
        more = f"; about {c.needed} {c.items} would tell" if c.needed is not None else ""
        asks = f" {c.rule}?" if c.rule else ""
        lines.append(f"  {c.name}: {_number(c.value, c.items)};{asks} {c.answer}{note}{more}")
    return lines


def _explained(advice: Advice) -> list[str]:
    questions = {rule.BITS: "1. More bits first?", rule.LOOPING: "2. Loop?", rule.BIGGER: "3. Route up?"}
    lines = [_headline(advice)]
    for step in advice.steps:
        of = f" ({advice.loop})" if step.name == rule.LOOPING and advice.loop else ""
        lines.append(f"  {questions[step.name]}{of} {step.answer}")
        for c in step.criteria:
            lines += _criterion(c)
    return lines


def _text(advices: list[Advice], study: Study, bigger: Study | None, explain: bool) -> str:
    def line(name: str, s: Study) -> str:
        h, made = s.header, s.files[0].note
        return f"{name}{h.model}, {h.n_params / 1e6:.4g} million weights, reference {s.types[0]}" + (
            f" ({made})" if made else ""
        )

    h = study.header
    out = [line("model   ", study)]
    out.append("bigger  none: routing up was not considered" if bigger is None else line("bigger  ", bigger))
    if "dequantised" in study.files[0].note:
        out.append(f"        what {h.model} lost when it was quantised is in none of these numbers")
    out.append(f"text    {h.text}, chunks of {h.n_ctx}; brackets are 95 % intervals where they say no other")
    for advice in advices:
        out.append("")
        out += _explained(advice) if explain else _short(advice)
        out += _bits(advice)
        if advice.note and (rule.MORE_BITS in advice.could_be or not advice.steps):
            out.append(f"  {advice.note}")
    return "\n".join(out) + "\n"


# For programs


def _json(advices: list[Advice], study: Study, bigger: Study | None, thresholds: Thresholds) -> str:
    def head(s: Study) -> dict[str, Any]:
        return {**dataclasses.asdict(s.header), "types": list(s.types), "loops": list(s.loops)}

    data = {
        "schema_version": SCHEMA_VERSION,
        "study": head(study),
        "bigger": None if bigger is None else head(bigger),
        "thresholds": dataclasses.asdict(thresholds),
        "seed": rule.SEED,
        "advice": [dataclasses.asdict(a) for a in advices],
    }
    return json.dumps(finite(data), indent=2) + "\n"


def _threshold(flag: str, name: str, help_: str) -> Callable[[Any], Any]:
    return click.option(
        flag, name, type=float, default=getattr(_DEFAULTS, name), show_default=True, metavar="X", help=help_
    )


@click.command(name="advise")
@click.argument("studies", nargs=-1, metavar="STUDY [STUDY2]", type=click.Path(path_type=Path))
@click.option("--type", "types", metavar="TYPE,...", help="Advise on these files of the smaller model (default: all).")
@click.option("--loop", metavar="LOOP", help="Judge this loop, chosen elsewhere, on all chunks, as the study names it.")
@click.option("--bigger-type", metavar="TYPE", help="The bigger model's file to compare with (default: the same type).")
@click.option("--budget", metavar="SIZE",
              help="Bytes a file may have, such as 4GB; of the bigger model the best that fits.")  # fmt: skip
@_threshold("--max-kld", "kld", "More bits if the KLD to the reference is above this, nats.")
@_threshold("--min-snr", "snr", "More bits if the window's weight SNR is below this, dB.")
@_threshold("--max-share", "share", "More bits if they explain this share of the gap to the bigger model.")
@_threshold("--sigma", "sigma", "Standard errors the gain of a loop must be above 0.")
@_threshold("--worth", "worth", "Nats per token: a gain whose interval stays below this counts as none.")
@_threshold("--max-amplification", "a_k", "Most A_K, amplification of quantisation noise, of a loop.")
@click.option("--explain", is_flag=True, help="Print every criterion of the rule, not only those that decide.")
@click.option("-o", "--output", "form", default="text", show_default=True, metavar="text|json", help="How to print it.")
def command(
    studies: tuple[Path, ...],
    types: str | None,
    loop: str | None,
    bigger_type: str | None,
    budget: str | None,
    explain: bool,
    form: str,
    **thresholds: float,
) -> None:
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
    if form not in _FORMS:
        raise UsageError(f"output form {form!r} is not known.", nearest(form, _FORMS))
    if not 1 <= len(studies) <= 2:
        raise UsageError(f"{len(studies)} studies are given.", "name one, or two of models of different size.")
    limits = Thresholds(**thresholds)
    _check(limits)
    most = None if budget is None else _bytes(budget)
    found = sorted((read(_file(path)) for path in studies), key=lambda s: s.header.n_params)
    for dropped in (s.dropped for s in found if s.dropped):
        terminal.note(dropped)
    study, bigger = found[0], found[1] if len(found) == 2 else None
    asked = [] if types is None else split_list(types, "--type")
    advices = [
        rule.advise(study, type_, limits, bigger, bigger_type, loop, most) for type_ in rule.types_of(study, asked)
    ]
    if form == "json":
        click.echo(_json(advices, study, bigger, limits), nl=False)
    else:
        click.echo(_text(advices, study, bigger, explain), nl=False)
