"""The architecture matrix: every oracle the loop has, for one row of archs.py at a time.

    for result in matrix.run(["llama", "gpt-oss"], folder):    # in worker processes, which may die
        print(result.name, result.error or result.repeated)

A row takes two processes, for one process has one llama.cpp. The stock worker writes the model and the same model
with its window repeated, and evaluates both; the looped worker compares. Workers answer one row after the other; one
that aborts in C or takes too long fails its row, and the next row gets a new one.
"""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from support import PYTHONPATH, archs, tiny

Rows = np.ndarray

ROUNDING = 2e-4
"""Most the same sum may differ when it is computed in other batches: F32, logits of size 1 to 10."""
MOVED = 0.02
"""Least a loop must move some logit, or the comparisons could not fail."""
PROMPT, DECODED = 44, 4
TIMEOUT = 120.0
SETTINGS = {"n_ctx": 128, "n_batch": 128, "n_threads": 1, "n_threads_batch": 1, "type_k": 0, "type_v": 0}


@dataclass(frozen=True)
class Result:
    """What the oracles measured on one row, or the first that failed. Differences are the largest of any logit."""

    name: str
    repeated: float | None = None  # naive K=2 kv=each to the file with the window repeated, None without such a file
    cut: float = 0.0  # damped K=3, each and frozen, between ways to cut the text into batches
    moved: float = 0.0  # damped K=3 kv=first to the plain model
    error: str = ""
    seconds: float = 0.0


def policies(row: archs.Row) -> tuple[str, ...]:
    """The kv policies a row's window can have."""
    return ("first", "each") if row.recurrent else ("first", "last", "each", "frozen")


def steps(row: archs.Row) -> list[list[int]]:
    """A prompt and a few tokens after it; one batch where there is no cache to come back to."""
    text = np.random.default_rng(7).integers(0, 256, PROMPT + DECODED).tolist()
    return [text] if row.cache == archs.NONE else [text[:PROMPT], *([t] for t in text[PROMPT:])]


def _file(row: archs.Row, folder: Path, kind: str) -> Path:
    return folder / f"{row.name.replace(' ', '-')}-{kind}"


def _evaluate(llm: Any, parts: Sequence[Sequence[int]]) -> Rows:
    llm.reset()
    return np.concatenate([llm.logits(part) for part in parts])


def _spread(a: Rows, b: Rows) -> float:
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return float("inf")
    return float(np.abs(a - b).max())


def _load(row: archs.Row, folder: Path, kind: str) -> Any:
    from ggufloop.engine import LoopedLlama

    return LoopedLlama(_file(row, folder, kind), verbose=False, flash_attn=row.flash_attn, **SETTINGS)


def prepare(row: archs.Row, folder: Path) -> None:
    """Write the row's two models and what the stock library makes of them. For a process with the stock library."""
    from support import zoo

    model = zoo.write(_file(row, folder, "model.gguf"), row)
    stored = row.meta.get("block_count", row.n_layer)  # fewer, if layers of a file serve several times
    zoo.write(_file(row, folder, "deaf.gguf"), row, deaf_from=row.window[1] % stored)
    files = {"plain": "model.gguf"}
    if not row.unrepeatable:
        files["repeated"] = "repeated.gguf"
        tiny.repeat_window(model, _file(row, folder, "repeated.gguf"), row.window, 2)
    rows = {}
    for kind, file in files.items():
        llm = _load(row, folder, file)
        rows[kind] = _evaluate(llm, steps(row))
        llm.close()
    np.savez(_file(row, folder, "stock.npz"), **rows)


