"""Damaged records given to the commands that read them: one line with the place, and what is valid before it is kept.

What is damaged here is what once ended in a traceback or in an abort of llama.cpp, one of each kind. Thousands more are
drawn by `scripts/mutate.py --only records`; the last test runs some of them.
"""

from __future__ import annotations

import gzip
import json
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import ROOT
from support.cli import Cli
from support.studies import FILES, HEADER, LOOPS, written

from ggufloop.backend import library
from ggufloop.cli import main
from ggufloop.errors import GgufloopError
from ggufloop.loop import PLAIN
from ggufloop.measure.perplexity import MAGIC, KLBase, stored_bytes
from ggufloop.models import registry
from ggufloop.quant import imatrix
from ggufloop.scaling import data as shannon_data
from ggufloop.scaling import noise_data
from ggufloop.study import file

TinyModel = Callable[[str], Path]
DEEP = "[" * 5000 + "]" * 5000


def told(cli: Cli, *words: object) -> str:
    """The line of a command that cannot go on."""
    code, _, err = cli(*words)
    assert code in (1, 2)
    lines = err.strip().splitlines()
    if lines[-1].startswith("Error: "):  # click's own, of an option
        return lines[-1]
    assert lines[-2].startswith("error: ")
    assert lines[-1].startswith("  ")
    return lines[-2]


# kl-base

N_CTX, N_CHUNK = 32, 3


@pytest.fixture(scope="module")
def kl_base(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file of the product."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "t.txt").write_text("A text that says something or other. " * 20)
    with pytest.raises(SystemExit) as e:
        main(["perplexity", str(tiny_model("llama")), "--text", str(folder / "t.txt"), "-c", str(N_CTX), "-t", "1",
              "--chunks", str(N_CHUNK), "--save-kl-base", str(folder / "b")])  # fmt: skip
    assert not e.value.code
    return (folder / "b").read_bytes()


def put(data: bytes, at: int, form: str, value: float) -> bytes:
    return data[:at] + struct.pack(form, value) + data[at + 4 :]


FIRST_ROW = 20 + 4 * N_CTX * N_CHUNK


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda d: put(d, 20 + 4 * 40, "<i", 2**20), "token 40, at byte 180, is 1048576, not in 0 to"),  # an abort
        (lambda d: put(d, 20 + 4 * 40, "<i", -2), "token 40, at byte 180, is -2, not in 0 to"),
        (lambda d: put(d, 8, "<I", 2**32 - 1), r"cut short: \d+ bytes of \d+ for 3 chunks of 4294967295 tokens"),
        (lambda d: put(d, 8, "<I", 3), "its -c is 3, not 4 or more"),
        (lambda d: put(d, 12, "<i", -5), "its vocabulary is -5, not 1 or more"),
        (lambda d: put(d, 16, "<i", -1), "its number of chunks is -1, not 1 or more"),
        (lambda d: put(d, 16, "<i", N_CHUNK - 1), r"is damaged: \d+ bytes of \d+ for 2 chunks of 32 tokens"),
        (lambda d: d[:-1], f"cut short: .* for {N_CHUNK} chunks of {N_CTX} tokens"),
        (lambda d: d[:15], "cut short: 15 bytes, and its header has 20"),
        (lambda d: put(d, FIRST_ROW, "<f", np.nan), f"at byte {FIRST_ROW} are no probabilities \\(chunk 1\\)"),
        (lambda d: put(d, FIRST_ROW, "<f", 1e30), f"at byte {FIRST_ROW} are no probabilities"),
        (lambda d: put(d, FIRST_ROW + 4, "<f", -np.inf), f"at byte {FIRST_ROW} are no probabilities"),
        (lambda d: put(d, FIRST_ROW + 4, "<f", 3), f"at byte {FIRST_ROW} are no probabilities"),
    ],
)
def test_kl_base(
    kl_base: bytes, damage: Callable[[bytes], bytes], said: str, tiny_model: TinyModel, tmp_path: Path,
    cli: Cli,
) -> None:  # fmt: skip
    path = tmp_path / "b"
    path.write_bytes(damage(kl_base))
    assert re.search(said, told(cli, "perplexity", tiny_model("llama"), "--window", "2:4", "--kl-base", path, "-t", 1))


