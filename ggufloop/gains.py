"""What a study says, with intervals: what looping changes, what it does to the noise of quantisation, and the verdict.

    change(study, "Q4_K_M", "12:16 k=3")              # paired change of the NLL, below 0: looping helps
    amplification(study, "Q4_K_M", "12:16 k=3")       # A_K, None where there is no noise to amplify
    verdicts(study, "Q4_K_M")                         # by loop, corrected for how many there are

Items are chunks of text. With q a quantised file and ref the reference,

    A_K = KLD(loop_K(q) || loop_K(ref)) / KLD(q || ref)

each KLD llama-perplexity's, of a model from its base: sum over the vocabulary of p_base (ln p_base - ln p_model).
Numerator and denominator are of the same chunks, so chunks are resampled whole and the ratio taken of their sums.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ggufloop.errors import UsageError
from ggufloop.stats import Estimate, PairedEstimate, holm, mean_interval, paired_bootstrap, ratio_of_means
from ggufloop.study import PLAIN, Cell, Study

if TYPE_CHECKING:
    from ggufloop.eval import Comparison

HELPS, SAME, WORSE = "helps", "no difference shown", "worse"
SEED = 1234
LEVEL = 0.05
LEAST_KLD = 1e-4
"""Below this a KLD is the 16-bit rounding of llama-perplexity's protocol, and no ratio of it means anything."""


@dataclass(frozen=True)
class Verdict:
    """change: of the NLL by looping, nats per token; p: corrected by Holm over the loops of this file; word."""

    change: PairedEstimate
    p: float
    word: str


def change(study: Study, type_: str, loop: str) -> PairedEstimate:
    """NLL of the looped file minus the plain one, per chunk. Raises UsageError for fewer than 2 chunks."""
    looped, plain = study.paired((type_, loop), (type_, PLAIN))
    return paired_bootstrap(looped.values("nll"), plain.values("nll"), seed=SEED)


def lost(study: Study, type_: str) -> PairedEstimate:
    """What quantising costs: NLL of the plain file minus the plain reference's, per chunk. Raises UsageError."""
    quantised, reference = study.paired((type_, PLAIN), (study.types[0], PLAIN))
    return paired_bootstrap(quantised.values("nll"), reference.values("nll"), seed=SEED)


def kld(study: Study, type_: str, loop: str = PLAIN) -> Estimate:
    """KLD to the reference under the same loop, mean over chunks. Raises UsageError for fewer than 2 chunks."""
    return mean_interval(study.cell(type_, loop).values("kl"))


def amplification(study: Study, type_: str, loop: str) -> Estimate | None:
    """A_K with its interval; None for the reference and where KLD(q || ref) is below LEAST_KLD.

    Raises UsageError for fewer than 2 chunks.
    """
    looped, plain = study.paired((type_, loop), (type_, PLAIN))
    if type_ == study.types[0] or plain.mean("kl") < LEAST_KLD:
        return None
    return ratio_of_means(looped.values("kl"), plain.values("kl"), seed=SEED)


def verdicts(study: Study, type_: str) -> dict[str, Verdict]:
    """Of each loop this file was measured under. Raises UsageError for fewer than 2 chunks."""
    loops = [loop for loop in study.loops if loop != PLAIN and (type_, loop) in study.cells]
    changes = [change(study, type_, loop) for loop in loops]
    if not changes:
        return {}
    found = {}
    for loop, estimate, p in zip(loops, changes, holm([c.p for c in changes]), strict=True):
        word = SAME if p > LEVEL else HELPS if estimate.mean < 0 else WORSE
        found[loop] = Verdict(estimate, float(p), word)
    return found


def task_change(study: Study, type_: str, loop: str, task: str) -> Comparison:
    """Looped against plain on a task's questions. Raises UsageError if they were not asked the same."""
    from ggufloop.eval import Item, compare

    def items(cell: Cell) -> list[Item]:
        if task not in cell.tasks:
            raise UsageError(f"{type_} was not asked {task} under {cell.loop!r}.", "run compare with this task.")
        t = cell.tasks[task]
        return [Item(name, doc, right, gold) for (name, doc), right, gold in zip(t.docs, t.right, t.gold, strict=True)]

    return compare(items(study.cell(type_, PLAIN)), items(study.cell(type_, loop)))


def tokens_per_second(study: Study, cell: Cell) -> float:
    """Of the chunk of median time, as measured in this run."""
    return study.header.n_ctx / float(np.median(cell.values("seconds")))
