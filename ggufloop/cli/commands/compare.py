"""`ggufloop compare MODEL...`: bits against loops, the table of every quantisation under every loop, paired."""

from __future__ import annotations

import hashlib
import io
import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ggufloop.backend.doctor import versions
from ggufloop.cli import study_file, terminal
from ggufloop.cli.context import batch_options, check_context, check_loops, check_memory, engine_settings
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_list_options, loops_from_flags
from ggufloop.cli.options import model_from_flags, split_list
from ggufloop.cli.progress import shown
from ggufloop.cli.texts import text_from_flags, text_options
from ggufloop.errors import UsageError, nearest
from ggufloop.files import file_sha256, lock, write_text
from ggufloop.loop import LoopSpec, parse_window
from ggufloop.measure import corpus
from ggufloop.measure.perplexity import LEAST_CONTEXT
from ggufloop.models.info import describe
from ggufloop.models.registry import suggest_window
from ggufloop.progress import named
from ggufloop.quant.quantize import UNQUANTISED
from ggufloop.study import file as studies
from ggufloop.study import ladder_files, measure, report
from ggufloop.study.file import Study, StudyHeader
from ggufloop.study.ladder_files import LadderFile
from ggufloop.table import FORMS

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

TYPES = "Q8_0,Q6_K,Q5_K_M,Q4_K_M,Q4_0,Q3_K_M,Q2_K"
KS = "2,3,6"
CONTEXT, CHUNKS = 512, 16
TASK_CONTEXT = 2048
_SETTINGS = ("threads", "batch_size", "ubatch_size", "flash_attn", "type_k", "type_v", "gpu_layers", "split_mode",
             "tensor_split", "main_gpu", "device", "rpc_servers")  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """What one call asks of every model."""

    types: tuple[str, ...]
    chunks: int
    text: corpus.Text
    tasks: tuple[str, ...]
    limit: int | None
    reference: str
    out: Path
    flags: dict[str, Any]


@dataclass(frozen=True)
class _Place:
    """Where the files of one model's study are."""

    folder: Path

    @property
    def study(self) -> Path:
        return self.folder / "study.jsonl"

    @property
    def models(self) -> Path:
        return self.folder / "models"


def _loops(path: Path, plan: _Plan) -> tuple[tuple[int, int], list[LoopSpec | None]]:
    """The window of this model, and its loops, the plain model first. Raises UsageError for one it cannot run."""
    word = plan.flags["window"]
    if word is not None and "," in word:
        raise UsageError(f"--window {word} is several windows, and a study is of one.", "give one, and another --out.")
    window = suggest_window(path)[0] if word in (None, "auto") else parse_window(word)
    asked = {name: plan.flags[name] for name in LOOP_FLAGS}
    loops = [loop for loop in loops_from_flags("{}:{}".format(*window), lambda: window, **asked) if loop.is_loop]
    check_loops(path, loops)
    return window, [None, *dict.fromkeys(loops)]


def _header(path: Path, window: tuple[int, int], plan: _Plan, settings: dict[str, Any]) -> StudyHeader:
    from ggufloop.engine import ACTIVE

    info = describe(path)
    effective = {"threads": "n_threads", "batch_size": "n_batch", "ubatch_size": "n_ubatch"}
    shown = {name: str(settings[effective[name]] if name in effective else plan.flags[name]) for name in _SETTINGS}
    return StudyHeader(
        model=path.name,
        source_sha256=file_sha256(path),
        source_type=info.label,
        architecture=info.architecture,
        n_layer=info.n_layer,
        n_params=info.elements,
        n_vocab=info.n_vocab,
        reference=info.types[0].type if ladder_files.is_unquantized(info) else plan.reference,
        window=window,
        text=plan.text.name,
        text_sha256=hashlib.sha256(plan.text.text.encode()).hexdigest(),
        n_ctx=settings["n_ctx"],
        settings={name: value for name, value in shown.items() if value != "None"},
        ggufloop=versions().ggufloop,
        patch_id=ACTIVE.patch_id or "unknown",
    )


def _ladder(
    path: Path, place: _Place, study: Study, window: tuple[int, int], plan: _Plan
) -> tuple[Study, list[LadderFile]]:
    """The files to measure, made where they are not there yet, and recorded. Raises GgufloopError."""
    with shown() as progress:
        told = named(progress, f"{path.name}, {plan.reference}")
        ref = ladder_files.reference(path, place.models, plan.reference, plan.flags["threads"], told)
    study = studies.add_file(place.study, study, ref.file)
    ladder = [ref]
    for word in plan.types:
        if ladder_files.type_name(word) == ref.file.type or (word == ladder_files.SOURCE and ref.path == path):
            continue  # the reference is in the ladder anyway
        with shown() as progress:
            told = named(progress, f"{path.name}, {ladder_files.type_name(word)}")
            entry = ladder_files.make(ref, word, path, place.models, window, study.files, plan.flags["threads"], told)
        study = studies.add_file(place.study, study, entry.file)
        ladder.append(entry)
    return study, ladder


