"""How fast a prompt is read: transformers beside ggufloop under the settings that may matter, in one run.

    python3 scripts/bootstrap.py python scripts/bench_prefill.py [MODEL ...] [-r 7] [-t 2] [-o md|csv|json|jsonl]
    pip install --target DIR --no-deps transformers tokenizers safetensors     # once, for the first two rows;
    PYTHONPATH=DIR python scripts/bench_prefill.py ...                         # torch is in the extra `test`

A prompt of 512 tokens on an empty cache, logits of the last token only. transformers reads random weights of
SmolLM2-135M's shape, in bf16 and fp32. The first MODEL is read under every setting, each but the first row with one
change; further MODELs (the same one in other types, from `ggufloop quantize`) with none. On a CPU with AMX each of
them is also read without: the first row over that one is what AMX gains. The library and torch are the same ones then;
Linux refuses AMX to a process whose signal stack could not hold its registers, and both take what is next best.

Every row has a process of its own, and a round measures each row once, in a new order, so "ratio" (speed over that of
MODEL's first row) is of neighbours in time. "per core" counts seconds of CPU time instead of the clock's, the better
number where other work is on the machine. "difference" is the largest of any logit from the first row: 0 is the same
bits.
"""

from __future__ import annotations

import ctypes
import importlib.util
import multiprocessing
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter_ns, process_time_ns
from typing import Any

import click
import numpy as np

from ggufloop.errors import GgufloopError
from ggufloop.measure import bench
from ggufloop.measure.stats import ratio_interval
from ggufloop.models import registry
from ggufloop.table import FORMS, Column, Table

TOKENS = 512
SHAPE = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
         "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": True}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    "": {},
    "flash attention off": {"flash_attn": False},
    "ubatch 64": {"n_ubatch": 64},
    "ubatch 128": {"n_ubatch": 128},
    "ubatch 256": {"n_ubatch": 256},
}

Read = Callable[[], Any]


@dataclass(frozen=True)
class Reader:
    """One row. what: a dtype of transformers, or a model file; settings: keywords of LoopedLlama."""

    name: str
    what: str | Path
    threads: int
    amx: bool = True
    settings: dict[str, Any] = field(default_factory=dict)


def has_amx() -> bool:
    """Whether this CPU has AMX and the system is one that can be asked."""
    try:
        return "amx_int8" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


