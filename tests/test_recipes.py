"""Recipes: each one's loop by hand, on 24, 28, 30 and 32 layers and on the models it was published for; its flag."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from support import ROOT, tiny
from support.cli import Cli

from ggufloop.cli.loop_options import loop_from_flags, loop_suggestion, loops_from_flags
from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure.published import published, table
from ggufloop.models import registry
from ggufloop.recipes import PAPER, RECIPES, WINDOWS, recipe_loop, recipe_window

MIDDLE = {24: (10, 14), 28: (12, 16), 30: (13, 17), 32: (14, 18), 27: (11, 15), 6: (1, 5)}
WORDS = {
    "paper": "k=3 beta=0.5 decode=bypass",
    "authors": "k=6 beta=0.5 decode=bypass",
    "replication": "k=3",
    "inner-loop": "k=3 solver=average",
}


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("n_layer", MIDDLE)
def test_a_recipe_s_loop_by_depth(name: str, n_layer: int) -> None:
    assert list(WORDS) == list(RECIPES)
    a, b = MIDDLE[n_layer]
    assert recipe_loop(name, n_layer) == LoopSpec.parse(f"{a}:{b} {WORDS[name]}")


def test_tableaux_are_the_published_rules() -> None:
    """beta g(x0) + (1 - beta) y of K damped steps; and the mean of g, g(g), g(g(g)), in evaluations f(y) = g(y) - y."""
    for name, k in (("paper", 3), ("authors", 6)):
        B = recipe_loop(name, 30).tableau().B
        assert B.tolist() == pytest.approx([0.5 + 0.5 / k, *[0.5 / k] * (k - 1)])
    assert recipe_loop("replication", 30).tableau().B.tolist() == pytest.approx([1 / 3] * 3)
    assert recipe_loop("inner-loop", 30).tableau().B.tolist() == pytest.approx([1, 2 / 3, 1 / 3])


def test_published_windows_come_first() -> None:
    assert recipe_window("paper", 36, "Qwen3-4B-Instruct-2507") == (15, 19)
    assert recipe_window("authors", 48, "qwen3-30b-a3b") == (22, 26)
    assert recipe_window("replication", 27, "DeepSeek-V2-Lite-Chat") == (13, 17)
    assert recipe_window("paper", 34, "qwen3-4b") == (15, 19), "of 34 layers the middle, whatever it is called"
    assert recipe_window("inner-loop", 36, "qwen3-4b") == (16, 20), "the paper's windows are not its"


def test_windows_agree_with_the_models_known_by_name() -> None:
    entries = [m for m in registry.models() if m.window is not None and PAPER in m.origin]
    assert {(m.name, m.layers): m.window for m in entries} == WINDOWS


def test_experts_loop_layer_by_layer_and_route_anew() -> None:
    loop = recipe_loop("paper", 24, "qwen1.5-moe-a2.7b-chat", experts=True)
    assert loop == LoopSpec((13, 17), 3, beta=0.5, mode="layer", routing="free", decode="bypass")
    assert recipe_loop("authors", 48, "qwen3-30b-a3b", experts=True).mode == "block"


@pytest.mark.parametrize("n_layer", [3, 5])
def test_a_model_too_small_is_told_in_a_line(n_layer: int) -> None:
    with pytest.raises(UsageError) as e:
        recipe_loop("paper", n_layer)
    assert e.value.message == (
        f"recipe paper loops 4 layers between the first and the last, and this model has {n_layer} layers."
    )
    assert recipe_loop("paper", n_layer, window=(1, 2)).window == (1, 2)


def inspected(cli: Cli, path: Path, *flags: str) -> tuple[str, str]:
    code, out, err = cli("inspect", path, "-o", "json", *flags)
    assert code == 0, err
    return json.loads(out)["loop"]["spec"], err


def test_the_flag(tiny_model: Callable[[str], Path], cli: Cli) -> None:
    path = tiny_model("qwen3")
    assert inspected(cli, path, "--recipe", "paper") == (
        "1:5 k=3 beta=0.5 decode=bypass",
        f"note: recipe paper ({PAPER}, out of the box): --window 1:5 --K 3 --beta 0.5 --decode bypass\n",
    )
    assert inspected(cli, path, "--recipe", "authors", "--K", "2")[0] == "1:5 k=2 beta=0.5 decode=bypass"
    assert inspected(cli, path, "--recipe", "authors", "--decode", "full", "--window", "2:4")[0] == "2:4 k=6 beta=0.5"
    assert inspected(cli, path, "--recipe", "replication", "--window", "auto")[0] == "2:4 k=3"
    assert inspected(cli, tiny_model("qwen2moe"), "--recipe", "paper")[0] == (
        "1:5 k=3 mode=layer beta=0.5 decode=bypass routing=free"
    )


def test_the_flag_s_mistakes(tiny_model: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    path = tiny_model("qwen3")
    assert cli("run", path, "--recipe", "papr")[2] == (
        "error: recipe 'papr' is not known.\n  did you mean paper? Known: paper, authors, replication, inner-loop.\n"
    )
    assert cli("inspect", path, "--recipe", "paper", "--solver", "naive")[2].endswith(
        "error: beta 0.5 needs solver euler, not naive.\n"
        "  recipe paper is --K 3 --beta 0.5 --decode bypass; give what does not fit as well.\n"
    )
    small = tiny.write(tmp_path / "small.gguf", replace(tiny.FAMILIES["qwen3"], n_layer=5))
    assert cli("inspect", small, "--recipe", "paper")[2] == (
        "error: recipe paper loops 4 layers between the first and the last, and this model has 5 layers.\n"
        "  give --window A:B as well, or a larger model.\n"
    )
    assert inspected(cli, small, "--recipe", "paper", "--window", "1:3")[0] == "1:3 k=3 beta=0.5 decode=bypass"
    code, _, err = cli("exec", "--recipe", "paper", "--", "llama-bench", "-m", path)
    assert code
    assert err.startswith("error: --recipe needs a model, and the program's is not looked at.\n")


def test_a_list_of_recipes(tiny_model: Callable[[str], Path]) -> None:
    flags = dict.fromkeys(("k", "mode", "solver", "beta", "kv"))
    suggest = loop_suggestion(tiny_model("qwen3"))
    found = loops_from_flags(None, suggest, **flags, recipe="paper,inner-loop")
    assert [str(loop) for loop in found] == ["1:5 k=3 beta=0.5 decode=bypass", "1:5 k=3 solver=average"]
    found = loops_from_flags("1:3,2:4", suggest, **flags | {"k": "2"}, recipe="authors")
    assert [str(loop) for loop in found] == [f"{w} k=2 beta=0.5 decode=bypass" for w in ("1:3", "2:4")]
    assert loop_from_flags(None, suggest, **flags) is None


def test_published_scores_are_of_the_model_and_the_task() -> None:
    assert {p.source.partition(" ")[0] for p in table()} == {"arXiv", "independent", "ggml-org/llama.cpp"}
    found = published("SmolLM2-135M-Instruct.Q4_1.gguf", 30, "piqa")
    assert [p.line() for p in found] == [
        "plain acc 66.30 %; SmolLM2-135M-Instruct Q8_0, ggml-org/llama.cpp PR 15189",
        "plain acc_norm 66.80 %; SmolLM2-135M-Instruct Q8_0, ggml-org/llama.cpp PR 15189",
    ]
    (mmlu,) = published("Qwen3-4B-Instruct-2507-Q4_K_M.gguf", 36, "mmlu")
    assert mmlu.line() == (
        "gain +0.57 [+0.15, +1.00] points of accuracy (15:19 k=3); Qwen3-4B-Instruct, "
        "independent replication of arXiv 2605.23872"
    )
    assert not published("SmolLM2-360M-Instruct.Q8_0.gguf", 32, "piqa")
    assert not published("SmolLM2-135M-Instruct.Q4_1.gguf", 24, "piqa")
    assert not published("SmolLM2-135M-Instruct.Q4_1.gguf", 30, "mmlu")


def test_a_page_names_every_recipe() -> None:
    assert set(RECIPES) <= set(re.findall(r"`([\w-]+)`", (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")))
