"""Tiny random models of any architecture llama.cpp knows, as F32 GGUF files of a few hundred kilobytes.

    zoo.write(folder / "olmo2.gguf", archs.ROWS["olmo2"])      # needs ggufloop.engine, so a library, in this process

No list of tensors is kept here. llama.cpp can make a model from metadata alone and asks for each tensor's data by
name: that says which tensors the architecture's loader wants, and in which shape, the optional ones included. The
values are ours, drawn by name at a scale at which looping moves the logits. A wrong table can abort in C, so call
this where the process may die.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter

from ggufloop.engine import llama_cpp
from support import archs, tiny

Shapes = dict[str, tuple[int, ...]]


class _Tensor(ctypes.Structure):
    """The head of ggml_tensor."""

    _fields_ = (("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4))


class _InitParams(ctypes.Structure):
    """gguf_init_params."""

    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def _c() -> ctypes.CDLL:
    lib: ctypes.CDLL = llama_cpp.llama_cpp._lib  # looks in the libraries it is linked to, ggml-base among them
    lib.ggml_get_name.restype, lib.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    lib.gguf_init_from_file.restype = ctypes.c_void_p
    lib.gguf_init_from_file.argtypes = [ctypes.c_char_p, _InitParams]
    lib.gguf_free.argtypes = [ctypes.c_void_p]
    return lib


def shapes(metadata: Path) -> Shapes:
    """The tensors llama.cpp asks for when it loads a GGUF file without any, as numpy shapes by name.

    Raises RuntimeError if it refuses the metadata; its log says why.
    """
    lib, found = _c(), {}

    def ask(tensor: int, _: int) -> None:
        ne = list(_Tensor.from_address(tensor).ne)
        while len(ne) > 1 and ne[-1] == 1:
            ne.pop()
        found[lib.ggml_get_name(tensor).decode()] = tuple(reversed(ne))

    callback = llama_cpp.llama_cpp.llama_model_set_tensor_data_t(ask)
    params = llama_cpp.llama_model_default_params()
    params.load_mtp = True  # so that it asks for the layers of multi-token prediction too
    gguf = lib.gguf_init_from_file(str(metadata).encode(), _InitParams(True, None))
    try:
        model = llama_cpp.llama_model_init_from_user(gguf, callback, None, params)
    finally:
        lib.gguf_free(gguf)
    if not model:
        raise RuntimeError(f"llama.cpp refuses the metadata of {metadata.stem}.")
    llama_cpp.llama_model_free(model)
    return found


def _uniform(low: float, high: float) -> Any:
    return lambda rng, shape: rng.uniform(low, high, shape)


def _normal(mean: float, deviation: float) -> Any:
    return lambda rng, shape: mean + deviation * rng.standard_normal(shape)


_RULES = [
    # what must have a sign or a size, before what is a norm, a bias or a matrix by its name
    (r"^rope_f", lambda _, shape: np.linspace(1, 8, shape[0])),  # frequencies are divided by them
    (r"ssm_a$", lambda rng, shape: -rng.uniform(0.3, 3, shape)),  # a state decays
    (r"ssm_dt\.bias$", _normal(-1, 0.5)),
    (r"ssm_d$", _normal(1, 0.1)),
    (r"time_mix_w0", _normal(-1, 0.5)),
    (r"time_mix_(lerp|k_k|k_a)", _uniform(0.2, 0.8)),
    (r"time_mix_(a0|v0|r_k)", _normal(0, 0.3)),
    (r"exp_probs_b", _normal(0, 0.1)),
    (r"sinks", _normal(0, 0.5)),
    (r"(norm|_ln|norm_\d)\.bias$", _normal(0, 0.1)),
    (r"bias$", _normal(0, 0.2)),
    (r"norm|_ln\.|scale", _normal(1, 0.1)),
    (r"^position_embd", _normal(0, 0.3)),
]
_GAINS = [(r"attn_q\.", 1.5), (r"ffn_down|ssm_out", 2.0), (r"ffn_gate_inp", 2.0), (r"^output\.", 2.0)]
GELU_GAIN = 1000.0
"""llama.cpp rounds GELU's input to float16 below 10; far from there it is exact, and batches can be compared."""

_MIXES = re.compile(r"blk\.(\d+)\.(attn_output|ssm_out|shortconv\.out_proj|time_mix_output|channel_mix_value)\.")
"""What a layer adds from other positions goes through these."""


def draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], row: archs.Row, tied: bool) -> np.ndarray:
    """Float32 values of one tensor."""
    factor = float(np.prod([f for pattern, f in row.factors.items() if re.search(pattern, name)]))
    return (factor * _draw(rng, name, shape, row, tied)).astype(np.float32)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], row: archs.Row, tied: bool) -> np.ndarray:
    for pattern, rule in _RULES:
        if re.search(pattern, name):
            return rule(rng, shape)
    fan_in = shape[-1]
    if len(shape) == 1:
        return 0.3 * rng.standard_normal(shape)
    gain = next((g for pattern, g in _GAINS if re.search(pattern, name)), 1.0)
    if name.startswith("token_embd."):
        gain = 2.0 if tied else float(np.sqrt(fan_in))
    if row.gelu and re.search(rf"ffn_{row.gelu}(_exps)?\.|inp_gate", name):
        gain *= GELU_GAIN
    if row.gelu and re.search(r"ffn_down|blk\.\d+\.proj\.", name):
        gain /= GELU_GAIN
    values = gain / np.sqrt(fan_in) * rng.standard_normal(shape)
    if row.gelu == "gate" and "ffn_gate_up" in name:  # both in one tensor, the gate first
        values[..., : shape[-2] // 2, :] *= GELU_GAIN
    return values


def _header(path: Path, row: archs.Row) -> GGUFWriter:
    writer = GGUFWriter(path, row.arch)
    for key, value in row.metadata(len(tiny.vocabulary()[0])).items():
        tiny.add(writer, key, value)
    tiny.add_tokenizer(writer)
    return writer


def write(path: Path, row: archs.Row, deaf_from: int | None = None) -> Path:
    """Write the model of a row to `path` and return it. Raises RuntimeError if llama.cpp refuses its metadata.

    deaf_from: from this layer on nothing is taken from other positions, whatever a cache holds there.
    """
    header = tiny.finish(_header(path.with_suffix(".header"), row), path.with_suffix(".header"))
    wanted = {name: s for name, s in shapes(header).items() if not any(re.search(d, name) for d in row.drop)}
    header.unlink()
    writer = _header(path, row)
    for name, shape in wanted.items():
        seed = int.from_bytes(hashlib.sha256(f"{row.seed} {name}".encode()).digest()[:8], "little")
        values = draw(np.random.default_rng(seed), name, shape, row, "output.weight" not in wanted)
        layer = _MIXES.match(name)
        if deaf_from is not None and layer and int(layer[1]) >= deaf_from:
            values[:] = 0
        writer.add_tensor(name, values)
    return tiny.finish(writer, path)
