"""`bench`: what it evaluates and in which order, its whole outputs on a fake clock, what it predicts and refuses."""

from __future__ import annotations

import csv
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.cli import Cli, Ran
from support.fake_bench import Clock, FakeSpeed

from ggufloop.backend import library
from ggufloop.backend.settings import ContextSettings
from ggufloop.cli import width
from ggufloop.errors import BackendError, GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure import bench, bench_run
from ggufloop.measure.bench import Child, Timed, Variant, Workload, workloads
from ggufloop.models.gguf import read_model
from ggufloop.setting import settings as settings_of

LOOP = LoopSpec((2, 4), 3)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(FakeSpeed, "clock", clock, raising=False)
    monkeypatch.setattr(bench, "perf_counter_ns", clock)
    return clock


# what is evaluated


def test_tests_are_in_the_order_of_llama_bench() -> None:
    works = workloads([512, 0, 16], [128], [(8, 4), (0, 0), (0, 3)], [0, 64])
    assert list(map(str, works)) == [
        "pp512", "pp16", "tg128", "pp8+tg4", "tg3",
        "pp512 @ d64", "pp16 @ d64", "tg128 @ d64", "pp8+tg4 @ d64", "tg3 @ d64",
    ]  # fmt: skip
    assert (works[8].tokens, works[8].context) == (12, 76)


def test_one_measurement_warms_up_empties_the_cache_and_times_what_it_waits_for(clock: Clock) -> None:
    llm = FakeSpeed()
    clock.log.clear()
    ns = bench.sample(llm, Workload(4, 2, 8), LOOP, 0)  # type: ignore[arg-type]
    assert clock.log == [
        "loop 2:4 k=3",
        "reset", "eval 4", "wait", "eval 1", "wait",
        "reset", "eval 8", "wait",
        "clock", "eval 4", "wait", "eval 1", "wait", "eval 1", "wait", "clock",
    ]  # fmt: skip
    cost = 1 + 2 * 2 / 7
    assert ns == round(4e6 * cost) + 2 * round(1e6 * cost) + (4 + 5 + 6) * 1000
    assert {loop for loop, _ in llm.seen} == {LOOP}
    clock.log.clear()
    bench.sample(llm, Workload(0, 2), None, 0, warm=False)  # type: ignore[arg-type]
    assert clock.log == ["loop None", "reset", "clock", "eval 1", "wait", "eval 1", "wait", "clock"]


def test_tokens_are_random_start_with_bos_and_are_the_same_for_every_loop(clock: Clock) -> None:
    def tokens(loop: LoopSpec | None, repetition: int) -> list[int]:
        llm = FakeSpeed()
        bench.sample(llm, Workload(64), loop, repetition, warm=False)  # type: ignore[arg-type]
        return llm.seen[0][1]

    first = tokens(None, 0)
    assert first == tokens(LOOP, 0)
    assert first != tokens(None, 1)
    assert first[0] == 257
    assert len(set(first)) > 40
    assert all(0 <= token < 300 for token in first)


def test_a_comparison_measures_every_variant_once_a_round_in_a_new_order() -> None:
    variants = [Variant(None, True), Variant(), Variant(LOOP), Variant(LoopSpec((2, 5), 2))]
    calls: list[tuple[Variant, Workload, int]] = []

    def run(variant: Variant, work: Workload, round_: int) -> int:
        calls.append((variant, work, round_))
        return 1000 * round_ + variants.index(variant) + 1

    results = bench.compare(variants, Workload(8), 50, run)
    rounds = [calls[4 * i : 4 * i + 4] for i in range(50)]
    for i, round_ in enumerate(rounds):
        assert {number for _, _, number in round_} == {i}
        assert [v for v, _, _ in round_] == [variants[j] for j in bench.order(i, 4)]
        assert {str(v) for v, _, _ in round_} == {"stock", "plain", "2:4 k=3", "2:5 k=2"}
    assert len({tuple(bench.order(i, 4)) for i in range(50)}) > 12, "orders differ"
    for v in range(4):
        assert {bench.order(i, 4).index(v) for i in range(50)} == {0, 1, 2, 3}, "everyone is first once"
        assert results[v].variant == variants[v]
        assert results[v].samples_ns == tuple(1000 * i + v + 1 for i in range(50))


