"""Control vectors and LoRA under a loop: they belong to layers, so every pass through a layer has them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from support import archs, tiny
from support.contexts import FAMILIES, ROUNDING, SHOWS, Context, Part, loop, spread, text, write, write_repeated
from support.rewrite import replacing, rewritten

LOOPS = ("k=3", "k=3 kv=last", "k=3 kv=each", "k=3 kv=frozen", "k=2 solver=heun mode=layer", "k=3 solver=heavy-ball")
RANK, ALPHA, SCALE = 4, 8.0, 0.5
"""The product of a LoRA's matrices counts SCALE * ALPHA / RANK."""

Adapter = dict[str, tuple[np.ndarray, np.ndarray]]


def run(c: Context) -> np.ndarray:
    """Logits of a prompt and two tokens after it."""
    return np.concatenate([c.decode(Part(part))[0] for part in (text(30), [5], [6])])


def order(family: str, times: int) -> list[int]:
    """The layers of the file with the window repeated, as layers of the model."""
    row = archs.ROWS[family]
    a, b = row.window
    return [*range(a), *list(range(a, b)) * times, *range(b, row.n_layer)]


# control vectors


def vectors(n_layer: int, n_embd: int) -> np.ndarray:
    return 0.3 * np.random.default_rng(3).standard_normal((n_layer, n_embd)).astype(np.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_control_vector_is_added_in_every_pass(family: str, tmp_path: Path) -> None:
    """Fails if the state is taken back to the window's start before its last layer's vector is added, or after it."""
    path = write(family, tmp_path)
    with Context(path, loop(family, "k=2 solver=repeat")) as looped, Context(write_repeated(path)) as twice:
        without = run(looped)
        added = vectors(looped.n_layer, looped.n_embd)
        for c, by_layer in ((looped, added), (twice, added[order(family, 2)])):
            c.clear()
            c.control(by_layer, 1, c.n_layer - 1)
        rows = run(looped)
        assert spread(rows, run(twice)) == 0
        assert spread(rows, without) > SHOWS


@pytest.mark.parametrize("settings", LOOPS)
def test_a_control_vector_is_a_bias_of_its_layer(settings: str, tmp_path: Path) -> None:
    """In a damped pass the vector counts as what the layer computes does. The bias is added one addition earlier."""
    path = write("llama", tmp_path)
    a, b = archs.ROWS["llama"].window
    with Context(path, loop("llama", settings)) as c:
        without = run(c)
        added = vectors(c.n_layer, c.n_embd)
        c.clear()
        c.control(added, a, b - 1)
        rows = run(c)
    weights = {t.name: t.data for t in GGUFReader(path).tensors}
    biases = {name: weights[name] + added[il] for il in range(a, b) for name in [f"blk.{il}.ffn_down.bias"]}
    with Context(
        rewritten(path, tmp_path / "biased.gguf", tensors=replacing(biases)),
        loop("llama", settings),
    ) as c:
        assert spread(rows, run(c)) < ROUNDING
    assert spread(rows, without) > SHOWS


# LoRA


def adapter(path: Path) -> Adapter:
    """Random A (rank, inputs) and B (outputs, rank) for the matrices of every layer, experts' too."""
    rng = np.random.default_rng(4)
    found = {}
    for t in GGUFReader(path).tensors:
        shape = t.data.shape
        if t.name.endswith(("attn_q.weight", "attn_v.weight", "attn_output.weight", "ffn_down.weight")) or (
            "_exps.weight" in t.name
        ):
            size = (*shape[:-2], RANK, shape[-1]), (*shape[:-1], RANK)
            found[t.name] = tuple((rng.standard_normal(s) / np.sqrt(s[-1])).astype(np.float32) for s in size)
    return found


def write_lora(path: Path, arch: str, matrices: Adapter) -> Path:
    writer = GGUFWriter(path, arch)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (a, b) in matrices.items():
        writer.add_tensor(f"{name}.lora_a", a)
        writer.add_tensor(f"{name}.lora_b", b)
    return tiny.finish(writer, path)


def repeated_lora(matrices: Adapter, family: str, times: int) -> Adapter:
    """The same for the file with the window repeated."""
    split = {name: name.split(".", 2) for name in matrices}
    return {
        f"blk.{new}.{rest}": matrices[name]
        for new, old in enumerate(order(family, times))
        for name, (_, il, rest) in split.items()
        if int(il) == old
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_is_applied_in_every_pass(family: str, tmp_path: Path) -> None:
    """Fails if a later pass looks its matrices up under another layer than the weights it uses."""
    path = write(family, tmp_path)
    matrices = adapter(path)
    arch = archs.ROWS[family].arch
    with Context(path, loop(family, "k=2 solver=repeat")) as looped, Context(write_repeated(path)) as twice:
        without = run(looped)
        looped.clear()
        looped.lora(write_lora(tmp_path / "lora", arch, matrices), SCALE)
        twice.lora(write_lora(tmp_path / "lora-2", arch, repeated_lora(matrices, family, 2)), SCALE)
        rows = run(looped)
        assert spread(rows, run(twice)) == 0
        assert spread(rows, without) > SHOWS


@pytest.mark.parametrize("settings", LOOPS)
def test_a_lora_is_the_file_it_is_merged_into(settings: str, tmp_path: Path) -> None:
    """Up to rounding: W x + B (A x) and (W + B A) x are other sums."""
    path = write("llama", tmp_path)
    matrices = adapter(path)
    weights = {t.name: t.data for t in GGUFReader(path).tensors}
    merged = {name: weights[name] + SCALE * ALPHA / RANK * (b @ a) for name, (a, b) in matrices.items()}
    with Context(path, loop("llama", settings)) as c:
        without = run(c)
        c.clear()
        c.lora(write_lora(tmp_path / "lora", "llama", matrices), SCALE)
        rows = run(c)
    with Context(
        rewritten(path, tmp_path / "merged.gguf", tensors=replacing(merged)),
        loop("llama", settings),
    ) as c:
        assert spread(rows, run(c)) < ROUNDING
    assert spread(rows, without) > SHOWS