def test_what_is_before_the_damage_of_a_kl_base_can_be_used(
    kl_base: bytes, tiny_model: TinyModel, tmp_path: Path, cli: Cli
) -> None:
    """The line of a damaged second chunk says how."""
    path = tmp_path / "b"
    row = (len(kl_base) - FIRST_ROW) // N_CHUNK
    path.write_bytes(put(kl_base, FIRST_ROW + row, "<f", -1))
    words = ("perplexity", tiny_model("llama"), "--window", "2:4", "--kl-base", path, "-t", 1)
    code, _, err = cli(*words)
    assert code == 1
    assert "or give --chunks 1: what is before is good." in err
    assert cli(*words, "--chunks", 1)[0] == 0


def test_a_kl_base_cut_short_is_good_for_the_chunks_that_are_there(
    kl_base: bytes, tiny_model: TinyModel, tmp_path: Path, cli: Cli
) -> None:
    path = tmp_path / "b"
    words = ("perplexity", tiny_model("llama"), "--window", "2:4", "--kl-base", path, "-t", 1)
    path.write_bytes(kl_base)
    whole = cli(*words, "--chunks", N_CHUNK - 1)
    path.write_bytes(kl_base[:-1])
    code, _, err = cli(*words)
    assert code == 1
    assert f"or give --chunks {N_CHUNK - 1}: they are there." in err
    assert cli(*words, "--chunks", N_CHUNK - 1) == whole
    assert whole[0] == 0
    path.write_bytes(kl_base[: FIRST_ROW + 9])
    assert "--chunks" not in cli(*words, "--chunks", 1)[2]


