"""Importance matrices: against the states a trace shows, through files of both formats, and what they do."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray
from support import tiny

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.models.gguf import read_model
from ggufloop.models.weights import locate, weights
from ggufloop.quant import imatrix
from ggufloop.quant.quantize import quantize

TEXT = "The quick brown fox jumps over the lazy dog. " * 30
N_CTX, CHUNKS = 160, 3  # a chunk is more than one batch


def matrix_of(model: Path, target: Path) -> imatrix.Imatrix:
    made = imatrix.compute(model, TEXT, "fox", target, n_ctx=N_CTX, chunks=CHUNKS, threads=1)
    assert (made.path, made.chunks, made.made) == (target, CHUNKS, True)
    return imatrix.read(target)


def norms(model: Path) -> dict[str, NDArray[np.float32]]:
    return {name: np.concatenate([*weights(s)]) for name, s in locate(read_model(model)).items() if "norm" in name}


def test_values_are_those_of_the_states(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """What enters a layer's projections is its normed input, which a trace shows: another way to the same numbers.

    The trace has the whole chunk in one batch.
    """
    from ggufloop.engine import LoopedLlama

    model = tiny_model("llama")
    matrix = matrix_of(model, tmp_path / "im.gguf")
    weight = norms(model)
    llm = LoopedLlama(model, n_ctx=N_CTX, n_batch=N_CTX, n_ubatch=N_CTX, n_threads=1, verbose=False)
    tokens = llm.tokenize(TEXT.encode(), add_bos=True, special=False)
    squares = {il: np.zeros(64) for il in range(1, 7)}
    for i in range(CHUNKS):
        states = {s.layer: s.rows.astype(np.float64) for s in llm.trace(tokens[i * N_CTX : (i + 1) * N_CTX])}
        for il in squares:
            x = states[il - 1]
            normed = x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + 1e-6) * weight[f"blk.{il}.attn_norm.weight"]
            squares[il] += np.square(normed).sum(axis=0)
    llm.close()
    for il, total in squares.items():
        for part in ("attn_q", "attn_k", "attn_v"):
            found = matrix.entries[f"blk.{il}.{part}.weight"]
            np.testing.assert_allclose(found[0], total / (CHUNKS * N_CTX), rtol=1e-3)
    counts = {t.name: t.data for t in GGUFReader(tmp_path / "im.gguf").tensors if t.name.endswith(".counts")}
    assert {float(n[0, 0]) for n in counts.values()} == {float(CHUNKS * N_CTX)}  # of the last layer too
    assert len(counts) == 7 * 7


def test_experts_see_the_tokens_routed_to_them(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Every token meets two experts with the row the router meets, so the experts' sums are twice the router's."""
    model = tiny_model("qwen3moe")
    matrix_of(model, tmp_path / "im.gguf")
    tensors = {t.name: np.array(t.data) for t in GGUFReader(tmp_path / "im.gguf").tensors}
    for il in range(6):
        router, gate = (f"blk.{il}.{part}.weight" for part in ("ffn_gate_inp", "ffn_gate_exps"))
        assert tensors[f"{gate}.counts"].sum() == 2 * N_CTX * CHUNKS
        assert tensors[f"{gate}.in_sum2"].shape == (4, 64)
        np.testing.assert_allclose(
            tensors[f"{gate}.in_sum2"].sum(axis=0), 2 * tensors[f"{router}.in_sum2"].reshape(-1), rtol=1e-5
        )


