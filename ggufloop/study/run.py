"""A study of a model file, from its path to the last measurement: what `ggufloop compare` shows.

    plan = StudyPlan(text=local("pydoc"), types=("Q8_0", "Q4_0"), chunks=16)
    study = run_study(path, [LoopSpec((12, 16), k=2), LoopSpec((12, 16), k=3)], plan, Path("studies/smollm2"))
    study.cell("Q4_0", "12:16 k=2")

The folder keeps the study (study.jsonl); the same call goes on from there and from what shards have measured beside it,
and one with more types, loops, chunks or tasks extends it. The files that are made (models/) stay until all is
measured, with keep after that as well. `figures.page.publish` draws it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ggufloop.backend.doctor import versions
from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import UsageError, nearest
from ggufloop.files import file_sha256, lock
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import Text
from ggufloop.measure.multiple_choice import SEQUENCES
from ggufloop.measure.perplexity import LEAST_CONTEXT
from ggufloop.measure.slices import Shard, file_name
from ggufloop.models.info import describe
from ggufloop.opening import check_loops, open_model
from ggufloop.progress import Progress, named, note, silent
from ggufloop.quant.quantize import UNQUANTISED, default_name, file_type
from ggufloop.study import file as studies
from ggufloop.study import ladder_files, measure
from ggufloop.study.file import File, Study, StudyHeader
from ggufloop.study.ladder_files import LadderFile
from ggufloop.study.merge import take_over
from ggufloop.tasks.loading import load_tasks
from ggufloop.tasks.own import kept_name, task_name

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K")
CONTEXT, CHUNKS = 512, 16
TASK_CONTEXT = 2048


@dataclass(frozen=True)
class StudyPlan:
    """What is measured of a model.

    types        what to quantise to; .gguf files, and 'source', the model itself, as they are
    chunks       of the text, each of `chunk` tokens, from its start
    tasks        of lm-eval as well, the first `limit` questions of each
    reference    F32, F16 or BF16: what a model that is quantised already is dequantised to
    offline      download no questions; include_path: a folder of more of lm-eval's tasks

    Raises UsageError for what could not be measured.
    """

    text: Text
    types: tuple[str, ...] = TYPES
    chunk: int = CONTEXT
    chunks: int = CHUNKS
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    reference: str = "F16"
    offline: bool = False
    include_path: str | None = None

    def __post_init__(self) -> None:
        if self.chunks < 2:
            raise UsageError(f"--chunks {self.chunks} gives no interval: chunks are what is compared.",
                             "give 2 or more, 16 is good.")  # fmt: skip
        if self.chunk < LEAST_CONTEXT:
            raise UsageError(f"-c {self.chunk} leaves nothing to score.", f"give {LEAST_CONTEXT} or more.")
        if self.reference not in UNQUANTISED:
            raise UsageError(
                f"reference {self.reference!r} would be quantised.", nearest(self.reference.upper(), UNQUANTISED)
            )
        for word in self.types:
            ladder_files.type_name(word)


def run_study(
    path: Path,
    loops: Sequence[LoopSpec],
    plan: StudyPlan,
    folder: Path,
    settings: ContextSettings | None = None,
    *,
    verbose: bool = False,
    begun: Callable[[], None] = lambda: None,
    shard: Shard | None = None,
    progress: Progress = silent,
    models: Path | None = None,
    keep: bool = False,
) -> Study:
    """Quantise the model to each type and measure every file under every loop, the plain model among them.

    loops: all of one window; one of a single evaluation is the plain model. settings: n_ctx is the plan's. begun:
    called once nothing is left to be refused. shard: measure only this part of chunks and questions, of every file
    under every loop. models: where files go that are made, and stay; if None models/ in the folder, and they stay
    only with keep, or where there are other shards.
    Raises UsageError, GgufloopError, BackendError; KeyboardInterrupt leaves in the folder what was measured.
    """
    settings = replace(settings or ContextSettings(), n_ctx=plan.chunk)
    settings = replace(settings, n_batch=min(settings.n_batch, plan.chunk), n_ubatch=min(settings.n_ubatch, plan.chunk))
    window = _window(loops)
    check_loops(path, loops)
    settings.check_memory([path], loops)
    part = "" if shard is None else f"-{shard.number}-of-{shard.of}"
    with lock(folder / f".lock{part}", lambda: note(progress, f"waiting for another compare of {path.name} ...")):
        each: list[LoopSpec | None] = [None, *dict.fromkeys(loop for loop in loops if loop.is_loop)]
        job = StudyJob(path, each, plan, folder, settings, verbose, progress, models or folder / "models", shard)
        study = studies.create(job.file, job.header(window))
        if study.dropped:
            note(progress, study.dropped)
        if shard is None:
            study = take_over(job.file, study)
        job.check_text(study)
        begun()
        with lock(folder / ".lock") if shard is not None else nullcontext():  # shards make them once
            job.say_room(study, keep or shard is not None)
            study, ladder = job.ladder(study, window)
        study = job.measure(study, ladder)
        for entry in ladder if plan.tasks else ():
            study = job.ask(study, entry)
        if models is None and shard is None:
            ladder_files.tidy(job.models, plan.types, keep)
    return study


def text_folder(folder: Path, text: Text) -> Path:
    """Where the study of one of several texts is kept, below the folder they share."""
    return folder / (re.sub(r"[^\w.-]+", "-", Path(text.name).name).strip("-.") or "text")


def run_texts(
    path: Path,
    loops: Sequence[LoopSpec],
    plan: StudyPlan,
    texts: Sequence[Text],
    folder: Path,
    settings: ContextSettings | None = None,
    *,
    verbose: bool = False,
    begun: Callable[[], None] = lambda: None,
    shard: Shard | None = None,
    progress: Progress = silent,
    keep: bool = False,
) -> dict[Path, Study]:
    """A study of each text by its folder, which is `folder` itself if there is one; files are made once for all.

    Raises UsageError for two texts that would share a folder, and as `run_study` does.
    """
    places = [folder] if len(texts) == 1 else [text_folder(folder, text) for text in texts]
    twice = next((place for i, place in enumerate(places) if place in places[:i]), None)
    if twice is not None:
        raise UsageError(f"two texts are called {twice.name}.", "give each once, files under different names.")
    found = {}
    for text, place in zip(texts, places, strict=True):
        told = progress if len(texts) == 1 else named(progress, text.name)
        found[place] = run_study(path, loops, replace(plan, text=text), place, settings, verbose=verbose, begun=begun,
                                 shard=shard, progress=told, keep=keep,
                                 models=None if len(texts) == 1 else folder / "models")  # fmt: skip
    if len(texts) > 1 and shard is None:
        ladder_files.tidy(folder / "models", plan.types, keep)
    return found


def _window(loops: Iterable[LoopSpec]) -> tuple[int, int]:
    """The window of all loops. Raises UsageError."""
    windows = list(dict.fromkeys(loop.window for loop in loops))
    if len(windows) != 1:
        raise UsageError(f"a study is of one window, not {len(windows)}.", "give loops of one, and another folder.")
    return windows[0]


@dataclass(frozen=True)
class StudyJob:
    """What one call asks of one model, and the steps of it."""

    path: Path
    loops: Sequence[LoopSpec | None]
    plan: StudyPlan
    folder: Path
    settings: ContextSettings
    verbose: bool
    progress: Progress
    models: Path
    shard: Shard | None = None

    @property
    def file(self) -> Path:
        return self.folder / file_name("study", self.shard)

    @property
    def chunks(self) -> list[int]:
        every = range(self.plan.chunks)
        return list(every if self.shard is None else self.shard.share(every))

    def open(self, path: Path, settings: ContextSettings) -> LoopedLlama:
        return open_model(path, settings, verbose=self.verbose, progress=self.progress)

    def header(self, window: tuple[int, int]) -> StudyHeader:
        from ggufloop.engine import ACTIVE

        info, s = describe(self.path), self.settings
        shown = {
            "threads": s.threads, "batch_size": s.n_batch, "ubatch_size": s.n_ubatch, "flash_attn": s.flash_attn,
            "type_k": s.type_k, "type_v": s.type_v, "gpu_layers": s.n_gpu_layers, "split_mode": s.split_mode,
            "tensor_split": s.tensor_split, "main_gpu": s.main_gpu, "device": s.device, "rpc_servers": s.rpc_servers,
            **s.kernels,
        }  # fmt: skip
        return StudyHeader(
            model=self.path.name,
            source_sha256=file_sha256(self.path),
            source_type=info.label,
            architecture=info.architecture,
            n_layer=info.n_layer,
            n_params=info.elements,
            n_vocab=info.n_vocab,
            reference=info.types[0].type if ladder_files.is_unquantized(info) else self.plan.reference,
            window=window,
            text=self.plan.text.name,
            text_sha256=hashlib.sha256(self.plan.text.text.encode()).hexdigest(),
            n_ctx=self.plan.chunk,
            settings={name: str(value) for name, value in shown.items() if value is not None},
            ggufloop=versions().ggufloop,
            patch_id=ACTIVE.patch_id or "unknown",
            shard=str(self.shard or ""),
        )

    def check_text(self, study: Study) -> None:
        """Raise GgufloopError for a text too short before anything is quantised; once measured it is not."""
        if any(chunk.index >= self.plan.chunks - 1 for cell in study.cells.values() for chunk in cell.chunks):
            return
        with closing(self.open(self.path, self.settings)) as llm:
            tokens = measure.shared_tokens({self.path.name: llm}, self.plan.text.text)
            measure.check_text(tokens, self.plan.chunk, self.plan.chunks)

    def lacks(self, study: Study, type_: str) -> bool:
        """Whether anything of a file is left to be measured."""
        names = [measure.loop_name(loop) for loop in self.loops]
        return bool(measure.missing(study, [type_], self.loops, self.chunks)) or any(
            study.lacks_task(type_, name, kept_name(task), self.plan.limit)
            for name in names
            for task in self.plan.tasks
        )

    def done(self, study: Study) -> list[File]:
        """The files that need not be there any more; the reference only if no other is needed either."""
        found = [file for file in study.files if not self.lacks(study, file.type)]
        wanted = {study.header.reference, *(ladder_files.type_name(w, self.plan.types) for w in self.plan.types)}
        if ladder_files.is_unquantized(describe(self.path)):
            wanted.discard(ladder_files.SOURCE)  # that is the reference
        if wanted <= {file.type for file in found}:
            return found
        return [file for file in found if file.type != study.header.reference]

    def say_room(self, study: Study, keep: bool) -> None:
        """Say what will be made, before it is: a ladder takes several times the model's own room."""
        done = [file.type for file in self.done(study)]
        reference, made = study.header.reference, not ladder_files.is_unquantized(describe(self.path))
        first = self.models / default_name(self.path, reference) if made else self.path
        files = {file_type(word): self.models / default_name(first, file_type(word))
                 for word in self.plan.types if ladder_files.is_made(word)}  # fmt: skip
        files[reference] = first
        todo = [type_ for type_, file in files.items() if type_ not in done and not file.exists()]
        ladder_files.say_room(self.progress, self.path, todo, self.models, keep)

    def ladder(self, study: Study, window: tuple[int, int]) -> tuple[Study, list[LadderFile]]:
        """The files to measure, made where they are not there yet, and recorded. Raises GgufloopError."""
        models, threads = self.models, self.settings.n_threads

        def told(type_: str) -> Progress:
            return named(self.progress, f"{self.path.name}, {type_}")

        asked, done = self.plan.reference, self.done(study)
        ref = ladder_files.reference(self.path, models, asked, threads, told(asked), done)
        study = studies.add_file(self.file, study, ref.file)
        found = [ref]
        for word in dict.fromkeys(self.plan.types):
            type_ = ladder_files.type_name(word, self.plan.types)
            if type_ == ref.file.type or (word == ladder_files.SOURCE and ref.path == self.path):
                continue  # the reference is in the ladder anyway
            entry = ladder_files.make(ref, word, self.path, models, window, study.files, threads, told(type_),
                                      type_, done)  # fmt: skip
            study = studies.add_file(self.file, study, entry.file)
            found.append(entry)
        return study, found

    def measure(self, study: Study, ladder: Sequence[LadderFile]) -> Study:
        """The chunks that are lacking, every file that lacks one open at once."""
        chunks = self.chunks
        lacking = [entry for entry in ladder if measure.missing(study, [entry.file.type], self.loops, chunks)]
        if not lacking:
            return study
        needed = [ladder[0], *(entry for entry in lacking if entry is not ladder[0])]
        self.settings.check_memory([entry.path for entry in needed], self.loops)
        tried = replace(self.settings, try_first=False)  # the model they are made of is
        with ExitStack() as stack:
            models: dict[str, LoopedLlama] = {}
            for entry in needed:
                models[entry.file.type] = stack.enter_context(closing(self.open(entry.path, tried)))
            tokens = measure.shared_tokens(models, self.plan.text.text)
            return measure.measure(self.file, study, models, self.loops, tokens, chunks, self.plan.chunk,
                                   named(self.progress, self.path.name))  # fmt: skip

    def ask(self, study: Study, entry: LadderFile) -> Study:
        """The tasks a file lacks."""
        type_ = entry.file.type
        if not self.lacks(study, type_):
            return study
        tasks = load_tasks(self.plan.tasks, self.plan.offline, None, self.progress, self.plan.include_path)
        kept = {task_name(name): kept_name(name) for name in self.plan.tasks}
        tasks = replace(tasks, members={kept[name]: inside for name, inside in tasks.members.items()})
        room = max(self.plan.chunk, min(TASK_CONTEXT, describe(entry.path).n_ctx_train))
        settings = replace(self.settings, n_ctx=room, n_seq=SEQUENCES, try_first=False)
        with closing(self.open(entry.path, settings)) as llm:
            return measure.ask(self.file, study, type_, llm, self.loops, tasks, self.plan.limit, self.progress,
                               self.shard)  # fmt: skip
