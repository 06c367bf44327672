"""Measures a study: every file of a ladder under every loop on the same chunks, the reference in lockstep.

    measure(path, study, {"F16": reference, "Q4_0": llm, ...}, loops, tokens, range(16), n_ctx=512)

For each chunk and loop the reference is evaluated once, and every file that lacks this chunk is compared with it before
the next: one chunk of distributions is all that is held, however long the text. Chunks are the outer loop, so that a
run that is stopped has measured all cells on the same chunks, and so that a machine that is slow for a while is slow
for all of them. The protocol and the KL are llama-perplexity's (perplexity.py, divergence.py), to the digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import GgufloopError
from ggufloop.logits import Logits, Normalisers, log_probabilities
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.divergence import Packed, Record
from ggufloop.measure.perplexity import TextModel, chunk_at, count_chunks, halves, tokenize
from ggufloop.measure.score import each_target
from ggufloop.measure.slices import Shard, docs_of, slices_of
from ggufloop.progress import Progress, Step, named, silent
from ggufloop.study import file as studies
from ggufloop.study.file import Chunk, Study, TaskResult

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama
    from ggufloop.measure.tasks import Item
    from ggufloop.tasks.loading import Tasks

Targets = NDArray[np.intp]


def loop_name(loop: LoopSpec | None) -> str:
    """What a study calls a loop; one of a single evaluation is the plain model."""
    return PLAIN if loop is None or not loop.is_loop else str(loop)


def missing(study: Study, types: Iterable[str], loops: Iterable[LoopSpec | None], chunks: Sequence[int]) -> int:
    """How many evaluations of a chunk `measure` would record."""
    return sum(len(study.lacks(t, loop_name(loop), chunks)) for loop in loops for t in types)


def shared_tokens(models: Mapping[str, TextModel], text: str) -> list[int]:
    """The text in tokens. Raises GgufloopError if the models cut it into different ones."""
    (first, reference), *others = models.items()
    tokens = tokenize(reference, text)
    for name, model in others:
        if model.n_vocab() != reference.n_vocab() or tokenize(model, text) != tokens:
            raise GgufloopError(
                f"{name} cuts the text into other tokens than {first}.", "compare quantisations of the same model."
            )
    return tokens


def check_text(tokens: Sequence[int], n_ctx: int, chunks: int) -> None:
    """Raise GgufloopError unless the text has so many chunks of n_ctx tokens, UsageError for chunks too small."""
    found = count_chunks(tokens, n_ctx)
    if found < chunks:
        raise GgufloopError(
            f"the text has {len(tokens)} tokens, {found} chunks of {n_ctx}.",
            f"give a longer text, a smaller -c, or --chunks {found} at most.",
        )


def measure(
    path: Path,
    study: Study,
    models: Mapping[str, TextModel],
    loops: Sequence[LoopSpec | None],
    tokens: Sequence[int],
    chunks: Sequence[int],
    n_ctx: int,
    progress: Progress = silent,
) -> Study:
    """Measure what the study lacks of these models, loops and chunks, and append it to its file.

    models: by type, the reference first, their contexts at least n_ctx tokens; loops: None is the plain model.
    Interrupted anywhere, the file holds what `progress` was told of. Raises GgufloopError for a text too short or
    logits that are not finite.
    """
    check_text(tokens, n_ctx, max(chunks, default=0) + 1)
    (ref_name, reference), *others = models.items()
    first, scored = halves(n_ctx)
    packed = Packed.empty(scored, reference.n_vocab())
    done, total = 0, missing(study, models, loops, chunks)
    for i in chunks:
        chunk = chunk_at(reference, tokens, n_ctx, i)
        n_bytes = len(reference.detokenize(chunk[first + 1 :]))
        for loop in loops:
            name = loop_name(loop)
            lacking = [t for t in models if study.lacks(t, name, [i])]
            if not lacking:
                continue
            for type_, llm in [(ref_name, reference), *((t, m) for t, m in others if t in lacking)]:
                llm.set_loop(loop if name != PLAIN else None)
                nll, kl, same, seconds = _evaluate(llm, chunk, first, packed, is_reference=type_ == ref_name)
                if type_ in lacking:
                    found = Chunk(i, scored, n_bytes, float(nll.mean()), float((nll * nll).mean()), kl, same, seconds)
                    studies.add_chunk(path, type_, name, found)
                    done += 1
                    progress(Step(f"{type_}, {name}, chunk {i + 1}", done, total, "evaluation"))
    return studies.read(path)


def _evaluate(
    llm: TextModel, chunk: list[int], first: int, packed: Packed, is_reference: bool
) -> tuple[NDArray[np.float64], float, float, float]:
    """NLL per token, mean KL from `packed`, share of the same likeliest token, and seconds to evaluate.

    The reference fills `packed` and is compared with nothing. What scoring takes is not counted as evaluating.
    """
    nll = np.empty(len(packed.scale), dtype=np.float64)
    record = Record.empty(0 if is_reference else len(nll))
    scoring = 0.0

    def take(part: slice, rows: Logits, targets: Targets) -> None:
        nonlocal scoring
        begin = perf_counter()
        norms = Normalisers.of(rows)
        nll[part] = log_probabilities(rows, targets, norms).nll
        if is_reference:
            packed.put(part, rows, norms)
        else:
            record.put(part, rows, norms, targets, packed.part(part))
        scoring += perf_counter() - begin

    begin = perf_counter()
    each_target(llm, chunk, first, take)
    seconds = perf_counter() - begin - scoring
    if is_reference:
        return nll, 0.0, 1.0, seconds
    return nll, float(record.kl.mean()), float(record.same_top.mean()), seconds


def ask(
    path: Path,
    study: Study,
    type_: str,
    llm: LoopedLlama,
    loops: Sequence[LoopSpec | None],
    tasks: Tasks,
    limit: int | None,
    progress: Progress = silent,
    shard: Shard | None = None,
) -> Study:
    """Ask a file, under each loop, what the study lacks of these tasks, and append it. Raises as `eval.evaluate`."""
    from ggufloop.measure.tasks import evaluate

    docs = None if shard is None else docs_of(shard.share(slices_of(tasks, limit)))

    for loop in loops:
        name = loop_name(loop)
        if not any(study.lacks_task(type_, name, task, limit) for task in tasks.members):
            continue
        llm.set_loop(loop if name != PLAIN else None)
        told = named(progress, f"{type_}, {name}")
        found: dict[str, list[Item]] = {task: [] for task in tasks.members}
        if docs != {}:  # a shard may have none
            found = evaluate(llm, tasks, limit if docs is None else None, progress=told, docs=docs).items
        for task, items in found.items():
            asked = tuple((item.task, item.doc) for item in items)
            order = () if docs is None else tuple(tasks.members[task])
            result = TaskResult(asked, tuple(i.right for i in items), tuple(i.gold for i in items), limit, order)
            studies.add_task(path, type_, name, task, result)
    return studies.read(path)
