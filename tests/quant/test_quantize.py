"""`ggufloop quantize`: llama.cpp's quantiser against gguf's, what the result says of itself, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import quantize as gguf_quantize
from support import tiny
from support.cli import Cli

from ggufloop.backend.process import Worker, main_of
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import file_sha256
from ggufloop.models.gguf import read_header, read_model
from ggufloop.models.weights import locate, weights
from ggufloop.progress import Step
from ggufloop.quant import quantize as module
from ggufloop.quant.quantize import quantize, window_override

WIDE = dataclasses.replace(tiny.FAMILIES["llama"], n_layer=4, n_embd=256, n_ff=256)
"""A model whose rows K-quants divide, but for those of attn_output, which have 128 columns."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("wide") / "wide.gguf", WIDE)


def test_blocks_are_those_of_gguf(wide: Path, tmp_path: Path) -> None:
    """gguf's own quantisers, which are another implementation, give the same bytes."""
    source = {t.name: t.data for t in GGUFReader(wide).tensors}
    seen: list[Step] = []
    for kind in ("Q8_0", "Q4_0"):
        made = quantize(wide, tmp_path / f"{kind}.gguf", kind, threads=1, progress=seen.append)
        for tensor in GGUFReader(made.path).tensors:
            wanted = source[tensor.name]
            if tensor.tensor_type != GGMLQuantizationType.F32 and tensor.name != "output.weight":  # Q6_K in a Q4_0 file
                assert tensor.tensor_type.name == kind
                wanted = gguf_quantize(wanted, tensor.tensor_type)
            if tensor.name != "output.weight":
                assert np.array_equal(tensor.data, wanted), tensor.name
    n = len(source)
    assert [step.done for step in seen] == [*range(1, n + 1)] * 2
    assert {step.text for step in seen if step.total == n} == set(source)


def test_what_the_result_says_of_itself(wide: Path, tmp_path: Path) -> None:
    made = quantize(wide, tmp_path / "q.gguf", "q4_k", threads=1)  # llama.cpp's alias, in any case
    header = read_header(made.path)
    assert (made.type, made.made, made.requantized) == ("Q4_K_M", True, False)
    assert made.bytes == made.path.stat().st_size
    assert made.sha256 == file_sha256(made.path)
    assert made.provenance["source_sha256"] == file_sha256(wide)
    assert header.text("ggufloop.quantize.type") == "Q4_K_M"
    assert header.number("general.file_type") == 15
    assert made.bits_per_weight == 8 * sum(t.nbytes for t in header.tensors) / sum(t.elements for t in header.tensors)
    fell = {t.name for t in made.tensors if t.wanted}
    assert fell == {f"blk.{il}.attn_output.weight" for il in range(4)}  # 128 columns, blocks of 256
    assert {(t.wanted, t.type) for t in made.tensors if t.wanted} == {("Q4_K", "Q5_0")}
    assert {t.type for t in made.tensors if t.name.endswith("ffn_up.weight")} == {"Q4_K"}


def test_a_file_made_so_before_is_kept_and_another_is_not_lost(wide: Path, tmp_path: Path) -> None:
    target = tmp_path / "q.gguf"
    first = quantize(wide, target, "Q8_0", threads=1)
    stamp = target.stat().st_mtime_ns
    again = quantize(wide, target, "Q8_0", threads=1)
    assert (again.made, again.sha256, target.stat().st_mtime_ns) == (False, first.sha256, stamp)
    with pytest.raises(GgufloopError, match=r"q\.gguf exists, and was not made from wide\.gguf in this way"):
        quantize(wide, target, "Q8_0", overrides=[("ffn_down", "Q4_0")], threads=1)
    assert file_sha256(target) == first.sha256
    forced = quantize(wide, target, "Q8_0", overrides=[("ffn_down", "Q4_0")], threads=1, force=True)
    assert forced.sha256 != first.sha256
    assert not list(tmp_path.glob(".*"))


