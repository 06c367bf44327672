"""`ggufloop compare MODEL...`: bits against loops, the table of every quantisation under every loop, paired."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import outcomes, study_file, terminal
from ggufloop.cli.context import batch_options, context_from_flags
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import (
    LOOP_FLAGS,
    loop_list_options,
    loop_suggestion,
    loops_from_flags,
    window_suggestion,
)
from ggufloop.cli.options import complete_model, model_from_flags, split_list, tasks_from_flags, tasks_options
from ggufloop.cli.progress import shown
from ggufloop.cli.sensitivity import show_sensitivity
from ggufloop.cli.shards import parts_from_flags, study_shard_options
from ggufloop.cli.texts import texts_from_flags, texts_option
from ggufloop.cli.types import OneOf, output_option, show_table
from ggufloop.errors import UsageError
from ggufloop.files import write_text
from ggufloop.loop import LoopSpec, parse_window
from ggufloop.measure.slices import ShardDone, file_name
from ggufloop.opening import check_loops
from ggufloop.quant.quantize import UNQUANTISED
from ggufloop.study import report
from ggufloop.study.planning import plan_study
from ggufloop.study.run import CHUNKS, CONTEXT, TYPES, StudyPlan, run_texts
from ggufloop.study.sensitivity import LAYER, PARTS

KS = "2,3,6"


def _loops(path: Path, word: str | None, asked: dict[str, Any]) -> list[LoopSpec]:
    """The loops of this model, all of one window. Raises UsageError."""
    if word is None and asked["recipe"] is not None:
        return loops_from_flags(None, loop_suggestion(path), **asked)
    if word is not None and "," in word:
        raise UsageError(f"--window {word} is several windows, and a study is of one.", "give one, and another --out.")
    return loops_from_flags("{}:{}".format(*_window(path, word)), loop_suggestion(path), **asked)


def _window(path: Path, word: str | None) -> tuple[int, int]:
    """The window --window says, of this model if none. Raises UsageError."""
    if word in (None, "auto"):
        return window_suggestion(path)()
    loop = LoopSpec(parse_window(str(word)), k=2)
    check_loops(path, [loop])
    return loop.window


@click.command(name="compare", cls=Command)
@click.argument("models", nargs=-1, metavar="MODEL...", shell_complete=complete_model)
@click.option("--study", "study", metavar="FILE.toml", is_eager=True, callback=study_file.load, expose_value=False,
              help="Take the options from a file; those given here count instead.")  # fmt: skip
@click.option("--types", default=",".join(TYPES), show_default=True, metavar="TYPE,...",
              help="What to quantise to; .gguf files and 'source' (MODEL itself): as they are.")  # fmt: skip
@click.option("--reference", type=OneOf(UNQUANTISED, upper=True, what="reference"), default="F16", show_default=True,
              metavar="|".join(UNQUANTISED),
              help="What a model that is quantised already is dequantised to.")  # fmt: skip
@texts_option
@click.option("-c", "--ctx-size", "chunk", type=click.IntRange(min=1), metavar="N", default=CONTEXT,
              show_default=True, help="Tokens of a chunk; half of them are scored.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", default=CHUNKS, show_default=True,
              help="Chunks of the text, from its start; more of them later go on with the study.")  # fmt: skip
@tasks_options("Tasks as well, as ggufloop eval has them.")
@click.option("--limit", type=click.IntRange(min=2), metavar="N", help="Only the first N questions of each task.")
@click.option("--out", default="studies", show_default=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Each model gets a folder in it: study.jsonl, figures, report.html.")  # fmt: skip
@click.option(
    "--keep", is_flag=True, help="Leave the quantised files there when all is measured; else they are deleted."
)
@click.option("--sensitivity", "lower", metavar="TYPE", help="Instead of a ladder: one layer at a time at this type, "
              "all else at Q8_0, and its KLD, the layers of --window against the others. No loop is run.")  # fmt: skip
@click.option("--sensitivity-by", "by", type=OneOf(PARTS, what="--sensitivity-by"), default=LAYER, show_default=True,
              metavar="|".join(PARTS), help="With --sensitivity: a layer or a kind of tensor at a time.")  # fmt: skip
@click.option("--offline", is_flag=True, help="Use only what is downloaded already.")
@loop_list_options
@study_shard_options
@output_option(help="How to print the table.")
@batch_options
@click.pass_context
def command(
    ctx: click.Context, /, models: tuple[str, ...], types: str, reference: str, text: tuple[str, ...],
    dataset: str | None, chunk: int, chunks: int, tasks: str | None, include_path: str | None, limit: int | None,
    out: Path, offline: bool, window: str | None, form: str, lower: str | None, by: str, keep: bool, **flags: Any,
) -> None:  # fmt: skip
    """Bits against loops: quantise a model to each type and measure each under each loop, paired, on the same text.

    Of each cell: size, bits, SNR of the window's weights, perplexity, what looping gains, KLD to the reference under
    the same loop, the noise amplification A_K, and a verdict with its interval. Without --window it is the model's
    suggested one, without --K 2, 3 and 6. Every file is open at once. A run that was stopped goes on where it was, and
    other types, K, solvers, chunks or tasks extend it. KLD against bytes, with the files on the Pareto front, follows;
    --K 1 measures that alone. Figures need the extra 'lab'.

    \b
    ggufloop compare smollm2-135m --text pydoc --K 2,3 --solver euler,naive
    ggufloop compare smollm2-135m --text pydoc --types Q8_0,Q4_0,mine.gguf --window 12:16 --chunks 32
    ggufloop compare F16.gguf --types a/Q4_K_M.gguf,b/Q4_K_M.gguf --K 1 --text wiki --text code
    ggufloop compare smollm2-135m --sensitivity Q4_0 --text wiki
    ggufloop compare --study studies/SmolLM2-135M-Instruct.Q4_1/study.toml
    """
    from ggufloop.figures import page

    if not models:
        raise UsageError(
            "no model is given.", "name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant]."
        )
    parts = parts_from_flags(flags, out)
    asked = {name: flags.pop(name) for name in LOOP_FLAGS}
    settings = context_from_flags(flags, n_ctx=chunk)
    words, named = split_list(types, "--types"), tasks_from_flags(tasks, include_path)
    texts = texts_from_flags(text, dataset, offline)
    plan = StudyPlan(texts[0], tuple(words), chunk, chunks, named, limit,
                     reference, offline, include_path)  # fmt: skip
    paths = {model_from_flags(model, None, None, offline): model for model in models}
    if lower is not None:
        named_windows = [(path, _window(path, window)) for path in paths]
        show_sensitivity(named_windows, lower, by, plan, texts, out, settings, form, ctx.obj["verbose"], keep)
        return
    found, ks = [], asked["k"] or (KS if asked["recipe"] is None else None)
    for path, name in paths.items():
        loops = _loops(path, window, asked | {"k": ks})
        folder = out / path.stem
        again = f"ggufloop compare --study {shlex.quote(str(folder / 'study.toml'))}"
        of_one = ctx.params | {"models": (name,), "window": "{}:{}".format(*loops[0].window), "out": str(out),
                               "k": ks, "shard": None, "only_plan": None, "tokens_per_second": None}  # fmt: skip

        def begun(folder: Path = folder, of_one: dict[str, Any] = of_one) -> None:
            page.check(folder)
            write_text(folder / "study.toml", study_file.dump(command, of_one))

        if parts.plan:
            with shown() as progress:
                planned = [plan_study(path, loops, replace(plan, text=t), settings, shards=parts.of,
                                      speed=parts.speed, progress=progress) for t in texts]  # fmt: skip
            for each in planned:
                outcomes.print_plan(path, each, form)
            continue
        try:
            with shown() as progress:
                studies = run_texts(path, loops, plan, texts, folder, settings, verbose=ctx.obj["verbose"],
                                    begun=begun, shard=parts.shard, progress=progress, keep=keep)  # fmt: skip
        except KeyboardInterrupt:
            terminal.note(f"what was measured is kept; go on with: {again}")
            raise
        if parts.shard is not None:
            done = len(parts.shard.share(range(plan.chunks)))
            for place in studies:
                journal = place / file_name("study", parts.shard)
                outcomes.print_shard(ShardDone(parts.shard, done, plan.chunks, journal, what="chunks"))
            continue
        for place, study in studies.items():
            found.append(study)
            outcomes.print_study(study, place, again, form, first=len(found) == 1, text=len(studies) > 1)
        page.publish_sizes(list(studies.values()), folder)
        if form == "text":
            outcomes.print_files(list(studies.values()))
    if form != "text" and found:
        show_table(form, lambda: report.numbers(*found))
