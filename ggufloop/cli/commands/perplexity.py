"""`ggufloop perplexity MODEL --text FILE`: llama-perplexity's number, and looped against plain on the same tokens."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import click

from ggufloop.cli import terminal
from ggufloop.cli.context import Opened, batch_options, check_context, check_memory, open_from_flags, reopened
from ggufloop.cli.loop_options import LOOP_FLAGS, loop_options
from ggufloop.cli.options import MODEL_FLAGS, model_from_flags, model_options, split_list
from ggufloop.cli.progress import shown
from ggufloop.cli.texts import text_from_flags, text_options
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.files import atomic_file, file_sha256
from ggufloop.measure import corpus
from ggufloop.measure.perplexity import (
    LEAST_CONTEXT,
    Base,
    Figure,
    KLBase,
    Other,
    TextScore,
    count_chunks,
    perplexity,
    stored_bytes,
    tokenize,
)
from ggufloop.measure.stats import Estimate
from ggufloop.progress import named
from ggufloop.reading import finite
from ggufloop.table import FORMS, Cell, Column, Table

SCHEMA_VERSION = 1
CONTEXT = 512
PLAIN, NONE = "plain", "none"

_COLUMNS = (Column("model"), Column("loop"), Column("n_ctx"), Column("chunks"), Column("n"), Column("PPL", ".4f"),
            Column("+/-", ".5f"), Column("bits/byte", ".4f"), Column("NLL change", ".5f"), Column("low", ".5f"),
            Column("high", ".5f"), Column("KL", ".6f"), Column("KL +/-", ".6f"), Column("same top", ".5f"),
            Column("same top +/-", ".5f"))  # fmt: skip
_CONTEXTS = (Column("n_ctx"), Column("chunks"), Column("n"), Column("PPL", ".4f"), Column("+/-", ".5f"),
             Column("bits/byte", ".4f"))  # fmt: skip
_AGAINST = (Column("base PPL", ".4f"), Column("+/-", ".5f"), Column("NLL change", "+.5f"), Column("low", "+.5f"),
            Column("high", "+.5f"), Column("over"), Column("KL", ".6f"), Column("+/-", ".6f"))  # fmt: skip


def _row(name: str, loop: str, result: TextScore, figure: Figure, compared: bool) -> list[Cell]:
    row: list[Cell] = [name, loop, result.n_ctx, result.chunks, result.n, figure.ppl, figure.error,
                       figure.bits_per_byte]  # fmt: skip
    if not compared or result.against is None:
        return [*row, *[None] * 7]
    change, kl = result.against.change, result.against.kl
    return [*row, change.mean, change.low, change.high, *kl.kl, *kl.same_top]


@dataclasses.dataclass(frozen=True)
class _Done:
    """A result per context, and what was compared: base_path None for a stored base, base '' without one."""

    results: list[TextScore]
    path: Path
    base: str
    base_path: Path | None


def _table(done: _Done) -> Table:
    """One row per context and model: the base first, which has nothing it is compared with."""
    rows = []
    for result in done.results:
        if result.against is not None:
            rows.append(_row(done.base, "plain", result, result.against.base, compared=False))
        rows.append(_row(done.path.name, str(result.loop or "plain"), result, result.model, compared=True))
    return Table(_COLUMNS, rows)


def _verdict(change: Estimate, chunks: int) -> str:
    if chunks < 2:
        return "one chunk says nothing about other texts; score more of them."
    if change.low <= 0 <= change.high:
        return "no difference can be concluded from this text."
    return "the model predicts this text better than the base." if change.high < 0 else "the model predicts it worse."


def _estimate(estimate: Estimate, what: str) -> str:
    return f"{estimate.mean:+.5f} [{estimate.low:+.5f}, {estimate.high:+.5f}] nats per token, n = {estimate.n} {what}"


def _text(done: _Done, text: str) -> str:
    """The form for eyes: llama-perplexity's line and block, and what is ours around them."""
    (result,) = done.results
    n = f"n = {result.n} tokens in {result.chunks} chunks of {result.n_ctx}"
    model = result.model
    out = [f"model   {done.path.name}, {'no loop' if result.loop is None else result.loop}", f"text    {text}, {n}", ""]
    line = f"Final estimate: PPL = {model.ppl:.4f} +/- {model.error:.5f}"
    if result.against is None:
        return "\n".join([*out, line, f"bits per byte: {model.bits_per_byte:.4f}"]) + "\n"
    against = result.against
    out += [f"base    {done.base}: PPL = {against.base.ppl:.4f} +/- {against.base.error:.5f}, "
            f"bits per byte {against.base.bits_per_byte:.4f}",
            line, f"bits per byte: {model.bits_per_byte:.4f}", "",
            "Change of negative log-likelihood, paired, 95 % intervals (below 0: better than the base):"]  # fmt: skip
    if against.over_chunks is not None:
        out.append(f"  over chunks: {_estimate(against.over_chunks, 'chunks')}")
    out += [f"  over tokens: {_estimate(against.over_tokens, 'tokens')}, taken as independent",
            f"  {_verdict(against.change, result.chunks)}", ""]  # fmt: skip
    return "\n".join(out) + "\n" + (against.kl.block() if result.n >= 100 else "under 100 tokens: no KL statistics.\n")


