"""`ggufloop sweep MODEL`: many loops against plain on the same items, a verdict from items that chose nothing."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click

from ggufloop.backend import library as backend
from ggufloop.cli import terminal
from ggufloop.cli.context import batch_options, check_context, check_loops, check_memory, engine_settings
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_list_options, loop_suggestion, loops_from_flags
from ggufloop.cli.options import MODEL_FLAGS, model_from_flags, model_options, number_ranges, split_list
from ggufloop.cli.progress import shown
from ggufloop.cli.texts import text_from_flags, text_options
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.files import file_sha256
from ggufloop.loop import LoopSpec
from ggufloop.measure import corpus
from ggufloop.measure.items import Measure, TaskMeasure, TextMeasure
from ggufloop.measure.journal import Journal
from ggufloop.measure.selection import FINALISTS, HELPS, LEAST_ITEMS, NONE_HELPS, WORTH
from ggufloop.measure.sweep import Outcome, check_record, items_within, sweep
from ggufloop.models.gguf import read_header
from ggufloop.models.info import layer_count
from ggufloop.progress import duration
from ggufloop.table import Cell, Column, Table

SCHEMA_VERSION = 1
FORMS = ("text", "md", "csv", "json", "jsonl")
CONTEXT, TASK_CONTEXT = 512, 2048
WIDTH = "4"
SEED = 1234
LEVEL = 0.05

_COLUMNS = (Column("measure"), Column("loop"), Column("layers", ".2f"), Column("n", "d"), Column("gain", "+.5f"),
            Column("low", "+.5f"), Column("high", "+.5f"), Column("held-out n", "d"), Column("held-out gain", "+.5f"),
            Column("held-out low", "+.5f"), Column("held-out high", "+.5f"), Column("p (Holm)", ".3g"))  # fmt: skip


# the loops


def _grid(start: str | None, width: str | None, n_layer: int) -> str:
    """The windows of all starts and widths that fit the model, as --window takes them."""
    widths = number_ranges(width or WIDTH, "--width")
    starts = number_ranges(start, "--start") if start else list(range(1, n_layer - 1, max(1, n_layer // 15)))
    if 0 in widths or 0 in starts:
        flag = "--width" if 0 in widths else "--start"
        raise UsageError(f"{flag} 0 makes no window.", "a window has a layer at least, and layer 0 cannot be looped.")
    windows = [f"{a}:{a + w}" for w in widths for a in starts if a + w <= n_layer - 1]
    if not windows:
        raise UsageError(
            f"no window of --start {start or 'any'} and --width {width or WIDTH} fits a model of {n_layer} layers.",
            f"windows lie in 1:{n_layer - 1}.",
        )
    return ",".join(dict.fromkeys(windows))


def _loops(path: Path, flags: dict[str, Any]) -> list[LoopSpec]:
    """Every loop the flags mean that this model can run. What is left out is said in one line."""
    start, width, window = flags.pop("start"), flags.pop("width"), flags.pop("window")
    header = read_header(path)
    n_layer = layer_count(header, header.text("general.architecture") or "unknown")
    if window is not None and (start or width):
        raise UsageError("windows are given twice, by --window and by --start or --width.", "leave out one.")
    refused: list[UsageError] = []
    asked = loops_from_flags(
        window or _grid(start, width, n_layer),
        loop_suggestion(path),
        refused,
        **{name: flags.pop(name) for name in LOOP_FLAGS},
    )
    loops = []
    for loop in dict.fromkeys(asked):
        try:
            check_loops(path, [loop])
        except UsageError as e:
            refused.append(e)
        else:
            if loop.is_loop:
                loops.append(loop)
    if refused and (window is not None or not loops):
        raise refused[0]
    if refused:
        terminal.note(f"{len(refused)} of {len(asked) + len(refused)} combinations are no loop of this model, such as: "
                      f"{refused[0].message}")  # fmt: skip
    if not loops:
        raise UsageError("every loop asked for is one evaluation, the plain model.", "give --K 2 or more.")
    return loops


# what is measured


def _measures(llm: Any, text: corpus.Text | None, tasks: str | None, chunks: int | None, limit: int | None, n_ctx: int,
              chat: bool) -> list[Measure]:  # fmt: skip
    measures: list[Measure] = []
    if text is not None:
        measures.append(TextMeasure(llm, text, n_ctx, chunks))
    with terminal.progress("reading the tasks ..."):
        measures += [TaskMeasure(name, limit, chat) for name in (split_list(tasks, "--tasks") if tasks else [])]
    names = [m.name for m in measures]
    if len(set(names)) < len(names):
        raise UsageError(f"a task is named twice in {tasks}.", "name each once.")
    return measures


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text)
    if match is None or float(match[1]) == 0:
        raise UsageError(f"--budget {text!r} is no time.", "write it like 90s, 30m or 2h.")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 60}[match[2]]


def _within_budget(llm: Any, loops: list[LoopSpec], measures: list[Measure], seconds: float, racing: bool) -> None:
    """Lower each measure's n to what its share of the time allows, by timing the plain model on a few items."""
    import time

    for measure in measures:
        few = list(range(min(4, measure.n)))
        measure.score(llm, few[:1])  # the first is slower
        begun = time.perf_counter()
        measure.score(llm, few)
        per_item = (time.perf_counter() - begun) / len(few)
        measure.n = items_within(seconds / len(measures), per_item, loops, llm.n_layer(), measure, racing=racing)


