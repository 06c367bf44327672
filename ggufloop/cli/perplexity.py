"""`ggufloop perplexity MODEL --text FILE`: llama-perplexity's number, and looped against plain on the same tokens."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import click

from ggufloop import corpus
from ggufloop.cli.context import Opened, batch_options, check_context, open_from_flags
from ggufloop.cli.options import LOOP_FLAGS, loop_options, model_from_flags, model_options
from ggufloop.cli.progress import download_progress
from ggufloop.digest import file_sha256
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.perplexity import LEAST_CONTEXT, Base, Figure, Other, Result, Stored, perplexity, tokenize
from ggufloop.stats import Estimate
from ggufloop.table import FORMS, Cell, Column, Table

SCHEMA_VERSION = 1
CONTEXT = 512
PLAIN, NONE = "plain", "none"

_COLUMNS = (Column("model"), Column("loop"), Column("n_ctx"), Column("chunks"), Column("n"), Column("PPL", ".4f"),
            Column("+/-", ".5f"), Column("bits/byte", ".4f"), Column("NLL change", ".5f"), Column("low", ".5f"),
            Column("high", ".5f"), Column("KL", ".6f"), Column("KL +/-", ".6f"), Column("same top", ".5f"),
            Column("same top +/-", ".5f"))  # fmt: skip


def _row(name: str, loop: str, result: Result, figure: Figure, compared: bool) -> list[Cell]:
    row: list[Cell] = [name, loop, result.n_ctx, result.chunks, result.n, figure.ppl, figure.error,
                       figure.bits_per_byte]  # fmt: skip
    if not compared or result.against is None:
        return [*row, *[None] * 7]
    change, kl = result.against.change, result.against.kl
    return [*row, change.mean, change.low, change.high, *kl.kl, *kl.same_top]


def _table(result: Result, name: str, base: str) -> Table:
    """One row per model: the base first, which has nothing it is compared with."""
    rows = [_row(name, str(result.loop or "plain"), result, result.model, compared=True)]
    if result.against is not None:
        rows.insert(0, _row(base, "plain", result, result.against.base, compared=False))
    return Table(_COLUMNS, rows)


def _verdict(change: Estimate, chunks: int) -> str:
    if chunks < 2:
        return "one chunk says nothing about other texts; score more of them."
    if change.low <= 0 <= change.high:
        return "no difference can be concluded from this text."
    return "the model predicts this text better than the base." if change.high < 0 else "the model predicts it worse."


def _estimate(estimate: Estimate, what: str) -> str:
    return f"{estimate.mean:+.5f} [{estimate.low:+.5f}, {estimate.high:+.5f}] nats per token, n = {estimate.n} {what}"


def _text(result: Result, name: str, base: str, text: str) -> str:
    """The form for eyes: llama-perplexity's line and block, and what is ours around them."""
    n = f"n = {result.n} tokens in {result.chunks} chunks of {result.n_ctx}"
    model = result.model
    out = [f"model   {name}, {'no loop' if result.loop is None else result.loop}", f"text    {text}, {n}", ""]
    line = f"Final estimate: PPL = {model.ppl:.4f} +/- {model.error:.5f}"
    if result.against is None:
        return "\n".join([*out, line, f"bits per byte: {model.bits_per_byte:.4f}"]) + "\n"
    against = result.against
    out += [f"base    {base}: PPL = {against.base.ppl:.4f} +/- {against.base.error:.5f}, "
            f"bits per byte {against.base.bits_per_byte:.4f}",
            line, f"bits per byte: {model.bits_per_byte:.4f}", "",
            "Change of negative log-likelihood, paired, 95 % intervals (below 0: better than the base):"]  # fmt: skip
    if against.over_chunks is not None:
        out.append(f"  over chunks: {_estimate(against.over_chunks, 'chunks')}")
    out += [f"  over tokens: {_estimate(against.over_tokens, 'tokens')}, taken as independent",
            f"  {_verdict(against.change, result.chunks)}", ""]  # fmt: skip
    return "\n".join(out) + "\n" + (against.kl.block() if result.n >= 100 else "under 100 tokens: no KL statistics.\n")


