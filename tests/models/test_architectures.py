"""Every architecture llama.cpp knows is green in the matrix or refused with a reason, and the page says so.

The rows run in worker processes, so that an abort in C fails one row; here each row's verdict is one test.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from oracles import matrix
from support import PYTHONPATH, ROOT, archs, tiny

from ggufloop.errors import UsageError
from ggufloop.models.architectures import KNOWN, LOOPS, check_window, refusal

GREEN = [name for name, row in archs.ROWS.items() if refusal(row.arch) is None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, matrix.Result]:
    return {result.name: result for result in matrix.run(GREEN, folder)}


@pytest.mark.parametrize("name", GREEN)
def test_row(name: str, results: dict[str, matrix.Result]) -> None:
    assert results[name].error == ""
    assert (results[name].repeated is None) == bool(archs.ROWS[name].unrepeatable)


def test_what_loops_has_a_row_and_is_enough() -> None:
    assert {archs.ROWS[name].arch for name in GREEN} == set(LOOPS)
    assert len(LOOPS) >= 60
    assert {row.arch for row in archs.ROWS.values()} <= KNOWN
    caches = {archs.ROWS[name].cache for name in GREEN}
    assert caches >= {archs.KV, archs.SLIDING, archs.LATENT, archs.HYBRID, archs.RECURRENT, archs.NONE}


def test_no_architecture_of_the_library_is_forgotten() -> None:
    """Every string in the library that could be an architecture's name is asked of the loader."""
    done = subprocess.run(
        [sys.executable, __file__],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH},
        capture_output=True,
        text=True,
        check=True,
    )
    assert set(done.stdout.split()) == KNOWN, done.stderr


def test_the_page_is_current(results: dict[str, matrix.Result]) -> None:
    """`python scripts/architecture_matrix.py` writes it. Its last column may differ by rounding."""
    spec = importlib.util.spec_from_file_location("architecture_matrix", ROOT / "scripts" / "architecture_matrix.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written, made = (text.splitlines() for text in (script.PAGE.read_text(), script.page(results)))
    number = re.compile(r" (\d[\d.e+-]*) \|$")
    assert [number.sub("", line) for line in written] == [number.sub("", line) for line in made]
    for old, new in zip(written, made, strict=True):
        if number.search(old):
            assert float(number.findall(old)[0]) == pytest.approx(float(number.findall(new)[0]), rel=0.1)


def test_a_worker_that_dies_fails_its_row_only(tmp_path: Path) -> None:
    dead, alive = matrix.run(["no row", "llama"], tmp_path, jobs=1)
    assert (dead.name, alive.name, alive.error) == ("no row", "llama", "")
    assert dead.error.startswith("the process died (1): ")
    assert dead.error.endswith("KeyError: 'no row'")


def test_a_worker_that_takes_too_long_fails_its_row_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "TIMEOUT", 0.01)
    (late,) = matrix.run(["llama"], tmp_path, jobs=1)
    assert late.error.startswith("no answer within 0.01 s")


@pytest.mark.parametrize("name", ["llama", "gpt-oss", "deepseek2"])
def test_the_oracles_can_fail(name: str, results: dict[str, matrix.Result], folder: Path) -> None:
    """Another window than the one that is repeated in the file must show."""
    assert results[name].error == ""
    row = archs.ROWS[name]
    a, b = row.window
    with pytest.raises(AssertionError, match=r"^naive K=2 is [\d.]+ from the file with the window repeated"):
        matrix.check(replace(row, window=(a + 1, b + 1)), folder)


@pytest.mark.parametrize(
    ("meta", "window", "message"),
    [
        ({"leading_dense_block_count": 3}, (2, 4), "window 2:4 mixes dense and MoE layers: 3 lead."),
        ({"attention.shared_kv_layers": 3}, (2, 4), "without: the last 3 share."),
        ({"interleave_moe_layer_step": 4}, (2, 4), "whole periods of interleave_moe_layer_step 4."),
    ],
)
def test_files_that_cannot_say_what_repeats(
    meta: dict[str, Any], window: tuple[int, int], message: str, tmp_path: Path
) -> None:
    path = tiny.write(tmp_path / "m.gguf", replace(tiny.FAMILIES["qwen3"], meta=meta))
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.repeat_window(path, tmp_path / "r.gguf", window, 2)


# windows

SHARED = {"gemma4.attention.shared_kv_layers": 10}
BARE = {"deci.feed_forward_length": [9, 9, 0, 9, 9, 9]}
RESCALE = {"rwkv6.rescale_every_n_layers": 6}


