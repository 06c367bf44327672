"""Damaged GGUF files: tiny models of several architectures and tokenizers, and the first layers of a real one.

    for case in cases(folder): damaged = mutate(case.data, rng)

A file is taken apart into metadata and tensors, one to three things are done to it, and it is put together again, so
that most of what comes out is well-formed and gets past the reader to where it hurts. Some bytes are then flipped, or
the end cut off, in one of six.
"""

from __future__ import annotations

import multiprocessing
import random
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mutations import FILE, FOLDER, Case, forked

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from gguf import GGUFReader, GGUFWriter, TokenType
from support import archs, tiny, zoo

from ggufloop.models.gguf import type_sizes

FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
_FLOATS = (6, 12)
COMMANDS = {
    "inspect": ("inspect", FILE),
    "run": ("run", FILE, "--raw", "-p", "Once upon a time", "-n", "4", "-t", "1", "--seed", "1", "--no-try"),
    "quantize": ("quantize", FILE, "--types", "Q8_0", "-t", "1", "--out", FOLDER),
    "snr": ("snr", FILE),
}
ROWS = (
    "gpt2", "bloom", "phi3", "command-r", "falcon", "minicpm", "gpt-oss", "llama4", "mamba", "mamba2", "rwkv6", "rwkv7",
    "lfm2", "jamba", "falcon-h1", "nemotron_h", "gemma3n", "glm4moe", "openelm",
)  # fmt: skip
"""Rows of tests/support/archs.py, beside the families of tests/support/tiny.py."""


@dataclass
class Key:
    """An entry of the metadata. kind: of its value, or of the entries of an array."""

    name: bytes
    kind: int
    value: Any
    array: bool


@dataclass
class Weight:
    """A tensor: its data are what its shape and type say, whatever was done to them."""

    name: bytes
    shape: list[int]
    kind: int
    data: bytes


@dataclass
class File:
    """A GGUF file in parts. layout: the alignment it is written with, whatever it says."""

    keys: list[Key]
    weights: list[Weight]
    layout: int = 32

    def key(self, name: bytes) -> Key | None:
        return next((k for k in self.keys if k.name == name), None)


# taking apart and putting together


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return value

    def string(self) -> bytes:
        n = self.scalar("<Q")
        self.at += n
        return self.data[self.at - n : self.at]

    def entry(self, kind: int) -> Any:
        return self.string() if kind == STRING else self.scalar(FORMS[kind])

    def key(self) -> Key:
        name, kind = self.string(), self.scalar("<I")
        if kind != ARRAY:
            return Key(name, kind, self.entry(kind), False)
        kind, n = self.scalar("<I"), self.scalar("<Q")
        if kind == STRING:
            return Key(name, kind, [self.string() for _ in range(n)], True)
        form = f"<{n}{FORMS[kind][1]}"
        values = list(struct.unpack_from(form, self.data, self.at))
        self.at += struct.calcsize(form)
        return Key(name, kind, values, True)


def parse(data: bytes) -> File:
    """A sound file in parts."""
    r = _Reader(data)
    r.at = 8
    n_weights, n_keys = r.scalar("<Q"), r.scalar("<Q")
    keys = [r.key() for _ in range(n_keys)]
    heads = []
    for _ in range(n_weights):
        name, dims = r.string(), r.scalar("<I")
        heads.append((name, [r.scalar("<Q") for _ in range(dims)], r.scalar("<I"), r.scalar("<Q")))
    start = _pad(r.at, 32)
    weights = []
    for name, shape, kind, offset in heads:
        begin = start + offset
        weights.append(Weight(name, shape, kind, data[begin : begin + _nbytes(shape, kind)]))
    return File(keys, weights)


