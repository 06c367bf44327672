"""What the benchmark scripts do besides measuring: settings that do not leak, counters that count, words."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "scripts"))

import bench_loaded
import bench_overhead
import instructions

from ggufloop import backend
from ggufloop.loop import LoopSpec


def test_a_setting_is_the_only_word_to_libgomp_and_is_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    before = dict(os.environ)
    with bench_loaded.environment("GOMP_SPINCOUNT=7"):
        backend.spin_briefly()
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
    mine = bytearray(64 << 20)
    with counter:
        pass
    assert counter.value < 100
    with counter:
        more = bytearray(64 << 20)
    assert counter.value > 30  # at least one fault for every 2 MiB
    assert len(mine) == len(more)


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
