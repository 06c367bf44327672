"""Reads the header of a GGUF file, and says in one line what is wrong with a file llama.cpp could not load.

    parts = read_model(path)             # one Header per file of a split model
    check_model_file(path)               # the same, for its errors

llama.cpp is never given a file this has not accepted: it answers a corrupt one with a log, and some with an abort.
The reader is our own because gguf.GGUFReader turns every vocabulary entry into arrays (12 s for 262k tokens, against
0.1 s) and raises whatever a corrupt file makes numpy raise. Here only what lies before the tensor data is walked,
long arrays are skipped, and nothing is allocated on the word of a length field: every length is checked against the
bytes the file has. The rules are those of llama.cpp's gguf.cpp.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ggufloop.errors import GgufloopError

MAX_HEADER = 256 << 20
"""Bytes before the tensor data; the largest vocabularies need a tenth of it."""
MAX_LAYERS, MAX_EXPERTS = 512, 1024
"""What llama.cpp has room for."""
MAX_COUNT = 1 << 24
"""Most keys, tensors or strings in one array that are believed."""
KEPT_ARRAY = 4096
"""Arrays up to this length are kept (per-layer settings); of longer ones only the length."""

_AGAIN = "it was damaged on the way or on disk: download or copy it again."
_SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_STATE = re.compile(r"^blk\.\d+\.(ssm|time_mix|shortconv)[._]")
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_U64 = struct.Struct("<Q").unpack_from
_FOREIGN = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"PK\x03\x04", "a zip archive (a wheel, or a PyTorch checkpoint)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"%PDF", "a PDF document"),
    (b"\x7fELF", "an ELF binary"),
    (b"FUGG", "a GGUF file with its magic reversed"),
    (b"tjgg", "a GGML file from before GGUF"),
    (b"lmgg", "a GGML file from before GGUF"),
    (b"fmgg", "a GGML file from before GGUF"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file itself"),
    (b"<", "an HTML or XML page"),
    (b"\0\0\0\0", "zeros"),
)


@dataclass(frozen=True)
class Array:
    """An array of the metadata. values: None when it has more than KEPT_ARRAY entries, or holds strings.

    digest: of the bytes of an array of strings, so that two vocabularies can be told apart. bytes: of a vocabulary, how
    many of the 256 bytes have a token, written <0x0A> or as they are.
    """

    length: int
    values: tuple[int | float | bool, ...] | None
    digest: str = ""
    bytes: int = 0


Value = int | float | bool | str | Array


@dataclass(frozen=True)
class Tensor:
    """One tensor of a file. type: 'F32', 'Q4_K', ...; shape: as stored, row length first; nbytes: of its data."""

    name: str
    type: str
    shape: tuple[int, ...]
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """Everything in one GGUF file but the tensor data, which lie from data_start on.

    data_end: bytes a whole file has at least.
    """

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    data_start: int
    data_end: int
    file_bytes: int

    def text(self, key: str) -> str | None:
        """A string of the metadata, None if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def number(self, key: str) -> int | None:
        """A whole number of the metadata, None if there is none."""
        value = self.metadata.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else None

    def positive(self, key: str, limit: int = 2**31 - 1) -> int:
        """A whole number from 1 to `limit` of the metadata. Raises GgufloopError."""
        value = self.number(key)
        if value is None or not 1 <= value <= limit:
            what = f"is {self.metadata[key]!r}, not in 1 to {limit}" if key in self.metadata else "is missing"
            raise unusable(self.path, f"its {key} {what}")
        return value

    @property
    def keeps_state(self) -> bool:
        """Whether some layer is recurrent: what it keeps of a sequence is a state, which costs memory for each."""
        linear = f"{self.text('general.architecture')}.full_attention_interval"  # some have no tensors of their own
        return linear in self.metadata or any(_STATE.search(tensor.name) for tensor in self.tensors)


def unusable(path: Path, why: str) -> GgufloopError:
    """What to say of a well-formed file whose metadata describe no model."""
    return GgufloopError(f"{path} is no model that can run: {why}.", "get it from another source, or convert it again.")


@lru_cache(maxsize=1)
def type_sizes() -> dict[int, tuple[str, int, int]]:
    """ggml type number -> its name, weights per block, bytes per block; as the pinned llama.cpp has them."""
    from gguf.constants import GGML_QUANT_SIZES  # a fifth of a second, because it imports all of gguf

    sizes = {int(t): (str(t.name), int(block), int(size)) for t, (block, size) in GGML_QUANT_SIZES.items()}
    return {42: ("Q2_0", 64, 18)} | sizes  # newer than some gguf releases


