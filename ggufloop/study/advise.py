"""What to spend on next for a quantised model: more bits, a loop, a bigger model, or nothing. From measured studies.

    advice = advise(study, "Q4_K_M")                          # one size: more bits, a loop, or nothing
    advice = advise(small, "Q4_K_M", bigger=big)              # two sizes: a bigger model as well
    advice.verdict, advice.could_be, advice.steps             # the answer, and every measurement behind it

The rule, in this order, with q the file in question, ref the reference of its study and q' the bigger model's file:

1. more bits, if KLD(q || ref) or the window's SNR says that quantisation is heavy, or if bits explain most of the gap
   to the bigger model, (L(q) - L(ref)) / (L(q) - L(q')). They can never recover more than L(q) - L(ref);
2. else the loop, if its paired gain on held-out chunks is significant, it does not amplify the noise of quantisation
   (A_K), and it gains more per millisecond than the bigger model;
3. else the bigger model, if the local size slope (ln L(q) - ln L(q')) / ln(N'/N) is positive with its interval and it
   has the better gain per millisecond of the two;
4. else nothing.

A criterion whose interval holds its threshold is open, and so is a verdict that depends on it: `could_be` says what it
might be. Nothing is extrapolated: only files and loops that were measured are spoken of. Without a bigger model what
compares with one is left out.

Models are compared in bits per byte of text, which does not depend on their tokenizers. Where both cut the text alike
their chunks are paired, otherwise they are independent samples of it. Milliseconds are those of evaluating chunks,
the prompt's side of a model's cost. More bits cost memory instead, so they have no part in that race.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.loop import PLAIN
from ggufloop.measure import selection
from ggufloop.measure.stats import Estimate, ratio_interval
from ggufloop.study import analysis
from ggufloop.study.bits_per_byte import Losses, rate
from ggufloop.study.file import Cell, File, Study, check_comparable

MORE_BITS, LOOP, ROUTE_UP, KEEP = "more bits first", "loop", "route up", "keep it, loop off"
NOT_ENOUGH = "not enough data to tell"
YES, NO, OPEN, SKIPPED = "yes", "no", "not enough data", "not measured"
BITS, LOOPING, BIGGER = "more bits", "loop", "bigger model"
SEED = 1234
POWER = 0.8

_TWO_BITS = re.compile(r"(I?Q|TQ)[12]_", re.IGNORECASE)


@dataclass(frozen=True)
class Thresholds:
    """Where the rule draws its lines; `ggufloop advise` has an option for each.

    kld      nats of KLD(q || ref) above which quantisation is heavy
    snr      dB of the window's weights below which it is
    share    of the gap to the bigger model from which on bits are the cheaper way to close it
    sigma    standard errors that the loop's gain must be above 0
    worth    nats per token: a gain whose interval stays below this is none, and need not be measured any better
    a_k      most noise amplification of a loop
    """

    kld: float = 0.1
    snr: float = 17.0
    share: float = 0.5
    sigma: float = 2.0
    worth: float = selection.WORTH
    a_k: float = 2.0


@dataclass(frozen=True)
class Criterion:
    """One question of the rule. answer: YES, NO, OPEN or SKIPPED.

    value is what was measured, an interval or a plain number, None where nothing was; rule the line drawn through it;
    note says why where the value alone does not. items: what n counts. needed: so many of them would tell with 80 %
    power, if the value is as measured; of a loop's gain, those that would find one of `Thresholds.worth`.
    """

    name: str
    value: Estimate | float | None
    rule: str
    answer: str
    note: str = ""
    items: str = "chunks"
    needed: int | None = None


@dataclass(frozen=True)
class RuleStep:
    """A step of the rule: its criteria, and what they come to."""

    name: str
    answer: str
    criteria: tuple[Criterion, ...]


@dataclass(frozen=True)
class Advice:
    """What to do about one file.

    verdict     one of the four, or NOT_ENOUGH
    could_be    the verdict, or the several that the data leave possible
    loop        the loop spoken of, None where none was measured
    bigger      the bigger model's file spoken of, None without one
    recoverable what more bits can recover at most, nats per token
    enough_bits the smallest measured file that is not quantised heavily, None if there is none (within the budget)
    """

    file: File
    verdict: str
    could_be: tuple[str, ...]
    steps: tuple[RuleStep, ...]
    loop: str | None
    bigger: File | None
    recoverable: Estimate | None
    enough_bits: File | None
    note: str = ""


# Answers


def above(value: Estimate, threshold: float) -> str:
    """Whether it is above: OPEN if its interval holds the threshold."""
    return YES if value.low > threshold else NO if value.high <= threshold else OPEN


def _not(answer: str) -> str:
    return {YES: NO, NO: YES}.get(answer, answer)


def any_of(answers: Sequence[str]) -> str:
    """YES if one is, else OPEN if one is, else NO; what was skipped has no say."""
    return YES if YES in answers else OPEN if OPEN in answers else NO


def all_of(answers: Sequence[str]) -> str:
    """NO if one is, else OPEN if one is, else YES; what was skipped has no say."""
    return NO if NO in answers else OPEN if OPEN in answers else YES


def _needed(value: Estimate, threshold: float) -> int | None:
    """Items at which the interval would leave the threshold out with 80 % power, if the value is as measured."""
    off = abs(value.mean - threshold)
    half = (value.high - value.low) / 2
    if not off or not math.isfinite(half):
        return None
    z = NormalDist().inv_cdf((1 + value.level) / 2)
    return max(value.n + 1, math.ceil(value.n * (half / off * (z + NormalDist().inv_cdf(POWER)) / z) ** 2))


def _about(name: str, value: Estimate, threshold: float, sign: str, note: str = "") -> Criterion:
    """A criterion that an interval decides. sign: '>' or '<='."""
    answer = above(value, threshold) if sign == ">" else _not(above(value, threshold))
    needed = _needed(value, threshold) if answer == OPEN else None
    return Criterion(name, value, f"{sign} {threshold:g}", answer, note, needed=needed)


# The rule


def advise(
    study: Study,
    type_: str,
    thresholds: Thresholds = Thresholds(),
    bigger: Study | None = None,
    bigger_type: str | None = None,
    loop: str | None = None,
    budget: int | None = None,
) -> Advice:
    """What to do about the file `type_` of a study.

    bigger: a study of a bigger model on the same text. bigger_type: its file to compare with; without one that of the
    same type, or with a budget the best that fits. loop: the loop to judge, chosen before this study; without one it is
    chosen here, on half of the chunks, and judged on the others. budget: bytes a file may have.
    Raises UsageError for what was not measured or cannot be, GgufloopError for studies that cannot be compared.
    """
    file = study.file(type_)
    if bigger is not None:
        check_comparable(study, bigger)
        if bigger.header.n_params <= study.header.n_params:
            raise UsageError(
                f"{bigger.header.model} has {bigger.header.n_params} weights, {study.header.model} "
                f"{study.header.n_params}.",
                "the second study must be of a bigger model.",
            )
    if loop is not None:
        study.cell(type_, loop)
    if min(len(cell.chunks) for cell in study.paired((type_, PLAIN), (study.types[0], PLAIN))) < 2:
        note = "one chunk has no interval; measure some dozen."
        any_ = (MORE_BITS, LOOP, *([] if bigger is None else [ROUTE_UP]), KEEP)
        return Advice(file, NOT_ENOUGH, any_, (), loop, None, None, None, note)

    other, absent = _bigger_file(bigger, type_, bigger_type, budget)
    own = study.paired((type_, PLAIN), (study.types[0], PLAIN))
    losses = Losses.of(own, bigger.cell(other.type) if bigger is not None and other is not None else None)
    bits = _bits_step(study, file, losses, bigger is not None, absent, thresholds)
    looping, chosen, race = _loop_step(study, type_, loop, losses, bigger, other, thresholds, absent)
    steps = [bits, looping]
    outcomes = [MORE_BITS] if bits.answer != NO else []
    if bits.answer != YES:
        outcomes += [LOOP] if looping.answer != NO else []
    if bigger is not None:
        steps.append(_bigger_step(study, type_, bigger, other, losses, looping, race, absent))
    if bits.answer != YES and looping.answer != YES:
        up = steps[2].criteria[0].answer if bigger is not None else NO  # who gets here has lost the race, or ran none
        outcomes += [ROUTE_UP] if up != NO else []
        outcomes += [KEEP] if up != YES else []
    enough, note = _enough_bits(study, file, thresholds, budget)
    return Advice(
        file,
        outcomes[0] if len(outcomes) == 1 else NOT_ENOUGH,
        tuple(outcomes),
        tuple(steps),
        chosen,
        other,
        analysis.lost(study, type_),
        enough,
        note,
    )


def _bigger_file(bigger: Study | None, type_: str, asked: str | None, budget: int | None) -> tuple[File | None, str]:
    """The bigger model's file to compare with, and why there is none. Raises UsageError for one that was asked for."""
    if bigger is None:
        if asked is not None:
            raise UsageError(f"{asked} of which bigger model?", "give its study as well.")
        return None, "no bigger model was measured"
    known = [bigger.file(t) for t in _measured(bigger, 2)]
    if budget is not None and asked is None:
        fits = [f for f in known if f.nbytes <= budget]
        best = min(fits, key=lambda f: bigger.cell(f.type).bits_per_byte, default=None)
        return best, "" if best else f"no file of {bigger.header.model} fits the budget"
    wanted = asked or type_
    if asked is not None:
        bigger.cell(asked)
    found = next((f for f in known if f.type == wanted), None)
    others = ", ".join(f.type for f in known) or "nothing"
    return found, "" if found else f"{wanted} of {bigger.header.model} was not measured on two chunks, only {others}"


