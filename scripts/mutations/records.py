"""Damaged records: journals, studies, kl-base files, importance matrices, TOML files, tables of numbers, texts.

    for case in cases(folder): damaged = case.mutate(case.data, rng)

Every sound file is made by the product itself, from a tiny model. What is damaged is its structure, by what it is (a
value of JSON, a cell, a number of a header), or its bytes, or the kind of text it is: no UTF-8, a BOM, UTF-16, zeros.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import multiprocessing
import random
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mutations import FILE, FOLDER, Case, Mutate, forked

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from support import tiny

_N_CTX, _CHUNKS = 32, 8
_TEXT = "".join(f"Line {i} says that {i * i} is the square of {i}. " for i in range(60))
_QUICK = ("--starts", "2", "--resamples", "20")
_LOOP = ("--window", "2:4", "--K", "2")

_ODD_WORDS = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "nan",
        "inf",
        "-inf",
        "1e999",
        "-1e999",
        "1e308",
        "-1",
        "0",
        "-0.0",
        "1.5",
        "1,1",
    ),
    *("2147483648", "9223372036854775808", "1" + 400 * "0", "1" + 5000 * "0", "1_0", "0x10", "\u0663", "2026-01-01"),
    *("true", "null", "[]", "{}", '""', '"5"', "", " ", "'", '"', "#", "\xed\xa0\x80"),
    *("[" * 3000, "{" * 3000, '{"a":' * 1500 + "1" + "}" * 1500, "[" * 400 + "]" * 400),
)
"""What may stand where a number or a word does."""
_ODD_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, -0.0, 1e308, math.nan, math.inf, "", "5", "a\0b", "\ud800",
    "\x1b[31m\n", "x" * 3000, [], {}, [[]], [1, 2], {"a": 1}, ["plain"], "../../etc/passwd", "\u0130",
)  # fmt: skip
"""What a value of JSON may become."""
_WORD = re.compile(rb"-?\d[\w.+-]*|\"[^\"\n]*\"|[A-Za-z_][\w.-]*")
_INTS = (0, 1, -1, 2, 3, 255, 65535, 2**31 - 1, -(2**31), 2**24, 100000, 7)
_FLOATS = (math.nan, math.inf, -math.inf, -1.0, 0.0, 1e30, -1e30, 1e-45, 3.4e38)


# bytes


def _bytes(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    at = rng.randrange(len(out) + 1)
    n = min(rng.choice((1, 1, 2, 4, 16, 300)), len(out) - at)
    how = rng.randrange(7)
    if how == 0:
        del out[at:]
    elif how == 1:
        del out[at : at + n]
    elif how == 2:
        out[at : at + n] = rng.choice((b"\0", b"\xff", b" ", b"\n", b"\r")) * n
    elif how == 3:
        out[at:at] = rng.randbytes(n)
    elif how == 4:
        other = rng.randrange(len(out) + 1)
        out[at : at + n] = out[other : other + n]
    elif out:
        for _ in range(rng.choice((1, 1, 3, 30))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _encoding(data: bytes, rng: random.Random) -> bytes:
    """The same text as another kind of file."""
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (
            lambda: b"\xef\xbb\xbf" + data,
            lambda: text.encode("utf-16"),
            lambda: text.replace("a", "\xe4").encode("latin-1", "replace"),
            lambda: data.replace(b"\n", b"\r\n"),
            lambda: data.replace(b"\n", b"\r"),
            lambda: b"",
            lambda: b"\n" * 3,
            lambda: bytes(len(data)),
            lambda: data + bytes(4096),
            lambda: data + data,
            lambda: rng.randbytes(300),
        )
    )()


# text


def _word(data: bytes, rng: random.Random) -> bytes:
    """A number, a name or a quoted word becomes an odd one."""
    found = list(_WORD.finditer(data))
    if not found:
        return data
    match = rng.choice(found)
    return data[: match.start()] + rng.choice(_ODD_WORDS).encode() + data[match.end() :]


def _lines(data: bytes, rng: random.Random) -> bytes:
    lines = data.split(b"\n")
    i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
    how = rng.randrange(6)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines.insert(j, lines[i])
    elif how == 2:
        lines[i], lines[j] = lines[j], lines[i]
    elif how == 3:
        lines[i] = lines[i][: rng.randrange(len(lines[i]) + 1)]
    elif how == 4:
        lines[i] += lines[j]
    else:
        lines[i:] = [_bytes(line, rng) for line in lines[i:]]
    return b"\n".join(lines)


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a value of JSON: what holds it, and its key or index."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield value, key
        yield from _nodes(item)


def _value(data: bytes, rng: random.Random) -> bytes:
    """One value of JSON changed, taken out, or there twice; of JSON lines in one line."""
    lines = data.split(b"\n") if data.count(b"\n{") else [data]
    i = rng.choice([i for i, line in enumerate(lines) if line.strip()] or [0])
    try:
        value = json.loads(lines[i])
    except (ValueError, RecursionError):  # damaged before
        return data
    places = list(_nodes(value))
    if not places:
        return data
    of, key = rng.choice(places)
    how = rng.randrange(8)
    if how == 0:
        del of[key]
    elif how == 1 and isinstance(of, dict):
        of[rng.choice(("", "x", "kind", "\ud800", "a\0"))] = of.pop(key)
    elif how == 2 and isinstance(of, list):
        of.insert(0, of[key])
    elif how == 3:
        of[key] = rng.choice(([of[key]], {"": of[key]}, str(of[key])))
    elif how == 4:
        other, place = rng.choice(places)
        of[key] = json.loads(json.dumps(other[place]))
    else:
        of[key] = rng.choice(_ODD_VALUES)
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if how == 7 and isinstance(value, dict):
        text = b"{" + text[1:-1] + b", " + text[1:]  # every key twice
    lines[i] = text
    return b"\n".join(lines)


_DEEP = ".".join("a" * 4000)


def _table(data: bytes, rng: random.Random) -> bytes:
    """A line of TOML becomes another."""
    lines = data.decode().split("\n")
    at = [i for i, line in enumerate(lines) if "=" in line]
    i = rng.choice(at)
    key, _, old = lines[i].partition(" = ")
    values = (
        *_ODD_WORDS,
        *("-1", "1e400", "[nan]", "[[1]]", '["a", 1, true]', "{ a = 1 }", f"{{ {_DEEP} = 1 }}", "1.0", "9" * 30, "'''"),
        *(
            '"\\u0000"',
            '"\\u001b[31m"',
            f'"{3000 * "x"}"',
            '"../../x.gguf"',
            '"/"',
            '"a:b:c"',
            '"3:"',
            "1979-05-27T07:32:00Z",
        ),
        *('"0:9999999999999"', '"2:4 k=99999999999"', '"2:4 k=2 beta=nan"', '"2:4 k=-1"', "[" * 300 + "]" * 300),
        *(old + old, f"[{old}, {old}]"),
    )
    how = rng.randrange(6)
    if how == 0:
        del lines[i]
    elif how == 1:
        lines[i] = f"{rng.choice((_DEEP, 'a.b', 'x', '', chr(39) * 2, key + '.x', '[' + key + ']'))} = {old}"
    elif how == 2:
        lines.insert(i, rng.choice((f"[{_DEEP}]", "[a]", "[[a]]", "[]", "a = 1", f"{key} = 1")))
    else:
        lines[i] = f"{key} = {rng.choice(values)}"
    return "\n".join(lines).encode()


def _cells(data: bytes, rng: random.Random) -> bytes:
    """A cell of a CSV file becomes another."""
    lines = data.decode().split("\n")
    i = rng.choice([i for i, line in enumerate(lines) if line and not line.startswith("#")])
    cells = lines[i].split(",")
    j = rng.randrange(len(cells))
    how = rng.randrange(6)
    if how == 0:
        del cells[j]
    elif how == 1:
        cells.insert(j, rng.choice(cells))
    elif how == 2:
        cells[j] = rng.choice(("\0", '"', '"a\nb"', "x" * 200_000, "=1+1"))
    else:
        cells[j] = rng.choice(_ODD_WORDS)
    lines[i] = ",".join(cells)
    return "\n".join(lines).encode()


def _drawn(*how: Mutate) -> Mutate:
    """One to three of these, one after the other."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            with_text = rng.choice(how)
            try:
                data = with_text(data, rng)
            except (UnicodeDecodeError, IndexError):  # no text any more
                data = _bytes(data, rng)
        return data

    return mutate


