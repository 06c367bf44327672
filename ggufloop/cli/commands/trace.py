"""`ggufloop trace MODEL -p TEXT`: how far each pass of a loop moves the states, and what each layer would predict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ggufloop.cli import input as lines
from ggufloop.cli import terminal
from ggufloop.cli.context import Opened, context_from_flags, context_options, open_from_flags
from ggufloop.cli.options import loop_options, model_options
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.figures import style
from ggufloop.figures.trace import trace_figure
from ggufloop.files import file_sha256
from ggufloop.generate.complete import encode, prompt_tokens
from ggufloop.measure.trace import LAYER, Point, TokenMean, Trace, trace
from ggufloop.models.template import ChatTemplate
from ggufloop.table import FORMS, Cell, Column, Table

SCHEMA_VERSION = 1

_MOVED = (Column("+/-", ".4f"), Column("cosine", ".5f"), Column("+/-", ".5f"), Column("all as one", ".5f"))
_STEPS = (Column("layers"), Column("pass"), Column("step", ".4f"), *_MOVED)
_CHANGE = (Column("layer"), Column("pass"), Column("residual", ".4f"), *_MOVED)
_LENS = (Column("state"), Column("layer"), Column("pass"), Column("entropy", ".3f"), Column("+/-", ".3f"),
         Column("KL to the end", ".3f"), Column("+/-", ".3f"))  # fmt: skip
_ALL = (Column("state"), Column("layer"), Column("pass"), Column("n"), Column("residual", ".4f"),
        Column("residual_ci", ".4f"), Column("whole_residual", ".4f"), Column("cosine", ".5f"),
        Column("cosine_ci", ".5f"), Column("entropy", ".3f"), Column("entropy_ci", ".3f"), Column("kl", ".3f"),
        Column("kl_ci", ".3f"))  # fmt: skip


def _text(prompt: str | None, file: Path | None) -> str:
    """The prompt of -p or -f. Raises UsageError, GgufloopError."""
    if prompt is not None and file is not None:
        raise UsageError("the prompt is given twice.", "give -p or -f, not both.")
    if prompt is None and file is None:
        raise UsageError("no prompt is given.", "give one with -p, or a text file with -f.")
    text = prompt if file is None else lines.read_file(file)
    if not text:
        raise UsageError(f"{file or 'the prompt'} is empty.", "give a text of some sentences.")
    encode(text, "the prompt")
    return text


def _tokens(opened: Opened, text: str, chat: bool, batch: int) -> list[int]:
    """The prompt as tokens that fit one batch. Raises UsageError, GgufloopError."""
    llm = opened.llm
    if chat:
        template = ChatTemplate.of(llm)
        if template is None:
            raise UsageError("this model has no chat template.", "leave out --chat: the text is then taken as it is.")
        text = template.render([{"role": "user", "content": text}])
    tokens = prompt_tokens(llm, text)
    if len(tokens) > llm.n_ctx():
        raise GgufloopError(
            f"the prompt has {len(tokens)} tokens, and the context holds {llm.n_ctx()}.",
            "give a larger context with -c, or a shorter prompt.",
        )
    if len(tokens) > batch:
        raise GgufloopError(
            f"the prompt has {len(tokens)} tokens; a trace is one batch, which holds {batch}.",
            f"give -b {max(len(tokens), 2048)} -ub {len(tokens)}, or a shorter prompt.",
        )
    return tokens


def _pair(estimate: TokenMean | None) -> tuple[float | None, float | None]:
    return (None, None) if estimate is None else (estimate.mean, estimate.half)


def _change(p: Point) -> list[Cell]:
    return [*_pair(p.residual), *_pair(p.cosine), p.whole_residual]


def _lens(p: Point) -> list[Cell]:
    return [*_pair(p.entropy), *_pair(p.kl)]


def _everything(result: Trace) -> Table:
    """One row per state, all columns: the form for programs."""
    return Table(
        _ALL,
        [
            [
                p.kind,
                p.layer,
                p.evaluation,
                result.tokens,
                *_pair(p.residual),
                p.whole_residual,
                *_pair(p.cosine),
                *_lens(p),
            ]
            for p in result.points
        ],
    )


def _halts(result: Trace, tau: float) -> list[str]:
    """What halt=tau does on this text, a line per unit."""
    n = max(step.evaluation for step in result.steps)
    return [
        f"--halt {tau:g}: {ran} of {n} passes of layers {first}:{last} run."
        for (first, last), ran in result.passes(tau).items()
    ]


def _tables(result: Trace, opened: Opened, tau: float | None) -> str:
    """The form for eyes: what was run, then a table per question."""
    once = "no loop" if result.loop is None else str(result.loop)
    parts = [
        f"model   {opened.path.name}, {opened.llm.n_layer()} layers\n"
        f"loop    {once}\n"
        f"text    {result.tokens} tokens; +/- is a 95 % interval (normal) of a mean over them\n"
    ]
    if result.loop is not None:
        moved = [p for p in result.points if p.kind != LAYER]
        steps = Table(
            _STEPS,
            [[f"{s.first}:{s.last}", s.evaluation, *_change(p)] for s, p in zip(result.steps, moved, strict=True)],
        )
        halts = "".join(f"{line}\n" for line in _halts(result, tau)) if tau is not None else ""
        parts.append(f"How far each pass moves the state of the window (--halt compares the step):\n\n"
                     f"{steps.render('md')}{halts}")  # fmt: skip
        changed = [p for p in result.points if p.kind == LAYER and p.residual is not None]
        change = Table(_CHANGE, [[p.layer, p.evaluation, *_change(p)] for p in changed])
        parts.append(f"Change of each layer's output to the pass before:\n\n{change.render('md')}")
    if result.points[0].entropy is not None:
        read = Table(_LENS, [[p.kind, p.layer, p.evaluation, *_lens(p)] for p in result.points])
        parts.append(f"What each state would predict (logit lens), in nats:\n\n{read.render('md')}")
    return "\n".join(parts)


def _json(result: Trace, opened: Opened, tau: float | None) -> str:
    from ggufloop.engine import ACTIVE

    loop = result.loop
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": opened.path.name,
        "model_sha256": file_sha256(opened.path),
        "patch_id": ACTIVE.patch_id,
        "loop": None if loop is None else str(loop),
        "window": None if loop is None else loop.window,
        "evaluations": 1 if loop is None else loop.tableau().evaluations,
        "layers": opened.llm.n_layer(),
        "n": result.tokens,
        "interval": "mean +/- 1.96 standard errors over tokens",
        "steps": [{"first": s.first, "last": s.last, "pass": s.evaluation, "step": s.size} for s in result.steps],
        "halt": tau,
        "halted_passes": None,
        "states": _everything(result).records(),
    }
    if tau is not None and loop is not None:
        data["halted_passes"] = [
            {"first": first, "last": last, "passes": n} for (first, last), n in result.passes(tau).items()
        ]
    return json.dumps(data, indent=2) + "\n"


@click.command(name="trace")
@model_options
@click.option("-p", "--prompt", metavar="TEXT", help="The text to trace, taken as it is.")
@click.option("-f", "--file", "file", type=click.Path(path_type=Path), metavar="FILE", help="Read the text from FILE.")
@click.option("--chat", is_flag=True, help="Ask the text as a chat message, in the model's chat template.")
@loop_options
@click.option("-o", "--output", "form", default="table", show_default=True, metavar="table|md|csv|json|jsonl",
              help="How to print it; all but 'table' have one row per state.")  # fmt: skip
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE.png",
              help="Draw it too; the suffix says the format. Needs matplotlib (the extra 'lab').")  # fmt: skip
@click.option("--no-lens", is_flag=True, help="Leave out the logit lens: one output matrix per state less.")
@context_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    prompt: str | None,
    file: Path | None,
    chat: bool,
    form: str,
    plot: Path | None,
    no_lens: bool,
    **flags: Any,
) -> None:
    """Show how a loop converges on a text: how far each pass moves the states, and what each layer would predict.

    The text is one batch. Without --window it is the plain model's logit lens alone. docs/convergence.md says how to
    read the numbers.

    \b
    ggufloop trace smollm2-135m --window 12:16 --K 6 -p "The quick brown fox jumps over the lazy dog."
    ggufloop trace smollm2-135m --window 12:16 --K 6 -f notes.txt --plot trace.png
    """
    if form not in ("table", *FORMS):
        raise UsageError(f"output form {form!r} is not known.", nearest(form, ("table", *FORMS)))
    text = _text(prompt, file)
    if no_lens and flags["window"] is None:
        raise UsageError("without --window there is only the logit lens.", "leave out --no-lens, or give a window.")
    settings = context_from_flags(flags)
    if plot is not None:
        style.check_target(plot)
    batch = min(settings.n_batch, settings.n_ubatch)
    opened = open_from_flags(flags, settings, ctx.obj["verbose"])
    tokens = _tokens(opened, text, chat, batch)
    loop = opened.llm.loop
    if loop is None or not loop.is_loop:
        what = "nothing loops" if loop is None else f"{loop} is one evaluation"
        terminal.note(f"{what}: this is the logit lens of the plain model.")
        if no_lens:
            raise UsageError("a plain model has only the logit lens.", "leave out --no-lens, or give --K 2 or more.")
    tau = None if loop is None else loop.halt
    with terminal.progress("tracing ..."):
        result = trace(opened.llm, tokens, lens=not no_lens)
    if plot is not None:
        style.save(trace_figure(result, f"{opened.path.stem}, {result.loop or 'no loop'}", tau), plot)
    if form == "table":
        click.echo(_tables(result, opened, tau), nl=False)
    elif form == "json":
        click.echo(_json(result, opened, tau), nl=False)
    else:
        click.echo(_everything(result).render(form), nl=False)
