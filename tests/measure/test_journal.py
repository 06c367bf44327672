"""The file a long run goes on from: what it keeps, what it drops, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ggufloop.errors import GgufloopError
from ggufloop.measure.journal import Journal

HEADER = {"model": "a", "n": 3, "loops": ["1:2 k=2"]}


def test_records_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    with Journal.open(path, HEADER) as journal:
        assert journal.records == []
        journal.add({"x": 1})
        journal.add({"x": "\u00fc"})
    with Journal.open(path, HEADER) as journal:
        assert journal.records == [{"x": 1}, {"x": "\u00fc"}]
        journal.add({"x": 3})
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == [
        HEADER, {"x": 1}, {"x": "\u00fc"}, {"x": 3}]  # fmt: skip
    assert Journal.header(path) == HEADER
    assert Journal.header(tmp_path / "none") is None


def test_a_record_is_on_disk_before_the_next(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", HEADER) as journal:
        journal.add({"x": 1})
        assert (tmp_path / "j").read_text().splitlines()[1] == '{"x": 1}'


@pytest.mark.parametrize("cut", range(1, 9))
def test_a_record_cut_short_is_dropped_and_written_over(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "j"
    with Journal.open(path, HEADER) as journal:
        journal.add({"x": 1})
        journal.add({"x": 2})
    path.write_bytes(path.read_bytes()[:-cut])
    with Journal.open(path, HEADER) as journal:
        assert journal.records == [{"x": 1}]
        journal.add({"x": 3})
    with Journal.open(path, HEADER) as journal:
        assert journal.records == [{"x": 1}, {"x": 3}]


def test_a_header_cut_short_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "j"
    path.write_text('{"model": "a", "n"')
    with Journal.open(path, HEADER) as journal:
        assert journal.records == []
    assert Journal.header(path) == HEADER


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", HEADER) as journal:
        journal.add({"x": 1})
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(GgufloopError, match='model is "a" there and "b" here; n is 3 there and null here'):
        Journal.open(tmp_path / "j", {"model": "b", "loops": HEADER["loops"]})
    assert (tmp_path / "j").read_bytes() == before
    with Journal.open(tmp_path / "j", HEADER) as journal:  # the lock was let go
        assert journal.records == [{"x": 1}]


@pytest.mark.parametrize("content", ["a text\n", "[1]\n", '{"model": 1}\nno\n', "text"])
def test_what_is_no_journal_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "j").write_text(content)
    with pytest.raises(GgufloopError, match=r"no record|no journal|another run"):
        Journal.open(tmp_path / "j", HEADER)
    assert (tmp_path / "j").read_text() == content


def test_two_writers_do_not_mix(tmp_path: Path) -> None:
    with (
        Journal.open(tmp_path / "j", HEADER),
        pytest.raises(GgufloopError, match="being written"),
    ):
        Journal.open(tmp_path / "j", HEADER)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GgufloopError, match="cannot write"):
        Journal.open(tmp_path / "file" / "j", HEADER)
    (tmp_path / "folder").mkdir()
    with pytest.raises(GgufloopError, match=r"cannot (read|write)"):
        Journal.open(tmp_path / "folder", HEADER)