def _heavy(study: Study, file: File, thresholds: Thresholds) -> tuple[Criterion, ...]:
    """Whether a file is quantised heavily, by the distance of its predictions and of its window's weights."""
    reference = study.types[0]
    if file.type == reference:
        return (
            Criterion("KLD to the reference", 0.0, f"> {thresholds.kld:g}", NO, "it is the reference"),
            Criterion("SNR of the window, dB", math.inf, f"< {thresholds.snr:g}", NO, "it is the reference"),
        )
    snr = file.window_snr
    return (
        _about(f"KLD to {reference}, nats", analysis.kld(study, file.type), thresholds.kld, ">"),
        Criterion("SNR of the window, dB", snr, f"< {thresholds.snr:g}", YES if snr < thresholds.snr else NO,
                  "" if math.isfinite(snr) else "the window's weights are the reference's"),
    )  # fmt: skip


def _bits_step(study: Study, file: File, losses: Losses, two: bool, absent: str, thresholds: Thresholds) -> RuleStep:
    criteria = [*_heavy(study, file, thresholds)]
    name, rule = "share of the gap to the bigger model that bits explain", f">= {thresholds.share:g}"
    if len(losses.means) < 3:
        criteria.append(Criterion(name, None, rule, OPEN if two else SKIPPED, absent))
    elif file.type == study.types[0]:
        criteria.append(Criterion(name, 0.0, rule, NO, "it is the reference"))
    else:
        gap = losses.contrast((1, 0, -1))
        share = losses.ratio((1, -1, 0), (1, 0, -1))
        told = f"the gap in bits per byte is {gap.show('+.4f')}"
        if gap.high <= 0:
            criteria.append(Criterion(name, None, rule, NO, f"the bigger model is no better: {told}"))
        elif gap.low <= 0 or share is None:
            needed = _needed(gap, 0.0)
            criteria.append(Criterion(name, None, rule, OPEN, f"no gap is shown: {told}", needed=needed))
        else:
            answer = YES if share.low >= thresholds.share else NO if share.high < thresholds.share else OPEN
            needed = _needed(share, thresholds.share) if answer == OPEN else None
            criteria.append(Criterion(name, share, rule, answer, told, needed=needed))
    return RuleStep(BITS, any_of([c.answer for c in criteria]), tuple(criteria))


