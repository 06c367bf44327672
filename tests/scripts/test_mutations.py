"""300 damaged model files through inspect, run, quantize and snr; and that the script would notice what must not be.

`python scripts/mutate.py --count 10000` is the long run.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import forked, gguf
from support import ROOT

TinyModel = Callable[[str], Path]


@pytest.mark.timeout(2700)  # 1,200 commands
def test_damaged_files_end_in_an_answer_or_a_line() -> None:
    words = [sys.executable, str(ROOT / "scripts" / "mutate.py"), "--count", "300", "--jobs", "2"]
    for family in ("llama", "gemma3", "qwen2moe", "deepseek2", "qwen35", "granitehybrid"):
        words += ["--only", f"gguf {family}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {}
    for line in done.stdout.splitlines()[-4:]:
        command, files, worked, one_line, tried, *bad = line.split()
        assert (files, bad) == ("300", ["0"] * len(forked.BAD))
        counts[command] = int(worked), int(one_line) + int(tried)
    assert list(counts) == ["inspect", "run", "quantize", "snr"]
    for worked, line_ in counts.values():
        assert worked >= 60  # not all are refused by the reader,
        assert line_ >= 60  # and not all are as good as new


@pytest.mark.parametrize(
    ("status", "said", "outcome"),
    [
        (0, "note: what", forked.WORKED),
        (1, "note: what\nerror: this is wrong.\n  do that.", forked.LINE),
        (2, "Usage: ggufloop\n\nError: No such option", forked.LINE),
        (1, "", forked.SILENT),
        (1, "llama_model_load: error", forked.SILENT),
        (139, "error: what", forked.SILENT),
        (1, "error: what\nTraceback (most recent call last):\n  File\nKeyError: 1", forked.TRACEBACK),
        (0, "Exception ignored in\nTraceback (most recent call last):\n  File\nKeyError: 1", forked.TRACEBACK),
        (-6, "a.cpp:1: GGML_ASSERT(x) failed", forked.ASSERT),
        (-6, "terminate called after throwing", forked.ASSERT),
        (-11, "error: what", forked.SIGNAL),
        (None, "", forked.HANG),
    ],
)
def test_what_an_end_is_called(status: int | None, said: str, outcome: str) -> None:
    assert forked._judge(status, said)[0] == outcome


def test_taking_a_file_apart_and_putting_it_together_changes_nothing(tiny_model: TinyModel) -> None:
    for family in ("llama", "deepseek2", "qwen35"):
        data = tiny_model(family).read_bytes()
        rebuilt = gguf.build(gguf.parse(data))
        assert rebuilt == data[: len(rebuilt)]  # gguf pads the end


def test_a_seed_names_a_file_for_good_and_every_damage_is_done(tiny_model: TinyModel) -> None:
    data = tiny_model("llama").read_bytes()
    files = [gguf.mutate(data, random.Random(f"1.{i}")) for i in range(60)]
    assert files == [gguf.mutate(data, random.Random(f"1.{i}")) for i in range(60)]
    assert len(set(files)) > 50
    for damage in set(gguf.DAMAGES):
        changed = set()
        for i in range(20):
            file = gguf.parse(data)
            damage(file, random.Random(i))
            changed.add(gguf.build(file))
        assert len(changed - {data}) > 1, damage.__name__
    assert not re.search(rb"gone", data)