def refuse_amx() -> None:
    """Keep this process, which has not asked for AMX yet, from getting it: 11 KiB of registers do not fit 8."""
    size = 8192
    memory = ctypes.create_string_buffer(size)

    class Stack(ctypes.Structure):
        _fields_ = (("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    libc = ctypes.CDLL(None, use_errno=True)
    stack = Stack(ctypes.cast(memory, ctypes.c_void_p), 0, size)
    refuse_amx.memory = memory  # type: ignore[attr-defined]  # it is used as long as the process lives
    if libc.sigaltstack(ctypes.byref(stack), None) != 0:
        raise GgufloopError(f"the small stack is not taken: {os.strerror(ctypes.get_errno())}.")
    if libc.syscall(158, 0x1023, 18) == 0:  # ARCH_REQ_XCOMP_PERM
        raise GgufloopError("this process got AMX although it should not.", "is the machine no Linux on x86-64?")


def transformers(dtype: str, threads: int) -> Read:
    """Reads with transformers on random weights of SHAPE."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(threads)
    torch.manual_seed(bench.SEED)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).to(getattr(torch, dtype)).eval()
    tokens = torch.randint(SHAPE["vocab_size"], (1, TOKENS))

    def read() -> None:
        with torch.inference_mode():
            model(tokens, logits_to_keep=1, use_cache=True)

    return read


def ggufloop(path: Path, threads: int, settings: dict[str, Any]) -> Read:
    """Reads with LoopedLlama; what it returns are the logits of the last token."""
    from ggufloop.engine import LoopedLlama

    settings = {"flash_attn": True, "n_ubatch": TOKENS, **settings}
    llm = LoopedLlama(
        path, n_ctx=TOKENS, n_batch=TOKENS, n_threads=threads, n_threads_batch=threads, verbose=False, **settings
    )
    tokens = np.random.default_rng(bench.SEED).integers(llm.n_vocab(), size=TOKENS).tolist()

    def read() -> Any:
        llm.reset()
        llm.eval(tokens)
        return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()

    return read


def serve(pipe: Connection, reader: Reader) -> None:
    """The life of a row's process: load, read once, then read whenever asked."""
    try:
        if not reader.amx:
            refuse_amx()
        if isinstance(reader.what, Path):
            read = ggufloop(reader.what, reader.threads, reader.settings)
        else:
            read = transformers(reader.what, reader.threads)
        pipe.send(read())
        while pipe.recv():
            wall, cpu = perf_counter_ns(), process_time_ns()
            read()
            pipe.send((perf_counter_ns() - wall, process_time_ns() - cpu))
    except EOFError:
        pass
    except GgufloopError as e:
        pipe.send(e)


def measure(readers: list[Reader], rounds: int) -> list[list[Any]]:
    """Rows of the table."""
    context = multiprocessing.get_context("spawn")
    times: list[list[tuple[int, int]]] = [[] for _ in readers]
    logits: list[Any] = []
    pipes = []
    with ExitStack() as stack:
        for reader in readers:
            pipe, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, reader), daemon=True)
            process.start()
            stack.callback(process.terminate)
            theirs.close()
            pipes.append(pipe)
            first = pipe.recv()
            if isinstance(first, GgufloopError):
                raise first
            logits.append(first)
        for round_ in range(rounds):
            click.echo(f"round {round_ + 1} of {rounds}", err=True)
            for i in bench.order(round_, len(readers)):
                pipes[i].send(True)
                times[i].append(pipes[i].recv())
    base = next(i for i, reader in enumerate(readers) if isinstance(reader.what, Path))
    rows = []
    for reader, found, own in zip(readers, times, logits, strict=True):
        ratio = ratio_interval([wall for wall, _ in times[base]], [wall for wall, _ in found])
        speed, per_core = (1e9 * TOKENS / statistics.median(pair[i] for pair in found) for i in (0, 1))
        same = reader.what == readers[base].what
        difference = float(np.abs(own - logits[base]).max()) if same else None
        rows.append([reader.name, reader.threads, speed, ratio.mean, ratio.low, ratio.high, per_core, difference])
    return rows


def readers(models: list[Path], threads: int) -> list[Reader]:
    """What is measured: transformers, the first model under every change, the others as they are."""
    rows = []
    if importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
        rows += [Reader(f"transformers {dtype}", dtype, threads) for dtype in ("bfloat16", "float32")]
    else:
        click.echo("transformers is left out: it is not installed (how: the first lines of this script)", err=True)
    for name, change in CHANGES.items():
        rows.append(Reader(f"{models[0].stem} {name}".strip(), models[0], threads, settings=change))
    if threads > 1:
        rows.append(Reader(f"{models[0].stem} 1 thread", models[0], 1))
    rows += [Reader(path.stem, path, threads) for path in models[1:]]
    if has_amx():
        plain = [row for row in rows if not row.settings and row.threads == threads]
        rows += [Reader(f"{row.name} without AMX", row.what, threads, amx=False) for row in plain]
    return rows


@click.command()
@click.argument("models", nargs=-1)
@click.option("-r", "rounds", type=click.IntRange(2), default=7, show_default=True, help="Rounds of all rows.")
@click.option("-t", "threads", type=click.IntRange(1), help="Threads; default: all cores.")
@click.option("-o", "form", type=click.Choice(FORMS), default="md", show_default=True, help="How to print it.")
def main(models: tuple[str, ...], rounds: int, threads: int | None, form: str) -> None:
    """Measure how fast MODELS (default: smollm2-135m) read a prompt of 512 tokens, beside transformers."""
    columns = [Column("reader"), Column("threads"), Column("t/s", ".0f"), Column("ratio", ".2f"), Column("low", ".2f"),
               Column("high", ".2f"), Column("per core", ".0f"), Column("difference", ".1e")]  # fmt: skip
    try:
        paths = [registry.resolve(name) for name in models or ("smollm2-135m",)]
        rows = measure(readers(paths, threads or os.cpu_count() or 1), rounds)
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    click.echo(Table(tuple(columns), rows).render(form), nl=False)
    click.echo(f"n = {rounds} rounds, {TOKENS} tokens", err=True)


if __name__ == "__main__":  # children import this file too
    main()