def _pad(n: int, to: int) -> int:
    return -(-n // to) * to


def _nbytes(shape: list[int], kind: int) -> int:
    _, block, size = type_sizes()[kind]
    return int(np.prod(list(shape), dtype=object)) // block * size if shape else size


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _entries(kind: int, values: list[Any]) -> bytes:
    if kind == STRING:
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{FORMS[kind][1]}", *values)


def _key(k: Key) -> bytes:
    head = _string(k.name)
    if k.array:
        return head + struct.pack("<IIQ", ARRAY, k.kind, len(k.value)) + _entries(k.kind, k.value)
    return head + struct.pack("<I", k.kind) + _entries(k.kind, [k.value])


def build(file: File) -> bytes:
    """The bytes of a file."""
    out = [b"GGUF", struct.pack("<IQQ", 3, len(file.weights), len(file.keys)), *map(_key, file.keys)]
    offset = 0
    for w in file.weights:
        out.append(_string(w.name) + struct.pack(f"<I{len(w.shape)}QIQ", len(w.shape), *w.shape, w.kind, offset))
        offset = _pad(offset + len(w.data), file.layout)
    header = b"".join(out)
    parts = [header.ljust(_pad(len(header), file.layout), b"\0")]
    parts += [w.data.ljust(_pad(len(w.data), file.layout), b"\0") for w in file.weights]
    return b"".join(parts)


def _fit(w: Weight) -> Weight:
    """The same with as much data as its shape takes."""
    n = _nbytes(w.shape, w.kind)
    data = w.data if w.data else b"\0"
    return replace(w, data=(data * (n // len(data) + 1))[:n] if n < 1 << 24 else w.data)


# what is done to a file: each takes it and a generator, and changes it in place

Damage = Callable[[File, random.Random], None]
_WHOLE = (0, 1, 2, 3, 5, 7, 8, 31, 33, 63, 64, 65, 127, 255, 256, 1000, 4096, 65535, 2**20, 2**24, 2**31 - 1, 2**31,
          2**32 - 1, 2**40, 2**62, -1, -2, -(2**31))  # fmt: skip
_REAL = (0.0, -0.0, 1.0, -1.0, 1e-12, 1e-45, 1e30, -1e30, 3e38, float("inf"), float("-inf"), float("nan"))
_WORDS = (b"", b"llama", b"gpt2", b"bert", b"t5", b"rwkv", b"plamo2", b"none", b"default", b"yarn", b"longrope",
          b"linear", b"\0", b"a\0b", b"\xff\xfe", b"x" * 300, "\u4f60\u597d".encode())  # fmt: skip
_TEMPLATES = (b"{{", b"{% for %}", b"{% if x %}", b"{{ 1/0 }}", b"{{ messages[0].nothing.deeper }}", b"{% endfor %}",
              b"{{ raise_exception('no') }}", b"", b"\xff{{", b"{% for m in messages %}{{ m }}{% endfor %}",
              b"{{ messages " * 5000)  # fmt: skip
_SECRET = (b"general.architecture", b"tokenizer.ggml.tokens")  # where nearly every change is seen at once


def _some(file: File, rng: random.Random, test: Callable[[Key], bool]) -> Key | None:
    found = [k for k in file.keys if test(k)]
    return rng.choice(found) if found else None


def _whole(kind: int, rng: random.Random, old: Any) -> Any:
    size = 8 * struct.calcsize(FORMS[kind])
    new = rng.choice((*_WHOLE, old + 1, old - 1, 2 * old, old // 2, rng.getrandbits(size)))
    low, high = (0, 2**size) if FORMS[kind][1].isupper() else (-(2 ** (size - 1)), 2 ** (size - 1))
    return new if low <= new < high else (new - low) % (high - low) + low


def _number(kind: int, rng: random.Random, old: Any) -> Any:
    if kind == 7:
        return not old
    if kind in _FLOATS:
        new = rng.choice((*_REAL, 2 * old, -old, rng.gauss(0, 1)))
        return max(min(new, 3.4e38), -3.4e38) if kind == 6 and abs(new) < float("inf") else new
    return _whole(kind, rng, old)


def scalar(file: File, rng: random.Random) -> None:
    """Another number, or one where another kind of number stood."""
    k = _some(file, rng, lambda k: not k.array and k.kind != STRING)
    if k is not None:
        k.value = _number(k.kind, rng, k.value)


def text(file: File, rng: random.Random) -> None:
    k = _some(file, rng, lambda k: not k.array and k.kind == STRING and (k.name not in _SECRET or rng.random() < 0.1))
    if k is not None:
        k.value = rng.choice((*_WORDS, k.value[:-1], k.value + b"x"))


def type_of_key(file: File, rng: random.Random) -> None:
    """The same value as another type, or one no type fits."""
    k = rng.choice(file.keys)
    kind = rng.choice([*FORMS, STRING])
    if kind == STRING:
        k.kind, k.value = STRING, [b"1"] * len(k.value) if k.array else str(k.value).encode()
        return
    values = k.value if k.array else [k.value]
    value = 1 if k.kind == STRING or values == [] or values[0] != values[0] else values[0]
    new = float(value) if kind in _FLOATS else bool(value) if kind == 7 else min(max(int(value), 0), 127)
    k.kind, k.value = kind, [new] * len(k.value) if k.array else new


def to_array(file: File, rng: random.Random) -> None:
    """One value becomes an array of it, or an array one value."""
    k = rng.choice(file.keys)
    if k.array:
        k.array, k.value = False, k.value[0] if k.value else (b"" if k.kind == STRING else 0)
        if k.kind == 7:
            k.value = bool(k.value)
    else:
        k.array, k.value = True, [k.value] * rng.choice((0, 1, 2, 6, 7, 8, 600))


def drop_key(file: File, rng: random.Random) -> None:
    file.keys.remove(rng.choice(file.keys))


def twice(file: File, rng: random.Random) -> None:
    k = rng.choice(file.keys)
    file.keys.insert(rng.randrange(len(file.keys)), replace(k, value=k.value))


def rename_key(file: File, rng: random.Random) -> None:
    k = rng.choice(file.keys)
    k.name = rng.choice((k.name[:-1], k.name + b"\0", k.name.upper(), b"", b"a" * 70000, b"\xff" + k.name))


def array(file: File, rng: random.Random) -> None:
    """An array that is shorter, longer, in another order, or has another number in it."""
    k = _some(file, rng, lambda k: k.array and bool(k.value))
    if k is None:
        return
    how = rng.randrange(6)
    if how == 0:
        k.value = k.value[: rng.randrange(len(k.value) + 1)]
    elif how == 1:
        k.value = k.value + k.value[: rng.randrange(1, 9)]
    elif how == 2:
        rng.shuffle(k.value)
    elif how == 3:
        i = rng.randrange(len(k.value))
        k.value[i] = rng.choice(_WORDS) if k.kind == STRING else _number(k.kind, rng, k.value[i])
    elif how == 4 and k.kind != STRING:
        k.value = [_number(k.kind, rng, v) for v in k.value[:5000]]
    else:
        k.value = list(reversed(k.value))


def swap(file: File, rng: random.Random) -> None:
    """Two arrays, or two numbers, change places."""
    a = rng.choice(file.keys)
    b = _some(file, rng, lambda k: k is not a and k.array == a.array and k.kind == a.kind)
    if b is not None:
        a.value, b.value = b.value, a.value


def tokenizer(file: File, rng: random.Random) -> None:
    """Byte tokens go, kinds of tokens change, merges or scores vanish, ids point past the vocabulary."""
    tokens, kinds = file.key(b"tokenizer.ggml.tokens"), file.key(b"tokenizer.ggml.token_type")
    how = rng.randrange(6)
    if how == 0 and tokens is not None:
        for i in range(len(tokens.value)):
            if tokens.value[i].startswith(b"<0x") or (len(tokens.value[i]) < 3 and rng.random() < 0.3):
                tokens.value[i] = b"gone%d" % i
    elif how == 1 and kinds is not None:
        value = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 99, -1))
        for i in range(len(kinds.value)):
            if rng.random() < 0.5:
                kinds.value[i] = value
    elif how == 2:
        name = rng.choice((b"merges", b"scores", b"token_type", b"tokens", b"model", b"pre"))
        file.keys = [k for k in file.keys if k.name != b"tokenizer.ggml." + name]
    elif how == 3:
        name = rng.choice((b"bos", b"eos", b"unknown", b"padding", b"eot", b"fim_pre", b"separator", b"mask"))
        name = b"tokenizer.ggml." + name + b"_token_id"
        file.keys = [k for k in file.keys if k.name != name]
        n = len(tokens.value) if tokens is not None else 9
        file.keys.append(Key(name, 4, rng.choice((0, n - 1, n, n + 1, 2**31 - 1, 2**32 - 1)), False))
    elif how == 4:
        for name in (b"add_bos_token", b"add_eos_token", b"add_space_prefix", b"remove_extra_whitespaces"):
            file.keys = [k for k in file.keys if k.name != b"tokenizer.ggml." + name]
            file.keys.append(Key(b"tokenizer.ggml." + name, 7, rng.random() < 0.5, False))
    else:
        model = file.key(b"tokenizer.ggml.model")
        if model is not None:
            model.value = rng.choice(_WORDS[:10])


def template(file: File, rng: random.Random) -> None:
    file.keys = [k for k in file.keys if k.name != b"tokenizer.chat_template"]
    file.keys.append(Key(b"tokenizer.chat_template", STRING, rng.choice(_TEMPLATES), False))


def alignment(file: File, rng: random.Random) -> None:
    """A file that says how it is aligned, and mostly is."""
    n = rng.choice((0, 1, 2, 4, 8, 16, 64, 4096, 3, 2**31, 2**32 - 1))
    file.keys = [k for k in file.keys if k.name != b"general.alignment"]
    file.keys.append(Key(b"general.alignment", 4, n, False))
    if rng.random() < 0.8 and 0 < n <= 4096:
        file.layout = n


def split(file: File, rng: random.Random) -> None:
    for name in rng.sample((b"split.no", b"split.count", b"split.tensors.count"), 2):
        file.keys.append(Key(name, rng.choice((2, 4)), rng.choice((0, 1, 2, 65535)), False))


def type_of_tensor(file: File, rng: random.Random) -> None:
    """Another type, with as much data as that takes; or the same change to a tensor's likes in all layers."""
    w = rng.choice(file.weights)
    tail = w.name.split(b".")[-2:]
    kind = rng.choice((rng.choice(list(type_sizes())), rng.choice((0, 1, 8, 24, 25, 26, 27, 28, 30))))
    likes = [x for x in file.weights if x.name.split(b".")[-2:] == tail] if rng.random() < 0.5 else [w]
    for x in likes:
        if not x.shape or x.shape[0] % type_sizes()[kind][1] == 0:
            x.kind = kind
            x.data = _fit(x).data


def drop_tensor(file: File, rng: random.Random) -> None:
    w = rng.choice(file.weights)
    layer = b".".join(w.name.split(b".")[:2])
    gone = [w] if rng.random() < 0.7 else [x for x in file.weights if x.name.startswith(layer)]
    file.weights = [x for x in file.weights if x not in gone]


def rename_tensor(file: File, rng: random.Random) -> None:
    w = rng.choice(file.weights)
    other = rng.choice(file.weights).name
    new = (b"", other, w.name + b"\0", w.name[:-7], b"blk.99." + w.name, b"\xff" + w.name, b"y" * 63, b"y" * 64)
    w.name = rng.choice(new)


def swap_tensors(file: File, rng: random.Random) -> None:
    a, b = rng.choice(file.weights), rng.choice(file.weights)
    a.name, b.name = b.name, a.name


def reshape(file: File, rng: random.Random) -> None:
    w = rng.choice(file.weights)
    if not w.shape:
        return
    how = rng.randrange(6)
    if how == 0:
        w.shape = list(reversed(w.shape))
    elif how == 1:
        i = rng.randrange(len(w.shape))
        w.shape[i] = rng.choice((0, 1, w.shape[i] * 2, w.shape[i] // 2, w.shape[i] + 32, 2**20, 2**33))
    elif how == 2:
        w.shape = [*w.shape, 1, 1, 1, 1][: rng.randrange(6)]
    elif how == 3:
        w.shape = [int(np.prod(w.shape))]
    elif how == 4 and len(w.shape) > 1:
        w.shape = [w.shape[0] * 2, w.shape[1] // 2, *w.shape[2:]]
    else:
        w.shape = [1, *w.shape][:4]
    if w.shape and w.shape[0] % type_sizes()[w.kind][1] == 0:
        w.data = _fit(w).data


def spoil(file: File, rng: random.Random) -> None:
    """Weights that are zeros, no numbers, or noise."""
    w = rng.choice(file.weights)
    how = rng.randrange(4)
    n = len(w.data)
    w.data = (bytes(n), b"\xff" * n, (b"\0\0\x80\x7f" * (n // 4 + 1))[:n], rng.randbytes(n))[how]


DAMAGES: tuple[Damage, ...] = (
    scalar, scalar, scalar, text, type_of_key, to_array, drop_key, twice, rename_key, array, array, swap, tokenizer,
    tokenizer, template, alignment, split, type_of_tensor, type_of_tensor, drop_tensor, rename_tensor, swap_tensors,
    reshape, spoil,
)  # fmt: skip


def _flip(data: bytes, rng: random.Random) -> bytes:
    """A few bytes of the header changed, or the end cut off."""
    out, header = bytearray(data), min(len(data), 24000)
    how = rng.randrange(3)
    if how == 0:
        del out[rng.randrange(len(out)) :]
    for _ in range(rng.randrange(1, 9) if how else 0):
        at = rng.randrange(min(header, len(out)))
        out[at] = rng.choice((0, 255, out[at] ^ 1 << rng.randrange(8), rng.getrandbits(8)))
    return bytes(out)


def mutate(data: bytes, rng: random.Random) -> bytes:
    """The file, damaged as `rng` has it."""
    if rng.random() < 0.1:
        return _flip(data, rng)
    file = parse(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if file.weights and file.keys:
            rng.choice(DAMAGES)(file, rng)
    out = build(file)
    return _flip(out, rng) if rng.random() < 0.07 else out


# the sound files


def _with_context(data: bytes) -> bytes:
    """The same, trained on 4096 tokens: a damaged number must not be what makes the context larger."""
    file = parse(data)
    if any(w.name == b"position_embd.weight" for w in file.weights):
        return data  # has a row for each
    for k in file.keys:
        if k.name.endswith(b".context_length"):
            k.value = 4096
    return build(file)


def sentencepiece(data: bytes) -> bytes:
    """The same model with a tokenizer of the kind "llama": unknown, bos, eos, 256 bytes, one piece."""
    file = parse(data)
    file.keys = [k for k in file.keys if not k.name.startswith(b"tokenizer.")]
    tokens = [b"<unk>", b"<s>", b"</s>", *(b"<0x%02X>" % i for i in range(256)), b"\xe2\x96\x81a"]
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, *[TokenType.BYTE] * 256, TokenType.NORMAL]
    for name, kind, value in (
        (b"model", STRING, b"llama"), (b"tokens", STRING, tokens), (b"scores", 6, [0.0] * 260),
        (b"token_type", 5, [int(k) for k in kinds]), (b"bos_token_id", 4, 1), (b"eos_token_id", 4, 2),
    ):  # fmt: skip
        file.keys.append(Key(b"tokenizer.ggml." + name, kind, value, isinstance(value, list)))
    return build(file)


def _first_layers(source: Path, out: Path, n: int) -> Path:
    """A real model's file with its first n layers: its own vocabulary, template and types, a quarter of its size."""
    reader = GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(out, arch)
    for key, f in reader.fields.items():
        if key != "general.architecture" and not key.startswith("GGUF."):
            value = n if key == f"{arch}.block_count" else f.contents()
            writer.add_key_value(key, value, f.types[0], sub_type=f.types[-1] if len(f.types) > 1 else None)
    for t in reader.tensors:
        if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < n:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    return tiny.finish(writer, out)


def _write(folder: Path, real: Path | None) -> None:
    """All sound files, as NAME.gguf."""
    for name, family in (tiny.FAMILIES | tiny.HYBRIDS).items():
        path = tiny.write(folder / f"{name}.gguf", family)
        if name in ("llama", "gemma3"):
            (folder / f"{name} spm.gguf").write_bytes(sentencepiece(path.read_bytes()))
    for name in ROWS:
        zoo.write(folder / f"{name}.gguf", archs.ROWS[name])
    if real is not None:
        _first_layers(real, folder / "real.gguf", 4)


def cases(folder: Path, real: Path | None = None) -> Iterator[Case]:
    """The tiny models, written anew; and the first layers of the real one, if it is given."""
    with multiprocessing.get_context("fork").Pool(1, initializer=forked.quiet) as pool:
        pool.apply(_write, (folder, real))  # llama.cpp has computed nothing in the process that is forked
    for path in sorted(folder.glob("*.gguf")):
        share = 0.4 if path.stem in (*ROWS, "real") else 1.0
        yield Case(f"gguf {path.stem}", "m.gguf", _with_context(path.read_bytes()), mutate, COMMANDS, share)
