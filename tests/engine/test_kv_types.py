"""K/V of every type under every kv policy: what a pass stores is rounded once, and comes from the pass it should.

Heads are of 64 numbers (contexts.py), so llama.cpp rotates what it quantises, and the rows of a cache hold whole
blocks. Quantised V needs flash attention.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.contexts import (
    BF16,
    F16,
    F32,
    FAMILIES,
    Q4_0,
    Q8_0,
    SHOWS,
    Context,
    Part,
    loop,
    spread,
    text,
    write,
    write_repeated,
)

TYPES = {
    "F16": {"type_k": F16, "type_v": F16},
    "F16, flash": {"type_k": F16, "type_v": F16, "flash": True},
    "BF16": {"type_k": BF16, "type_v": BF16},
    "BF16, flash": {"type_k": BF16, "type_v": BF16, "flash": True},
    "Q8_0, flash": {"type_k": Q8_0, "type_v": Q8_0, "flash": True},
    "Q4_0, flash": {"type_k": Q4_0, "type_v": Q4_0, "flash": True},
}
CASES = [(family, types) for family in FAMILIES for types in TYPES] + [("llama", "K of Q8_0")]
TYPES["K of Q8_0"] = {"type_k": Q8_0, "type_v": F32}  # of a latent cache K and V are one


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are written once."""
    return tmp_path_factory.mktemp("models")


def run(c: Context, *prompt: list[int]) -> list[np.ndarray]:
    """Logits of a prompt, in the batches given, and of tokens after it."""
    c.clear()
    return [c.decode(Part(part))[0] for part in (*prompt, [5], [6], text(3, seed=1))]


@pytest.mark.parametrize(("family", "types"), CASES)
def test_each_is_the_file_with_the_window_repeated(family: str, types: str, folder: Path) -> None:
    """Fails if a later pass reads what the first one stored, or its own K/V before they are rounded."""
    path = write(family, folder)
    prompt = text(24), text(9, seed=2)
    with (
        Context(path, loop(family, "k=2 solver=repeat"), **TYPES[types]) as looped,
        Context(write_repeated(path), **TYPES[types]) as twice,
    ):
        rows, expected = np.concatenate(run(looped, *prompt)), np.concatenate(run(twice, *prompt))
        assert spread(rows, expected) == 0
        looped.set_loop(None)
        assert spread(np.concatenate(run(looped, *prompt)), rows) > SHOWS


@pytest.mark.parametrize(("family", "types"), CASES)
def test_first_and_frozen_keep_the_plain_models(family: str, types: str, folder: Path) -> None:
    """Plain tokens after a looped prompt, in a model that is deaf behind its window, see the plain model's K/V.

    Fails if `first` puts back another pass's K/V, or rounds a copy of them a second time.
    """
    prompt = text(24), text(9, seed=2)
    with Context(write(family, folder, deaf=True), **TYPES[types]) as c:
        plain = run(c, *prompt)
        assert spread(run(c, prompt[0][::-1], prompt[1])[-1], plain[-1]) > SHOWS
        for kv in ("first", "frozen", "last", "each"):
            c.set_loop(loop(family, f"k=3 kv={kv}"))
            c.clear()
            looped = [c.decode(Part(part))[0] for part in prompt]
            assert spread(looped[0], plain[0]) > SHOWS
            c.enable(False)
            rest = np.concatenate([c.decode(Part(part))[0] for part in ([5], [6], text(3, seed=1))])
            kept = spread(rest, np.concatenate(plain[2:]))
            assert (kept == 0) == (kv != "last"), f"kv={kv}: plain tokens differ by {kept:.3g}"


@pytest.mark.parametrize(("family", "types"), CASES)
def test_first_last_and_each_agree_in_one_batch(family: str, types: str, folder: Path) -> None:
    """In the first batch there is no past to differ in; frozen does differ, from the second pass on."""
    with Context(write(family, folder), **TYPES[types]) as c:
        rows = {}
        for kv in ("first", "last", "each", "frozen"):
            c.set_loop(loop(family, f"k=3 kv={kv}"))
            rows[kv] = run(c, text(30))[0]
        assert spread(rows["last"], rows["first"]) == 0
        assert spread(rows["each"], rows["first"]) == 0
        assert spread(rows["frozen"], rows["first"]) > SHOWS / 10