class _Cursor:
    """A position in a mapped file; every read is checked against the file's end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at, self.end = path, data, 0, len(data)

    def corrupt(self, what: str) -> GgufloopError:
        return GgufloopError(f"{self.path} is corrupt: {what}.", _AGAIN)

    def skip(self, n: int) -> int:
        """Move on by n bytes and return the position before. Raises GgufloopError past the end."""
        before, self.at = self.at, self.at + n
        if self.at > self.end:
            raise GgufloopError(f"{self.path} is truncated: its header is incomplete after {self.end} bytes.", _AGAIN)
        if self.at > MAX_HEADER:
            raise self.corrupt(f"its header is over {MAX_HEADER >> 20} MiB")
        return before

    def scalar(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))[0]
        return value

    def u32(self) -> int:
        return int(self.scalar("<I"))

    def count(self, what: str, limit: int = MAX_COUNT) -> int:
        n = int(self.scalar("<Q"))
        if n > limit:
            raise self.corrupt(f"it claims {n} {what}")
        return n

    def string(self) -> str:
        n = self.count("bytes for one string", MAX_HEADER)
        start = self.skip(n)
        return self.data[start : self.at].decode("utf-8", "replace")

    def value(self, key: str) -> Value:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _ARRAY:
            kind, n = self.u32(), self.count(f"entries in {key!r}")
            if kind == _STRING:
                start = self.at
                known = self.skip_strings(n, distinct=key == "tokenizer.ggml.tokens")
                spelled = sum(b"<0x%02X>" % i in known or bytes((i,)) in known for i in range(256))
                return Array(n, None, hashlib.sha256(self.data[start : self.at]).hexdigest(), spelled)
            if kind in _SCALARS:
                form = f"<{n}{_SCALARS[kind][1]}"
                start = self.skip(struct.calcsize(form))
                return Array(n, struct.unpack_from(form, self.data, start) if n <= KEPT_ARRAY else None)
        raise self.corrupt(f"key {key!r} has unknown type {kind}")

    def skip_strings(self, n: int, distinct: bool) -> set[bytes]:
        """Move past n strings. distinct: return them; llama.cpp aborts over one that is there twice."""
        at, last = self.at, min(self.end, MAX_HEADER) - 8
        seen: set[bytes] = set()
        for i in range(n):  # the one hot loop: a vocabulary has a quarter of a million of them
            if at > last:
                at += 8  # past the end, which `skip` reports
                break
            start = at + 8
            at = start + _U64(self.data, at)[0]
            if distinct:
                if at > self.end:  # no token, but all that is left: `skip` reports it, without a copy
                    break
                token = self.data[start:at]
                if not token or 0 in token:  # llama.cpp stops at a zero byte, and gives an empty token a name
                    token = token.split(b"\0", 1)[0] or b"[EMPTY_%d]" % i
                seen.add(token)
        self.skip(at - self.at)
        if distinct and len(seen) < n:
            raise self.corrupt(f"{n - len(seen)} of its tokens are there twice")
        return seen

    def tensor(self) -> tuple[Tensor, int]:
        """The next tensor and the offset of its data."""
        name = self.string()
        if "\0" in name or not name:
            raise self.corrupt(f"the tensor name {name[:20]!r} {'holds a zero byte' if name else 'is empty'}")
        if len(name.encode()) >= 64:
            raise self.corrupt(f"the tensor name {name[:20]!r}... is longer than 63 bytes")
        dims = self.u32()
        if dims > 4:
            raise self.corrupt(f"tensor {name!r} has {dims} dimensions")
        shape = tuple(int(self.scalar("<Q")) for _ in range(dims))
        if not 0 < math.prod(shape) < 1 << 48:
            raise self.corrupt(f"tensor {name!r} has the shape {shape}")
        number = self.u32()
        if number not in type_sizes():
            raise self.corrupt(f"tensor {name!r} has unknown type {number}")
        kind, block, size = type_sizes()[number]
        row = shape[0] if shape else 1
        if row % block:
            raise self.corrupt(f"tensor {name!r} has rows of {row}, not a multiple of the {block} of {kind}")
        return Tensor(name, kind, shape, math.prod(shape) // block * size), int(self.scalar("<Q"))


def _foreign(start: bytes) -> str:
    """What a file that is no GGUF looks like."""
    for magic, kind in _FOREIGN:
        if start.startswith(magic):
            return f"it looks like {kind}"
    if start[8:9] == b"{":
        return "it looks like a safetensors file"
    return f"it starts with {start[:4]!r} instead of b'GGUF'"


def _walk(c: _Cursor) -> Header:
    path = c.path
    if c.data[:4] != b"GGUF":
        raise GgufloopError(f"{path} is not a GGUF file: {_foreign(c.data[:64])}.", "give a model in GGUF format.")
    c.skip(4)
    version = c.u32()
    if version & 0xFFFF == 0 and version:
        raise GgufloopError(f"{path} is a big-endian GGUF file; only little-endian ones run here.", "convert it again.")
    if version not in (2, 3):
        raise GgufloopError(f"{path} has GGUF version {version}; versions 2 and 3 can be read.", "convert it again.")
    n_tensors = c.count("tensors")
    n_keys = c.count("metadata keys")
    metadata: dict[str, Value] = {}
    for _ in range(n_keys):
        key = c.string()
        if not key or key in metadata:
            raise c.corrupt(f"metadata key {key!r} is given twice" if key else "a metadata key is empty")
        metadata[key] = c.value(key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise c.corrupt(f"its alignment is {alignment}, not a power of two")

    tensors: list[Tensor] = []
    names: set[str] = set()
    expected = data_bytes = 0
    for _ in range(n_tensors):
        tensor, offset = c.tensor()
        if tensor.name in names:
            raise c.corrupt(f"tensor {tensor.name!r} is given twice")
        if offset != expected:
            raise c.corrupt(f"tensor {tensor.name!r} is at {offset} instead of {expected}")
        data_bytes = offset + tensor.nbytes
        expected = _pad(data_bytes, alignment)
        names.add(tensor.name)
        tensors.append(tensor)
    data_start = _pad(c.at, alignment) if tensors else c.at
    return Header(path, version, metadata, tuple(tensors), data_start, data_start + data_bytes, c.end)


def _pad(n: int, to: int) -> int:
    return (n + to - 1) // to * to


def read_header(path: Path) -> Header:
    """Read one GGUF file up to its tensor data.

    Raises GgufloopError, one line each, if it is missing, a folder, empty, unreadable, no GGUF, of another version or
    byte order, cut off, or not well-formed.
    """
    try:
        stat = path.stat()
        return _read(path, stat.st_size, stat.st_mtime_ns)
    except FileNotFoundError:
        raise GgufloopError(
            f"model file {path} does not exist.", "check the path; `ggufloop list` shows the models known by name."
        ) from None
    except OSError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror or e}.", "check the path and its permissions.") from None


@lru_cache(maxsize=16)
def _read(path: Path, size: int, _changed: int) -> Header:
    """`read_header`, done once for a file that stays as it is: several modules look at a model before it runs."""
    if path.is_dir():
        raise GgufloopError(f"{path} is a folder, not a model file.", "name the .gguf file in it.")
    if not path.is_file():  # opening a named pipe would wait for ever
        raise GgufloopError(f"{path} is not a regular file.", "give a model file.")
    with path.open("rb") as f:
        if size == 0:
            raise GgufloopError(f"{path} is empty.", _AGAIN)
        with mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            header = _walk(_Cursor(path, data))
    if header.file_bytes < header.data_end:
        raise GgufloopError(
            f"{path} is truncated: {header.data_end} bytes expected, it has {header.file_bytes}.", _AGAIN
        )
    return header


def split_paths(path: Path) -> tuple[Path, ...]:
    """All files of the split model `path` is named as a part of, in order; `path` alone if it is not."""
    match = _SPLIT_NAME.fullmatch(path.name)
    if match is None:
        return (path,)
    count = int(match["count"])
    return tuple(path.with_name(f"{match['stem']}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1))


def read_model(path: Path) -> tuple[Header, ...]:
    """The headers of all files of a model: one, or those of a split model, given its first.

    Raises GgufloopError for what `read_header` does, for missing or misplaced parts, and for a file without tensors.
    """
    from ggufloop.models import check  # which needs this module

    first = read_header(path)
    count, number = first.number("split.count") or 1, first.number("split.no") or 0
    paths = split_paths(path)
    if count != len(paths):
        raise GgufloopError(
            f"{path} is one of {count} parts by its content, but of {len(paths)} by its name.",
            "give the parts their names back: NAME-00001-of-0000N.gguf.",
        )
    if number != 0 or paths[0] != path:
        raise GgufloopError(f"{path} is part {number + 1} of {count}.", f"name the first part: {paths[0]}.")
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise GgufloopError(
            f"{path} is the first of {count} parts; missing: {', '.join(missing[:3])}{more}.",
            "put them into the same folder.",
        )
    headers = (first, *(read_header(p) for p in paths[1:]))
    for i, header in enumerate(headers):
        if (header.number("split.no") or 0) != i:
            raise GgufloopError(f"{header.path} is not part {i + 1} of {count}.", "download the parts again.")
    if not any(h.tensors for h in headers):
        raise GgufloopError(f"{path} has no tensors: it holds a vocabulary only.", "give a file with the weights.")
    check.check(headers)
    return headers


def check_model_file(path: Path) -> None:
    """Raise GgufloopError, with one clear line, unless `path` is a whole, well-formed GGUF model with a tokenizer."""
    from ggufloop.models import check

    check.check_tokenizer(read_model(path)[0])