def test_a_header_asks_for_no_memory(tmp_path: Path) -> None:
    """32 MiB of tokens, in a file that is a hole: refused by its size, and nothing of it is read."""
    path = tmp_path / "b"
    with path.open("wb") as f:
        f.write(MAGIC + struct.pack("<Iii", 2**22, 300, 2))
        f.truncate(stored_bytes(2**22, 300, 2) - 1)
    tracemalloc.start()
    with pytest.raises(GgufloopError, match="cut short"):
        KLBase.open(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


# sweep's journal


@pytest.fixture(scope="module")
def sweeping(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> tuple[tuple[str, ...], list[str]]:
    """The words of a sweep, and the lines of its journal, but for what it decided: the look and the verdict."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "t.txt").write_text("A text that says something or other. " * 20)
    words = ("sweep", str(tiny_model("llama")), "--window", "2:4", "--K", "2", "--text", str(folder / "t.txt"), "-c",
             "32", "--chunks", "8", "-t", "1", "-o", "json", "--journal")  # fmt: skip
    with pytest.raises(SystemExit) as e:
        main([*words, str(folder / "j")])
    assert not e.value.code
    lines = (folder / "j").read_text().splitlines(keepends=True)
    return words, [line for line in lines if not {"look", "said"} & json.loads(line).keys()]


def scores(lines: list[str]) -> dict[tuple[str, int], float]:
    """By loop and item."""
    records = [json.loads(line) for line in lines[1:]]
    return {(r["loop"], i): x for r in records if "items" in r for i, x in zip(r["items"], r["scores"], strict=True)}


RECORD_DAMAGE: list[tuple[dict[str, Any], str]] = [
    ({"items": ["0"]}, "items is '0', not a whole number"),
    ({"items": list(range(40))}, "it has"),
    ({"items": [0] * 40}, "it has"),
    ({"items": 3}, "items is 3"),
    ({"items": [8]}, "it has"),
    ({"scores": None}, "scores is None"),
    ({"scores": ["1"]}, "scores is '1', not a number"),
    ({"seconds": "1"}, "seconds is '1', not a number"),
    ({"seconds": -1}, "a score or a time that nothing has"),
    ({"loop": 5}, "loop is 5, not text"),
    ({"measure": "another"}, "measure 'another' is none of this sweep's"),
    ({"budget": "1h"}, "is no field of it"),
]


@pytest.mark.parametrize(("change", "said"), RECORD_DAMAGE)
def test_a_journal(
    sweeping: tuple[tuple[str, ...], list[str]], change: dict[str, Any], said: str, tmp_path: Path,
    cli: Cli,
) -> None:  # fmt: skip
    """The last line damaged: told, and measured again. The second: refused by its number."""
    (words, lines), path = sweeping, tmp_path / "j"
    bad = [json.dumps(json.loads(line) | change) + "\n" for line in lines]
    path.write_text("".join([*lines[:-1], bad[-1]]))
    code, out, err = cli(*words, path)
    assert code == 0, err
    assert f"note: line {len(lines)} of {path} is damaged (" in err
    assert said in err
    results = json.loads(out)["results"][0]
    assert [results["n"], results["cost"]["spent"] > 0] == [8, True]
    kept = path.read_text().splitlines(keepends=True)
    assert kept[: len(lines) - 1] == lines[:-1]
    assert scores(kept) == pytest.approx(scores(lines))
    path.write_text("".join([lines[0], bad[1], *lines[2:]]))
    assert f"line 2 of {path} is damaged: " in told(cli, *words, path)


def test_a_journal_of_no_time_at_all(sweeping: tuple[tuple[str, ...], list[str]], tmp_path: Path, cli: Cli) -> None:
    """Seconds are rounded; a table is printed all the same."""
    (words, lines), path = sweeping, tmp_path / "j"
    path.write_text("".join([lines[0], *(json.dumps(json.loads(x) | {"seconds": 0}) + "\n" for x in lines[1:])]))
    code, out, err = cli(*words[:-3], "--journal", path)
    assert code == 0, err
    assert "Verdict" in out


# studies


def study_lines(path: Path) -> list[dict[str, Any]]:
    written(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"nll": "3"}, "nll is '3', not a number"),
        ({"nll": 1e6}, "nll is 1000000.0, not in 0 to 700"),
        ({"n": 0}, "n is 0, not in 1 to"),
        ({"n": [1]}, "n is [1], not a whole number"),
        ({"index": -1}, "index is -1, not in 0 to"),
        ({"index": {}}, "index is {}, not a whole number"),
        ({"same_top": 1.5}, "same_top is 1.5, not in 0 to 1"),
        ({"loop": []}, "loop is [], not text"),
        ({"type": None}, "type is None, not text"),
        ({"more": 1}, "'more' is no field of it"),
        ({"kind": {}}, "its kind is {}"),
    ],
)
def test_a_chunk_of_a_study(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = tmp_path / "s.jsonl"
    lines = study_lines(path)
    before = file.read(path)
    good = [json.dumps(line) for line in lines]
    path.write_text("\n".join([*good[:-1], json.dumps(lines[-1] | change)]) + "\n")
    after = file.read(path)
    assert f"line {len(lines)} of {path} is damaged ({said}" in after.dropped
    assert after.cells["Q4_0", LOOPS[1]].chunks == before.cells["Q4_0", LOOPS[1]].chunks[:-1]
    assert file.create(path, HEADER) == after
    assert path.read_text() == "\n".join(good[:-1]) + "\n"  # and it goes on from there
    path.write_text("\n".join([*good[:5], json.dumps(lines[5] | change), *good[6:]]) + "\n")
    with pytest.raises(GgufloopError, match=re.escape(f"line 6 of {path} is damaged: {said}")):
        file.read(path)


def test_the_line_of_a_file_that_is_damaged_drops_no_measurement(tmp_path: Path) -> None:
    """All that follows belongs to it and would be an end without it."""
    path = tmp_path / "s.jsonl"
    good = [json.dumps(line) for line in study_lines(path)]
    path.write_text("\n".join([*good[:2], good[2][:-9], *(x for x in good[3:] if '"Q4_0"' in x)]) + "\n")
    with pytest.raises(GgufloopError, match=r"line 3 of .* is damaged"):
        file.create(path, HEADER)
    path.write_text("\n".join([*good[:2], *(x for x in good[3:] if '"Q4_0"' in x)]) + "\n")
    with pytest.raises(GgufloopError, match=r"line 3 of .* is of Q4_0, and no line before it says which file that is"):
        file.read(path)


@pytest.mark.parametrize(
    ("line", "change", "said"),
    [
        (0, {"window": [5, 2]}, "its window is 5:2 of 7 layers"),
        (0, {"window": "2:5"}, "window is '2:5'"),
        (0, {"n_layer": 7.5}, "n_layer is 7.5, not a whole number"),
        (0, {"settings": []}, "settings is []"),
        (0, {"n_params": -1}, "n_params is -1, not 1 or more"),
        (0, {"schema_version": [1]}, "schema version [1] is not 1"),
        (1, {"snr": "inf"}, "snr is 'inf', not a number"),
        (1, {"nbytes": None}, "nbytes is None, not a whole number"),
        (1, {"bits_per_weight": -4}, "bits per weight"),
        (1, {"type": ["F32"]}, "type is ['F32'], not text"),
    ],
)
def test_the_head_of_a_study(tmp_path: Path, line: int, change: dict[str, Any], said: str, cli: Cli) -> None:
    path = tmp_path / "s.jsonl"
    lines = study_lines(path)
    lines[line] |= change
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert said in told(cli, "advise", path)


@pytest.mark.parametrize(
    "end", ["\xff\xfe\n", DEEP + "\n", '{"kind": "chunk", "nll": NaN}\n', "[]\n", '{"kind": "file"']
)
def test_advise_says_what_it_leaves_out(tmp_path: Path, end: str, cli: Cli) -> None:
    path = tmp_path / "s.jsonl"
    written(path)
    good = path.read_bytes()
    path.write_bytes(good + end.encode("latin-1"))
    code, out, err = cli("advise", path)
    assert code == 0, err
    assert err.startswith("note: ")
    assert "left out.\n" in err
    path.write_bytes(good)
    assert cli("advise", path)[1] == out


def test_a_task_of_a_study(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    s = written(path)
    good = {"kind": "task", "type": FILES[0].type, "loop": PLAIN, "task": "t", "docs": [["t", 0]], "right": [1],
            "gold": [None], "limit": None}  # fmt: skip
    before = path.read_bytes()
    for change in ({"docs": [["t"]]}, {"docs": 1}, {"right": []}, {"gold": ["x"]}, {"right": [7]}, {"task": {}}):
        path.write_bytes(before + (json.dumps(good | change) + "\n").encode())
        assert "is damaged" in file.read(path).dropped, change
    path.write_bytes(before + (json.dumps(good) + "\n").encode())
    assert file.read(path).cells[FILES[0].type, PLAIN].tasks.keys() == {"t"}
    assert s.dropped == ""


def test_a_study_that_was_never_one_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text("notes of mine")  # no whole line
    with pytest.raises(GgufloopError, match="is no study"):
        file.create(path, HEADER)
    assert path.read_text() == "notes of mine"
    path.write_text('{"kind": "study", "sch')  # a first line cut short is begun anew
    assert file.create(path, HEADER).header == HEADER
    assert file.read(path).header == HEADER


# models.toml

MINE = '[mine]\nfile = "m.gguf"\narchitecture = "llama"\nlayers = 7\nsources = [{ hf = "me/mine" }]\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a = " + DEEP, "nested over 20 levels deep"),
        (MINE + ".".join("a" * 3000) + " = 1", "nested over 20 levels deep"),
        (MINE.replace("7", "1" + "0" * 400), "more than 64 bits"),
        (MINE.replace("7", "0"), "layers is 0, not in 1 to 512"),
        (MINE.replace("7", "-3"), "layers is -3, not in 1 to 512"),
        (MINE.replace("7", "nan"), "nan is no number"),
        (MINE.replace('"m.gguf"', '"../../m.gguf"'), "file is '../../m.gguf', not a name in the source"),
        (MINE.replace("m.gguf", "m\\u0000"), "is no text"),
        (MINE.replace("m.gguf", 300 * "x"), "...', not a name in the source"),
        (MINE.replace("[{", "[3, {"), "a source is not a table"),
        (MINE.replace('"me/mine"', '"me"'), "hf is 'me', not user/repo"),
        (MINE.replace("layers", "bytes = -1\nlayers"), "bytes is -1, not 1 or more"),
        (MINE.replace("layers", "origin = 3\nlayers"), "origin is 3, not of type str"),
        (MINE.replace("layers", "window = '1:99999999999999999999'\nlayers"), "model mine in "),
        (MINE.replace('{ hf = "me/mine" }', "{ wheels = [1] }"), "a wheel is not a table"),
        ("mine = 3", "it is not a table"),
        ('["a\\nb"]\n', "model 'a\\nb' in "),
        (MINE + "\udce4", "is not UTF-8 text"),
    ],
)
def test_own_models(
    text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: TinyModel,
    cli: Cli,
) -> None:  # fmt: skip
    path = tmp_path / "models.toml"
    monkeypatch.setenv("GGUFLOOP_MODELS", str(path))
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    registry._load.cache_clear()
    assert said in told(cli, "list")
    assert said in told(cli, "inspect", tiny_model("llama"))


def test_own_models_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFLOOP_MODELS", str(tmp_path))
    with pytest.raises(GgufloopError, match="it is a folder"):
        registry.models()


# the file of a study


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (DEEP, "is not TOML"),
        ("a = " + DEEP, "is not TOML: it is nested over 20 levels deep"),
        ("ctx-size = inf", "is not TOML: inf is no number"),
        ("threads = 99999999999999999999999", "is not TOML: it has a number of more than 64 bits"),
        ("text = 'a\x00b'", "is not TOML"),
        ('text = "a\\u0000b"', "is not TOML: 'a\\x00b' is no text"),
        ("flash-attn = 3", "flash"),
        ("offline = 5", "offline is true or false, not 5"),
        ("K = 2026-05-22", "K is not a word, a number, or a list of them"),
        ("chunks = [[2]]", "chunks is not a word, a number, or a list of them"),
    ],
)
def test_the_file_of_a_study(text: str, said: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "s.toml"
    path.write_text(text)
    assert said in told(cli, "compare", "--study", path)
    assert "it is a folder" in told(cli, "compare", "--study", tmp_path)


# importance matrices


def test_an_importance_matrix(tmp_path: Path) -> None:
    """Names of texts in a damaged file are bytes; gguf's own reader made text of them, and numbers of another type."""
    path = tmp_path / "im.gguf"
    sums, counts = {"blk.0.attn_q.weight": np.ones((1, 64))}, {"blk.0.attn_q.weight": np.array([4])}
    imatrix.write(path, sums, counts, "fox.txt", 4, 32, {})
    good = path.read_bytes()
    path.write_bytes(good.replace(b"fox.txt", b"fo\xff\xfe\x80\xc0t"))
    np.testing.assert_array_equal(imatrix.read(path).entries["blk.0.attn_q.weight"], np.full((1, 64), 0.25))
    at = good.index(np.ones(64, np.float32).tobytes())
    for value in (np.nan, -1.0, np.inf):
        path.write_bytes(put(good, at, "<f", value))
        with pytest.raises(GgufloopError, match="no mean squares"):
            imatrix.read(path)
    at = good.rindex(struct.pack("<f", 4))
    for value in (np.nan, -1.0, np.inf):
        path.write_bytes(put(good, at, "<f", value))
        with pytest.raises(GgufloopError, match="has counts that are none"):
            imatrix.read(path)
    with pytest.raises(GgufloopError, match="it is a folder"):
        imatrix.read(tmp_path)


# tables of numbers

HEAD = "N,D,loss\n"
ROWS = "".join(f"{n},{d},{3 + 1 / d}\n" for n in (1, 2, 3, 4) for d in (4, 5, 6, 7, 8, 9, 10, 11))
GRID = {"sizes": [1, 2], "sets": {"a": {"tokens": [4, 5], "loss": [[3, 2], [3, 2]]}}}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD + ROWS + f"1,2,{'x' * 200_000}\n", "is no CSV: field larger than field limit"),
        ("N,D,loss,loss\n1,2,3,4\n", "has the column 'loss' twice"),
        ("N,D,loss,bits\n" + "1,2,3,1e300\n", "1e+300 bits are not at most 64"),
        (HEAD + ROWS + "1,2,1e300\n", "loss 1e+300 in all is not a loss"),
        ('[{"N": ' + DEEP + "}]", "is not JSON: it is nested"),
        ('[{"N": 1, "N": 2}]', "is not JSON: 'N' is there twice"),
        (json.dumps(GRID | {"sizes": 3}), "the sizes and tokens of set a are no lists"),
        (json.dumps(GRID | {"sizes": [1, 10**400]}), "is not JSON: it has a number of more than 64 bits"),
        (json.dumps(GRID | {"sets": []}), "are no records"),
        (json.dumps(GRID | {"sets": {"a": 3}}), "are no records"),
        (json.dumps(GRID | {"sizes": [[1], [2]]}), "the sizes and tokens of set a are no lists"),
    ],
)
def test_losses(text: str, said: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "d.csv"
    path.write_text(text)
    assert said in told(cli, "shannon", "fit", path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("type,snr_db,kld\nQ8_0,45,0.1,7\n", "rows of another length than its header"),
        ("type,snr_db,kld\nQ8_0,45\n", "rows of another length than its header"),
        (f"type,snr_db,kld\n{'x' * 200_000},45,0.1\n", "is no CSV"),
        ("type,snr_db,kld\nQ8_0,-inf,0.1\n", "snr_db -inf is not in -1000 to inf"),
        ("type,snr_db,kld\nQ8_0,45,1e300\n", "kld 1e+300 is not in 0 to 1000"),
        ("type,snr_db,bits,kld\nQ8_0,45,-8,0.1\n", "bits -8 is not in 0 to 64"),
        ("type,snr_db,ppl\nQ8_0,45,inf\n", "ppl inf is not in"),
    ],
)
def test_ladders(text: str, said: str, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "l.csv"
    path.write_text(text)
    assert said in told(cli, "shannon", "ladder", path)


def test_a_file_of_numbers_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shannon_data, "LARGEST", 1 << 20)
    for read in (shannon_data.read, noise_data.read):
        with pytest.raises(GgufloopError, match="it is over 1 MiB"):
            read("/dev/zero")


# archives


def test_a_damaged_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))
    (tmp_path / "sdist").mkdir()
    path = tmp_path / "sdist" / library.SDIST
    for content in (b"", b"no archive", gzip.compress(bytes(range(256)) * 9), gzip.compress(bytes(4096))[:-20]):
        path.write_bytes(content)
        assert f"{path} is damaged" in told(cli, "perplexity", tmp_path / "m.gguf", "--text", "sdist-docs")


# many


def test_mutated_records() -> None:
    """Of every kind whose command takes no second; each command in a process of its own, which may die."""
    kinds = ("kl-base", "journal", "study", "models", "imatrix", "ladder", "text")
    only = [word for kind in kinds for word in ("--only", f"records {kind}")]
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "mutate.py", *only, "--count", "100", "--seed", "12", "--jobs", "2"],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert {row[0] for row in rows} >= {"perplexity", "sweep", "advise", "list", "auto", "quantize", "ladder", "run"}
    assert sum(int(row[2]) for row in rows) >= 20  # worked: not everything is refused,
    assert sum(int(row[3]) for row in rows) >= 60  # and not everything as good as new