def test_overrides_keep_the_window_and_the_first_one_counts(wide: Path, tmp_path: Path) -> None:
    overrides = [(r"blk\.1\.ffn_up", "F16"), *window_override((1, 3), "q8_0")]
    kept = quantize(wide, tmp_path / "kept.gguf", "Q4_0", overrides=overrides, threads=1)
    plain = quantize(wide, tmp_path / "plain.gguf", "Q4_0", threads=1)
    before = {t.name: t.type for t in plain.tensors}
    for t in kept.tensors:
        inside = t.name.startswith(("blk.1.", "blk.2.")) and len(t.shape) > 1
        wanted = "F16" if t.name == "blk.1.ffn_up.weight" else "Q8_0" if inside else before[t.name]
        assert t.type == wanted, t.name
    assert json.loads(kept.provenance["overrides"])[0] == [r"blk\.1\.ffn_up", "F16"]


def test_f32_of_a_quantised_file_is_its_weights(wide: Path, tmp_path: Path) -> None:
    small = quantize(wide, tmp_path / "small.gguf", "Q4_0", threads=1)
    exact = quantize(small.path, tmp_path / "exact.gguf", "F32", threads=1)
    assert exact.requantized
    assert {t.type for t in exact.tensors} == {"F32"}
    a, b = locate(read_model(small.path)), locate(read_model(exact.path))
    for name in a:
        assert np.array_equal(np.concatenate([*weights(a[name])]), np.concatenate([*weights(b[name])])), name


def test_an_assert_of_llama_cpp_is_one_line(wide: Path, tmp_path: Path) -> None:
    """IQ2_XXS of the output matrix without importances: llama.cpp has no check there, and aborts."""
    iq2_xxs = GGMLQuantizationType.IQ2_XXS.value
    job = {"kind": "quantise", "source": str(wide), "target": str(tmp_path / "x.gguf"), "ftype": 2, "threads": 1,
           "overrides": [["^output", iq2_xxs]], "imatrix": None, "metadata": {}, "dry_run": False}  # fmt: skip
    with (
        Worker(main_of("ggufloop.quant.child")) as worker,
        pytest.raises(GgufloopError, match=r"ended its process \(SIGABRT\).*imatrix"),
    ):
        worker.run(job, lambda event: None)


@dataclasses.dataclass
class Free:
    """What shutil.disk_usage returns, as far as it is read."""

    free: int