def test_figures_are_llama_benchs() -> None:
    """Its avg_ts is the mean of the speeds, not the speed of the mean; stdev has n - 1, and is 0 for one."""
    result = Timed(Variant(), Workload(10), (10**9, 2 * 10**9, 4 * 10**9), "")
    assert result.samples_ts == [10.0, 5.0, 2.5]
    assert result.mean_ts == pytest.approx(17.5 / 3)
    assert result.stdev_ts == pytest.approx(np.std([10, 5, 2.5], ddof=1))
    assert (result.mean_ns, result.stdev_ns) == (2333333333, round(np.std([1e9, 2e9, 4e9], ddof=1)))
    once = Timed(Variant(), Workload(10), (10**9,), "")
    assert (once.stdev_ts, once.stdev_ns) == (0.0, 0)


def test_a_ratio_is_taken_within_its_round() -> None:
    """A machine that slows down tenfold in the middle moves every time, and no ratio."""
    plain = Timed(Variant(), Workload(1), (100, 110, 1000, 1100, 120, 130, 900), "")
    looped = Timed(Variant(LOOP), Workload(1), tuple(2 * ns for ns in plain.samples_ns), "")
    found = bench.ratio(looped, plain)
    assert (found.mean, found.low, found.high, found.n) == (2.0, 2.0, 2.0, 7)


# what is predicted


@pytest.mark.parametrize(
    ("work", "decode", "cost"),
    [
        (Workload(8), "full", 2.0),
        (Workload(8), "bypass", 2.0),
        (Workload(0, 8), "full", 2.0),
        (Workload(0, 8), "bypass", 1.125),  # the token on the empty cache is a prompt
        (Workload(0, 8, 4), "bypass", 1.0),
        (Workload(0, 8, 4), "first:2", 1.25),
        (Workload(0, 8), "first:2", 1.375),
        (Workload(0, 8, 4), "first:99", 2.0),
        (Workload(1, 0, 4), "bypass", 1.0),  # one token behind others is a generated one
        (Workload(1), "bypass", 2.0),
        (Workload(8, 8), "full", 2.0),
        (Workload(8, 8), "bypass", None),
        (Workload(8, 8), "first:8", 2.0),
        (Workload(0, 8), "entropy:1", None),
        (Workload(8), "entropy:1", 2.0),
    ],
)
def test_predicted_cost_follows_the_decode_policy(work: Workload, decode: str, cost: float | None) -> None:
    assert bench.predicted(work, LoopSpec((2, 4), 3, decode=decode), 2.0) == cost


@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True)])
def test_weight_cost_counts_what_a_token_reads(family: str, tied: bool, tiny_model: Callable[[str], Path]) -> None:
    path = tiny_model(family)
    sizes = {t.name: t.nbytes for header in read_model(path) for t in header.tensors}
    assert ("output.weight" not in sizes) == tied
    read = sum(sizes.values()) - (0 if tied else sizes["token_embd.weight"])
    window = sum(n for name, n in sizes.items() if name.split(".")[1] in ("2", "3") and name.startswith("blk."))
    assert bench.weight_cost(path, LOOP) == pytest.approx(1 + 2 * window / read)
    assert bench.weight_cost(path, LoopSpec((2, 4), 1)) == 1.0


# the command on a fake clock


Run = Callable[..., Ran]