def _loop_step(
    study: Study,
    type_: str,
    asked: str | None,
    losses: Losses,
    bigger: Study | None,
    other: File | None,
    thresholds: Thresholds,
    absent: str,
) -> tuple[RuleStep, str | None, str]:
    """The step, the loop it speaks of, and how its race with the bigger model ends."""
    loops = [asked] if asked else [b for a, b in study.cells if a == type_ and b != PLAIN]
    loops = [name for name in study.loops if name in loops]
    rules = (f"> {thresholds.sigma:g} sigma", f"<= {thresholds.a_k:g}")
    if not loops:
        none = Criterion("gain of looping, nats per token", None, rules[0], NO, "no loop was measured")
        return RuleStep(LOOPING, NO, (none,)), None, SKIPPED
    amplified = {name: _amplification(study, type_, name, thresholds) for name in loops}
    candidates = [name for name in loops if amplified[name].answer != NO] or loops
    gain, name, estimate = _gain(study, type_, candidates, thresholds)
    race, answer = _race(study, type_, name, estimate, losses, bigger, other, absent)
    criteria = (gain, amplified[name], race)
    return RuleStep(LOOPING, all_of([c.answer for c in criteria]), criteria), name, answer


def _amplification(study: Study, type_: str, loop: str, thresholds: Thresholds) -> Criterion:
    name, rule = "A_K, noise amplification", f"<= {thresholds.a_k:g}"
    both = study.paired((type_, loop), (type_, PLAIN))
    if len(both[0].chunks) < 2:
        return Criterion(name, None, rule, OPEN, "one chunk has no interval")
    value = analysis.amplification(study, type_, loop)
    if value is None:
        return Criterion(name, None, rule, YES, "there is no noise of quantisation to amplify")
    return _about(name, value, thresholds.a_k, "<=")