def _open(path: Path, settings: dict[str, Any], verbose: bool) -> LoopedLlama:
    from ggufloop.engine import LoopedLlama

    return LoopedLlama(path, verbose=verbose, **settings)


def _check_text(path: Path, study: Study, plan: _Plan, settings: dict[str, Any], verbose: bool) -> None:
    """Raise GgufloopError for a text that is too short before anything is quantised; once measured it is not."""
    if any(chunk.index >= plan.chunks - 1 for cell in study.cells.values() for chunk in cell.chunks):
        return
    with terminal.progress(f"loading {path.name} ..."):
        llm = _open(path, settings, verbose)
    try:
        measure.check_text(measure.shared_tokens({path.name: llm}, plan.text.text), settings["n_ctx"], plan.chunks)
    finally:
        llm.close()


def _measure(
    place: _Place, study: Study, ladder: Sequence[LadderFile], loops: Sequence[LoopSpec | None], plan: _Plan,
    settings: dict[str, Any], verbose: bool,
) -> Study:  # fmt: skip
    """The chunks that are lacking, then the tasks that are."""
    chunks = range(plan.chunks)
    lacking = [r for r in ladder if measure.missing(study, [r.file.type], loops, chunks)]
    if lacking:
        needed = [ladder[0], *(r for r in lacking if r is not ladder[0])]
        check_memory([entry.path for entry in needed], plan.flags, loops)
        with ExitStack() as stack:
            models = {}
            for entry in needed:
                with terminal.progress(f"loading {entry.path.name} ..."):
                    models[entry.file.type] = _open(entry.path, settings, verbose)
                stack.callback(models[entry.file.type].close)
            tokens = measure.shared_tokens(models, plan.text.text)
            progress = named(stack.enter_context(shown()), study.header.model)
            study = measure.measure(place.study, study, models, loops, tokens, chunks, settings["n_ctx"], progress)
    for entry in ladder if plan.tasks else ():
        study = _ask(place, study, entry, loops, plan, settings, verbose)
    return study


def _ask(
    place: _Place, study: Study, entry: LadderFile, loops: Sequence[LoopSpec | None], plan: _Plan,
    settings: dict[str, Any], verbose: bool,
) -> Study:  # fmt: skip
    from ggufloop.measure.multiple_choice import SEQUENCES
    from ggufloop.measure.tasks import load_tasks

    names = [measure.loop_name(loop) for loop in loops]
    type_ = entry.file.type
    if not any(study.lacks_task(type_, name, task, plan.limit) for name in names for task in plan.tasks):
        return study
    with terminal.progress("reading the tasks ..."):
        tasks = load_tasks(list(plan.tasks))

    trained = describe(entry.path).n_ctx_train
    more = {"n_ctx": max(settings["n_ctx"], min(TASK_CONTEXT, trained)), "n_seq": SEQUENCES}
    llm = _open(entry.path, settings | more, verbose)
    try:
        with shown() as progress:
            return measure.ask(place.study, study, type_, llm, loops, tasks, plan.limit, progress)
    finally:
        llm.close()


def _publish(place: _Place, study: Study, again: str) -> None:
    """The table, the figures and the page beside the study."""
    from ggufloop.figures import study as study_plots
    from ggufloop.figures import style

    write_text(place.folder / "table.md", report.shown(study).render("md"))
    write_text(place.folder / "table.csv", report.numbers(study).render("csv"))
    drawn = {}
    for name, figure in study_plots.figures(study).items():
        style.save(figure, place.folder / f"{name}.png")
        svg = io.StringIO()
        with style.style():
            figure.savefig(svg, format="svg")
        drawn[name] = svg.getvalue()
    write_text(place.folder / "report.html", report.html(study, drawn, again))


def _one(path: Path, plan: _Plan, values: dict[str, Any], verbose: bool) -> tuple[Study, _Place]:
    """One model's study, from its file to its page."""
    from ggufloop.figures import study as study_plots
    from ggufloop.figures import style

    place = _Place(plan.out / path.stem)
    window, loops = _loops(path, plan)
    check_memory([path], plan.flags, loops)
    settings = engine_settings(path, plan.flags)
    settings |= {name: min(settings[name], settings["n_ctx"]) for name in ("n_batch", "n_ubatch")}
    header = _header(path, window, plan, settings)
    with lock(place.folder / ".lock", lambda: terminal.note(f"waiting for another compare of {path.name} ...")):
        study = studies.create(place.study, header)
        if study.dropped:
            terminal.note(study.dropped)
        _check_text(path, study, plan, settings, verbose)
        style.check_target(place.folder / f"{study_plots.SIZE}.png")
        toml = place.folder / "study.toml"
        write_text(
            toml,
            study_file.dump(command, values | {"models": (values["given"][path],), "window": "{}:{}".format(*window)}),
        )
        try:
            study, ladder = _ladder(path, place, study, window, plan)
            study = _measure(place, study, ladder, loops, plan, settings, verbose)
        except KeyboardInterrupt:
            terminal.note(f"what was measured is kept; go on with: ggufloop compare --study {shlex.quote(str(toml))}")
            raise
        _publish(place, study, f"ggufloop compare --study {shlex.quote(str(toml))}")
    return study, place