@pytest.fixture
def run(
    clock: Clock, tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, cli: Cli,
) -> Run:  # fmt: skip
    """run("-p", "4") is `ggufloop bench MODEL -t 1 -p 4` on a FakeSpeed; the stock library is as fast as it."""
    path = tiny_model("llama")

    class FakeChild:
        def __init__(self, path: Path, stock: bool, settings: dict[str, Any]) -> None:
            assert stock
            self._llm = FakeSpeed(path, **settings)

        def run(self, work: Workload, loop: None, repetition: int, warm: bool) -> bench.Measured:
            clock.log.append("stock")
            return bench.Measured(bench.sample(self._llm, work, loop, repetition, warm), 0, 0)  # type: ignore[arg-type]

        def __enter__(self) -> FakeChild:
            return self

        def __exit__(self, *exception: object) -> None:
            clock.log.append("child closed")

    def activate(stock: bool) -> library.Backend:
        return library.Backend(Path("/"), "cpu", stock, "" if stock else "abc", "", False, "", "", "")

    monkeypatch.setattr(library, "activate", activate)
    monkeypatch.setattr(library, "locate", lambda stock=False: activate(stock))
    monkeypatch.setattr(bench, "backends", lambda directory, devices: "CPU")
    monkeypatch.setattr(bench, "now", lambda: "2026-01-02T03:04:05Z")
    monkeypatch.setattr(bench_run, "Child", FakeChild)
    monkeypatch.setitem(sys.modules, "ggufloop.engine", types.SimpleNamespace(LoopedLlama=FakeSpeed))

    def run(*words: str) -> Ran:
        return cli("bench", path, "-t", "1", *words)

    return run


PLAIN = """\
| model                          |       size |     params | backend    | threads |            test |                  t/s |
| ------------------------------ | ---------: | ---------: | ---------- | ------: | --------------: | -------------------: |
| llama 7B Q4_1                  |   1.28 MiB |     0.34 M | CPU        |       1 |             pp4 |        999.38 ~ 0.18 |
| llama 7B Q4_1                  |   1.28 MiB |     0.34 M | CPU        |       1 |             tg2 |        993.54 ~ 1.40 |
| llama 7B Q4_1                  |   1.28 MiB |     0.34 M | CPU        |       1 |         pp4+tg2 |        993.30 ~ 1.05 |
| llama 7B Q4_1                  |   1.28 MiB |     0.34 M | CPU        |       1 |        pp4 @ d8 |        995.02 ~ 0.35 |
| llama 7B Q4_1                  |   1.28 MiB |     0.34 M | CPU        |       1 |        tg2 @ d8 |        974.66 ~ 2.02 |
| llama 7B Q4_1                  |   1.28 MiB |     0.34 M | CPU        |       1 |    pp4+tg2 @ d8 |        982.80 ~ 1.37 |

build: 0c1e57098, patch abc
"""  # noqa: E501  # llama-bench's widths

LISTS = """\
| type_k | window  |   K | kv     | loop             |            test |                  t/s |
| -----: | ------- | --: | ------ | ---------------- | --------------: | -------------------: |
|   q8_0 | 2:4     |   1 | first  | mode=layer       |             pp4 |        999.50 ~ 0.00 |
|   q8_0 | 2:4     |   1 | frozen | mode=layer       |             pp4 |        999.00 ~ 0.00 |
|   q8_0 | 2:4     |   3 | first  | mode=layer       |             pp4 |        635.76 ~ 0.00 |
|   q8_0 | 2:4     |   3 | frozen | mode=layer       |             pp4 |        635.55 ~ 0.00 |
|   q8_0 | 2:5     |   1 | first  | mode=layer       |             pp4 |        997.51 ~ 0.00 |
|   q8_0 | 2:5     |   1 | frozen | mode=layer       |             pp4 |        997.01 ~ 0.00 |
|   q8_0 | 2:5     |   3 | first  | mode=layer       |             pp4 |        537.45 ~ 0.00 |
|   q8_0 | 2:5     |   3 | frozen | mode=layer       |             pp4 |        537.30 ~ 0.00 |

build: 0c1e57098, patch abc
"""

