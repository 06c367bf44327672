"""What is checked of files that somebody else may have written: JSON, JSON lines, TOML, and our own caches."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ggufloop import files, reading
from ggufloop.backend import library as backend
from ggufloop.errors import GgufloopError
from ggufloop.measure.journal import Journal
from ggufloop.tasks import questions

DEEP = '{"a":' * 5000 + "1" + "}" * 5000


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("[1, NaN]", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[1e999]", "inf is no number"),
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        (DEEP, "nested over 20 levels deep"),
        ("[" * 30 + "]" * 30, "nested over 20 levels deep"),
        ("[1" + "0" * 400 + "]", "more than 64 bits"),
        ("[1" + "0" * 5000 + "]", "more than 64 bits"),
        (r'"\ud800"', r"'\ud800' is no text"),
        (r'{"a\u0000": 1}', r"'a\x00' is no text"),
        (b'"\xe4"', "not UTF-8 text: byte 0xe4 at position 1"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8 text: byte 0xff at position 0"),
        ("[1,]", "at column"),
        ("[1,\n 2,\n x]", "line 3, column 2"),
        ("", "Expecting value at column 1"),
        (b"\0\0", "Expecting value at column 1"),
    ],
)
def test_json_that_no_program_can_go_on_with(data: str | bytes, said: str) -> None:
    assert said in str(_caught(reading.json, data))


def _caught(read: Any, data: Any) -> Exception:
    """What reading ends with; it may end in nothing else than a ValueError."""
    try:
        read(data)
    except ValueError as e:
        return e
    raise AssertionError("it was read")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("a = nan", "nan is no number"),
        ("a = inf", "inf is no number"),
        ("a = " + "[" * 5000 + "]" * 5000, "nested over 20 levels deep"),
        (".".join("a" * 5000) + " = 1", "nested over 20 levels deep"),
        ("[" + ".".join("a" * 5000) + "]", "nested over 20 levels deep"),
        (".".join("a" * 30) + " = 1", "nested over 20 levels deep"),
        ("a = 99999999999999999999", "more than 64 bits"),
        ('a = "\\u0000"', "is no text"),
        (b"a = '\xff'", "not UTF-8 text"),
        ("a = 1\nb == 2", "line 2"),
    ],
)
def test_toml_that_no_program_can_go_on_with(data: str | bytes, said: str) -> None:
    assert said in str(_caught(reading.toml, data))


def test_what_is_good_is_read() -> None:
    assert reading.json(b'\xef\xbb\xbf{"a": [1, 2.5, "\xc3\xbc", null, true]}') == {"a": [1, 2.5, "\u00fc", None, True]}
    assert reading.toml('a.b = 1\nc = "x.y.z"\nd = [' + "1.5, " * 200 + "]")["a"] == {"b": 1}


@dataclass(frozen=True)
class Thing:
    n: int
    x: float
    name: str
    pair: tuple[int, int]
    some: dict[str, str]
    many: tuple[float | None, ...] = ()


GOOD: dict[str, Any] = {"n": 1, "x": 2, "name": "a", "pair": [1, 2], "some": {"k": "v"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n": 1.0}, "n is 1.0, not a whole number"),
        ({"n": True}, "n is True, not a whole number"),
        ({"x": "2"}, "x is '2', not a number"),
        ({"name": None}, "name is None, not text"),
        ({"pair": [1, 2, 3]}, "pair is [1, 2, 3], not what it should be"),
        ({"pair": 1}, "pair is 1, not what it should be"),
        ({"some": {"k": 1}}, "some 'k' is 1, not text"),
        ({"many": [1, "a"]}, "many is 'a', not a number"),
        ({"more": 1}, "'more' is no field of it"),
        ({"name": 3000 * "x", "n": "\n" + 3000 * "x"}, "...', not a whole number"),
    ],
)
def test_records_of_other_types(change: dict[str, Any], said: str) -> None:
    message = str(_caught(lambda record: reading.build(Thing, record), GOOD | change))
    assert said in message
    assert len(message) < 120
    assert reading.build(Thing, GOOD | {"many": [1, None]}) == Thing(1, 2.0, "a", (1, 2), {"k": "v"}, (1.0, None))
    with pytest.raises(ValueError, match="name is missing"):
        reading.build(Thing, {k: v for k, v in GOOD.items() if k != "name"})


# JSON lines, as a journal has them

HEADER = {"model": "a"}
DAMAGED = (b'{"x": 2', b'{"x": NaN}', b"[2]", b"\xff\xfe", b'{"y": 2}', b"\0" * 20, b'{"x": 2, "x": 2}', DEEP.encode())


def check(record: dict[str, Any]) -> None:
    if record.keys() != {"x"}:
        raise ValueError("it has no x")


def journal(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join([json.dumps(HEADER).encode(), b'{"x": 1}', *lines]) + b"\n")
    return path


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
@pytest.mark.parametrize("behind", [(), (b"rubbish", b"", b'{"z"')])
def test_a_damaged_end_is_left_out_and_told(tmp_path: Path, line: bytes, behind: tuple[bytes, ...]) -> None:
    path = journal(tmp_path / "j", line, *behind)
    with Journal.open(path, HEADER, check) as j:
        assert j.records == [{"x": 1}]
        assert j.dropped.startswith(f"line 3 of {path} is damaged (")
        assert j.dropped.endswith("it and what is behind it are left out.")
        j.add({"x": 3})
    with Journal.open(path, HEADER, check) as j:
        assert (j.records, j.dropped) == ([{"x": 1}, {"x": 3}], "")


@pytest.mark.parametrize("line", DAMAGED, ids=range(len(DAMAGED)))
def test_damage_before_valid_lines_is_refused_by_its_number(tmp_path: Path, line: bytes) -> None:
    path = journal(tmp_path / "j", line, b'{"x": 3}')
    before = path.read_bytes()
    with pytest.raises(GgufloopError, match=f"line 3 of {path} is damaged: ") as e:
        Journal.open(path, HEADER, check)
    assert e.value.hint == "line 4 behind it is not: take line 3 out; what it held is measured again."
    assert path.read_bytes() == before
    path.write_bytes(b"\n".join(before.split(b"\n")[:2] + before.split(b"\n")[3:]))
    with Journal.open(path, HEADER, check) as j:
        assert j.records == [{"x": 1}, {"x": 3}]


def test_what_editors_do_to_a_file_is_no_damage(tmp_path: Path) -> None:
    path = journal(tmp_path / "j", b"", b'{"x": 2}')
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    with Journal.open(path, HEADER, check) as j:
        assert (j.records, j.dropped) == ([{"x": 1}, {"x": 2}], "")


def test_a_last_line_cut_short_is_told(tmp_path: Path) -> None:
    path = journal(tmp_path / "j")
    path.write_bytes(path.read_bytes() + b'{"x"')
    with Journal.open(path, HEADER, check) as j:
        assert (j.records, j.dropped) == ([{"x": 1}], f"the last line of {path} was cut short; it is left out.")


@pytest.mark.parametrize("content", [b"\xff\xfe\n", b"\0" * 9, (DEEP + "\n").encode(), b'{"model": NaN}\n', b"a text"])
def test_a_file_that_begins_otherwise_is_left_alone(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(GgufloopError, match="is no journal of a run"):
        Journal.open(tmp_path / "j", HEADER)
    assert (tmp_path / "j").read_bytes() == content


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(GgufloopError, match=r"cannot read .*pipe: it is no file"):
        Journal.open(tmp_path / "pipe", HEADER)  # once, it waited for a writer
    with pytest.raises(GgufloopError, match=r"cannot read .*: it is a folder"):
        reading.content(tmp_path, "")
    with pytest.raises(GgufloopError, match="cannot read"):
        reading.content(tmp_path / "a\0b", "")


def test_a_name_that_is_no_text_can_be_written_and_read(tmp_path: Path) -> None:
    """Names of files may be any bytes, which Python keeps as lone surrogates."""
    for _ in range(2):
        with Journal.open(tmp_path / "j", {"model": os.fsdecode(b"m\xff.gguf")}) as j:
            assert j.records == []


# what is only a memory


@pytest.mark.parametrize(
    "content", [DEEP, '{"PATH": 3}', '{"PATH": {}}', '{"PATH": [1]}', "[]", '{"PATH": null}', "\0"]
)
def test_a_damaged_memory_of_hashes_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))
    file = tmp_path / "file"
    file.write_bytes(b"abc")
    (tmp_path / "sha256.json").write_text(content.replace("PATH", str(file)))
    assert files.recall(file) is None
    assert files.file_sha256(file).startswith("ba7816bf")
    assert files.recall(file) == files.file_sha256(file)


@pytest.mark.parametrize(
    "change", [{"name": 3}, {"stock": "no"}, {"key": None}, {"directory": "/"}, {"x": 1}, {"cpu": DEEP}]
)
def test_a_damaged_manifest_is_none(tmp_path: Path, change: dict[str, Any]) -> None:
    library = backend.Backend(tmp_path, "cpu", False, "p", "k", (), "0.3.36", "c", "gcc")
    library.save()
    assert backend.Backend.load(tmp_path) == library
    path = tmp_path / backend.MANIFEST
    text = json.dumps(json.loads(path.read_text()) | change)
    path.write_text(text.replace(json.dumps(DEEP), DEEP))
    assert backend.Backend.load(tmp_path) is None


@pytest.mark.parametrize("content", ["{", "\xff", "[1]\n", '{"prompt": 1, "choices": ["a"], "answer": 0}\n',
                                     '{"prompt": "a", "choices": ["a"], "answer": 1}\n'])  # fmt: skip
def test_damaged_questions_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))
    good = questions.questions("brackets")
    assert questions.questions("brackets") == good
    questions.questions_path("brackets").write_bytes(content.encode("latin-1"))
    assert questions.questions("brackets") == good