def _contexts_text(done: _Done, text: str) -> str:
    """Several contexts for eyes: a row for each."""
    rows: list[list[Cell]] = []
    for r in done.results:
        rows.append([r.n_ctx, r.chunks, r.n, r.model.ppl, r.model.error, r.model.bits_per_byte])
        if r.against is not None:
            change, figure = r.against.change, r.against.base
            over = "tokens" if r.against.over_chunks is None else "chunks"
            rows[-1] += [figure.ppl, figure.error, change.mean, change.low, change.high, over, *r.against.kl.kl]
    loop, compared = done.results[0].loop, done.results[0].against is not None
    out = [f"model   {done.path.name}, {'no loop' if loop is None else loop}", f"text    {text}"]
    out += [f"base    {done.base}"] if compared else []
    out += ["", Table((*_CONTEXTS, *_AGAINST) if compared else _CONTEXTS, rows).render("md")]
    if compared:
        out += ["NLL change: nats per token against the base, paired, with its 95 % interval over chunks, or, with one",
                "chunk, over tokens taken as independent; +/-: standard error over tokens."]  # fmt: skip
    out.append("Rows score different tokens, those with more text before them in larger contexts.")
    return "\n".join(out) + "\n"


def _json(result: TextScore, done: _Done, text: str) -> Any:
    from ggufloop.engine import ACTIVE

    against = result.against
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": done.path.name,
        "model_sha256": file_sha256(done.path),
        "patch_id": ACTIVE.patch_id,
        "loop": None if result.loop is None else str(result.loop),
        "text": text,
        "n_ctx": result.n_ctx,
        "chunks": result.chunks,
        "n": result.n,
        "n_bytes": result.n_bytes,
        **dataclasses.asdict(result.model),
        "base": None,
    }
    if against is not None:
        block = against.kl
        data["base"] = {
            "model": done.base,
            "sha256": None if done.base_path is None else file_sha256(done.base_path),
            **dataclasses.asdict(against.base),
        }
        data["nll_change"] = {
            "over_tokens": dataclasses.asdict(against.over_tokens),
            "over_chunks": None if against.over_chunks is None else dataclasses.asdict(against.over_chunks),
        }
        data["kl_statistics"] = {
            f.name: v._asdict() if hasattr(v := getattr(block, f.name), "_asdict") else v
            for f in dataclasses.fields(block)
        }
    return finite(data)


