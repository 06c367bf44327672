"""`ggufloop snr`: against numpy, against what each format is known to reach, and the estimate against the truth."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize
from support import tiny
from support.cli import Cli

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.figures import style
from ggufloop.figures.snr import snr_figure
from ggufloop.models.gguf import read_model
from ggufloop.quant import snr
from ggufloop.quant.quantize import quantize, window_override
from ggufloop.quant.snr import by_layer, tensor_snr, window_share, window_snr

TYPES = [kind for kind in snr.FORMATS if kind not in ("IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")]
"""Those llama.cpp makes without an importance matrix; the table has all of them without."""
DRAW = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "t5": lambda rng, shape: rng.standard_t(5, size=shape),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each distribution a model, and the file in which the feed-forward matrices of a layer are of a type each."""
    folder = tmp_path_factory.mktemp("snr")
    shape = tiny.Tiny("llama", n_layer=len(TYPES), n_embd=256, n_ff=256, n_head=1, n_head_kv=1)
    tensors, out = tiny.tensors(shape), {}
    overrides = [(rf"^blk\.{il}\.ffn_", kind) for il, kind in enumerate(TYPES)]
    for name, draw in DRAW.items():
        rng = np.random.default_rng(0)
        drawn = {k: 0.02 * draw(rng, v.shape).astype(np.float32) if v.ndim > 1 else v for k, v in tensors.items()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiny, "tensors", lambda t, drawn=drawn: drawn)
            source = tiny.write(folder / f"{name}.gguf", shape)
        out[name] = source, quantize(source, folder / f"{name}-q.gguf", "Q8_0", overrides=overrides, threads=1).path
    return out


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its file in three types, one of them without equal steps."""
    folder = tmp_path_factory.mktemp("small")
    source = tiny.write(folder / "m.gguf", tiny.FAMILIES["llama"])
    overrides = [("ffn_up", "IQ4_NL"), *window_override((2, 4), "Q8_0")]
    return source, quantize(source, folder / "m-q.gguf", "Q4_0", overrides=overrides, threads=1).path


@pytest.mark.parametrize("column", range(3), ids=list(DRAW))
def test_formats_reach_what_they_are_known_for(files: dict[str, tuple[Path, Path]], column: int) -> None:
    """196608 weights of a known distribution: the measured SNR of each type within 0.3 dB, the estimate within 0.5."""
    source, made = files[list(DRAW)[column]]
    measured, estimated = tensor_snr(made, source), tensor_snr(made)
    for il, kind in enumerate(TYPES):
        true, guess = (
            [t for t in of if t.name.startswith(f"blk.{il}.ffn_") and t.is_matrix] for of in (measured, estimated)
        )
        method = snr.STEPS if kind in snr.OFFSETS else snr.FORMAT
        assert {(t.type, t.layer, t.method, t.estimated) for t in true} == {(kind, il, "reference", False)}
        assert {(t.type, t.layer, t.method, t.estimated) for t in guess} == {(kind, il, method, True)}
        assert sum(t.n for t in true) == 196608
        reached, said = (snr.decibel(sum(t.signal for t in of), sum(t.noise for t in of)) for of in (true, guess))
        assert abs(reached - snr.FORMATS[kind][column]) < 0.3, (kind, reached)
        assert abs(said - reached) < (0.5 if method == snr.STEPS else 1.5), (kind, said, reached)


def test_equals_numpy(files: dict[str, tuple[Path, Path]]) -> None:
    source, made = files["laplace"]
    exact = {t.name: np.asarray(t.data, dtype=np.float64) for t in GGUFReader(source).tensors}
    signal, noise = {}, {}
    for t in GGUFReader(made).tensors:
        values = dequantize(t.data, t.tensor_type).astype(np.float64)
        signal[t.name], noise[t.name] = np.sum(exact[t.name] ** 2), np.sum((values - exact[t.name]) ** 2)
    found = tensor_snr(made, source)
    assert {t.name for t in found} == set(exact)
    for t in found:
        assert t.signal == pytest.approx(signal[t.name], rel=1e-12)
        assert t.noise == pytest.approx(noise[t.name], rel=1e-12)
    names = [t.name for t in found if t.layer in (3, 4) and len(t.shape) > 1]
    wanted = 10 * math.log10(sum(signal[n] for n in names) / sum(noise[n] for n in names))
    assert window_snr(found, (3, 5)) == pytest.approx(wanted, abs=1e-9)


def test_slabs_of_other_sizes_change_nothing(
    files: dict[str, tuple[Path, Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 32 and of 256 weights against an F32 reference, cut where neither ends."""
    source, made = files["normal"]
    whole = [tensor_snr(made, source), tensor_snr(made)]
    monkeypatch.setattr("ggufloop.models.weights._SLAB", 50000)
    for a, b in zip(whole, [tensor_snr(made, source), tensor_snr(made)], strict=True):
        for t, u in zip(a, b, strict=True):
            assert (t.name, t.method) == (u.name, u.method)
            assert t.signal == pytest.approx(u.signal, rel=1e-9)
            assert t.noise == pytest.approx(u.noise, rel=1e-5, abs=1e-12)


