"""Advice in words, short or with every criterion, and for programs: text(...), record(...)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ggufloop.loop import PLAIN
from ggufloop.measure.stats import Estimate
from ggufloop.reading import finite
from ggufloop.study import advise as rule
from ggufloop.study.across import nearest
from ggufloop.study.advise import Advice, Criterion, Thresholds
from ggufloop.study.file import Study

SCHEMA_VERSION = 1


def _size(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


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


def _across(study: Study, advice: Advice) -> list[str]:
    """Its loop, or itself, against the next larger file: what a loop replaces."""
    return [f"  {c.sentence}" for c in nearest(study)
            if c.file == advice.file and c.loop in (advice.loop, PLAIN)]  # fmt: skip


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


def text(advices: list[Advice], study: Study, bigger: Study | None, explain: bool) -> str:
    """All of it for eyes. explain: every criterion, not only those that decide."""

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
        out += _across(study, advice)
        if advice.note and (rule.MORE_BITS in advice.could_be or not advice.steps):
            out.append(f"  {advice.note}")
    return "\n".join(out) + "\n"


def record(advices: list[Advice], study: Study, bigger: Study | None, thresholds: Thresholds) -> dict[str, Any]:
    """For JSON."""

    def head(s: Study) -> dict[str, Any]:
        return {**dataclasses.asdict(s.header), "types": list(s.types), "loops": list(s.loops)}

    data = {
        "schema_version": SCHEMA_VERSION,
        "study": head(study),
        "bigger": None if bigger is None else head(bigger),
        "thresholds": dataclasses.asdict(thresholds),
        "seed": rule.SEED,
        "advice": [dataclasses.asdict(a) for a in advices],
        "next_larger_file": [dataclasses.asdict(c) for c in nearest(study)],
    }
    found: dict[str, Any] = finite(data)
    return found
