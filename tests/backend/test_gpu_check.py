"""scripts/gpu_check.py, rehearsed on the CPU: its checks run, what crashes, hangs or differs is a failed row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gpu_check
import pytest
from gpu_checks import device
from support import ROOT
from support.rpc_worker import environment


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "gpu_check.py", *words],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_the_cpu_agrees_with_itself(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    done = run("--device", "none", "--size", "tiny", "--only", "recurrent", "--only", "splits", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(out.read_text())
    rows = {row["case"]: row for row in told["rows"]}
    assert [rows[name]["value"] for name in ("qwen35", "granitehybrid")] == [0, 0]
    assert rows["all layers on the device, 2:5 k=3 kv=first"]["value"] == 1
    assert all(row["ok"] is not False for row in told["rows"])
    assert told["left_out"] == []
    assert "8 rows, 0 failed" in done.stdout


def test_without_a_gpu_it_says_so() -> None:
    done = run()
    if done.returncode == 3:
        assert "sees no GPU" in done.stderr
        assert "--device none" in done.stderr
    else:
        pytest.skip("the library in use has a GPU")


def test_what_does_not_fit_the_budget_is_listed() -> None:
    done = run("--device", "none", "--budget", "0", "--only", "repeated")
    assert "repeated         left out" in done.stdout
    assert done.returncode == 1


@pytest.mark.parametrize(
    ("body", "told"),
    [("import os; os.abort()", "ended with -6"), ("import time; time.sleep(60)", "no end within 2 s")],
)
def test_a_check_that_does_not_end_well_is_a_failed_row(
    body: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = "import sys, json; print(json.dumps({'check': 'x', 'case': 'first', 'ok': True}), flush=True)"
    program = tmp_path / "child.py"
    program.write_text(f"{before}\n{body}\n")
    monkeypatch.setattr(gpu_check, "__file__", str(program))
    rows = gpu_check.run(gpu_check.Check("x", "numbers.recurrent", 1), tmp_path, "tiny", 2)
    assert [(row.case, row.ok) for row in rows] == [("first", True), (told, False)]


@pytest.mark.parametrize(("value", "ok"), [(0.0, True), (0.2, False), (float("nan"), False), (float("inf"), False)])
def test_a_row_passes_within_its_bound(value: float, ok: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with open(tmp_path / "rows", "w+") as out:
        monkeypatch.setattr(device, "_answers", out)
        device.row("x", "y", value, 0.1)
        out.seek(0)
        assert json.loads(out.read())["ok"] is ok