def test_layers_and_windows(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    made = quantize(source, tmp_path / "q.gguf", "Q4_0", overrides=window_override((2, 5), "Q8_0"), threads=1)
    tensors = tensor_snr(made.path, source)
    shares = by_layer(tensors)
    assert [s.layer for s in shares] == [*range(7), None]
    assert [s.types for s in shares[:7]] == [("Q4_0",)] * 2 + [("Q8_0",)] * 3 + [("Q4_0",)] * 2
    assert all(s.snr_db > 40 for s in shares[2:5])
    assert all(15 < s.snr_db < 25 for s in (*shares[:2], *shares[5:7]))
    assert window_share(tensors, (2, 5)).bits == 8.5
    for window in ((5, 9), (3, 3), (-1, 2)):
        with pytest.raises(UsageError, match="out of range: the file has layers 0 to 6"):
            window_snr(tensors, window)
    norm = next(t for t in tensors if t.name == "blk.0.attn_norm.weight")
    assert (norm.is_matrix, norm.snr_db) == (False, math.inf)


def test_a_reference_of_another_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    source = tiny_model("llama")
    made = quantize(source, tmp_path / "q.gguf", "Q8_0", threads=1).path
    shape = tiny.FAMILIES["llama"]
    shorter = tiny.write(tmp_path / "shorter.gguf", dataclasses.replace(shape, n_layer=6))
    wider = tiny.write(tmp_path / "wider.gguf", dataclasses.replace(shape, n_ff=128))
    words = tmp_path / "words.gguf"
    words.write_bytes(source.read_bytes().replace(b"<|endoftext|>", b"<|endOFtext|>"))
    for reference, message in (
        (tiny_model("qwen3"), "its general.architecture is 'qwen3', not 'llama'"),
        (shorter, r"it has no tensor blk\.6\."),
        (wider, r"blk\.0\.ffn_down\.weight is 128x64 there and 96x64 here"),
        (words, "its tokenizer has other tokens"),
        (made, "is the file itself"),
    ):
        with pytest.raises(GgufloopError, match=message):
            tensor_snr(made, reference)
    with pytest.raises(GgufloopError, match=r"it has a tensor blk\.6\..* more"):
        tensor_snr(shorter, source)


def test_types_gguf_does_not_read(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Q1_0 and Q2_0 hold -1, 1 and -1 to 2 times a scale; llama.cpp's own F32 of such a file says the same."""
    shape = dataclasses.replace(tiny.FAMILIES["llama"], n_layer=3, n_embd=128, n_ff=128)
    source = tiny.write(tmp_path / "m.gguf", shape)
    overrides = [("ffn_up", "Q1_0"), ("ffn_gate", "Q2_0")]
    made = quantize(source, tmp_path / "q.gguf", "Q8_0", overrides=overrides, threads=1)
    exact = quantize(made.path, tmp_path / "exact.gguf", "F32", threads=1)
    found = tensor_snr(made.path, exact.path)
    assert {"Q1_0", "Q2_0", "Q8_0"} <= {t.type for t in found}
    assert all(t.noise == 0 and t.signal > 0 for t in found)
    with pytest.raises(GgufloopError, match="whose SNR cannot be estimated without a reference"):
        tensor_snr(made.path)


def test_another_alignment(tmp_path: Path) -> None:
    """The data of a tensor are found where the file's own alignment puts them."""
    path, values = tmp_path / "m.gguf", np.arange(1, 100, dtype=np.float32).reshape(9, 11)
    writer = GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    for key in ("block_count", "context_length", "embedding_length"):
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_tensor("blk.0.a.weight", values)
    writer.add_tensor("blk.0.b.weight", 2 * values)
    tiny.finish(writer, path)
    read_model(path)
    assert [t.signal for t in tensor_snr(path)] == [np.sum(values**2.0), np.sum(4 * values**2.0)]


def test_the_command(small: tuple[Path, Path], tmp_path: Path, cli: Cli) -> None:
    source, made = small
    picture = tmp_path / "snr.svg"
    done = cli("snr", made, "--ref", source, "--window", "2:4", "--plot", picture)
    assert done.code == 0, done.err
    tensors = tensor_snr(made, source)
    assert f"2:4       {window_snr(tensors, (2, 4)):.2f} dB" in done.out
    assert "| outside |" in done.out
    assert "SNR of the weights (dB)" in picture.read_text()
    data = json.loads(cli("snr", made, "--ref", source, "--window", "2:4", "-o", "json").out)
    assert data["window"]["snr_db"] == window_snr(tensors, (2, 4))
    assert [t["snr_db"] for t in data["tensors"]] == [t.snr_db if math.isfinite(t.snr_db) else None for t in tensors]
    rows = cli("snr", made, "-o", "csv").out.splitlines()
    assert len(rows) == 1 + len(tensors)
    assert "estimated from the steps of its blocks, and of some types what is usual" in cli("snr", made).out


def test_the_plot_shades_the_window(small: tuple[Path, Path]) -> None:
    source, made = small
    tensors = tensor_snr(made, source)
    for figure, patches in ((snr_figure(tensors, "t", (2, 4)), 1), (snr_figure(tensors, "t"), 0)):
        upper, lower = figure.axes
        assert [len(axes.patches) for axes in (upper, lower)] == [patches] * 2
        line = next(line for line in upper.lines if line.get_label() == "layer")
        assert list(line.get_ydata()) == [s.snr_db for s in by_layer(tensors) if s.layer is not None]
    assert upper.get_ylabel() == "SNR of the weights (dB)"
    assert lower.get_ylabel() == "bits per weight"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "xml"], "output form 'xml' is not known"),
        (["--window", "2-4"], "is not of the form first:end"),
        (["--window", "4:99"], "out of range: the file has layers 0 to"),
        (["--plot", "x.xyz"], "no format"),
    ],
)
def test_bad_input(small: tuple[Path, Path], words: list[str], message: str, cli: Cli) -> None:
    done = cli("snr", small[1], *words)
    assert done.code == 2
    error, hint = done.err.splitlines()
    assert message in error
    assert hint.startswith("  ")


def test_matplotlib_is_asked_for(small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    def absent(path: Path) -> None:
        raise GgufloopError("plots need matplotlib, which is not installed.", "run: pip install 'ggufloop[lab]'")

    monkeypatch.setattr(style, "check_target", absent)
    assert cli("snr", small[1], "--plot", "x.png").err.startswith("error: plots need matplotlib")


@pytest.mark.model
def test_the_estimate_on_a_real_model(smollm2: Path, tmp_path: Path) -> None:
    """Real weights are no sample of a distribution: SmolLM2 in Q5_0, by layer within 1.2 dB of the truth.

    What is outside the layers is Q8_0 in the source and stays so, without noise.
    """
    made = quantize(smollm2, tmp_path / "q.gguf", "Q5_0", threads=1)
    assert made.requantized
    measured, estimated = by_layer(tensor_snr(made.path, smollm2)), by_layer(tensor_snr(made.path))
    assert measured[-1].noise == 0
    for a, b in zip(measured[:-1], estimated[:-1], strict=True):
        assert abs(a.snr_db - b.snr_db) < 1.2, (a, b)