def test_it_lowers_the_error_where_it_matters(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """The error of each layer's outputs, weights' errors times the squares of what meets them, gets smaller."""
    model = tiny_model("llama")
    matrix = matrix_of(model, tmp_path / "im.gguf")
    plain = quantize(model, tmp_path / "plain.gguf", "Q4_0", threads=1)
    better = quantize(model, tmp_path / "better.gguf", "Q4_0", imatrix=tmp_path / "im.gguf", threads=1)
    assert better.provenance["imatrix_sha256"]
    exact = {t.name: t.data for t in GGUFReader(model).tensors}

    def error(path: Path) -> float:
        return sum(
            float((np.square(dequantize(t.data, t.tensor_type) - exact[t.name]) * matrix.entries[t.name][0]).sum())
            for t in GGUFReader(path).tensors
            if t.tensor_type.name == "Q4_0" and t.name in matrix.entries
        )

    assert error(better.path) < 0.98 * error(plain.path)


def test_one_made_so_before_is_kept(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    target = tmp_path / "im.gguf"
    matrix_of(tiny_model("llama"), target)
    stamp = target.stat().st_mtime_ns
    again = imatrix.compute(tiny_model("llama"), TEXT, "fox", target, n_ctx=N_CTX, chunks=CHUNKS, threads=1)
    assert (again.made, again.chunks, target.stat().st_mtime_ns) == (False, CHUNKS, stamp)
    with pytest.raises(GgufloopError, match="was not made from this model and text"):
        imatrix.compute(tiny_model("llama"), TEXT + "x", "fox", target, n_ctx=N_CTX, chunks=CHUNKS, threads=1)


def legacy(entries: dict[str, NDArray[np.float32]], calls: int, end: bytes) -> bytes:
    out = struct.pack("<i", len(entries))
    for name, sums in entries.items():
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, sums.size) + sums.tobytes()
    return out + end


def test_the_older_format(tmp_path: Path) -> None:
    path, sums = tmp_path / "im.dat", np.arange(1, 65, dtype=np.float32)
    path.write_bytes(legacy({"blk.0.attn_q.weight": sums}, 4, struct.pack("<ii", 4, 3) + b"fox"))
    matrix = imatrix.read(path)
    assert matrix.chunks == 4
    np.testing.assert_array_equal(matrix.entries["blk.0.attn_q.weight"], sums[None, :] / 4)
    path.write_bytes(legacy({"blk.0.attn_q.weight": sums}, 4, b""))  # what follows the entries may be missing
    assert imatrix.read(path).chunks == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0\0", "it is too short"),
        (struct.pack("<i", 0), "it holds no entries"),
        (legacy({"x": np.ones(8, np.float32)}, 1, b"")[:-5], "it ends in the middle of an entry"),
        (b"\x07\0\0\0\xff\xff\xff\x7fnoise", r"no \.dat file"),
        (legacy({"x": np.full(8, np.nan, np.float32)}, 1, b""), "no mean squares"),
    ],
)
def test_files_that_are_none(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "im.dat"
    path.write_bytes(content)
    with pytest.raises(GgufloopError, match=message):
        imatrix.read(path)


def test_a_model_is_no_importance_matrix(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(GgufloopError, match="it holds no sums of squares"):
        quantize(tiny_model("llama"), tmp_path / "q.gguf", "Q8_0", imatrix=tiny_model("llama"))


def test_one_of_another_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "im.gguf"
    imatrix.write(
        path, {"blk.0.attn_q.weight": np.ones((1, 32))}, {"blk.0.attn_q.weight": np.ones(1, int)}, "", 1, 1, {}
    )
    with pytest.raises(GgufloopError, match=r"another model: it has 32 values for blk\.0\.attn_q\.weight"):
        quantize(tiny_model("llama"), tmp_path / "q.gguf", "Q8_0", imatrix=path)
    imatrix.write(path, {"blk.0.other.weight": np.ones((1, 32))}, {"blk.0.other.weight": np.ones(1, int)}, "", 1, 1, {})
    with pytest.raises(GgufloopError, match="none of its 1 entries is a tensor"):
        quantize(tiny_model("llama"), tmp_path / "q.gguf", "Q8_0", imatrix=path)


def test_a_text_that_is_too_short(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(GgufloopError, match="and one chunk takes 512"):
        imatrix.compute(tiny_model("llama"), "short", "text", tmp_path / "im.gguf", threads=1)
    assert not list(tmp_path.iterdir())


def test_types_that_need_one(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    wide = tiny.write(tmp_path / "wide.gguf", tiny.Tiny("llama", n_layer=3, n_embd=256, n_ff=256))
    with pytest.raises(UsageError, match="type Q2_K_S needs an importance matrix"):
        quantize(wide, tmp_path / "q.gguf", "Q2_K_S")
    with pytest.raises(UsageError, match="tensor type IQ2_XS needs an importance matrix"):
        quantize(wide, tmp_path / "q.gguf", "Q8_0", overrides=[("attn_v", "IQ2_XS")])
    matrix_of(wide, tmp_path / "im.gguf")
    made = quantize(wide, tmp_path / "q.gguf", "Q2_K_S", imatrix=tmp_path / "im.gguf", threads=1)
    assert "Q2_K" in {t.type for t in made.tensors}
