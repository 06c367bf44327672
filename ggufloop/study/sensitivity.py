"""Which layers, or kinds of tensor, bear fewer bits: one at a time at a lower type, all others at Q8_0, KLD of each.

    plan = StudyPlan(text=local("pydoc"), chunks=16)
    study = run_sensitivity(path, "Q2_K", LAYER, (12, 16), plan, folder)
    for part in parts(study): print(part.name, part.more)       # KLD beyond that of Q8_0 throughout, paired by chunk
    contrast(study).mean                                        # the window's layers against the others

It is a study, and goes on after a stop. A file differs from the one of Q8_0 throughout in the tensors of its part
alone, bit for bit: Q8_0 is no mixture, so that llama.cpp's choice for one tensor does not depend on the others. Files
are made a few at a time from the reference, and deleted when they are measured, the reference at the end.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import UsageError, nearest
from ggufloop.files import lock
from ggufloop.loop import PLAIN
from ggufloop.measure.dependence import chunk_mean
from ggufloop.measure.stats import PairedEstimate
from ggufloop.models.gguf import read_model
from ggufloop.models.info import describe
from ggufloop.progress import Progress, Step, named, note, silent
from ggufloop.quant.quantize import tensor_type
from ggufloop.quant.snr import TensorSnr
from ggufloop.study import file as studies
from ggufloop.study import ladder_files, measure
from ggufloop.study.file import Study
from ggufloop.study.ladder_files import LadderFile
from ggufloop.study.run import StudyJob, StudyPlan

BASE = "Q8_0"
"""What all other tensors are; its own KLD is taken off."""

LAYER, CLASS = "layer", "class"
PARTS = (LAYER, CLASS)
_AT_ONCE = 4
"""Files that are open beside the reference: its evaluation is shared by so many."""

_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(.+)\.weight")


@dataclass(frozen=True)
class ModelPart:
    """A layer or a kind of tensor. more: KLD to the reference beyond that of `BASE` throughout, nats per token, over
    chunks that are neighbours; layer: None for a kind; in_window, may_loop: of a layer."""

    name: str
    layer: int | None
    more: PairedEstimate
    in_window: bool
    may_loop: bool


def patterns(path: Path, by: str) -> dict[str, str]:
    """The parts of a model by name, each with the pattern of its tensors' names. Raises UsageError."""
    if by not in PARTS:
        raise UsageError(f"parts by {by!r} are not known.", nearest(by, PARTS))
    names = [t.name for header in read_model(path) for t in header.tensors if len(t.shape) > 1]
    found: dict[str, str] = {}
    for name in names:
        match = _LAYER_TENSOR.fullmatch(name)
        if by == LAYER and match is not None:
            found[f"layer {match[1]}"] = rf"^blk\.{match[1]}\."
        elif by == CLASS:
            kind = name.removesuffix(".weight") if match is None else match[2]
            found[kind] = rf"^{re.escape(name)}$" if match is None else rf"^blk\.\d+\.{re.escape(kind)}\.weight$"
    return found