def test_a_disk_that_is_too_full(wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "q.gguf"
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Free(1000))
    with pytest.raises(GgufloopError, match=r"q\.gguf needs 1\.\d MB, and 0\.0 MB are free"):
        quantize(wide, target, "Q8_0", threads=1)
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_nothing(wide: Path, tmp_path: Path) -> None:
    """A limit on the size of files does what a full disk does after the check of its space."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200000, 200000));"
        "from ggufloop.cli import main; main(sys.argv[1:])"
    )
    words = ["quantize", str(wide), "--int8", "--out", str(tmp_path), "-t", "1"]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert "--out" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command(wide: Path, tmp_path: Path, cli: Cli) -> None:
    words = ["-t", "1", "--out", tmp_path, "--window", "1:3", "--keep-window", "q8_0"]
    done = cli("quantize", wide, "--types", "Q4_K_M", "--int4", "--int8", *words)
    assert done.code == 0, done.err
    names = ["wide-Q4_K_M-w1_3-Q8_0.gguf", "wide-Q8_0-w1_3-Q8_0.gguf", "wide-Q4_0-w1_3-Q8_0.gguf"]
    assert [line for line in done.err.splitlines() if line.startswith("made")] == [
        f"made {tmp_path / name}" for name in names
    ]
    assert "blk.*.attn_output: Q5_0 instead of Q4_K, rows of 128 (2 tensors)" in done.out.replace(".weight", "")
    data = json.loads(cli("quantize", wide, "--int8", *words, "-o", "json").out)["files"][0]
    record = json.loads((tmp_path / f"{names[1]}.json").read_text())
    assert record == {"schema_version": 1, **data}
    assert data["sha256"] == file_sha256(tmp_path / names[1])
    assert data["recipe_source_sha256"] == file_sha256(wide)


def test_the_command_says_that_its_source_is_quantised(wide: Path, tmp_path: Path, cli: Cli) -> None:
    small = quantize(wide, tmp_path / "small.gguf", "Q4_0", threads=1)
    done = cli("quantize", small.path, "--int8", "-t", "1")
    assert "small.gguf is quantised already (Q4_0, Q6_K): what that lost stays lost" in done.err
    assert (tmp_path / "small-Q8_0.gguf").exists()  # beside a source that is named as a file


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no type is given"),
        (["--types", "Q4_K_X"], "type 'Q4_K_X' is not known"),
        (["--types", "Q4_0,"], "has an empty entry"),
        (["--int4", "--keep-window", "Q8_0"], "--keep-window does nothing by itself"),
        (["--int4", "--window", "1:2"], "--window does nothing by itself"),
        (["--int4", "--window", "1:9", "--keep-window", "Q8_0"], "out of range: this model has 4 layers"),
        (["--int4", "--window", "1:2", "--keep-window", "Q8"], "tensor type 'Q8' is not known"),
        (["--int4", "--tensor-type", "ffn"], "is not PATTERN=TYPE"),
        (["--int4", "--tensor-type", "ffn(=Q8_0"], "is no regular expression"),
        (["--int4", "--tensor-type", "nothing=Q8_0"], "no tensor of wide.gguf matches 'nothing'"),
        (["--int4", "--tensor-type", "ffn=IQ2_XS"], "tensor type IQ2_XS needs an importance matrix"),
        (["--types", "F16", "--tensor-type", "ffn=Q8_0"], "a file of type F16 has no tensors of other types"),
        (["--types", "Q8_0,IQ2_M"], "type IQ2_M needs an importance matrix"),
        (["--int4", "--imatrix-chunks", "3"], "--imatrix-chunks does nothing by itself"),
        (["--int4", "--imatrix", "no/such.txt"], "there is no such file"),
        (["--int4", "-o", "xml"], "output form 'xml' is not known"),
    ],
)
def test_bad_input(wide: Path, tmp_path: Path, words: list[str], message: str, cli: Cli) -> None:
    done = cli("quantize", wide, *words, "--out", tmp_path / "out")
    assert done.code == 2
    error, hint = done.err.splitlines()
    assert message in error
    assert hint.startswith("  ")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_known_type_is_suggested() -> None:
    with pytest.raises(UsageError) as caught:
        module.file_type("Q4KM")
    assert caught.value.hint.startswith("did you mean Q4_K_M?")


def test_the_source_is_not_its_own_target(wide: Path, tmp_path: Path) -> None:
    alias = tmp_path / "alias.gguf"
    alias.symlink_to(wide)
    before = file_sha256(wide)
    with pytest.raises(UsageError, match="is the source itself"):
        quantize(wide, alias, "Q8_0", force=True)
    assert file_sha256(wide) == before


def test_weights_that_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = tiny.tensors(WIDE)
    tensors["blk.1.ffn_up.weight"][3, 5] = np.nan
    monkeypatch.setattr(tiny, "tensors", lambda t: tensors)
    source = tiny.write(tmp_path / "nan.gguf", WIDE)
    with pytest.raises(GgufloopError, match=r"blk\.1\.ffn_up\.weight") as caught:
        quantize(source, tmp_path / "q.gguf", "Q4_K_M", threads=1)
    assert "no numbers" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["nan.gguf"]


def test_help_says_what_the_aliases_mean(cli: Cli) -> None:
    text = " ".join(cli("quantize", "--help").out.split())
    assert "--int8 Q8_0: 8-bit whole numbers" in text
    assert "--int4 Q4_0: 4-bit whole numbers" in text


@pytest.mark.parametrize("family", ["qwen3moe", "qwen35"])
def test_other_families(family: str, tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    """Experts and recurrent layers: every tensor arrives, and what cannot be quantised stays as it is."""
    source = tiny_model(family)
    made = quantize(source, tmp_path / "q.gguf", "Q8_0", threads=1)
    assert {t.name for t in made.tensors} == {t.name for h in read_model(source) for t in h.tensors}
    assert {t.type for t in made.tensors if "ffn_gate" in t.name and "inp" not in t.name} == {"Q8_0"}
    assert {t.type for t in made.tensors if "norm" in t.name or "gate_inp.weight" in t.name} == {"F32"}


def test_a_log_without_spaces_is_read_in_no_time() -> None:
    """A key of 65535 letters is legal, and llama.cpp logs it: a search for what is before a word takes n^2 steps."""
    begun = time.process_time()
    reader = module._Reader(None, None)
    reader({"log": f"llama_model_loader: - kv   7: {'a' * 70000} f32 = 1"})
    reader({"log": "blk.0.x.weight - ncols 33 not divisible by 256 (required for type q4_K)"})
    assert time.process_time() - begun < 1
    assert reader.wanted == {"blk.0.x.weight": "Q4_K"}