@pytest.mark.parametrize(
    ("arch", "window", "n_layer", "metadata"),
    [
        ("llama", (2, 4), 6, {}),
        ("gemma3n", (4, 18), 30, {}),
        ("gemma3n", (20, 24), 30, {}),
        ("gemma4", (4, 18), 30, SHARED),
        ("gemma4", (4, 24), 30, {}),
        ("deci", (4, 5), 6, BARE),
        ("deci", (2, 4), 6, {"deci.feed_forward_length": 96}),
        ("qwen3vl", (4, 8), 30, {"qwen3vl.n_deepstack_layers": 3}),
        ("rwkv6", (6, 11), 24, RESCALE),
        ("rwkv6", (2, 14), 24, {}),
        ("kimi-k3", (13, 23), 48, {"kimi-k3.attn_res.block_size": 12}),
    ],
)
def test_windows_that_can_loop(arch: str, window: tuple[int, int], n_layer: int, metadata: dict[str, Any]) -> None:
    check_window(arch, window, n_layer, metadata)


@pytest.mark.parametrize(
    ("arch", "window", "n_layer", "metadata", "reason", "hint"),
    [
        ("gemma3n", (16, 19), 30, {}, "its layers from 20 on read the K/V of layers 18 and 19",
         "use a window that ends at 18, or one that starts at 20."),
        ("gemma4", (19, 22), 30, SHARED, "its layers from 20 on read the K/V of layers 18 and 19",
         "use a window that ends at 18, or one that starts at 20."),
        ("deci", (3, 5), 6, BARE, "layer 2 has no feed-forward network",
         "use a window that holds no such layer and does not start right after one."),
        ("qwen3vl", (3, 8), 30, {"qwen3vl.n_deepstack_layers": 3}, "its first 3 layers add the features of an image",
         "use a window that starts at 4 or later."),
        ("granite", (2, 4), 6, {"granite.deepstack_mapping": [-1, -1, -1, 0, -1, -1]},
         "layer 3 adds the features of an image", "use a window that holds no such layer."),
        ("rwkv6", (4, 8), 24, RESCALE, "layer 5 halves the residual", "use a window that ends at 5 or starts at 6."),
        ("kimi-linear", (2, 4), 6, {"kimi-linear.attention.head_count_kv": [0, 0, 0, 1, 0, 0]},
         "layer 2 is recurrent", "use a window of attention layers only."),
        ("kimi-k3", (10, 14), 48, {"kimi-k3.attn_res.block_size": 12},
         "layer 12 banks the residual, once more on every pass", "use a window between multiples of 12."),
    ],
)  # fmt: skip
def test_windows_that_cannot_loop(
    arch: str, window: tuple[int, int], n_layer: int, metadata: dict[str, Any], reason: str, hint: str
) -> None:
    with pytest.raises(UsageError) as e:
        check_window(arch, window, n_layer, metadata)
    assert e.value.message == f"window {window[0]}:{window[1]} of {arch} cannot loop: {reason}."
    assert e.value.hint == hint


def _print_known() -> None:
    """Print the architectures the stock library's loader knows, among all strings in the library."""
    import ctypes

    from ggufloop.backend import library as backend

    library = backend.activate(stock=True).directory
    from ggufloop.engine import llama_cpp

    data = next(path for path in library.glob("*llama.*") if not path.is_symlink()).read_bytes()
    strings = {s.decode() for s in re.findall(rb"(?<=\0)[a-z][a-z0-9_.-]{1,24}(?=\0)", data)}
    ends = {s[i:] for s in strings for i in range(len(s) - 1)}  # a linker may keep one string as the end of another
    log: list[bytes] = []
    callback = llama_cpp.llama_log_callback(lambda _level, text, _: log.append(text))
    llama_cpp.llama_log_set(callback, None)
    lib = llama_cpp.llama_cpp._lib
    lib.gguf_init_empty.restype = ctypes.c_void_p
    lib.gguf_set_val_str.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    no_data = llama_cpp.llama_cpp.llama_model_set_tensor_data_t(lambda _tensor, _: None)
    params = llama_cpp.llama_model_default_params()
    for name in sorted({e for e in ends if e[0].isalpha()}):
        log.clear()
        gguf = lib.gguf_init_empty()
        lib.gguf_set_val_str(gguf, b"general.architecture", name.encode())
        assert not llama_cpp.llama_model_init_from_user(gguf, no_data, None, params)
        lib.gguf_free(gguf)
        if b"unknown model architecture" not in b"".join(log):
            print(name)


if __name__ == "__main__":
    _print_known()
