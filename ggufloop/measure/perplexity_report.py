"""Perplexities in words and tables: llama-perplexity's lines, and what is ours around them.

text(run, "notes.txt")                           # for eyes
table(run).render("md")                          # a row per context and model
numbers(run, "notes.txt")                        # the same for programs
record(run, "notes.txt")                         # for json
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ggufloop.files import file_sha256
from ggufloop.loop import PLAIN
from ggufloop.measure.perplexity import Figure, TextScore
from ggufloop.measure.perplexity_run import PerplexityRun
from ggufloop.measure.stats import Estimate
from ggufloop.measure.verdict import HELPS, HURTS, UNSURE
from ggufloop.opening import record_head
from ggufloop.reading import finite
from ggufloop.table import Cell, Table, columns

_COLUMNS = columns("model", "loop", "n_ctx", "chunks", "n", "PPL:.4f", "+/-:.5f", "bits/byte:.4f", "gain:.5f",
                   "low:.5f", "high:.5f", "KL:.6f", "KL +/-:.6f", "same top:.5f", "same top +/-:.5f")  # fmt: skip
_CONTEXTS = columns("n_ctx", "chunks", "n", "PPL:.4f", "+/-:.5f", "bits/byte:.4f")
_AGAINST = columns("base PPL:.4f", "+/-:.5f", "gain:+.5f", "low:+.5f", "high:+.5f", "over", "KL:.6f", "+/-:.6f")


def _row(name: str, loop: str, result: TextScore, figure: Figure, compared: bool) -> list[Cell]:
    row: list[Cell] = [name, loop, result.n_ctx, result.chunks, result.n, figure.ppl, figure.error,
                       figure.bits_per_byte]  # fmt: skip
    if not compared or result.against is None:
        return [*row, *[None] * 7]
    gain, kl = result.against.gain, result.against.kl
    return [*row, gain.mean, gain.low, gain.high, *kl.kl, *kl.same_top]


def table(run: PerplexityRun) -> Table:
    """One row per context and model: the base first, which has nothing it is compared with."""
    rows = []
    for result in run.results:
        if result.against is not None:
            rows.append(_row(run.base, "plain", result, result.against.base, compared=False))
        rows.append(_row(run.path.name, str(result.loop or "plain"), result, result.model, compared=True))
    return Table(_COLUMNS, rows)


def numbers(run: PerplexityRun, source: str) -> Table:
    """The same rows for programs, with the text, the base and its score beside the model's, and the verdict."""
    rows: list[list[Cell]] = []
    for r in run.results:
        if r.against is None:
            rows.append([*_row(run.path.name, str(r.loop or PLAIN), r, r.model, compared=False), source, *[None] * 3])
            continue
        base, gain = r.against.base, r.against.gain
        rows.append([*_row(run.base, PLAIN, r, base, compared=False), source, *[None] * 3])
        word = UNSURE if r.chunks < 2 or gain.low <= 0 <= gain.high else HELPS if gain.low > 0 else HURTS
        rows.append([*_row(run.path.name, str(r.loop or PLAIN), r, r.model, compared=True), source, run.base,
                     base.ppl, word])  # fmt: skip
    names = [c.name for c in _COLUMNS]
    names[names.index("+/-")] = "PPL +/-"
    return Table(columns(*names, "text", "base", "base PPL", "verdict"), rows)


def _verdict(gain: Estimate, chunks: int) -> str:
    if chunks < 2:
        return "one chunk says nothing about other texts; score more of them."
    if gain.low <= 0 <= gain.high:
        return "no difference can be concluded from this text."
    return "the model predicts this text better than the base." if gain.low > 0 else "the model predicts it worse."


def _estimate(estimate: Estimate, what: str) -> str:
    return f"{estimate.mean:+.5f} [{estimate.low:+.5f}, {estimate.high:+.5f}] nats per token, n = {estimate.n} {what}"


