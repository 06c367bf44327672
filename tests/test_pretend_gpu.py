"""On a GPU a loop is what it is on the CPU, bit for bit: splits, copies, offloaded operations, memory; no GPU is needed.

The device (pretend_gpu.cpp) has the CPU's kernels and none of its memory, so whatever differs is the scheduler's doing
or the graph's. Without the mend of ggml-backend.cpp in ggml-loop.patch, passes after the first read experts that were
never copied (rows with many experts fail), and a window in host memory is in the compute buffer as a whole.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import matrix
import pretend
import pytest

from ggufloop.architectures import refusal

ROOT = Path(__file__).resolve().parent.parent
GREEN = [name for name, row in pretend.ROWS.items() if refusal(row.arch) is None]

Numbers = dict[str, dict[str, int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pretend")


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return pretend.build(folder)


@pytest.fixture(scope="module")
def results(folder: Path, library: Path) -> dict[str, matrix.Result]:
    return {result.name: result for result in pretend.run(GREEN, folder, library)}


@pytest.fixture(scope="module")
def sizes(folder: Path, library: Path) -> dict[str, Numbers]:
    """What pretend_sizes.py says."""
    words = [sys.executable, ROOT / "tests" / "pretend_sizes.py", folder, library]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    numbers: dict[str, Numbers] = json.loads(done.stdout)
    return numbers


@pytest.mark.parametrize("name", GREEN)
def test_row(name: str, results: dict[str, matrix.Result]) -> None:
    assert results[name].error == ""


def test_every_loop_meets_every_placement() -> None:
    """Over all rows; and a row meets each of its placements, and each kv policy its window can have."""
    mixtures = [name for name in GREEN if "expert_count" in pretend.ROWS[name].meta]
    assert len(mixtures) > 40
    for names, routings in ((mixtures, ("free", "frozen")), (GREEN, ("free",))):
        met = {case for name in names if name not in pretend.FAMILIES for case in pretend.cases(name)}
        wanted = product(
            [place for place in pretend.PLACEMENTS if place != "host-experts" or names is mixtures],
            [
                f"k=3 kv={kv} mode={mode} routing={routing}"
                for kv, mode, routing in product(("first", "last", "each", "frozen"), ("block", "layer"), routings)
            ],
        )
        assert set(wanted) <= met
    for name in GREEN:
        row = pretend.ROWS[name]
        assert {place for place, _ in pretend.cases(name)} == set(pretend.places(row))
        assert {loop.split()[1] for _, loop in pretend.cases(name)} == {f"kv={kv}" for kv in matrix.policies(row)}


def test_a_case_that_ends_the_process_is_named(tmp_path: Path) -> None:
    program = tmp_path / "dies.py"
    program.write_text("import os\nprint('> all k=3', flush=True)\nprint('> none k=2', flush=True)\nos.abort()\n")
    (result,) = matrix.ask(["llama"], [[str(program)]])
    assert result.error == "the process died (-6) in none k=2:"


def test_offloaded_layers_are_not_held(sizes: dict[str, Numbers]) -> None:
    """With weights in host memory the device holds one split's at a time, looped as plain.

    Without the mend: four layers of 3.75 MiB, or of 6 MiB of experts, in one buffer, and in layer mode one of them.
    What a loop adds is states, and with kv=first the K/V of the batch.
    """
    for where, by_loop in sizes["bytes"].items():
        for loop, size in by_loop.items():
            assert size <= 1.3 * by_loop["plain"], f"{where}, {loop}: {size} bytes, plain {by_loop['plain']}"


def test_splits_are_what_the_layers_explain(sizes: dict[str, Numbers]) -> None:
    """A graph for every time the computation comes to the device."""
    layers, window = 8, 4
    graphs = sizes["graphs"]
    assert set(graphs["all"].values()) == {1}, "nothing is in between"
    assert set(graphs["none"].values()) == {0}
    assert graphs["straddling"] == {
        "plain": 1,
        "k=3": 4,  # once per pass, and once for the K/V of the first
        "k=3 mode=layer": 1,  # the layers before it are done when the first of its own begins
        "k=3 kv=last": 4,  # another pass
        "k=3 kv=each": 3,
        "k=3 kv=frozen": 3,
        "k=6": 7,
    }
    # between two attentions, which are where the K/V is
    passes_3, passes_6 = layers + 2 * window + 1, layers + 5 * window + 1
    assert graphs["host-kv"] == {
        "plain": layers + 1,
        "k=3": passes_3 + 1,
        "k=3 mode=layer": passes_3 + window,  # each layer's K/V is written again after its last pass
        "k=3 kv=last": passes_3 + window,
        "k=3 kv=each": passes_3,
        "k=3 kv=frozen": passes_3,
        "k=6": passes_6 + 1,
    }