# binary


def _numbers(at: Callable[[bytes, random.Random], int]) -> Mutate:
    """A number of 32 bits at a place becomes an odd one."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        place = at(data, rng)
        if place + 4 > len(data):
            return data[:place]
        old = struct.unpack_from("<i", data, place)[0]
        near = max(-(2**31), min(old + rng.choice((-1, 1, 100, -100)), 2**31 - 1))
        odd = (struct.pack("<i", rng.choice((*_INTS, near))), struct.pack("<f", rng.choice(_FLOATS)))
        return data[:place] + rng.choice(odd) + data[place + 4 :]

    return mutate


def _kl_place(data: bytes, rng: random.Random) -> int:
    """Of a kl-base file: the header, a token, the scale or the lowest of a row."""
    how = rng.randrange(3)
    n_ctx, n_vocab = struct.unpack_from("<Ii", data, 8) if len(data) >= 20 else (0, 0)
    if how == 0 or not 0 < n_vocab < 10**6 or not 0 < n_ctx < 10**4:
        return 8 + 4 * rng.randrange(3)
    tokens, width = n_ctx * _CHUNKS, 2 * (2 * ((n_vocab + 1) // 2) + 4)
    if how == 1:
        return 20 + 4 * rng.randrange(tokens)
    row = rng.randrange(max(1, (len(data) - 20 - 4 * tokens) // width))
    return 20 + 4 * tokens + row * width + 4 * rng.randrange(2)


def _any_place(data: bytes, rng: random.Random) -> int:
    return 4 * rng.randrange(min(len(data), rng.choice((40, 400, 40000))) // 4 + 1)


# the sound files


def _legacy(path: Path) -> bytes:
    """The older format of an importance matrix."""
    from ggufloop.quant.imatrix import read

    matrix = read(path)
    out = struct.pack("<i", len(matrix.entries))
    for name, squares in matrix.entries.items():
        sums = (squares.ravel() * 4).astype(np.float32)
        out += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", 4, sums.size) + sums.tobytes()
    return out + struct.pack("<ii", 4, 3) + b"fox"


_CSV = "# from nowhere\nN,D,loss,bits\n" + "".join(
    f"{n},{d},{1.5 + 0.4 / n**0.3 + 0.9 / d**0.25 + 0.1 * (bits == 4):.6f},{bits}\n"
    for bits in (16, 4) for n in (0.07, 0.16, 0.41, 1.0) for d in (2, 4, 8, 16, 33, 67, 134, 300)
)  # fmt: skip
_LADDER = "type,snr_db,bits,kld,loss\nF16,inf,16,0,2.5\n" + "".join(
    f"Q{b},{6 * b - 4},{b + 0.5},{10 ** -(0.55 * b - 1.2):.7f},{2.5 + 10 ** -(0.6 * b - 1):.6f}\n"
    for b in (3, 4, 5, 6, 8)
)
_OWN = """# models of my own
[mine]
file = "m.gguf"
architecture = "llama"
layers = 7
bytes = 1234567
loop = "2:4 k=2"
origin = "my sweep"
sources = [{ hf = "me/mine" }]