def _contexts(text: str) -> list[int]:
    """The contexts of -c, each once. Raises UsageError."""
    words = split_list(text, "-c")
    bad = next((word for word in words if not (word.isascii() and word.isdecimal()) or len(word) > 10), None)
    if bad is not None:
        raise UsageError(f"-c {bad!r} is not a whole number of 0 or more.", "write it like -c 512, or -c 256,512,1024.")
    small = next((word for word in words if 0 < int(word) < LEAST_CONTEXT), None)
    if small is not None:
        raise UsageError(f"-c {small} leaves nothing to score.", f"give {LEAST_CONTEXT} or more.")
    return list(dict.fromkeys(int(word) for word in words))


def _base(
    given: str | None, opened: Opened, flags: dict[str, Any], verbose: bool
) -> tuple[Base | None, str, Opened | None]:
    """What to compare with, what to call it, and the model it is. flags: to open it with, no loop among them."""
    loop = opened.llm.loop
    if given == NONE or (given is None and (loop is None or not loop.is_loop)):
        return None, "", None
    if given in (None, PLAIN):
        if loop is None:
            raise UsageError("the plain model compared with itself differs nowhere.", "give --window as well.")
        return Other(opened.llm), "the plain model", opened
    other = open_from_flags({**flags, "model": given, "model_path": None, "hf": None, "hf_file": None}, verbose)
    return Other(other.llm), other.path.name, other


@contextlib.contextmanager
def _saving(path: Path | None) -> Iterator[BinaryIO | None]:
    """The file of --save-kl-base, which gets its name when the block ends well; None without one."""
    if path is None:
        yield None
        return
    with atomic_file(path) as partial, partial.open("wb") as file:
        yield file
    terminal.note(f"{path} is written, {path.stat().st_size / 1e6:.1f} MB.")


