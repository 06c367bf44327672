"""Batches as servers make them, under a loop: several sequences in one, embeddings for tokens, windows that wrap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from support.contexts import FAMILIES, ROUNDING, SHOWS, Context, Part, loop, spread, text, write, write_repeated

KV = ("first", "last", "each", "frozen")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where models are written once."""
    return tmp_path_factory.mktemp("models")


# embeddings


@pytest.mark.parametrize("family", [*FAMILIES, "jamba"])
def test_embeddings_are_the_tokens_they_embed(family: str, folder: Path) -> None:
    """Fails if a loop takes the tokens of a batch for granted, which has none here."""
    path = write(family, folder)
    table = next(t.data for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
    if family == "gemma3":  # which scales tokens, but not embeddings
        table = table * np.sqrt(np.float32(table.shape[1]))
    with Context(path) as c:
        plain = [c.decode(Part(part))[0] for part in (text(30), [5])]
        for settings in [f"k=3 kv={kv}" for kv in KV if family != "jamba" or kv in ("first", "each")]:
            c.set_loop(loop(family, settings))
            c.clear()
            rows = [c.decode(Part(part))[0] for part in (text(30), [5])]
            assert spread(rows[0], plain[0]) > SHOWS
            c.clear()
            embedded = [c.decode(Part(table[part]))[0] for part in (text(30), [5])]
            for mine, theirs in zip(embedded, rows, strict=True):
                assert spread(mine, theirs) == 0, settings


# several sequences


@pytest.mark.parametrize("family", [*FAMILIES, "qwen35"])
@pytest.mark.parametrize("unified", [False, True])
def test_sequences_of_a_batch_equal_the_repeated_file(family: str, unified: bool, folder: Path) -> None:
    """Fails if a later pass mixes up the sequences: their streams of K/V, their masks, their recurrent states."""
    path = write(family, folder)
    settings = {"n_seq": 3, "unified": unified}
    with (
        Context(path, loop(family, "k=2 solver=repeat"), **settings) as looped,
        Context(write_repeated(path), **settings) as twice,
    ):
        rows, expected = together(looped), together(twice)
        for i, (mine, theirs) in enumerate(zip(rows, expected, strict=True)):
            assert spread(mine, theirs) == 0, f"sequence {i}"
        looped.set_loop(None)
        looped.clear()
        assert all(spread(*pair) > SHOWS for pair in zip(together(looped), rows, strict=True))


LENGTHS = (25, 7, 13)


def together(c: Context) -> list[np.ndarray]:
    """Rows of three sequences by sequence: unequal prompts in one batch, then some or all of them go on."""
    steps = [
        [Part(text(n, seed=seq), seq=seq) for seq, n in enumerate(LENGTHS)],
        [Part([5], seq=2), Part([6], seq=0)],
        [Part([8 + seq], seq=seq) for seq in range(3)],
    ]
    rows: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    for parts in steps:
        for part, found in zip(parts, c.decode(*parts), strict=True):
            rows[part.seq].append(found)
    return [np.concatenate(found) for found in rows]


def alone(c: Context, seq: int) -> np.ndarray:
    """The same steps of one of the sequences, alone in the context."""
    c.clear()
    steps = [text(LENGTHS[seq], seed=seq), *([[5 if seq == 2 else 6]] if seq != 1 else []), [8 + seq]]
    return np.concatenate([c.decode(Part(step))[0] for step in steps])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("unified", [False, True])
def test_sequences_of_a_batch_equal_each_alone(family: str, unified: bool, folder: Path) -> None:
    """Fails as above, for damped passes and every policy. Up to rounding: other numbers of rows, other order of sums.

    With K/V apart llama.cpp cuts a batch where its shorter sequences end, and the K/V of first and last depend on cuts.
    """
    path = write(family, folder)
    with Context(path, n_seq=3, unified=unified) as several, Context(path) as one:
        first = None
        loops = [f"k=3 kv={kv}" for kv in (KV if unified else ("each", "frozen"))]
        for settings in (*loops, "k=3 kv=each mode=layer", "k=3 kv=each attention=4 sinks=1"):
            for c in (several, one):
                c.set_loop(loop(family, settings))
                c.clear()
            rows = together(several)
            for seq, mine in enumerate(rows):
                difference = spread(mine, alone(one, seq))
                assert difference < ROUNDING, f"{settings}, sequence {seq}: {difference:.3g}"
            prompts = np.concatenate([mine[:n] for mine, n in zip(rows, LENGTHS, strict=True)])
            if settings == "k=3 kv=first":
                first = prompts
            elif unified and settings in ("k=3 kv=last", "k=3 kv=each"):  # no past to differ in yet
                assert spread(prompts, first) == 0, settings


# a sliding window whose cells are used again

N_TEXT, BATCH = 600, 20
"""Far more tokens than a window of 16 and a batch have cells: 256, the least llama.cpp gives."""
SLIDING = {"n_ctx": 1024, "n_ubatch": BATCH, "swa_full": False}


@pytest.mark.parametrize("flash", [False, True])
@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_a_wrapping_window_equals_the_repeated_file(family: str, flash: bool, folder: Path) -> None:
    """Fails if the slots of a sliding window are written to other cells than the first one."""
    path = write(family, folder)
    with (
        Context(path, loop(family, "k=2 solver=repeat"), flash=flash, **SLIDING) as looped,
        Context(write_repeated(path), flash=flash, **SLIDING) as twice,
        Context(path, n_ctx=1024) as whole,
    ):
        whole.set_loop(loop(family, "k=2 solver=repeat"))
        assert looped.memory_bytes() < 0.75 * whole.memory_bytes()  # half the layers have a quarter of the cells
        rows = looped.read(text(N_TEXT), BATCH)
        assert spread(rows, twice.read(text(N_TEXT), BATCH)) == 0


@pytest.mark.parametrize("family", ["gemma3", "gpt-oss"])
def test_a_wrapping_window_does_not_depend_on_batches(family: str, folder: Path) -> None:
    """Batches of 20 in cells used again equal one batch in cells for all; first and last in batches of 20 too."""
    path = write(family, folder)
    with Context(path, **SLIDING) as wrapping, Context(path, n_ctx=1024, n_ubatch=1024) as whole:
        plain = whole.read(text(N_TEXT), N_TEXT)
        for kv in KV:
            for c in (wrapping, whole):
                c.set_loop(loop(family, f"k=3 kv={kv}"))
                c.clear()
            expected = whole.read(text(N_TEXT), N_TEXT if kv in ("each", "frozen") else BATCH)
            assert spread(expected, plain) > SHOWS
            difference = spread(wrapping.read(text(N_TEXT), BATCH), expected)
            assert difference < ROUNDING, f"kv={kv} differs by {difference:.3g}"


@pytest.mark.parametrize("kv", ["first", "frozen", "last"])
def test_a_wrapping_window_keeps_the_plain_models(kv: str, folder: Path) -> None:
    """Fails if `first` puts K/V back into cells that have another token by then."""
    with Context(write("gemma3", folder, deaf=True), **SLIDING) as c:
        prompt, rest = text(N_TEXT), text(4, seed=1)
        plain = c.read(prompt, BATCH), c.read(rest, 1)
        c.set_loop(loop("gemma3", f"k=3 kv={kv}"))
        c.clear()
        assert spread(c.read(prompt, BATCH), plain[0]) > SHOWS
        c.enable(False)
        assert (spread(c.read(rest, 1), plain[1]) == 0) == (kv != "last")
