"""On a GPU a loop is what it is on the CPU, bit for bit: splits, copies, offloaded operations, memory. Needs no GPU.

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

import pytest
from oracles import matrix, pretend
from support import PYTHONPATH, ROOT

from ggufloop.models.architectures import refusal

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
    words = [sys.executable, ROOT / "tests" / "oracles" / "pretend_sizes.py", folder, library]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH, "GGML_NO_BACKTRACE": "1"}
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
    """At most a graph for every time the computation has to come to the device: eight layers, four of them looped."""
    graphs = sizes["graphs"]
    assert set(graphs["all"].values()) == {1}, "nothing is in between"
    assert set(graphs["none"].values()) == {0}
    straddling = {
        "plain": 1,
        "k=3": 4,  # once per pass, and once for the K/V of the first
        "k=3 mode=layer": 1,  # the layers before it are done when the first of its own begins
        "k=3 kv=last": 4,  # another pass
        "k=3 kv=each": 3,
        "k=3 kv=frozen": 3,
        "k=6": 7,
    }
    attentions = 8 + 2 * 4  # of k=3; the device comes before, between and after them
    host_kv = {
        "plain": 8 + 1,
        "k=3": attentions + 2,  # the K/V of the first pass once more
        "k=3 mode=layer": attentions + 4 + 1,  # that of each layer, after its last pass
        "k=3 kv=last": attentions + 4 + 1,
        "k=3 kv=each": attentions + 1,
        "k=3 kv=frozen": attentions + 1,
        "k=6": 8 + 5 * 4 + 2,
    }
    for place, most in (("straddling", straddling), ("host-kv", host_kv)):
        assert graphs[place]["plain"] == most["plain"]
        assert {loop: n for loop, n in graphs[place].items() if n > most[loop]} == {}, place
