"""What servers do to a cache (context shift, sequences copied, cut, divided and restored), under a loop.

Two oracles. With solver=repeat the same operations on the file whose window is physically repeated give the same
bits: a slot that is not rotated, copied or restored with the others shows. With first and frozen, what is kept is the
plain model's, so it must still be after the operations: in a model that is deaf behind its window, plain tokens tell.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.contexts import FAMILIES, Q8_0, SHOWS, Context, Part, loop, spread, text, write, write_repeated

Rows = list[np.ndarray]

CONTEXTS = {
    "sequences apart": {},
    "unified": {"unified": True},
    "quantised": {"flash": True, "type_k": Q8_0, "type_v": Q8_0},  # rotating K means decoding and encoding it
}


def shift(c: Context) -> Rows:
    """Fill, drop some of the past, move the rest back, go on: the context shift of llama.cpp's server; twice."""
    rows = c.decode(Part(text(40)))
    for start in (4, 2):
        c.remove(0, start, start + 10)
        c.shift(0, start + 10, -1, -10)
        rows += c.decode(Part(text(5, seed=start)))
        rows += c.decode(Part([7]))
    return rows


def divide(c: Context) -> Rows:
    """Halve the positions of the past, as self-extend does."""
    rows = c.decode(Part(text(40)))
    c.divide(0, 0, 40, 2)
    return rows + c.decode(Part(text(6, seed=1)))


def fork(c: Context) -> Rows:
    """Copy a sequence, let both go their ways in one batch, drop one, copy the other over it."""
    rows = c.decode(Part(text(30)))
    c.copy(0, 1)
    rows += c.decode(Part(text(5, seed=1)), Part(text(3, seed=2), seq=1))
    c.remove(0, -1)
    c.copy(1, 0)
    return rows + c.decode(Part([5]), Part([6], seq=1))


def fork_and_shift(c: Context) -> Rows:
    """Cut something out of what only one of two sequences holds that began alike."""
    rows = c.decode(Part(text(30)))
    c.copy(0, 1)
    rows += c.decode(Part(text(8, seed=1)), Part(text(8, seed=2), seq=1))
    c.remove(0, 30, 33)
    c.shift(0, 33, -1, -3)
    return rows + c.decode(Part(text(4, seed=3)), Part(text(4, seed=4), seq=1))


def restore(c: Context) -> Rows:
    """Save a sequence, and restore it into other cells than it was in."""
    rows = c.decode(Part(text(30)), Part(text(12, seed=1), seq=1))
    state = c.save(0)
    c.remove(0, -1)
    rows += c.decode(Part(text(8, seed=2), seq=1))
    c.restore(state, 0)
    return rows + c.decode(Part([5]), Part([6], seq=1))


OPERATIONS = (shift, divide, fork, fork_and_shift, restore)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are written once."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("family", "settings"),
    # llama.cpp itself aborts where it is to rotate a quantised latent K
    [(f, s) for f in FAMILIES for s in CONTEXTS if (f, s) != ("deepseek2", "quantised")],
)
def test_every_slot_follows(family: str, settings: str, folder: Path) -> None:
    """Fails if the slots of later passes are not rotated, copied or restored with the first one's."""
    compare_with_repeated(family, OPERATIONS, folder, **CONTEXTS[settings])


@pytest.mark.parametrize("family", ["qwen35", "mamba2"])
def test_recurrent_slots_follow_a_copied_sequence(family: str, folder: Path) -> None:
    """Fails if a copied sequence goes on from another one's state in a later pass."""
    compare_with_repeated(family, [fork_recurrent], folder)


def fork_recurrent(c: Context) -> Rows:
    """`fork`, both of one length: recurrent layers read the sequences of a batch token by token."""
    rows = c.decode(Part(text(30)))
    c.copy(0, 1)
    rows += c.decode(Part(text(5, seed=1)), Part(text(5, seed=2), seq=1))
    c.remove(0, -1)
    c.copy(1, 0)
    return rows + c.decode(Part([5]), Part([6], seq=1))


def compare_with_repeated(
    family: str, operations: list[Callable[[Context], Rows]], folder: Path, **settings: object
) -> None:
    path = write(family, folder)
    with (
        Context(path, loop(family, "k=2 solver=repeat"), n_seq=2, **settings) as looped,
        Context(write_repeated(path), n_seq=2, **settings) as twice,
        Context(path, n_seq=2, **settings) as plain,
    ):
        for operation in operations:
            for c in (looped, twice, plain):
                c.clear()
            rows, expected, others = (operation(c) for c in (looped, twice, plain))
            for i, (mine, theirs, other) in enumerate(zip(rows, expected, others, strict=True)):
                difference = spread(mine, theirs)
                assert difference == 0, f"part {i} of {operation.__name__} differs by {difference:.3g}"
                assert spread(mine, other) > SHOWS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kv", ["first", "frozen", "last"])
def test_what_is_kept_stays_the_plain_models(family: str, kv: str, folder: Path) -> None:
    """Fails if a later pass leaves its K/V in cells that were moved, shared or restored."""
    path = write(family, folder, deaf=True)
    with Context(path, loop(family, f"k=3 kv={kv}"), n_seq=2) as looped, Context(path, n_seq=2) as plain:
        for operation in OPERATIONS:
            for c in (looped, plain):
                c.clear()
                c.enable(True)
            rows, expected = operation(looped), operation(plain)
            assert spread(rows[0], expected[0]) > SHOWS
            looped.enable(False)
            (mine,), (theirs,) = (c.decode(Part(text(4, seed=9))) for c in (looped, plain))
            assert (spread(mine, theirs) == 0) == (kv != "last"), operation.__name__