def _gain(
    study: Study, type_: str, loops: Sequence[str], thresholds: Thresholds
) -> tuple[Criterion, str, Estimate | None]:
    """Whether a loop gains, tested for all together; -> its name and gain in nats per token too."""
    level = 2 * (1 - NormalDist().cdf(thresholds.sigma))
    cells = study.paired((type_, PLAIN), *((type_, name) for name in loops))
    rule = f"> {thresholds.sigma:g} sigma"
    if len(cells[0].chunks) < 4:
        note = f"{len(cells[0].chunks)} chunks cannot be split into some to choose and some to judge"
        return Criterion("gain of looping, nats per token", None, rule, OPEN, note), loops[0], None
    scores = {name: -cell.values("nll") for name, cell in zip(loops, cells[1:], strict=True)}
    places = [(0, c.index) for c in cells[0].chunks]
    decision = selection.judge_all(-cells[0].values("nll"), scores, SEED, worth=thresholds.worth, level=level,
                                   places=places)  # fmt: skip
    best = max(decision.loops, key=lambda loop: loop.gain.mean)
    answer = {selection.HELPS: YES, selection.NONE_HELPS: NO, selection.NOT_ENOUGH: OPEN}[decision.verdict]
    if answer == NO and best.gain.high >= thresholds.worth:
        answer = OPEN  # not at so many sigma
    if answer == OPEN and best.gain.high <= 0:
        answer = NO  # few chunks are enough to see that it does harm
    note = f"the best of {len(loops)}, its interval of all together" if len(loops) > 1 else ""
    if answer == NO and best.gain.high > 0:
        note = f"{note}; if it gains, then less than {thresholds.worth:g}".removeprefix("; ")
    if answer == OPEN and len(cells[0].chunks) < max(len(study.cell(type_, name).chunks) for name in loops):
        note = f"{note}; some loops have fewer chunks, and one alone could be judged on more".removeprefix("; ")
    needed = decision.n_needed if answer == OPEN else None
    asked = Criterion("gain of looping, nats per token", best.gain, rule, answer, note, needed=needed)
    return asked, best.name, best.gain


def _bigger_step(
    study: Study,
    type_: str,
    bigger: Study,
    other: File | None,
    losses: Losses,
    looping: RuleStep,
    race: str,
    absent: str,
) -> RuleStep:
    names = "slope of ln(bits per byte) over ln(size)", "better gain per millisecond than the loop"
    if other is None:
        return RuleStep(BIGGER, OPEN, (Criterion(names[0], None, "> 0", OPEN, absent),))
    grown = math.log(bigger.header.n_params / study.header.n_params)
    plain, n_ctx = study.cell(type_), study.header.n_ctx
    times = 1 + _extra_ms(plain, bigger.cell(other.type), n_ctx, per_byte=True).mean / _ms_per_byte(plain, n_ctx)
    note = f"{losses.contrast((1, 0, -1)).mean:+.4f} bits per byte gained, {times:.3g} times the time"
    fall = losses.log_ratio(0, 2)
    slope = fall.mapped(lambda x: x / grown)
    runs = all(c.answer != NO for c in looping.criteria[:2])
    answer, why = (_not(race), "as above") if runs else (YES, "no loop competes")
    ahead = Criterion(names[1], None, "", answer, why)
    criteria = (_about(names[0], slope, 0.0, ">", note), ahead)
    return RuleStep(BIGGER, all_of([c.answer for c in criteria]), criteria)