def _clean(value: Any) -> Any:
    """JSON has no word for nan."""
    if isinstance(value, dict):
        return {str(k): _clean(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _json(result: Result, opened: Opened, base: str, base_path: Path | None, text: str) -> str:
    from ggufloop.engine import ACTIVE

    against = result.against
    data: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "model": opened.path.name,
        "model_sha256": file_sha256(opened.path),
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
            "model": base,
            "sha256": None if base_path is None else file_sha256(base_path),
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
    return json.dumps(_clean(data), indent=2) + "\n"


class _Progress:
    """One line on a terminal that follows the chunks."""

    def __call__(self, done: int, total: int, ppl: float) -> None:
        if sys.stderr.isatty():
            click.echo(f"\rchunk {done}/{total}, PPL {ppl:.4f} ", nl=done == total, err=True)


def _source(text: str | None, dataset: str | None, offline: bool) -> corpus.Text:
    if (text is None) == (dataset is None):
        what = "no text is given." if text is None else "the text is given twice."
        raise UsageError(what, f"give --text FILE, --text {' or --text '.join(corpus.NAMED)}, or --hf-dataset.")
    if text is not None:
        return corpus.local(text)
    assert dataset is not None
    with download_progress() as progress:
        return corpus.hub_text(dataset, offline, progress)


def _check_memory(path: Path, flags: dict[str, Any]) -> None:
    """Raise GgufloopError if the K/V cache cannot fit: Linux hands out memory it has not, and ends the process."""
    from ggufloop import backend
    from ggufloop.inspect import KV_PREDICTED, describe, plain_kv_bytes

    meminfo, info = Path("/proc/meminfo"), describe(path)
    elsewhere = flags["rpc_servers"] or backend.locate().name not in ("", "cpu")
    if elsewhere or not meminfo.is_file() or info.architecture not in KV_PREDICTED:
        return
    found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
    flash = flags["flash_attn"] != "off"
    needed = sum(plain_kv_bytes(info, flags["ctx_size"], flags["type_k"], flags["type_v"], flash_attn=flash))
    if found is not None and needed > 1024 * int(found[1]):
        raise GgufloopError(
            f"the K/V cache of {flags['ctx_size'] or info.n_ctx_train} tokens needs {needed / 1e9:.1f} GB, "
            f"and {int(found[1]) * 1024 / 1e9:.1f} GB of memory are free.",
            "give a smaller -c.",
        )


def _base(
    given: str | None, opened: Opened, flags: dict[str, Any], verbose: bool
) -> tuple[Base | None, str, Path | None]:
    """What to compare with, what to call it, and its file. flags: to open it with, no loop among them."""
    loop = opened.llm.loop
    if given == NONE or (given is None and (loop is None or not loop.is_loop)):
        return None, "", None
    if given in (None, PLAIN):
        if loop is None:
            raise UsageError("the plain model compared with itself differs nowhere.", "give --window as well.")
        return Other(opened.llm), "the plain model", opened.path
    other = open_from_flags({**flags, "model": given, "model_path": None, "hf": None}, verbose)
    return Other(other.llm), other.path.name, other.path


@click.command(name="perplexity")
@model_options
@click.option("--text", "-f", "--file", "text", metavar="FILE|pydoc|sdist-docs",
              help="The text: a UTF-8 file, Python's own help, or llama.cpp's documentation.")  # fmt: skip
@click.option("--hf-dataset", "dataset", metavar="wikitext|USER/REPO:FILE",
              help="Score a text file of a Hugging Face data set; ARCHIVE.zip:MEMBER reads a zip's.")  # fmt: skip
@click.option("-c", "--ctx-size", "ctx_size", type=click.IntRange(min=0), metavar="N", default=CONTEXT,
              show_default=True, help="Tokens of a chunk; half of them are scored. 0: the model's.")  # fmt: skip
@click.option("--chunks", type=click.IntRange(min=1), metavar="N", help="Score the first N chunks (default: all).")
@click.option("--kl-base", metavar="plain|none|MODEL|FILE",
              help="Compare with the plain model (default of a loop), another model, or a file that llama-perplexity "
                   "wrote with --kl-divergence-base, which brings its own text and -c.")  # fmt: skip
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
    """
    if form not in ("text", *FORMS):
        raise UsageError(f"output form {form!r} is not known.", nearest(form, ("text", *FORMS)))
    if 0 < flags["ctx_size"] < LEAST_CONTEXT:
        raise UsageError(f"-c {flags['ctx_size']} leaves nothing to score.", f"give {LEAST_CONTEXT} or more.")
    check_context(flags)
    verbose = ctx.obj["verbose"]
    stored = Stored.open(Path(kl_base)) if kl_base is not None and Stored.is_one(Path(kl_base)) else None
    if stored is not None:
        if text is not None or dataset is not None or flags["ctx_size"] not in (CONTEXT, stored.n_ctx):
            raise UsageError(
                f"{kl_base} brings its own text and -c {stored.n_ctx}.", "leave out --text, --hf-dataset and -c."
            )
        flags["ctx_size"] = stored.n_ctx
    source = _source(text, dataset, flags["offline"]) if stored is None else corpus.Text(f"that of {kl_base}", "")
    of_base = {name: value for name, value in flags.items() if name not in (*LOOP_FLAGS, "window")}
    path = model_from_flags(*(flags[name] for name in ("model", "model_path", "hf", "offline")))
    _check_memory(path, flags)
    flags |= {"model": str(path), "model_path": None, "hf": None}
    opened = open_from_flags(flags, verbose)
    n_ctx = flags["ctx_size"] or opened.llm.n_ctx()
    base, base_name, base_path = (
        (stored, str(kl_base), None) if stored is not None else _base(kl_base, opened, of_base, verbose)
    )
    tokens = stored.tokens if stored is not None else tokenize(opened.llm, source.text)
    if isinstance(base, Other) and tokenize(base.model, source.text) != tokens:
        raise GgufloopError(
            f"{base_name} cuts the text into other tokens than {opened.path.name}.",
            "compare models of one family, such as quantisations of the same model.",
        )
    result = perplexity(opened.llm, tokens, n_ctx, chunks, base, _Progress())
    if form == "text":
        click.echo(_text(result, opened.path.name, base_name, source.name), nl=False)
    elif form == "json":
        click.echo(_json(result, opened, base_name, base_path, source.name), nl=False)
    else:
        click.echo(_table(result, opened.path.name, base_name).render(form), nl=False)
