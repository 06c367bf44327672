"""`ggufloop eval MODEL --tasks a,b`: lm-eval's tasks under a loop; with --paired, the loop against the plain model."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from ggufloop.cli import terminal
from ggufloop.cli.context import Opened, context_from_flags, context_options, open_from_flags
from ggufloop.cli.options import loop_options, model_options
from ggufloop.errors import UsageError, nearest
from ggufloop.files import file_sha256, write_error
from ggufloop.tasks.questions import MAKERS

if TYPE_CHECKING:
    from ggufloop.measure.tasks import Comparison, Run

SCHEMA_VERSION = 1
_FORMS = ("table", "json")


def _tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(before + comma + name) for name in MAKERS if name.startswith(last)]


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of questions answered, on a terminal only."""
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from tqdm import tqdm

    with tqdm(desc=what, unit="request", file=sys.stderr, disable=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


def _comparison(name: str, c: Comparison) -> str:
    """The paired block of one task, for eyes."""
    gold = "not scored" if c.gold is None else f"{c.gold.show('+.4f')}  (mean change in nats, paired bootstrap)"
    lines = [
        f"{name}: looped against plain on the same questions (95 % intervals)",
        f"  plain accuracy       {c.plain.show()}  (Wilson)",
        f"  looped accuracy      {c.looped.show()}  (Wilson)",
        f"  difference           {c.difference.show('+.4f')}  (paired bootstrap)",
        f"  flips                {c.gained} became right, {c.lost} became wrong; McNemar exact p = {c.p:.4g}",
        f"  right answer's logp  {gold}",
    ]
    if not c.gained + c.lost:
        lines.append(f"  no question flipped: the share that does is below {c.flips_below:.4f}.")
    elif c.needed is None:
        lines.append("  both answer equally many questions right.")
    else:
        size = f"{abs(c.difference.mean):.4f}, {c.needed} questions would see it with 80 % power"
        lines.append(f"  if the true difference is {size}.")
    if not c.conclusive:
        lines.append(f"  {c.n} questions do not tell the two apart.")
    return "\n".join(lines) + "\n"


def _compare(plain: Run, looped: Run) -> dict[str, Comparison]:
    """What can be compared, by task; a note says what cannot."""
    from ggufloop.measure.tasks import compare

    compared = {}
    for name, items in plain.items.items():
        if len(items) < 2:
            terminal.note(f"{name} has {len(items)} questions that are right or wrong: nothing to compare.")
        else:
            compared[name] = compare(items, looped.items[name])
    return compared


def _estimate(e: Any) -> dict[str, float | int] | None:
    return None if e is None else {"mean": e.mean, "low": e.low, "high": e.high, "n": e.n, "level": e.level}


def _json(opened: Opened, runs: dict[str, Run], compared: dict[str, Comparison], settings: dict[str, Any]) -> str:
    from ggufloop.engine import ACTIVE
    from ggufloop.measure.tasks import SEED

    data = {
        "schema_version": SCHEMA_VERSION,
        "model": opened.path.name,
        "model_sha256": file_sha256(opened.path),
        "patch_id": ACTIVE.patch_id,
        "seed": SEED,
        **settings,
        "runs": [
            {
                "loop": loop,
                "results": run.results["results"],
                "versions": run.results["versions"],
                "n": {name: len(items) for name, items in run.items.items()},
            }
            for loop, run in runs.items()
        ],
        "paired": {
            name: {
                "n": c.n,
                "plain": _estimate(c.plain),
                "looped": _estimate(c.looped),
                "difference": _estimate(c.difference),
                "gained": c.gained,
                "lost": c.lost,
                "mcnemar_p": c.p,
                "gold_logprob": _estimate(c.gold),
                "n_for_80_percent_power": c.needed,
            }
            for name, c in compared.items()
        },
    }
    return json.dumps(_finite(data), indent=2, default=str) + "\n"


def _finite(value: Any) -> Any:
    """NaN and infinity, which JSON has no word for, become null."""
    if isinstance(value, dict):
        return {str(key): _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_samples(path: Path, runs: dict[str, Run]) -> None:
    try:
        with path.open("w", encoding="utf-8") as out:
            for loop, run in runs.items():
                for sample in run.samples:
                    out.write(json.dumps(_finite({"loop": loop, **sample}), default=str, ensure_ascii=False) + "\n")
    except OSError as e:
        raise write_error(e, path) from e


@click.command(name="eval")
@model_options
@click.option("--tasks", "names", metavar="NAME,...", shell_complete=_tasks,
              help=f"Tasks, groups or tags of lm-eval, or, without a network, {', '.join(MAKERS)}.")  # fmt: skip
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Only the first N questions of each task.")
@click.option("--apply-chat-template", "chat", is_flag=True, help="Ask in the model's chat template.")
@click.option("--paired", is_flag=True, help="Run plain and looped on the same questions and compare them.")
@click.option("--log-samples", "log", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
              help="Write each question with its answers and their scores to FILE, one per line.")  # fmt: skip
@loop_options
@click.option("-o", "--output", "form", default="table", show_default=True, metavar="table|json", help="How to print.")
@context_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    names: str | None,
    limit: int | None,
    chat: bool,
    paired: bool,
    log: Path | None,
    form: str,
    **flags: Any,
) -> None:
    """Run tasks of lm-eval, looped or not. Needs the extra 'eval'.

    The answers of a question are scored after its prompt, which is read once; docs/tasks.md says what that means for a
    loop and what the tasks that ship here ask.

    \b
    ggufloop eval smollm2-135m --tasks wordnet_definitions --limit 500
    ggufloop eval smollm2-135m --tasks mmlu_dev,brackets --window 12:16 --K 3 --paired
    """
    if form not in _FORMS:
        raise UsageError(f"output form {form!r} is not known.", nearest(form, _FORMS))
    if names is None:
        raise UsageError("no task is named.", f"name some with --tasks: {', '.join(MAKERS)}, or any of lm-eval's.")
    if paired and flags["window"] is None:
        raise UsageError("--paired compares a loop with the plain model, and no loop is given.", "give --window A:B.")
    settings = context_from_flags(flags)
    if log is not None and not log.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {log.absolute().parent}.", "make it, or choose another.")
    from ggufloop.measure.tasks import evaluate, load_tasks

    with terminal.progress("reading the tasks ..."):
        tasks = load_tasks([name.strip() for name in names.split(",")])
    opened = open_from_flags(flags, settings, ctx.obj["verbose"])
    loop = opened.llm.loop
    if paired and (loop is None or not loop.is_loop):
        raise UsageError(f"the loop {loop} is one evaluation, the plain model.", "give --K 2 or more.")
    runs: dict[str, Run] = {}
    for spec in [None, loop] if paired else [loop]:
        opened.llm.set_loop(spec)
        with _progress(terminal.describe(spec)) as progress:
            runs["plain" if spec is None else str(spec)] = evaluate(opened.llm, tasks, limit, chat, progress)
    if log is not None:
        _write_samples(log, runs)
    compared = _compare(*runs.values()) if paired else {}
    if form == "json":
        click.echo(_json(opened, runs, compared, {"limit": limit, "chat_template": chat}), nl=False)
        return
    for name, run in runs.items():
        click.echo(f"{opened.path.name}, {name}\n\n{run.table()}")
    for name, comparison in compared.items():
        click.echo(_comparison(name, comparison))
