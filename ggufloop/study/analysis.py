"""What a study says, with intervals: what looping gains, what it does to the noise of quantisation, and the verdict.

    verdicts(study, "Q4_K_M")                         # by loop: gain, above 0 it helps; corrected for their number
    amplification(study, "Q4_K_M", "12:16 k=3")       # A_K, None where there is no noise to amplify

Items are chunks of text. With q a quantised file and ref the reference,

    A_K = KLD(loop_K(q) || loop_K(ref)) / KLD(q || ref)

each KLD llama-perplexity's, of a model from its base: sum over the vocabulary of p_base (ln p_base - ln p_model).
Numerator and denominator are of the same chunks. All intervals know that chunks are neighbours in one text
(`measure/dependence.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ggufloop.errors import UsageError
from ggufloop.loop import PLAIN
from ggufloop.measure.dependence import chunk_mean, paired_ratio
from ggufloop.measure.stats import (
    Estimate,
    PairedEstimate,
    Values,
    holm,
    wilson,
)
from ggufloop.measure.verdict import HELPS, HURTS, LEAST, NATS, SAME, UNSURE, WORTHS, corrected, judge
from ggufloop.study.file import Cell, File, Study

if TYPE_CHECKING:
    from ggufloop.measure.tasks import Comparison

WORDS = (HELPS, HURTS, SAME, UNSURE)
WORTH = WORTHS[NATS]
LEVEL = 0.05
LEAST_KLD = 1e-4
"""Below this a KLD is the 16-bit rounding of llama-perplexity's protocol, and no ratio of it means anything."""

MOST_SNR = 60.0
"""dB beyond which weights are the reference's: what is left of a KLD then is the rounding of activations, which kernels
for quantised weights do. Quantising to the type a file has already gives some 80 dB."""


@dataclass(frozen=True)
class LoopGain:
    """gain: by looping, nats per token, the chunks neighbours of one text (`dependence.paired_mean`), its interval at a
    level that holds for all loops of this file together, so that one without 0 does not stand beside "cannot tell";
    p: corrected by Holm over these loops; word: of the four, against `WORTH`."""

    gain: PairedEstimate
    p: float
    word: str

    @property
    def phrase(self) -> str:
        """The word, with its x."""
        return f"{SAME} {WORTH:g}" if self.word == SAME else self.word


def lost(study: Study, type_: str) -> PairedEstimate:
    """What quantising costs: NLL of the plain file minus the plain reference's, per chunk. Raises UsageError."""
    quantised, reference = study.paired((type_, PLAIN), (study.types[0], PLAIN))
    return chunk_mean(quantised.values("nll") - reference.values("nll"))


def interaction(study: Study, type_: str, loop: str) -> PairedEstimate:
    """What looping gains in this file beyond what it gains in the reference, per chunk; 0: bits do not matter.

    Raises UsageError for fewer than 2 chunks.
    """
    reference = study.types[0]
    cells = study.paired((type_, loop), (type_, PLAIN), (reference, loop), (reference, PLAIN))
    looped, plain, ref_looped, ref_plain = (cell.values("nll") for cell in cells)
    return chunk_mean((plain - looped) - (ref_plain - ref_looped))


def kld(study: Study, type_: str, loop: str = PLAIN) -> Estimate:
    """KLD to the reference under the same loop, mean over chunks. Raises UsageError for fewer than 2 chunks."""
    return chunk_mean(study.cell(type_, loop).values("kl"))


def amplification(study: Study, type_: str, loop: str) -> Estimate | None:
    """A_K with its interval; None for the reference and where KLD(q || ref) is below LEAST_KLD.

    Raises UsageError for fewer than 2 chunks.
    """
    looped, plain = study.paired((type_, loop), (type_, PLAIN))
    if type_ == study.types[0] or plain.mean("kl") < LEAST_KLD:
        return None
    return paired_ratio(looped.values("kl"), plain.values("kl"), [0] * len(plain.chunks))


def _noisy(study: Study) -> list[str]:
    """Plain files whose noise is that of their weights."""
    usable = [t for t in study.types[1:] if (t, PLAIN) in study.cells and study.same_weights(t) is None]
    return [t for t in usable if study.file(t).snr < MOST_SNR]


def floor(study: Study) -> float:
    """KLD of a file with the reference's own weights: the rounding of activations, which every KLD has on top.

    0 where there is no such file, or one of noisy weights has as little: it can be taken off none then.
    """
    same = [t for t in study.types[1:] if (t, PLAIN) in study.cells and study.file(t).snr >= MOST_SNR]
    least = min((study.cell(t).mean("kl") for t in same), default=0.0)
    return least if all(study.cell(t).mean("kl") > least for t in _noisy(study)) else 0.0