def run_sensitivity(
    path: Path,
    lower: str,
    by: str,
    window: tuple[int, int],
    plan: StudyPlan,
    folder: Path,
    settings: ContextSettings | None = None,
    *,
    verbose: bool = False,
    begun: Callable[[], None] = lambda: None,
    progress: Progress = silent,
    keep: bool = False,
) -> Study:
    """Measure every part of a model at the type `lower`, as a study in `folder`, of the plan's text and chunks.

    keep: leave the reference and the file of BASE there. begun: called once nothing is left to be refused.
    Raises as `run_study`, and UsageError for a type that is BASE or needs an importance matrix.
    """
    lower = tensor_type(lower)
    if lower == BASE:
        raise UsageError(f"every other tensor is {BASE} too.", "name a lower type, such as Q4_0 or Q2_K.")
    settings = replace(settings or ContextSettings(), n_ctx=plan.chunk)
    settings = replace(settings, n_batch=min(settings.n_batch, plan.chunk), n_ubatch=min(settings.n_ubatch, plan.chunk))
    settings.check_memory([path], [None])
    with lock(folder / ".lock", lambda: note(progress, f"waiting for another compare of {path.name} ...")):
        job = StudyJob(path, [None], plan, folder, settings, verbose, progress, folder / "models")
        study = studies.create(job.file, job.header(window))
        job.check_text(study)
        begun()
        chunks = range(plan.chunks)
        names = {part: f"{part} {lower}" for part in patterns(path, by)}
        if not measure.missing(study, [study.header.reference, BASE, *names.values()], [None], chunks):
            return study
        made_first = [] if ladder_files.is_unquantized(describe(path)) else [plan.reference]
        ladder_files.say_room(progress, path, [*made_first, *[BASE] * (1 + _AT_ONCE)], job.models, keep)
        threads, shares = settings.n_threads, dict[str, TensorSnr]()
        ref = ladder_files.reference(path, job.models, plan.reference, threads, named(progress, plan.reference))
        study = studies.add_file(job.file, study, ref.file)
        base = ladder_files.varied(ref, BASE, BASE, (), job.models, window, threads, named(progress, BASE),
                                   shares)  # fmt: skip
        study = _measured(job, studies.add_file(job.file, study, base.file), [ref, base])
        left = [p for p in patterns(ref.path, by).items() if measure.missing(study, [names[p[0]]], [None], chunks)]
        for at in range(0, len(left), _AT_ONCE):
            progress(Step(f"{len(names) - len(left) + at} of {len(names)} parts are measured"))
            made = []
            for part, pattern in left[at : at + _AT_ONCE]:
                file = ladder_files.varied(ref, BASE, names[part], ((pattern, lower),), job.models, window, threads,
                                           named(progress, names[part]), shares)  # fmt: skip
                study = studies.add_file(job.file, study, file.file)
                made.append(file)
            study = _measured(job, study, [ref, *made])
            for file in made:
                file.path.unlink(missing_ok=True)
        ladder_files.tidy(job.models, keep=keep)
    return study


def _measured(job: StudyJob, study: Study, ladder: Sequence[LadderFile]) -> Study:
    """The chunks that these files lack, the reference first."""
    chunks = range(job.plan.chunks)
    if not measure.missing(study, [entry.file.type for entry in ladder[1:]], [None], chunks):
        return study
    tried = replace(job.settings, try_first=False)
    with ExitStack() as stack:
        models = {}
        for entry in ladder:
            models[entry.file.type] = job.open(entry.path, tried)
            stack.callback(models[entry.file.type].close)
        tokens = measure.shared_tokens(models, job.plan.text.text)
        return measure.measure(job.file, study, models, [None], tokens, chunks, job.plan.chunk,
                               named(job.progress, job.path.name))  # fmt: skip


# What it says


def parts(study: Study) -> list[ModelPart]:
    """Every part that was measured on two chunks at least, in the order of the model."""
    (a, b), n = study.header.window, study.header.n_layer
    found = []
    for type_ in study.types[2:]:
        if len(study.cells[type_, PLAIN].chunks) > 1:
            mine, base = (cell.values("kl") for cell in study.paired((type_, PLAIN), (BASE, PLAIN)))
            name = type_.rpartition(" ")[0]
            layer = int(name.split()[1]) if name.startswith("layer ") else None
            here, loops = (layer is not None and low <= layer < high for low, high in ((a, b), (1, n - 1)))
            found.append(ModelPart(name, layer, chunk_mean(mine - base), here, loops))
    return found


def contrast(study: Study) -> PairedEstimate | None:
    """How much more the KLD rises by a layer of the window than by another layer that may loop, means of both.

    Over chunks: the layers are this model's, all of them. Above 0 the window is the more sensitive one. None where
    parts are kinds of tensors, or either group has no layer.
    """
    found = parts(study)
    groups = [[p for p in found if p.in_window], [p for p in found if p.may_loop and not p.in_window]]
    if not all(groups):
        return None
    keys = [[(f"{p.name} {lower_type(study)}", PLAIN) for p in group] for group in groups]
    cells = iter(study.paired(*keys[0], *keys[1]))
    means = [np.mean([next(cells).values("kl") for _ in group], axis=0) for group in keys]
    return chunk_mean(means[0] - means[1])


def lower_type(study: Study) -> str:
    """The type that one part at a time has."""
    return study.types[-1].rpartition(" ")[2]