# what is printed


def rows(outcome: Outcome, cost: Callable[[str], float]) -> list[list[Cell]]:
    """One row per loop, in the order of the selection."""
    decision = outcome.decision
    held_out = {c.name: c for c in decision.finalists}
    gains = {s.name: s.gain for s in decision.selection}
    found: list[list[Cell]] = []
    for name in gains or held_out:
        gain, end = gains.get(name), held_out.get(name)
        first: list[Cell] = [None] * 4 if gain is None else [gain.n, gain.mean, gain.low, gain.high]
        last: list[Cell] = (
            [None] * 5 if end is None else [end.gain.n, end.gain.mean, end.gain.low, end.gain.high, end.p]
        )
        found.append([outcome.measure.name, name, cost(name), *first, *last])
    return found


def verdict(outcome: Outcome) -> str:
    """The decision in words, with the numbers behind it."""
    d, m = outcome.decision, outcome.measure
    if d.verdict == HELPS:
        won = next(c for c in d.finalists if c.name == d.winner)
        return f"{d.winner} helps: {won.gain.show('+.5f')} held-out {m.item}s, p = {won.p:.3g} after Holm's correction."
    harm = [c for c in d.finalists if c.gain.high < 0]
    tail = ""
    if harm:
        who = "all finalists do" if len(harm) == len(d.finalists) else f"{len(harm)} of {len(d.finalists)} finalists do"
        tail = f" Worse than plain: {who}."
    if d.verdict == NONE_HELPS:
        most = max(c.gain.high for c in d.finalists)
        return (f"no window helps: the best finalist gains {most:+.5f} at most, less than the {d.worth:g} that would "
                f"matter.{tail}")  # fmt: skip
    needed = f"about {d.n_needed} {m.item}s in all would find a gain of {d.worth:g} with 80 % power"
    few = f" ({d.n_confirm} held-out {m.item}s are under {LEAST_ITEMS})" if d.n_confirm < LEAST_ITEMS else ""
    return f"not enough data to tell{few}: {needed}.{tail}"


def _section(outcome: Outcome, cost: Callable[[str], float]) -> str:
    """One measure for eyes."""
    d, m, spent = outcome.decision, outcome.measure, outcome.cost
    head = [f"## {m.name}: {m.n} {m.item}s, gain in {m.unit} over plain ({outcome.plain:.5f}); above 0 is better", ""]
    if d.selection:
        head += [f"n: {m.item}s of the selection half ({d.n_select}) a loop was scored on, worse halves dropped early. "
                 "The best gains of many are too good to be quoted.", f"held-out: the other {d.n_confirm}, which chose "
                 f"nothing; their intervals hold for all {len(d.finalists)} finalists together.", ""]  # fmt: skip
    kept = [i for i in range(1, len(_COLUMNS)) if d.selection or not 3 <= i <= 6]  # a single loop is not selected
    shown = Table(tuple(_COLUMNS[i] for i in kept), [[row[i] for i in kept] for row in rows(outcome, cost)]).render(
        "md"
    )
    clock = spent.seconds / max(spent.plain_seconds, 1e-4)  # a journal rounds to that
    tail = [
        "",
        f"Verdict: {verdict(outcome)}",
        "",
        f"Cost: {spent.spent:.1f} plain runs by layer count, {clock:.1f} by the clock"
        f" ({duration(spent.seconds)}); each loop alone with its own plain run: {spent.alone:.1f}.",
        "",
    ]
    return "\n".join(head) + "\n" + shown + "\n".join(tail)