COMPARED = """\
| library | window  |   K | kv     |            test |                  t/s | over  |         time ratio | layers | weights |
| ------- | ------- | --: | ------ | --------------: | -------------------: | ----- | -----------------: | -----: | ------: |
| stock   |         |     |        |             pp4 |        994.05 ~ 3.83 |       |                    |        |         |
| patched |         |     |        |             pp4 |        993.39 ~ 4.03 | stock |  1.00 [1.00, 1.00] |        |         |
| patched | 2:4     |   3 | first  |             pp4 |        633.91 ~ 1.45 | plain |  1.57 [1.56, 1.57] |   1.57 |         |
| patched | 2:4     |   3 | frozen |             pp4 |        633.85 ~ 1.42 | plain |  1.57 [1.56, 1.57] |   1.57 |         |
| stock   |         |     |        |             tg2 |       923.29 ~ 19.85 |       |                    |        |         |
| patched |         |     |        |             tg2 |       919.93 ~ 20.75 | stock |  1.00 [1.00, 1.01] |        |         |
| patched | 2:4     |   3 | first  |             tg2 |        604.16 ~ 7.88 | plain |  1.52 [1.51, 1.55] |   1.57 |    1.54 |
| patched | 2:4     |   3 | frozen |             tg2 |        603.79 ~ 7.74 | plain |  1.52 [1.50, 1.55] |   1.57 |    1.54 |

build: 0c1e57098, patch abc
"""  # noqa: E501  # llama-bench's widths


def short(table: str, n: int) -> str:
    """A table without its first n columns, which are checked elsewhere."""
    return "".join(
        line if not line.startswith("|") else "|" + line.split("|", n + 1)[-1] for line in table.splitlines(True)
    )


def test_the_table_is_llama_benchs(run: Run) -> None:
    done = run("-p", "4", "-n", "2", "-pg", "4,2", "-d", "0,8", "-r", "2")
    assert done.out == PLAIN.replace("~", "\u00b1")
    assert (done.code, done.err) == (0, "n = 2 repetitions; \u00b1 is their standard deviation\n")


def test_every_window_with_every_k_and_kv(run: Run, clock: Clock) -> None:
    flags = ["--window", "2:4,2:5", "--K", "1,3", "--kv", "first,frozen", "--mode", "layer", "-ctk", "q8_0"]
    done = run("-p", "4", "-n", "0", "-r", "1", *flags)
    assert short(done.out, 5) == LISTS.replace("~", "\u00b1")
    loops = [f"loop {w} k={k} mode=layer{kv}" for w in ("2:4", "2:5") for k in (1, 3) for kv in ("", " kv=frozen")]
    assert [line for line in clock.log if line.startswith("loop ")] == ["loop None", *loops, *loops]


def test_a_comparison_prints_ratios_beside_what_was_predicted(run: Run, clock: Clock) -> None:
    done = run("-p", "4", "-n", "2", "-r", "6", "--window", "2:4", "--kv", "first,frozen", "--compare")
    assert short(done.out, 5) == COMPARED.replace("~", "\u00b1")
    assert done.err == (
        "n = 6 rounds; \u00b1 is the standard deviation of t/s; time ratio: median of the rounds' and its 96.9 % "
        "interval\n"
        "note: layers and weights are upper bounds for kv frozen, --loop-attention and --halt.\n"
    )
    names = {"loop 2:4 k=3": 2, "loop 2:4 k=3 kv=frozen": 3}
    measured = clock.log[clock.log.index("loop 2:4 k=3 kv=frozen") + 1 :]  # after each was tried once
    ran: list[int] = []
    for i, line in enumerate(measured):
        if line == "stock":
            ran.append(0)
        elif line.startswith("loop ") and measured[i - 1] != "stock":
            ran.append(names.get(line, 1))
    assert ran[0] == 1, "the child's model is loaded"
    assert ran[1:] == [i for _ in range(2) for round_ in range(6) for i in bench.order(round_, 4)]
    assert measured[-2:] == ["child closed", "close"]