def _check_space(path: Path, needed: int) -> None:
    """Raise GgufloopError if the disk cannot hold what is going to be written to `path`."""
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise GgufloopError(
            f"{path} needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the disk are free.",
            "give fewer --chunks, or a file on another disk.",
        )


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What to score. stored: the file kl_base is, if it is one."""

    contexts: list[int]
    chunks: int | None
    stored: KLBase | None
    kl_base: str | None
    source: corpus.Text
    save: Path | None


def _measure(asked: _Asked, flags: dict[str, Any], path: Path, verbose: bool) -> _Done:
    """Score every context, each in a model opened for it: what llama.cpp computes may depend on the room it has."""
    of_base = {name: value for name, value in flags.items() if name not in (*LOOP_FLAGS, "window")}
    flags = flags | {"model": str(path), "model_path": None, "hf": None, "hf_file": None}
    results: list[TextScore] = []
    tokens: list[int] = []
    opened: Opened | None = None
    with _saving(asked.save) as file:
        for context in asked.contexts:
            now = {"ctx_size": context}
            opened = reopened(opened, flags | now, verbose) if opened else open_from_flags(flags | now, verbose)
            n_ctx = context or opened.llm.n_ctx()
            base: Base | None
            base, name, other = asked.stored, str(asked.kl_base), None
            if asked.stored is None:
                base, name, other = _base(asked.kl_base, opened, of_base | now, verbose)
            if not results:
                tokens = _tokens(asked, opened, name, base)
                n_chunk = count_chunks(tokens, max(n_ctx, *asked.contexts))  # before any is scored
                if asked.save is not None:
                    n = min(n_chunk, asked.chunks or n_chunk)
                    _check_space(asked.save, stored_bytes(n_ctx, opened.llm.n_vocab(), n))
            with shown() as progress:
                told = named(progress, f"-c {n_ctx}") if len(asked.contexts) > 1 else progress
                results.append(perplexity(opened.llm, tokens, n_ctx, asked.chunks, base, told, file))
            if other is not None and other is not opened:
                other.llm.close()
    assert opened is not None
    return _Done(results, opened.path, name, None if other is None else other.path)


def _tokens(asked: _Asked, opened: Opened, base_name: str, base: Base | None) -> list[int]:
    if asked.stored is not None:
        return asked.stored.tokens
    tokens = tokenize(opened.llm, asked.source.text)
    if isinstance(base, Other) and tokenize(base.model, asked.source.text) != tokens:
        raise GgufloopError(
            f"{base_name} cuts the text into other tokens than {opened.path.name}.",
            "compare models of one family, such as quantisations of the same model.",
        )
    return tokens


@click.command(name="perplexity")
@model_options
@text_options
@click.option("-c", "--ctx-size", "ctx_size", metavar="N,...", default=str(CONTEXT), show_default=True,
              help="Tokens of a chunk; half of them are scored. 0: the model's. Several give a row each.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Score the first N chunks (default: all).")
@click.option("--kl-base", metavar="plain|none|MODEL|FILE",
              help="Compare with the plain model (default of a loop), another model, or a file that llama-perplexity "
                   "wrote with --kl-divergence-base, which brings its own text and -c.")  # fmt: skip
@click.option("--save-kl-base", "save", type=click.Path(path_type=Path), metavar="FILE",
              help="Write this model's distributions, looped if it is, to such a file: 2 bytes for each token of the "
                   "vocabulary at each token scored.")  # fmt: skip
@loop_options
@click.option("-o", "--output", "form", default="text", show_default=True, metavar="text|md|csv|json|jsonl",
              help="How to print it.")  # fmt: skip
@batch_options
@click.pass_context
def command(
    ctx: click.Context,
    /,
    text: str | None,
    dataset: str | None,
    chunks: int | None,
    kl_base: str | None,
    save: Path | None,
    form: str,
    **flags: Any,
) -> None:
    """Perplexity of a text, by llama-perplexity's protocol: chunks of -c tokens, their second halves scored.

    With --window, looped and plain are scored on the same tokens, and the change is printed with its interval, followed
    by llama-perplexity's KL statistics (Q: looped, base: plain; its +/- are single standard errors).

    \b
    ggufloop perplexity smollm2-135m --text notes.txt
    ggufloop perplexity smollm2-135m --window 12:16 --K 3 --text pydoc --chunks 20
    ggufloop perplexity small-Q4_K_M.gguf --kl-base small-F16.gguf --text pydoc
    ggufloop perplexity smollm2-135m --window 12:16 --text pydoc -c 256,512,1024
    """
    from ggufloop.models.info import describe

    if form not in ("text", *FORMS):
        raise UsageError(f"output form {form!r} is not known.", nearest(form, ("text", *FORMS)))
    contexts = _contexts(flags["ctx_size"])
    if save is not None and len(contexts) > 1:
        raise UsageError("--save-kl-base writes the chunks of one context.", "give one -c.")
    check_context(flags)
    verbose = ctx.obj["verbose"]
    stored = KLBase.open(Path(kl_base), chunks) if kl_base is not None and KLBase.is_one(Path(kl_base)) else None
    if stored is not None:
        if text is not None or dataset is not None or contexts not in ([CONTEXT], [stored.n_ctx]):
            raise UsageError(
                f"{kl_base} brings its own text and -c {stored.n_ctx}.", "leave out --text, --hf-dataset and -c."
            )
        contexts = [stored.n_ctx]
    source = (
        text_from_flags(text, dataset, flags["offline"]) if stored is None else corpus.Text(f"that of {kl_base}", "")
    )
    path = model_from_flags(*(flags[name] for name in MODEL_FLAGS))
    if len(contexts) > 1 and 0 in contexts:
        contexts = list(dict.fromkeys(c or describe(path).n_ctx_train for c in contexts))
    check_memory([path], flags | {"ctx_size": max(contexts)})
    asked = _Asked(contexts, chunks, stored, kl_base, source, save)
    done = _measure(asked, flags, path, verbose)
    several = len(done.results) > 1
    if form == "text":
        click.echo(_contexts_text(done, source.name) if several else _text(done, source.name), nl=False)
    elif form == "json":
        data = [_json(result, done, source.name) for result in done.results]
        click.echo(json.dumps(data if several else data[0], indent=2))
    else:
        click.echo(_table(done).render(form), nl=False)
