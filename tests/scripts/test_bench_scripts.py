"""What the benchmark scripts do besides measuring: settings that do not leak, counters that count, words."""

from __future__ import annotations

import math
import mmap
import os
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import bench_loaded
import bench_overhead
import bench_serve
import instructions
import llama_server
import pytest
from support import tiny

from ggufloop.backend import library
from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec


def test_a_setting_is_the_only_word_to_libgomp_and_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    before = dict(os.environ)
    with bench_loaded.environment("GOMP_SPINCOUNT=7"):
        library.spin_briefly()
        assert (os.environ["GOMP_SPINCOUNT"], os.environ.get("OMP_WAIT_POLICY")) == ("7", None)
    assert dict(os.environ) == before


def test_the_default_is_among_the_settings_measured() -> None:
    assert bench_loaded.DEFAULT in bench_loaded.SETTINGS


def test_the_counter_counts_what_is_inside_it_only() -> None:
    """Page faults, which the kernel counts on every machine; instructions take the same way."""
    try:
        counter = instructions.Counter(kind=1, event=2)
    except OSError as e:
        pytest.skip(f"perf_event_open: {e}")
    with mmap.mmap(-1, 64 << 20) as memory:  # the heap may have as much that was used before, and then nothing faults
        with counter:
            pass
        assert counter.value < 100
        with counter:
            memory.write(bytes(len(memory)))
        assert counter.value > 30  # at least one fault for every 2 MiB


def test_without_a_tool_the_cells_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(instructions, "tool", lambda: None)
    plans = [LoopSpec.parse("1:2 k=3")]
    assert bench_overhead.counted(tmp_path, plans) == [["no counter", "no counter"]] * 2


def test_ratios_of_instructions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Off over stock first, then looped over off: not over stock."""

    def count(path: Path, loops: list[str], stock: bool) -> list[instructions.Count]:
        return [instructions.Count(*((2, 4) if stock else (4 + 4 * i, 4 + 8 * i))) for i in range(len(loops))]

    monkeypatch.setattr(instructions, "count", count)
    assert bench_overhead.counted(tmp_path, [LoopSpec.parse("1:2 k=3")]) == [[2, 1], [2, 3]]


def test_a_dump_without_a_count_is_one_clean_line(tmp_path: Path) -> None:
    (tmp_path / "out.1").write_text("events: Ir\nsummary: 123\n")
    assert instructions._summary(tmp_path / "out.1") == 123
    with pytest.raises(instructions.GgufloopError, match=r"callgrind wrote no count out\.2"):
        instructions._summary(tmp_path / "out.2")


def test_no_new_client_finds_another_ones_prompt_in_a_cache() -> None:
    """Also with a vocabulary so small that the first token comes again."""
    prompts = bench_serve.Prompts(40)
    found = [tuple(prompts.new(16)) for _ in range(900)]
    assert {len(prompt) for prompt in found} == {16}
    assert len({prompt[:2] for prompt in found}) == 900
    assert all(10 <= token < 40 for prompt in found for token in prompt)


def test_a_new_client_with_something_in_a_cache_ends_the_benchmark() -> None:
    bench_serve.check_new({"timings": {"cache_n": 1}})
    with pytest.raises(GgufloopError, match="a new client found 2 tokens of its prompt"):
        bench_serve.check_new({"timings": {"cache_n": 2}})


def test_what_is_divided_by_what(tmp_path: Path) -> None:
    """Speeds against stock, times of all else; pairs of a round; no ratio of CPU times that nobody knows."""
    model = tiny.write(tmp_path / "tiny.gguf", tiny.FAMILIES["llama"])
    loop = LoopSpec.parse("2:4 k=3")
    looped = bench_serve.Way("looped", loop)
    seconds = {bench_serve.STOCK: 2, bench_serve.OURS: 1, looped: 3, bench_serve.BENCH: 0.5}
    times: bench_serve.Times = defaultdict(list)
    for way, each in seconds.items():
        for what in ("1", "4", "8", "new", "returning", "token"):
            each_ = each / 4 if what == "returning" else each
            cpu = math.nan if what == "token" else 10 * each_**2
            times[way, what] = [bench_serve.Spent(each_ * noise, cpu) for noise in (1, 5, 2)]  # shared by a round
    found = {(row[0], row[1]): row[2:] for row in bench_serve.rows(model, [loop], times)}
    assert found["tokens per second: plain / stock", 8] == ["t/s", 0.5, 0.25, 2, 2, 2, 4, 4, 4, None, None]
    slower = found["time per token: looped 2:4 k=3 / plain", 4]
    assert slower[:-1] == ["ms", 6000, 2000, 3, 3, 3, 9, 9, 9, pytest.approx(11 / 7)]
    assert ("time per token: looped 2:4 k=3 / plain", 8) not in found
    assert found["first token of 400: plain / stock", 1][3] == 0.5
    assert found["first token, looped 2:4 k=3: returning / new", 1][3] == 0.25
    assert found["time per token: plain / llama-bench", 1][3:9] == [2, 2, 2, None, None, None]


def test_an_answer_that_differs_is_counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = iter([[["a", 1], ["b", 2]], [["a", 1], ["b", 3]]])
    monkeypatch.setattr(bench_serve, "running", lambda *args: nullcontext())
    monkeypatch.setattr(bench_serve, "said", lambda server: next(given))
    monkeypatch.setattr(library, "program", lambda name, stock=False: tmp_path)
    assert bench_serve.alike(tmp_path, [])[3:6] == [1, 2, 0.5]


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho error: no such flag $9\nexit 1\n")
    program.chmod(0o755)
    started = llama_server.running(program, tmp_path / "model.gguf", 1, [])
    with pytest.raises(GgufloopError, match="llama-server does not start: error: no such flag"), started:
        pass