@click.command(name="compare")
@click.argument("models", nargs=-1, metavar="MODEL...")
@click.option("--study", "study", metavar="FILE.toml", is_eager=True, callback=study_file.load, expose_value=False,
              help="Take the options from a file; those given here count instead.")  # fmt: skip
@click.option("--types", default=TYPES, show_default=True, metavar="TYPE,...",
              help="What to quantise to; .gguf files and 'source' (MODEL itself): as they are.")  # fmt: skip
@click.option("--reference", default="F16", show_default=True, metavar="F32|F16|BF16",
              help="What a model that is quantised already is dequantised to.")  # fmt: skip
@text_options
@click.option("-c", "--ctx-size", "ctx_size", type=click.IntRange(min=1), metavar="N", default=CONTEXT,
              show_default=True, help="Tokens of a chunk; half of them are scored.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", default=CHUNKS, show_default=True,
              help="Chunks of the text, from its start; more of them later go on with the study.")  # fmt: skip
@click.option("--tasks", metavar="NAME,...", help="Tasks as well, as ggufloop eval has them.")
@click.option("--limit", type=click.IntRange(min=2), metavar="N", help="Only the first N questions of each task.")
@click.option("--out", default="studies", show_default=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Each model gets a folder in it: study.jsonl, files, figures, report.html.")  # fmt: skip
@click.option("--offline", is_flag=True, help="Use only what is downloaded already.")
@loop_list_options
@click.option("-o", "--output", "form", default="text", show_default=True, metavar="text|md|csv|json|jsonl",
              help="How to print the table.")  # fmt: skip
@batch_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    models: tuple[str, ...],
    types: str,
    reference: str,
    text: str | None,
    dataset: str | None,
    chunks: int,
    tasks: str | None,
    limit: int | None,
    out: Path,
    offline: bool,
    form: str,
    **flags: Any,
) -> None:
    """Bits against loops: quantise a model to each type and measure each under each loop, paired, on the same text.

    Of each cell: size, bits, SNR of the window's weights, perplexity, what looping changes, KLD to the reference under
    the same loop, the noise amplification A_K, and a verdict with its interval. Without --window it is the model's
    suggested one, without --K 2, 3 and 6. Every file is open at once. A run that was stopped goes on where it was, and
    other types, K, solvers, chunks or tasks extend it. Figures need the extra 'lab'.

    \b
    ggufloop compare smollm2-135m --text pydoc --K 2,3 --solver euler,naive
    ggufloop compare smollm2-135m --text pydoc --types Q8_0,Q4_0,mine.gguf --window 12:16 --chunks 32
    ggufloop compare --study studies/SmolLM2-135M-Instruct.Q4_1/study.toml
    """
    if form not in ("text", *FORMS):
        raise UsageError(f"output form {form!r} is not known.", nearest(form, ("text", *FORMS)))
    if not models:
        raise UsageError(
            "no model is given.", "name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant]."
        )
    if flags["k"] is None:
        flags["k"] = KS
    if chunks < 2:
        raise UsageError("--chunks 1 gives no interval: chunks are what is compared.", "give 2 or more, 16 is good.")
    if flags["ctx_size"] < LEAST_CONTEXT:
        raise UsageError(f"-c {flags['ctx_size']} leaves nothing to score.", f"give {LEAST_CONTEXT} or more.")
    if reference.upper() not in UNQUANTISED:
        raise UsageError(f"reference {reference!r} would be quantised.", nearest(reference.upper(), UNQUANTISED))
    check_context(flags)
    words = tuple(dict.fromkeys(split_list(types, "--types")))
    for word in words:
        ladder_files.type_name(word)
    plan = _Plan(
        words, chunks, text_from_flags(text, dataset, offline), tuple(split_list(tasks, "--tasks")) if tasks else (),
        limit, reference.upper(), out, flags,
    )  # fmt: skip
    paths = {model_from_flags(model, None, None, offline): model for model in models}
    values = ctx.params | flags | {"out": str(out), "given": paths}
    found = []
    for i, path in enumerate(paths):
        study, place = _one(path, plan, values, ctx.obj["verbose"])
        found.append(study)
        if form == "text":
            click.echo("\n" * bool(i) + f"{path.name}\n\n{report.shown(study).render('md')}")
            click.echo("\n".join(report.summary(study)))
            click.echo(f"\nreport: {place.folder / 'report.html'}")
    if form != "text":
        click.echo(report.numbers(*found).render(form), nl=False)