def text(run: PerplexityRun, source: str) -> str:
    """The form for eyes: llama-perplexity's line and block, and what is ours around them; source: the text's name."""
    if len(run.results) > 1:
        return _several(run, source)
    (result,) = run.results
    n = f"n = {result.n} tokens in {result.chunks} chunks of {result.n_ctx}"
    model = result.model
    out = [
        f"model   {run.path.name}, {'no loop' if result.loop is None else result.loop}",
        f"text    {source}, {n}",
        "",
    ]
    line = f"Final estimate: PPL = {model.ppl:.4f} +/- {model.error:.5f}"
    if result.against is None:
        return "\n".join([*out, line, f"bits per byte: {model.bits_per_byte:.4f}"]) + "\n"
    against = result.against
    out += [f"base    {run.base}: PPL = {against.base.ppl:.4f} +/- {against.base.error:.5f}, "
            f"bits per byte {against.base.bits_per_byte:.4f}",
            line, f"bits per byte: {model.bits_per_byte:.4f}", "",
            "Gain over the base, paired, 95 % intervals (above 0: better than the base):"]  # fmt: skip
    if against.over_chunks is not None:
        out.append(f"  over chunks: {_estimate(against.over_chunks, 'chunks')}")
    out += [f"  over tokens: {_estimate(against.over_tokens, 'tokens')}, taken as independent",
            f"  {_verdict(against.gain, result.chunks)}", ""]  # fmt: skip
    if result.n < 100:
        return "\n".join([*out, "under 100 tokens: no KL statistics."]) + "\n"
    ours = "" if against.chunked is None else "\n" + against.chunked.lines(result.n, result.chunks)
    return "\n".join(out) + "\n" + against.kl.block() + ours


def _several(run: PerplexityRun, source: str) -> str:
    """Several contexts for eyes: a row for each."""
    rows: list[list[Cell]] = []
    for r in run.results:
        rows.append([r.n_ctx, r.chunks, r.n, r.model.ppl, r.model.error, r.model.bits_per_byte])
        if r.against is not None:
            gain, figure = r.against.gain, r.against.base
            over = "tokens" if r.against.over_chunks is None else "chunks"
            rows[-1] += [figure.ppl, figure.error, gain.mean, gain.low, gain.high, over, *r.against.kl.kl]
    loop, compared = run.results[0].loop, run.results[0].against is not None
    out = [f"model   {run.path.name}, {'no loop' if loop is None else loop}", f"text    {source}"]
    out += [f"base    {run.base}"] if compared else []
    out += ["", Table((*_CONTEXTS, *_AGAINST) if compared else _CONTEXTS, rows).render("md")]
    if compared:
        out += ["gain: nats per token over the base, paired, with its 95 % interval over chunks, or, with one chunk, "
                "over tokens taken as independent; +/-: standard error over tokens."]  # fmt: skip
    out.append("Rows score different tokens, those with more text before them in larger contexts.")
    return "\n".join(out) + "\n"


def record(run: PerplexityRun, source: str) -> Any:
    """For JSON: a mapping, or a list of one for each context."""
    found = [_record(result, run, source) for result in run.results]
    return found if len(found) > 1 else found[0]


def _record(result: TextScore, run: PerplexityRun, source: str) -> Any:
    against = result.against
    data: dict[str, Any] = {
        **record_head(run.path),
        "loop": None if result.loop is None else str(result.loop),
        "text": source,
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
            "model": run.base,
            "sha256": None if run.base_path is None else file_sha256(run.base_path),
            **dataclasses.asdict(against.base),
        }
        data["gain"] = {
            "over_tokens": dataclasses.asdict(against.over_tokens),
            "over_chunks": None if against.over_chunks is None else dataclasses.asdict(against.over_chunks),
        }
        data["kl_statistics"] = {
            f.name: v._asdict() if hasattr(v := getattr(block, f.name), "_asdict") else v
            for f in dataclasses.fields(block)
        }
        if against.chunked is not None:
            data["kl_over_chunks"] = {name: value._asdict() for name, value in against.chunked._asdict().items()}
    return finite(data)