# The race: bits gained per millisecond spent on the same text


def _race(
    study: Study,
    type_: str,
    loop: str,
    gain: Estimate | None,
    losses: Losses,
    bigger: Study | None,
    other: File | None,
    absent: str,
) -> tuple[Criterion, str]:
    name = "gain per millisecond, bits"
    if bigger is None:
        return Criterion(name, None, "> the bigger model's", SKIPPED, absent), SKIPPED
    if other is None or gain is None:
        return Criterion(name, None, "> the bigger model's", OPEN, absent), OPEN
    plain, n_ctx = study.cell(type_), study.header.n_ctx
    mine = rate(gain.mapped(lambda nats: nats / math.log(2)), _extra_ms(plain, study.cell(type_, loop), n_ctx))
    theirs = rate(losses.contrast((1, 0, -1)), _extra_ms(plain, bigger.cell(other.type), n_ctx, per_byte=True))
    answer = YES if mine.low > theirs.high else NO if mine.high < theirs.low else OPEN
    return Criterion(name, mine, f"> {theirs.show('.4g')}", answer, f"of {other.type} of {bigger.header.model}"), answer


def _extra_ms(plain: Cell, other: Cell, n_ctx: int, per_byte: bool = False) -> Estimate:
    """Milliseconds more per token, or per byte of the text: medians, for a machine has other things to do.

    Raises UsageError for times that are not above 0.
    """
    n = min(len(plain.chunks), len(other.chunks))
    before, scale = _ms_per_byte(plain, n_ctx), _tokens_per_byte(other) / _tokens_per_byte(plain)
    if not per_byte:
        before, scale = before / _tokens_per_byte(plain), 1.0
    r = ratio_interval(other.values("seconds")[:n], plain.values("seconds")[:n])
    return r.mapped(lambda x: before * (scale * x - 1))


def _tokens_per_byte(cell: Cell) -> float:
    return cell.n / float(cell.values("n_bytes").sum())


def _ms_per_byte(cell: Cell, n_ctx: int) -> float:
    return 1000 * float(np.median(cell.values("seconds"))) / n_ctx * _tokens_per_byte(cell)


# What more bits would be


def _enough_bits(study: Study, file: File, thresholds: Thresholds, budget: int | None) -> tuple[File | None, str]:
    """The smallest measured file of more bits that is not quantised heavily; and what to say of its absence."""
    more = [f for f in map(study.file, _measured(study, 2)) if f.bits_per_weight > file.bits_per_weight]
    light = [f for f in more if all(c.answer == NO for c in _heavy(study, f, thresholds))]
    fits = [f for f in light if budget is None or f.nbytes <= budget]
    best = min(fits, key=lambda f: f.nbytes, default=None)
    quantised = [t for t in study.types if t != study.types[0]]
    if quantised and all(_TWO_BITS.match(t) for t in quantised):
        return best, "only types of 2 bits were measured; what 3 to 8 bits would do is not extrapolated from them."
    if best is None and light:
        least = min(light, key=lambda f: f.nbytes)
        size = f"{least.nbytes / 1e6:.1f} MB"
        return None, f"no file of enough bits fits the budget; the smallest, {least.type}, has {size}."
    return best, "" if best else "no measured file of more bits is known to be enough."


def types_of(study: Study, asked: Sequence[str]) -> list[str]:
    """The files to advise on: those asked for, or all that were measured. Raises UsageError, GgufloopError."""
    known = _measured(study)
    if not known or known[0] != study.files[0].type:
        raise GgufloopError(
            f"the study of {study.header.model} has no measurement of its reference yet.",
            "go on with it: ggufloop compare with the same --out.",
        )
    for type_ in asked:
        if type_ not in known:
            raise UsageError(
                f"{type_} was not measured in this study, and nothing is extrapolated.", nearest(type_, known)
            )
    return list(asked or known)


def _measured(study: Study, least: int = 1) -> list[str]:
    """Types that were measured without a loop, on so many chunks at least."""
    return [t for t in study.types if (t, PLAIN) in study.cells and len(study.cells[t, PLAIN].chunks) >= least]