def noise(study: Study) -> tuple[list[float], list[float], list[float]]:
    """SNR of all weights, KLD above `floor` and bits per weight of the plain files, for `noise.fit_kld`; the same
    weights once, and those of the reference not at all."""
    noisy, rest = _noisy(study), floor(study)
    return (
        [study.file(t).snr for t in noisy],
        [study.cell(t).mean("kl") - rest for t in noisy],
        [study.file(t).bits_per_weight for t in noisy],
    )


def verdicts(study: Study, type_: str) -> dict[str, LoopGain]:
    """Of each loop this file was measured under on two chunks at least that the plain model has too."""
    diffs = {}
    for loop in study.loops:
        if loop != PLAIN and _is_measured(study, type_, loop):
            looped, plain = (cell.values("nll") for cell in study.paired((type_, loop), (type_, PLAIN)))
            diffs[loop] = plain - looped
    return judged(diffs)


def judged(diffs: Mapping[str, Values]) -> dict[str, LoopGain]:
    """Of differences of chunks, which are neighbours in one text, by name, for all of them together: the word by Holm's
    p, which is sharper than the intervals, Bonferroni's."""
    found = {name: judge(x, WORTH, documents=[0] * len(x), level=LEVEL / len(diffs)) for name, x in diffs.items()}
    ps = holm([v.gain.p for v in found.values()])
    return {
        name: LoopGain(v.gain, float(p), corrected(v, float(p), enough=len(diffs[name]) >= LEAST).word)
        for (name, v), p in zip(found.items(), ps, strict=True)
    }


def _is_measured(study: Study, type_: str, loop: str) -> bool:
    cells = [study.cells.get((type_, name)) for name in (loop, PLAIN)]
    indices = [{c.index for c in cell.chunks} for cell in cells if cell is not None]
    return len(indices) == 2 and len(indices[0] & indices[1]) >= 2


def task_gain(study: Study, type_: str, loop: str, task: str) -> Comparison:
    """Looped against plain on a task's questions. Raises UsageError if they were not asked the same."""
    from ggufloop.measure.tasks import Item, compare

    def items(cell: Cell) -> list[Item]:
        if task not in cell.tasks:
            raise UsageError(f"{type_} was not asked {task} under {cell.loop!r}.", "run compare with this task.")
        t = cell.tasks[task]
        return [Item(name, doc, right, gold) for (name, doc), right, gold in zip(t.docs, t.right, t.gold, strict=True)]

    return compare(items(study.cell(type_, PLAIN)), items(study.cell(type_, loop)))


def tokens_per_second(study: Study, cell: Cell) -> float:
    """Of the chunk of median time, as measured in this run."""
    return study.header.n_ctx / float(np.median(cell.values("seconds")))


@dataclass(frozen=True)
class Row:
    """One cell of a study with all that is said of it. Of the plain model there is no gain and no verdict.

    kld       from the reference under the same loop, over chunks; None for the reference
    answers   accuracy of each task, with Wilson's interval; flips: of the loop against plain, paired
    speed     tokens per second of prompt processing, as measured in this run
    """

    file: File
    loop: str
    chunks: int
    n: int
    ppl: float
    error: float
    kld: Estimate | None
    amplification: Estimate | None
    same_top: float
    answers: dict[str, Estimate]
    flips: dict[str, Comparison]
    speed: float
    verdict: LoopGain | None


def rows(study: Study) -> list[Row]:
    """Every cell of two chunks at least, file by file, the plain model first."""
    found = []
    for type_ in study.types:
        loops = [loop for loop in study.loops if (type_, loop) in study.cells]
        whole = [loop for loop in loops if len(study.cell(type_, loop).chunks) >= 2]
        said = verdicts(study, type_) if PLAIN in whole else {}
        found += [_row(study, type_, loop, said.get(loop)) for loop in whole]
    return found


def _row(study: Study, type_: str, loop: str, verdict: LoopGain | None) -> Row:
    cell, is_reference = study.cell(type_, loop), type_ == study.types[0]
    plain_tasks = study.cell(type_).tasks if (type_, PLAIN) in study.cells else {}
    pairs = [task for task in cell.tasks if loop != PLAIN and task in plain_tasks]
    return Row(
        file=study.file(type_),
        loop=loop,
        chunks=len(cell.chunks),
        n=cell.n,
        ppl=cell.ppl[0],
        error=cell.ppl[1],
        kld=None if is_reference else kld(study, type_, loop),
        amplification=amplification(study, type_, loop) if verdict is not None else None,
        same_top=cell.mean("same_top"),
        answers={task: wilson(int(sum(t.right)), len(t.right)) for task, t in cell.tasks.items() if t.right},
        flips={task: task_gain(study, type_, loop, task) for task in pairs},
        speed=tokens_per_second(study, cell),
        verdict=verdict,
    )
