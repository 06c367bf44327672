"""`ggufloop answer MODEL --task FILE`: does looping help here, and is it worth more than bits? One paragraph."""

from __future__ import annotations

import importlib.util
import re
import shutil
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import terminal
from ggufloop.cli.context import batch_options, context_from_flags, resolve_model
from ggufloop.cli.help import Command
from ggufloop.cli.loop_options import loop_list_options
from ggufloop.cli.options import (
    check_template,
    complete_model,
    model_from_flags,
    model_options,
    tasks_from_flags,
    tasks_options,
    template_from_flags,
    template_options,
)
from ggufloop.cli.progress import shown
from ggufloop.cli.texts import text_from_flags, text_options
from ggufloop.cli.types import output_option, show
from ggufloop.cli.windows import WIDTH, sweep_loops
from ggufloop.errors import UsageError
from ggufloop.files import write_text
from ggufloop.flat import flat
from ggufloop.measure.sweep_run import CONTEXT, SEED, SweepPlan
from ggufloop.measure.verdict import ACCURACY, NATS, WORTHS
from ggufloop.study import answer_report
from ggufloop.study.answer import Finding, run_answer
from ggufloop.tasks.own import task_name

_TOGETHER = re.compile(r"`[^`]*`|[\d.]+ %|--\w+ \S+")  # a loop, a share, a flag: no line ends in them
WINDOWS, KS = 6, "2,3"


@click.command(name="answer", cls=Command)
@model_options
@tasks_options("Questions, those of several tasks taken together.")
@text_options
@click.option("--against", multiple=True, metavar="MODEL", shell_complete=complete_model,
              help="Another file, without a loop, on the same items: is this one with its loop better? May be "
              "repeated.")  # fmt: skip
@click.option("--budget", metavar="TIME", default="1h", show_default=True,
              help="Use as many items as fit into this time, about: 90s, 30m, 2h.")  # fmt: skip
@click.option("--start", metavar="N,A:B,...", help="First layers of the windows to try, without --window (default: "
              f"{WINDOWS}, spread over the model).")  # fmt: skip
@click.option("--width", metavar="N,A:B,...", help=f"Their widths (default {WIDTH}).")
@loop_list_options
@click.option("-c", "--ctx-size", "chunk", type=click.IntRange(min=4), metavar="N", default=CONTEXT, show_default=True,
              help="Tokens of a chunk of the text; half of them are scored.")  # fmt: skip
@click.option("--apply-chat-template", "chat", is_flag=True, help="Ask in the model's chat template.")
@template_options
@click.option("--worth", type=float, metavar="X", help="The smallest gain that would matter (default: "
              f"{WORTHS[ACCURACY]:g} of accuracy, {WORTHS[NATS]:g} nats per token).")  # fmt: skip
@click.option("-s", "--seed", type=click.IntRange(min=0), default=SEED, show_default=True, help="Of the random parts.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Keep everything here, and go on from it (default: answers/MODEL-TASK).")  # fmt: skip
@output_option()
@batch_options
@click.pass_context
def command(
    ctx: click.Context, /, tasks: str | None, include_path: str | None, text: str | None, dataset: str | None,
    against: tuple[str, ...], budget: str, chunk: int, chat: bool, worth: float | None, seed: int, out: Path | None,
    form: str, **flags: Any,
) -> None:  # fmt: skip
    """Does looping help this model on my task, at which window, by how much; and is it worth more than bits?

    Some of the items choose a loop, without loop flags of six windows with K 2 and 3, the others judge it, and no item
    does both. With --against the loop is compared with other files on the same items. It ends in one paragraph; the
    folder has all that it rests on. After Ctrl-C the same command goes on.

    \b
    ggufloop answer model.gguf --task questions.csv
    ggufloop answer Q4_K_M.gguf --tasks arc_easy --against Q5_K_M.gguf --budget 2h
    ggufloop answer smollm2-135m --text notes.txt --window 12:16 --K 2,3
    """
    if (tasks is None) == (text is None and dataset is None):
        what = "nothing to ask is given." if tasks is None else "a task and a text are two questions."
        raise UsageError(what, "give --task FILE, --tasks NAME,... or --text FILE.")
    if not chat:
        check_template(flags)
    source = text_from_flags(text, dataset, flags["offline"]) if tasks is None else None
    named = tasks_from_flags(tasks, include_path)
    plan = SweepPlan(source, named, chunk=chunk, chat=chat, budget=budget, worth=worth, seed=seed, pooled=True,
                     offline=flags["offline"], include_path=include_path)  # fmt: skip
    settings = context_from_flags(flags, n_ctx=plan.context)
    others = [model_from_flags(word, None, None, flags["offline"]) for word in against]
    path = resolve_model(flags)
    plan = replace(plan, template=template_from_flags(flags, path))
    if len({file.resolve() for file in (path, *others)}) <= len(others):
        raise UsageError("a file is compared with itself.", "give each --against once, and not MODEL.")
    if flags["k"] is None and flags["recipe"] is None:
        flags["k"] = KS
    loops = sweep_loops(path, flags, most=WINDOWS)
    asked = Path(source.name).stem if source is not None else ",".join(map(task_name, named))
    folder = out or Path("answers") / f"{path.stem}-{asked}"
    try:
        with shown() as progress:
            found = run_answer(path, loops, plan, folder, settings, against=others, verbose=ctx.obj["verbose"],
                               progress=progress)  # fmt: skip
    except KeyboardInterrupt:
        click.echo(f"stopped; {folder} keeps what is done, and the same command goes on.", err=True)
        raise
    _publish(found, folder)
    show(form, lambda: _said(found, folder), lambda: answer_report.record(found),
         lambda: answer_report.comparisons(found))  # fmt: skip


def _said(found: Finding, folder: Path) -> str:
    width = min(shutil.get_terminal_size((100, 24)).columns, 100)
    whole = _TOGETHER.sub(lambda m: m[0].replace(" ", "\0"), answer_report.paragraph(found))
    lines = [line.replace("\0", " ") for line in textwrap.wrap(whole, width, break_on_hyphens=False)]
    return "\n".join([*lines, "", f"report: {folder / 'answer.md'}", ""])


def _publish(found: Finding, folder: Path) -> None:
    """The paragraph and what stands behind it, beside the journals."""
    figure = None
    if importlib.util.find_spec("matplotlib") is not None:
        from ggufloop.figures import style
        from ggufloop.figures.answer import answer_figure

        figure = "answer.png"
        style.save(answer_figure(found), folder / figure)
    else:
        terminal.note("no figure is drawn without matplotlib: pip install 'ggufloop[lab]'.")
    write_text(folder / "answer.md", answer_report.markdown(found, figure))
    write_text(folder / "answer.csv", flat(answer_report.comparisons(found)).render("csv"))
    write_text(folder / "loops.csv", flat(answer_report.tried(found)).render("csv"))
    write_text(folder / "items.csv", answer_report.items(found).render("csv"))