def _record(outcome: Outcome, loops: Sequence[LoopSpec]) -> dict[str, Any]:
    d = dataclasses.asdict(outcome.decision)
    cost = dataclasses.asdict(outcome.cost)
    return {"measure": outcome.measure.name, "n": outcome.measure.n, **outcome.measure.identity(),
            "unit": outcome.measure.unit, "plain": outcome.plain, **d, "cost": cost,
            "words": verdict(outcome)}  # fmt: skip


# the command


@click.command(name="sweep")
@model_options
@click.option(
    "--start",
    metavar="N,A:B,...",
    help="First layers of the windows, without --window: 8,10,12 or 8:20:2 (half-open; "
    "default: about 15, spread over the model).",
)
@click.option("--width", metavar="N,A:B,...", help=f"Their widths (default {WIDTH}); 1:7 is 1 to 6.")
@loop_list_options
@text_options
@click.option("--tasks", metavar="NAME,...", help="Measure accuracy on tasks of lm-eval, one verdict for each.")
@click.option("-c", "--ctx-size", "ctx_size", type=click.IntRange(min=4), metavar="N", default=CONTEXT,
              show_default=True, help="Tokens of a chunk of the text; half of them are scored.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Use the first N chunks (default: all).")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use the first N questions of each task.")
@click.option("--apply-chat-template", "chat", is_flag=True, help="Ask in the model's chat template.")
@click.option("--budget", metavar="TIME", help="Use as many items as fit into this time: 90s, 30m, 2h.")
@click.option("--no-racing", is_flag=True, help="Score every loop on the whole selection half.")
@click.option("--worth", type=float, default=WORTH, show_default=True, metavar="X",
              help="The smallest gain that would matter.")  # fmt: skip
@click.option("--finalists", type=click.IntRange(min=1), default=FINALISTS, show_default=True, metavar="N",
              help="How many of the loops are tested on the held-out items.")  # fmt: skip
@click.option("-s", "--seed", type=click.IntRange(min=0), default=SEED, show_default=True, help="Of the random halves.")
@click.option("--journal", "journal_path", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.jsonl",
              help="Keep every score here and go on from it (default: sweep-MODEL.jsonl).")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE.png",
              help="Draw gains over start, width and K; with several measures one file each.")  # fmt: skip
@click.option("--save", is_flag=True, help="Write a confirmed loop into your models.toml, for --window auto.")
@click.option("-o", "--output", "form", default="text", show_default=True, metavar="|".join(FORMS),
              help="How to print it.")  # fmt: skip
@batch_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    text: str | None,
    dataset: str | None,
    tasks: str | None,
    chunks: int | None,
    limit: int | None,
    chat: bool,
    budget: str | None,
    no_racing: bool,
    worth: float,
    finalists: int,
    seed: int,
    journal_path: Path | None,
    plot: Path | None,
    save: bool,
    form: str,
    **flags: Any,
) -> None:
    """Which window, K, solver, beta, mode or kv helps this model? Every loop is scored against plain on the same items.

    One half of the items, drawn at random, chooses: the worse loops are dropped early. The other half tests the
    finalists, with Holm's correction. "No window helps" and "not enough data" are answers. Scores are kept in a file;
    after Ctrl-C the same command goes on.

    \b
    ggufloop sweep smollm2-135m --start 8:20:2 --width 2,4 --K 2,3 --text pydoc --chunks 120
    ggufloop sweep smollm2-135m --window 10:14,12:16 --K 2:5 --kv first,frozen --tasks wordnet_definitions
    """
    if form not in FORMS:
        raise UsageError(f"output form {form!r} is not known.", nearest(form, FORMS))
    has_text = text is not None or dataset is not None
    if not has_text and tasks is None:
        raise UsageError("nothing to measure is given.", "give --text FILE (or pydoc), --tasks NAME, or both.")
    if save and tasks is None:
        terminal.note("a gain in log-probability on one text says little about answers; --tasks measures those.")
    seconds = None if budget is None else _seconds(budget)
    check_context(flags | {"ctx_size": TASK_CONTEXT})
    if plot is not None:
        from ggufloop.figures import style

        style.check_target(plot)
    source = text_from_flags(text, dataset, flags["offline"]) if has_text else None
    path = model_from_flags(*(flags.pop(name) for name in MODEL_FLAGS))
    n_ctx = flags["ctx_size"]
    loops = _loops(path, flags)
    flags["ctx_size"] = max(n_ctx if has_text else 0, TASK_CONTEXT if tasks else 0)
    check_memory([path], flags, loops)
    library = backend.activate()
    from ggufloop.engine import LoopedLlama
    from ggufloop.measure.multiple_choice import SEQUENCES

    settings = engine_settings(path, flags) | {"n_seq": SEQUENCES if tasks else 1}

    with terminal.progress(f"loading {path.name} ..."):
        llm = LoopedLlama(path, verbose=ctx.obj["verbose"], **settings)
    measures = _measures(llm, source, tasks, chunks, limit, n_ctx, chat)
    journal_path = journal_path or Path(f"sweep-{path.stem}.jsonl")
    header: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": path.name,
        "model_sha256": file_sha256(path),
        "patch_id": library.patch_id,
        "settings": {"type_k": flags["type_k"], "type_v": flags["type_v"], "flash_attn": settings["flash_attn"],
                     "batch_size": flags["batch_size"], "ubatch_size": flags["ubatch_size"]},
        "measures": [m.identity() for m in measures],
    }  # fmt: skip
    outcomes: list[Outcome] = []
    with Journal.open(journal_path, header, partial(check_record, measures)) as journal:
        if journal.dropped:
            terminal.note(journal.dropped)
        planned = next((r["items"] for r in journal.records if "budget" in r and r["budget"] == budget), None)
        if seconds is not None and planned is None:
            _within_budget(llm, loops, measures, seconds, not no_racing)
            journal.add({"budget": budget, "items": [m.n for m in measures]})
        elif planned is not None:
            for measure, n in zip(measures, planned, strict=True):
                measure.n = n
        try:
            with shown() as progress:
                outcomes += [
                    sweep(llm, loops, measure, journal, seed=seed, finalists=finalists, racing=not no_racing,
                          worth=worth, level=LEVEL / len(measures), progress=progress)
                    for measure in measures
                ]  # fmt: skip
        except KeyboardInterrupt:
            click.echo(f"stopped; {journal_path} keeps what is done, and the same command goes on.", err=True)
            raise
    _print(form, path, loops, outcomes, header, seed, llm.n_layer())
    if plot is not None:
        _draw(plot, path, loops, outcomes)
    if save:
        _save(path, loops, outcomes)