def test_a_narrow_terminal_says_once_what_is_the_same(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 columns hold the rest as a table, 60 a block of lines for each row; -o md is whole."""
    flags = ["-p", "4", "-n", "0", "-r", "1", "--window", "2:4", "--K", "3"]
    whole = run(*flags).out
    head = "model: llama 7B Q4_1 | size: 1.28 MiB | params: 0.34 M | backend: CPU"
    monkeypatch.setattr(width, "columns", lambda stream: 80)
    lines = run(*flags).out.splitlines()
    assert lines[:2] == [head, "  threads: 1"]
    assert lines[3:5] == short(whole, 5).splitlines()[:2]
    assert lines[5].startswith("| 2:4     |   3 | first  |             pp4 |")
    assert max(map(len, lines)) <= 80
    monkeypatch.setattr(width, "columns", lambda stream: 60)
    blocks = run(*flags).out.split("\n\n")
    assert blocks[1].startswith("window: 2:4 | K: 3 | kv: first | test: pp4\n  t/s: ")
    assert blocks[2].startswith("build: ")
    assert run(*flags, "-o", "md").out.splitlines()[0] == whole.splitlines()[0]


def test_forms_for_programs_hold_the_same(run: Run) -> None:
    words = ["-p", "4", "-n", "2", "-r", "6", "--window", "2:4", "--compare", "-o"]
    outputs = {form: run(*words, form).out for form in ("json", "jsonl", "csv")}
    records = json.loads(outputs["json"])
    assert len(records) == 6
    looped = records[5]
    assert looped | {"model_filename": "", "samples_ns": [], "samples_ts": []} == {
        "schema_version": 1, "build_commit": "0c1e57098", "patch_id": "abc", "backends": "CPU", "model_filename": "",
        "model_sha256": looped["model_sha256"], "model_type": "llama 7B Q4_1", "model_size": 1341248,
        "model_n_params": 335312, "n_batch": 2048, "n_ubatch": 512, "n_threads": 1, "type_k": "f16", "type_v": "f16",
        "n_gpu_layers": -1, "flash_attn": True, "repack": True, "seed": 1, "library": "patched", "window": "2:4",
        "k": 3, "kv": "first", "loop": "2:4 k=3", "test": "tg2", "n_prompt": 0, "n_gen": 2, "n_depth": 0,
        "test_time": "2026-01-02T03:04:05Z", "n": 6, "avg_ns": looped["avg_ns"], "stddev_ns": looped["stddev_ns"],
        "avg_ts": looped["avg_ts"], "stddev_ts": looped["stddev_ts"], "samples_ns": [], "samples_ts": [],
        "over": "plain", "ratio": looped["ratio"], "ratio_low": looped["ratio_low"],
        "ratio_high": looped["ratio_high"], "ratio_level": 0.96875, "predicted_layers": 1 + 4 / 7,
        "predicted_weights": looped["predicted_weights"],
    }  # fmt: skip
    assert len(looped["model_sha256"]) == 64
    plain = records[4]
    ratios = sorted(a / b for a, b in zip(looped["samples_ns"], plain["samples_ns"], strict=True))
    assert (looped["ratio_low"], looped["ratio_high"]) == (ratios[0], ratios[5])
    assert looped["ratio"] == pytest.approx((ratios[2] + ratios[3]) / 2)
    assert looped["avg_ts"] == pytest.approx(np.mean([2e9 / ns for ns in looped["samples_ns"]]))
    assert [(r["library"], r["over"], r["window"]) for r in records[:3]] == [
        ("stock", None, None), ("patched", "stock", None), ("patched", "plain", "2:4"),
    ]  # fmt: skip

    lines = [json.loads(line) for line in outputs["jsonl"].splitlines()]
    assert [line.keys() for line in lines] == [r.keys() for r in records]
    table = list(csv.reader(io.StringIO(outputs["csv"])))
    measured = [name for name in records[0] if not name.startswith("samples")]
    assert table[0] == [*measured, *(name for name in settings_of(LoopSpec) if name not in measured)]
    assert len(table) == 7
    assert table[6][table[0].index("loop")] == "2:4 k=3"


def test_what_was_measured_is_kept_when_the_rest_is_not(
    run: Run, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(llm: FakeSpeed, tokens: list[int]) -> None:
        clock.ns += 1
        if len(tokens) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(FakeSpeed, "eval", stopped)
    done = run("-p", "4", "-n", "2", "-o", "json")
    assert [r["test"] for r in json.loads(done.out)] == ["pp4"]
    assert (done.code, done.err) == (130, "\ninterrupted\n")
    assert clock.log[-1] == "close"


def test_without_a_warm_up(run: Run, clock: Clock) -> None:
    assert run("-p", "4", "-n", "0", "-r", "2", "--no-warmup").code == 0
    assert clock.log.count("eval 4") == 2
    clock.log.clear()
    assert run("-p", "4", "-n", "0", "-r", "2", "--no-warmup", "--compare").code == 0
    assert clock.log.count("eval 4") == 4


def test_from_python_as_from_the_command_line(run: Run, clock: Clock, tiny_model: Callable[[str], Path]) -> None:
    told = json.loads(run("-p", "4", "-n", "2", "-r", "2", "--window", "2:4", "-o", "json").out)
    clock.ns = clock.evaluations = 0
    plan = bench_run.BenchPlan((Workload(4), Workload(0, 2)), (LoopSpec((2, 4), 3),), repetitions=2)
    settings = ContextSettings(n_threads=1)
    rows: list[bench_run.BenchRecord] = []
    assert bench_run.run_bench(tiny_model("llama"), plan, settings, row=rows.append) == told
    assert rows == told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-o jsn", "error: output form 'jsn' is not known.\n  did you mean json? Known: text, json, jsonl, csv, md."),
        ("-p 0 -n 0", "error: every test has 0 tokens, so there is nothing to measure.\n  give -p, -n or -pg above 0."),
        ("-p -5", "error: -p '-5' is not a whole number of 0 or more.\n  write it like -p 512,1024."),
        ("-p 4,x", "error: -p 'x' is not a whole number of 0 or more.\n  write it like -p 512,1024."),
        ("-p 4,,8", "error: -p '4,,8' has an empty entry.\n  write it like -p 1,2,3."),
        ("-pg 512", "error: -pg '512' is not a pair.\n  write it like -pg 512,128: prompt, then generated tokens."),
        ("-d 1.5", "error: -d '1.5' is not a whole number of 0 or more.\n  write it like -d 512,1024."),
        ("-c 64", "error: test pp512 needs 512 tokens of context, which has 64.\n"
         "  leave out -c, which then is what the tests need, or give smaller tests."),
        ("-c 0 -p 1000 -d 32", "error: test pp1000 @ d32 needs 1032 tokens of context, which has 1024.\n  leave out"),
        ("-r 0", "0 is not in the range x>=1."),
        ("--window 2:4,5:7", "error: window 5:7 touches layer 6, the last one, which cannot be looped.\n  use 1:6 at"),
        ("--window 2-4", "error: window 2-4 is not of the form first:end.\n  windows are half-open: layers 2 to 4 are"),
        ("--window 2:4 --K 3,0", "error: K 0 is not a whole number in the range 1 to 64.\n"),
        ("--window 2:4 --kv first,frosen", "error: kv 'frosen' is not known.\n  did you mean frozen? Known:"),
        ("--K 2", "--K needs --window A:B (or --window auto): without a window nothing loops."),
        ("--stock --window 2:4", "error: the stock llama.cpp has no loops.\n  leave out --window, or add --compare."),
        ("--compare -r 1", "error: --compare needs -r 2 or more: one round has no interval.\n  -r 6 is the least"),
    ],
)  # fmt: skip
def test_bad_input(words: str, message: str, run: Run, clock: Clock) -> None:
    done = run(*words.split())
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert clock.evaluations == 0


def test_over_rpc_there_is_no_stock_library_to_compare_with(run: Run) -> None:
    words = ["--compare", "--rpc", "localhost:50052", "-p", "4", "-n", "0", "-r", "2"]
    done = run(*words, "--window", "2:4")
    assert (done.code, "library" in done.out) == (0, False)
    assert done.err.startswith("note: the stock library is left out: an RPC server has one client at a time.\n")
    assert run(*words).err == (
        "error: the stock library cannot be compared over RPC: a server has one client at a time.\n"
        "  leave out --rpc, or measure it alone: --stock without --compare.\n"
    )


def test_tests_beyond_what_a_model_was_trained_on(run: Run) -> None:
    done = run("-p", "1200", "-n", "0", "-r", "1")
    assert done.err.startswith("note: a context of 1200 tokens is more than the 1024 this model was trained on.\n")
    assert "pp1200" in done.out


def test_without_a_stock_library(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def locate(stock: bool = False) -> library.Backend:
        raise BackendError("no stock llama.cpp is built yet.", "run: ggufloop build --stock")

    monkeypatch.setattr(library, "locate", locate)
    done = run("--compare", "--window", "2:4", "-p", "4", "-n", "0", "-r", "2")
    assert done.code == 0
    assert done.err.startswith(
        "note: the stock library is left out: no stock llama.cpp is built yet. (run: ggufloop build --stock)\n"
    )
    assert "library" not in done.out
    for words in (["--compare"], ["--compare", "--stock", "--window", "2:4"]):
        assert run(*words)[::2] == (3, "error: no stock llama.cpp is built yet.\n  run: ggufloop build --stock\n")


# on a real library


def settings(**others: Any) -> dict[str, Any]:
    return {"n_ctx": 64, "n_batch": 64, "n_threads": 1, "n_threads_batch": 1, **others}


def test_what_is_timed_really_loops(tiny_model: Callable[[str], Path]) -> None:
    """A halt that always stops counts the passes it saved, which only a loop that runs has; and the logits agree."""
    from ggufloop.engine import LoopedLlama

    llm = LoopedLlama(tiny_model("llama"), verbose=False, **settings())
    for work, evaluations in ((Workload(8), 1 + 1), (Workload(0, 5, 4), 1 + 6), (Workload(8, 5), 2 + 6)):
        llm.set_loop(None)
        assert bench.sample(llm, work, LoopSpec((2, 4), 3, halt=1e9), 0) > 0
        assert llm.skipped_evaluations() == 2 * evaluations
    llm.set_loop(None)
    bench.sample(llm, Workload(8, 5), LoopSpec((2, 4), 3, halt=1e9, decode="bypass"), 0)
    assert llm.skipped_evaluations() == 2 * 2, "the prompts"

    def last_row() -> np.ndarray:
        return np.ctypeslib.as_array(llm._ctx.get_logits(), shape=(llm.n_vocab(),)).copy()

    tokens = np.random.default_rng((bench.SEED, 3)).integers(llm.n_vocab(), size=8).tolist()
    tokens[0] = llm.token_bos() if llm.token_bos() >= 0 else tokens[0]
    rows = []
    for loop in (None, LOOP):
        bench.sample(llm, Workload(8), loop, 3)
        rows.append(last_row())
        llm.reset()
        llm.eval(tokens)
        np.testing.assert_array_equal(last_row(), rows[-1])
    assert np.abs(rows[0] - rows[1]).max() > 1e-3
    llm.close()


def test_size_and_parameters_are_what_llama_cpp_says(tiny_model: Callable[[str], Path]) -> None:
    from ggufloop.engine import LoopedLlama
    from ggufloop.models.info import describe

    for family in ("llama", "qwen2"):
        llm = LoopedLlama(tiny_model(family), verbose=False, **settings())
        info = describe(tiny_model(family))
        assert (llm._model.size(), llm._model.n_params()) == (info.weight_bytes, info.elements)
        assert llm.model_type().startswith(family)
        llm.close()


def test_a_child_measures_and_hands_back_what_went_wrong(tiny_model: Callable[[str], Path]) -> None:
    with Child(tiny_model("llama"), True, settings()) as stock:
        measured = stock.run(Workload(8, 2), None, 0)
        assert measured.ns > 0
        assert measured.kv_bytes == 0, "the stock library has no such function"
        with pytest.raises(BackendError, match=r"the stock llama\.cpp has no loops\."):
            stock.run(Workload(8), LOOP, 0)
        assert stock.run(Workload(8), None, 1).ns > 0
        stock._process.kill()
        stock._process.join()
        with pytest.raises(GgufloopError, match=r"^a measuring process ended early\.$"):
            stock.run(Workload(8), None, 0)
    with Child(tiny_model("llama"), False, settings()) as patched:
        plain = patched.run(Workload(8), None, 0)
        each = patched.run(Workload(8), LoopSpec((2, 4), 3, kv="each"), 0)
        assert each.kv_bytes - plain.kv_bytes == plain.kv_bytes // 7 * 2 * 2
        assert os.name == "nt" or each.peak_bytes > 1 << 20
    with pytest.raises(UsageError, match="flash attention"):
        Child(tiny_model("llama"), False, settings(type_v=8))
    assert multiprocessing.active_children() == []


def test_a_comparison_on_a_real_model(tiny_model: Callable[[str], Path]) -> None:
    words = ["bench", str(tiny_model("llama")), "-t", "1", "-p", "16", "-n", "4", "-d", "0,8", "-pg", "4,2", "-r", "3"]
    words += ["--window", "2:4,3:5", "--K", "1,3", "--compare", "--stock", "-o", "jsonl"]
    program = "from ggufloop.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.splitlines()]
    tests = ["pp16", "tg4", "pp4+tg2", "pp16 @ d8", "tg4 @ d8", "pp4+tg2 @ d8"]
    loops = [None, None, "2:4 k=1", "2:4 k=3", "3:5 k=1", "3:5 k=3"]
    assert [(r["test"], r["loop"]) for r in records] == [(test, loop) for test in tests for loop in loops]
    assert [r["library"] for r in records[:6]] == ["stock", *["patched"] * 5]
    assert {r["n"] for r in records} == {3}
    for r in records:
        assert min(r["samples_ns"]) > 0
        assert (r["ratio"] is None) == (r["library"] == "stock")
        assert r["ratio"] is None or r["ratio_low"] <= r["ratio"] <= r["ratio_high"]
        assert r["predicted_layers"] == (None if r["loop"] is None else 1.0 if r["k"] == 1 else 1 + 4 / 7)


def test_llama_bench_prints_the_same(tiny_model: Callable[[str], Path]) -> None:
    """All but the figures: the program against ours on the same model, with the same flags."""
    stock = library.locate(stock=True)
    program = stock.directory / "llama-bench"
    if not program.exists():
        pytest.skip("needs `ggufloop build --stock --with-tools`")
    flags = ["-p", "32,16", "-n", "8", "-pg", "8,4", "-d", "0,16", "-t", "1", "-r", "2", "-ctk", "bf16", "-ub", "64"]
    words = ["bench", str(tiny_model("llama")), *flags]

    def table(command: list[str]) -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        return [
            re.sub(r" +[\d.]+ \u00b1 [\d.]+", f"{len(line)} t/s", line)
            for line in done.stdout.splitlines()
            if line.startswith("|")
        ]

    ours = table([sys.executable, "-c", "from ggufloop.cli import main; main()", *words])
    assert ours == table([str(program), "-m", str(tiny_model("llama")), *flags])
    assert len(ours) == 2 + 2 * 4