def check(row: archs.Row, folder: Path) -> Result:
    """Run the oracles on what `prepare` wrote. Raises AssertionError with what failed."""
    from ggufloop.loop import LoopSpec

    start = time.perf_counter()
    with np.load(_file(row, folder, "stock.npz")) as saved:
        stock = dict(saved)
    llm = _load(row, folder, "model.gguf")
    parts = steps(row)
    text = [t for part in parts for t in part]

    plain = _evaluate(llm, parts)
    assert np.array_equal(plain, stock["plain"]), f"loop off is {_spread(plain, stock['plain']):.3g} from stock"

    repeated = None
    llm.set_loop(LoopSpec(row.window, 2, solver="naive", kv="each"))
    twice = _evaluate(llm, parts)
    assert _spread(twice, plain) > MOVED, f"naive K=2 moves the logits by {_spread(twice, plain):.3g} only"
    if "repeated" in stock:
        repeated = _spread(twice, stock["repeated"])
        assert repeated <= ROUNDING, f"naive K=2 is {repeated:.3g} from the file with the window repeated"

    whole: dict[str, Rows] = {}
    cut = 0.0
    for kv in policies(row):
        llm.set_loop(LoopSpec(row.window, 3, kv=kv))
        whole[kv] = _evaluate(llm, [text])
        moved = _spread(whole[kv], plain)
        assert np.isfinite(whole[kv]).all(), f"K=3 kv={kv} is not finite"
        assert moved > MOVED, f"K=3 kv={kv} moves the logits by {moved:.3g} only"
        if row.cache == archs.NONE:
            continue
        for size in (16, 1):
            rows = _evaluate(llm, [text[i : i + size] for i in range(0, len(text), size)])
            assert np.isfinite(rows).all(), f"K=3 kv={kv} in batches of {size} is not finite"
            if kv in ("each", "frozen"):
                difference = _spread(rows, whole[kv])
                assert difference <= ROUNDING, f"K=3 kv={kv} in batches of {size} is {difference:.3g} from one batch"
                cut = max(cut, difference)
    for kv in set(whole) & {"last", "each"}:
        assert np.array_equal(whole[kv], whole["first"]), f"in one batch kv={kv} is not kv=first"

    llm.set_loop(LoopSpec(row.window, 2, kv="each", mode="layer"))
    rows = _evaluate(llm, [text])
    difference = _spread(rows, _evaluate(llm, parts))
    assert difference <= ROUNDING, f"K=2 mode=layer kv=each cut into steps is {difference:.3g} from one batch"
    assert _spread(rows, plain) > MOVED, f"K=2 mode=layer moves the logits by {_spread(rows, plain):.3g} only"
    cut = max(cut, difference)

    _check_resumed(row, llm, text)

    llm.set_loop(None)
    assert np.array_equal(_evaluate(llm, parts), plain), "the loop leaves something behind when it is switched off"
    llm.close()
    if row.cache != archs.NONE:
        _check_kept(row, folder)
    _check_memory(row, folder)
    return Result(row.name, repeated, cut, _spread(whole["first"], plain), seconds=time.perf_counter() - start)


def _check_resumed(row: archs.Row, llm: Any, text: Sequence[int]) -> None:
    """A loop that begins with the states a plain evaluation left is the whole loop, bit for bit, or is refused."""
    from ggufloop.backend.capi import Refused
    from ggufloop.loop import LoopSpec
    from ggufloop.models import architectures

    llm.set_loop(None)
    with llm.recorded() as states:
        _evaluate(llm, [text])
    hybrid = row.cache in (archs.RECURRENT, archs.HYBRID, archs.BESIDE)
    alone = not hybrid and row.arch not in {*architectures.WINDOW_RULES, *architectures.INDEXED}
    for mode in ("block", "layer"):
        loop = LoopSpec(row.window, 3, kv="first", mode=mode)
        llm.set_loop(loop)
        whole = _evaluate(llm, [text])
        can = alone and not (loop.routing == "frozen" and row.meta.get("expert_count", 0) > 0)
        try:
            with llm.resumed(states):
                found = _evaluate(llm, [text])
        except Refused:
            found = None
        assert (found is not None) == can, f"mode={mode} resumes: {not can}"
        if found is not None:
            same = np.array_equal(found, whole)
            assert same, f"mode={mode} resumed is {_spread(found, whole):.3g} from the whole"


def _check_kept(row: archs.Row, folder: Path) -> None:
    """What `first` and `frozen` keep of a prompt is what the plain model would have kept.

    In this model the layers behind the window hear no other position, so the logits of tokens that are evaluated
    plain after a looped prompt depend on what the layers up to the window's end have stored, and on nothing else.
    """
    from ggufloop.loop import LoopSpec

    llm = _load(row, folder, "deaf.gguf")
    prompt, *rest = steps(row)
    plain = _evaluate(llm, [prompt, *rest])
    other = _evaluate(llm, [prompt[::-1], *rest])
    assert _spread(other[len(prompt) :], plain[len(prompt) :]) > MOVED, "tokens do not depend on what is kept"
    for kv in policies(row):
        if kv == "each":
            continue
        llm.set_loop(LoopSpec(row.window, 3, kv=kv, decode="bypass"))
        rows = _evaluate(llm, [prompt, *rest])
        assert _spread(rows[: len(prompt)], plain[: len(prompt)]) > MOVED, f"K=3 kv={kv} does not move the prompt"
        kept = _spread(rows[len(prompt) :], plain[len(prompt) :])
        if kv == "last" and row.stores:
            assert kept > 0, "kv=last keeps what kv=first should"
        else:
            assert kept == 0, f"what kv={kv} keeps is not the plain model's: plain tokens differ by {kept:.3g}"
    llm.close()