def _print(form: str, path: Path, loops: list[LoopSpec], outcomes: list[Outcome], header: dict[str, Any], seed: int,
           n_layer: int) -> None:  # fmt: skip
    costs = {str(loop): loop.relative_cost(n_layer) for loop in loops}
    if form == "json":
        data = {**header, "seed": seed, "loops": list(costs), "results": [_record(o, loops) for o in outcomes]}
        del data["measures"]
        click.echo(json.dumps(data, indent=2))
    elif form == "text":
        click.echo(f"# {path.name}: {len(loops)} loop{'s' if len(loops) > 1 else ''} against plain, seed {seed}\n")
        click.echo("\n".join(_section(o, costs.__getitem__) for o in outcomes), nl=False)
    else:
        table = [row for o in outcomes for row in rows(o, costs.__getitem__)]
        click.echo(Table(_COLUMNS, table).render(form), nl=False)
        for outcome in outcomes:
            click.echo(f"{outcome.measure.name}: {verdict(outcome)}", err=True)


def _draw(plot: Path, path: Path, loops: list[LoopSpec], outcomes: list[Outcome]) -> None:
    from ggufloop.figures import style
    from ggufloop.figures.sweep import heat_map

    for outcome in outcomes:
        target = plot if len(outcomes) == 1 else plot.with_stem(f"{plot.stem}-{Path(outcome.measure.name).stem}")
        style.save(heat_map(outcome, loops, path.name), target)
        terminal.note(f"drew {target}.")


def _save(path: Path, loops: list[LoopSpec], outcomes: list[Outcome]) -> None:
    """Write what the last measure with a winner confirmed; refuse where another measure shows harm."""
    from datetime import date

    from ggufloop.models import registry

    won = [o for o in outcomes if o.decision.winner is not None]
    if not won:
        terminal.note("nothing was confirmed, so nothing is saved.")
        return
    outcome = won[-1]
    name = outcome.decision.winner
    harmed = [o.measure.name for o in outcomes for c in o.decision.finalists if c.name == name and c.gain.high < 0]
    if harmed:
        raise GgufloopError(f"{name} helps on {outcome.measure.name} and harms on {harmed[0]}: it is not saved.",
                            "choose with --tasks or --text alone.")  # fmt: skip
    gain = next(c.gain for c in outcome.decision.finalists if c.name == name)
    origin = f"sweep of {date.today()}: {gain.show('+.4f')} held-out {outcome.measure.item}s of {outcome.measure.name}"
    where = registry.save_loop(path, next(loop for loop in loops if str(loop) == name), origin)
    terminal.note(f"saved {name} as --window auto of {path.name} in {where}.")