[other]
file = "other.gguf"
architecture = "qwen3"
layers = 36
window = "15:19"
origin = "a paper"
sources = [{ wheels = [{ pypi = "a==1", member = "a/b.gguf", bytes = 10, sha256 = "00", download = 20 }] }]
"""


def _write(folder: Path) -> None:
    """Every sound file, by the commands that write them."""
    from ggufloop.cli import main

    model, text = tiny.write(folder / "m.gguf", tiny.FAMILIES["llama"]), folder / "text.txt"
    text.write_text(_TEXT, encoding="utf-8")
    given = ("--text", str(text), "-c", str(_N_CTX), "--chunks", str(_CHUNKS), "-t", "1")
    for words in (
        ("perplexity", str(model), *given, "--save-kl-base", str(folder / "base.kld")),
        ("sweep", str(model), "--window", "2:4", "--K", "2,3", *given, "--journal", str(folder / "sweep.jsonl")),
        ("compare", str(model), *_LOOP, *given, "--types", "Q8_0", "--out", str(folder / "out")),
        ("quantize", str(model), "--types", "IQ4_NL", "--imatrix", str(text), "-t", "1", "--out", str(folder / "q")),
    ):
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                main(list(words))
        except SystemExit as e:
            if e.code:
                raise RuntimeError(f"no sound file: {words[0]} says: {said.getvalue().strip()}") from None


def cases(folder: Path) -> Iterator[Case]:
    """The kinds of records, written anew."""
    (folder / "long.txt").write_text(_TEXT * 20, encoding="utf-8")
    with multiprocessing.get_context("fork").Pool(1, initializer=forked.quiet) as pool:
        pool.apply(_write, (folder,))  # llama.cpp has computed nothing in the process that is forked
    model, text = str(folder / "m.gguf"), str(folder / "text.txt")
    given = ("--text", text, "-c", str(_N_CTX), "--chunks", str(_CHUNKS), "-t", "1")
    lines = _drawn(_bytes, _encoding, _word, _word, _lines, _value, _value, _value)
    tables = _drawn(_bytes, _encoding, _word, _lines, _table, _table, _table)
    csv = _drawn(_bytes, _encoding, _word, _lines, _cells, _cells, _cells)
    value = _drawn(_bytes, _encoding, _word, _value, _value, _value)
    binary = _drawn(_bytes, _numbers(_any_place), _numbers(_any_place), _encoding)

    def case(
        name: str, file: str, data: bytes, mutate: Mutate, share: float = 1.0, **commands: tuple[str, ...]
    ) -> Case:
        return Case(f"records {name}", file, data, mutate, commands, share)

    yield case("kl-base", "base.kld", (folder / "base.kld").read_bytes(),
               _drawn(_bytes, _numbers(_kl_place), _numbers(_kl_place), _numbers(_kl_place)), 2,
               perplexity=("perplexity", model, *_LOOP, "--kl-base", FILE, "-t", "1"))  # fmt: skip
    yield case("journal", "sweep.jsonl", (folder / "sweep.jsonl").read_bytes(), lines, 2,
               sweep=("sweep", model, "--window", "2:4", "--K", "2,3", *given, "--journal", FILE))  # fmt: skip
    study = folder / "out" / "m"
    yield case("study", "study.jsonl", (study / "study.jsonl").read_bytes(), lines, 3,
               advise=("advise", FILE), explain=("advise", FILE, "--explain", "-o", "json"))  # fmt: skip
    yield case("going-on", "m/study.jsonl", (study / "study.jsonl").read_bytes(), lines, 0.2,
               compare=("compare", model, *_LOOP, *given, "--types", "Q8_0", "--out", f"{FOLDER}/.."))  # fmt: skip
    toml = (
        f'models = ["{model}"]\ntypes = ["Q8_0"]\nK = [2]\nwindow = "2:4"\ntext = "{text}"\nctx-size = {_N_CTX}\n'
        f'chunks = 2\nthreads = 1\nreference = "F32"\nsolver = ["euler"]\nbatch-size = 32\nflash-attn = "on"\n'
    )
    yield case("toml", "study.toml", toml.encode(), tables, 0.5,
               study=("compare", "--study", FILE, "--out", FOLDER))  # fmt: skip
    own = f"GGUFLOOP_MODELS={FILE}"
    yield case("models", "models.toml", _OWN.encode(), tables, 2, list=(own, "list"), inspect=(own, "inspect", model),
               auto=(own, "inspect", model, "--window", "auto"))  # fmt: skip
    matrix = next((folder / "q").glob("m-imatrix-*.gguf"))
    quantize = ("quantize", model, "--types", "IQ4_NL", "-t", "1", "--out", FOLDER, "--imatrix", FILE)
    yield case("imatrix", "im.gguf", matrix.read_bytes(), binary, quantize=quantize)
    yield case("imatrix.dat", "im.dat", _legacy(matrix), binary, quantize=quantize)
    yield case("csv", "loss.csv", _CSV.encode(), csv, fit=("shannon", "fit", FILE, "--level", "4-bit", *_QUICK),
               predict=("shannon", "predict", FILE, "--N", "2", "--D", "100", *_QUICK))  # fmt: skip
    rows = [
        dict(zip(("N", "D", "loss", "bits"), map(float, line.split(",")), strict=True))
        for line in _CSV.split("\n")[2:-1]
    ]
    yield case("json", "loss.json", json.dumps(rows[32:]).encode(), value, fit=("shannon", "fit", FILE, *_QUICK))
    loss = [[3 + 1 / (n * d) for d in (2, 4, 9, 20)] for n in (1, 2, 4, 10)]
    grid = {"sizes": [0.1, 0.2, 0.4, 1.0], "units": {"N": "total"}, "source": "nowhere",
            "sets": {"4-bit": {"tokens": [2.0, 4.0, 9.0, 20.0], "loss": loss}}}  # fmt: skip
    yield case("grid", "grid.json", json.dumps(grid).encode(), value, fit=("shannon", "fit", FILE, *_QUICK))
    yield case("ladder", "ladder.csv", _LADDER.encode(), csv, ladder=("shannon", "ladder", FILE))
    yield case("text", "notes.txt", _TEXT[:800].encode(), _drawn(_bytes, _encoding, _lines), 0.5,
               run=("run", model, "--raw", "-f", FILE, "-n", "2", "-t", "1", "--seed", "1"),
               perplexity=("perplexity", model, "--text", FILE, "-c", "32", "--chunks", "2", "-t", "1"))  # fmt: skip