def _check_memory(row: archs.Row, folder: Path) -> None:
    """What `inspect` says of the K/V cache, where it says something, is what llama.cpp allocates, looped and not."""
    from ggufloop.engine import LoopedLlama
    from ggufloop.loop import LoopSpec
    from ggufloop.models.info import KV_PREDICTED, describe, plain_kv_bytes

    path = _file(row, folder, "model.gguf")
    if row.arch not in KV_PREDICTED:
        return
    for swa_full in (True, False):
        settings = {**SETTINGS, "n_ctx": 1024, "n_batch": 64, "n_ubatch": 64, "swa_full": swa_full}
        sizes = plain_kv_bytes(describe(path), 1024, "f32", "f32", n_batch=64, n_ubatch=64, swa_full=swa_full)
        llm = LoopedLlama(path, verbose=False, **settings)
        bytes_ = llm.memory_bytes()
        assert bytes_ == sum(sizes), f"the cache has {bytes_} bytes, inspect says {sum(sizes)} (swa_full {swa_full})"
        llm.set_loop(spec := LoopSpec(row.window, 3, kv="each"))
        more, said = llm.memory_bytes() - bytes_, spec.extra_kv_bytes(sizes)
        assert more == said, f"kv=each adds {more} bytes, inspect says {said} (swa_full {swa_full})"
        llm.close()


# workers


def _serve(kind: str, folder: Path) -> None:
    """Answer row names on stdin with a line of JSON each. C code may print, so its stdout is ours no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from ggufloop.backend import library

    library.activate(stock=kind == "stock")
    from ggufloop import engine

    engine.check_architecture = lambda arch: None  # the matrix finds out what can loop

    @engine.llama_cpp.llama_log_callback
    def log(level: int, text: bytes, _: object) -> None:
        if level == 4:
            os.write(2, text)

    for line in sys.stdin:
        engine.llama_cpp.llama_log_set(log, None)
        row = archs.ROWS[line.strip()]
        try:
            if kind == "stock":
                prepare(row, folder)
                result = Result(row.name)
            else:
                result = check(row, folder)
        except Exception as e:  # whatever it is, it belongs to this row
            result = Result(row.name, error=f"{e}" if isinstance(e, AssertionError) and f"{e}" else f"{e!r}")
        answers.write(json.dumps(asdict(result)) + "\n")
        answers.flush()


class _Worker:
    """A process that answers rows, started when needed and again when it died.

    Before its answer it may say with lines that begin with ">" what it is at, which an error then names.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = [sys.executable, *command]
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the worker
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, name: str) -> Result:
        if self.process is None:
            environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "GGML_NO_BACKTRACE": "1"}  # a debugger takes seconds
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment, bufsize=0
            )
        assert self.process.stdin
        assert self.process.stdout
        told = self.log.seek(0, os.SEEK_END)
        at = b""
        try:
            self.process.stdin.write(f"{name}\n".encode())
            while True:
                ready = select.select([self.process.stdout], [], [], TIMEOUT)[0]
                line = self.process.stdout.readline() if ready else b""
                if not line.startswith(b">"):
                    break
                at = line
        except BrokenPipeError:
            ready, line = [True], b""
        self.log.seek(told)
        said = self.log.read().decode(errors="replace").strip()[-600:]
        if line:
            result = Result(**json.loads(line))
            return result if not result.error else Result(name, error=" ".join(f"{result.error} {said}".split()))
        try:
            code = self.process.wait(10 if ready else 0)  # an end of file comes a moment before the exit code
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self.stop()
        died = f"the process died ({code})" if ready else f"no answer within {TIMEOUT:g} s"
        return Result(name, error=" ".join(f"{died}{at.decode().rstrip().replace('>', ' in', 1)}: {said}".split()))

    def stop(self) -> None:
        if self.process is not None:
            assert self.process.stdin
            assert self.process.stdout
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        self.stop()
        self.log.close()


def run(names: Sequence[str], folder: Path, jobs: int = 2) -> Iterator[Result]:
    """Results of the rows named, as they come, from `jobs` pairs of workers. Files are kept in `folder`."""
    return ask(names, [[__file__, kind, str(folder)] for kind in ("stock", "looped")], jobs)


def ask(names: Sequence[str], programs: Sequence[Sequence[str]], jobs: int = 2) -> Iterator[Result]:
    """As `run`, with workers that run these programs: each name goes through all of them, or until one fails."""
    todo: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Result | BaseException] = queue.SimpleQueue()
    for name in [*names, *[None] * jobs]:
        todo.put(name)

    def work() -> None:
        workers = [_Worker(program) for program in programs]
        try:
            while (name := todo.get()) is not None:
                for worker in workers:
                    result = worker.ask(name)
                    if result.error:
                        break
                done.put(result)
        except BaseException as e:
            done.put(e)
        finally:
            for worker in workers:
                worker.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for _ in names:
        result = done.get()
        if isinstance(result, BaseException):
            raise result
        yield result
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    _serve(sys.argv[1], Path(sys.argv[2]))
