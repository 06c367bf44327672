"""One row source, four forms."""

from __future__ import annotations

import csv
import io
import json

import pytest

from ggufloop.errors import UsageError
from ggufloop.table import Column, Table

TABLE = Table(
    (Column("model"), Column("n"), Column("t/s", ".2f"), Column("there")),
    [("a|b", 12, 3.14159, True), ("long name", None, float("nan"), False)],
)

MD = """\
| model     |   n |  t/s | there |
| --------- | --: | ---: | ----- |
| a\\|b      |  12 | 3.14 | yes   |
| long name |     |  nan | no    |
"""


def test_md() -> None:
    assert TABLE.render("md") == MD
    assert Table((Column("a"), Column("bcde")), []).render("md") == "|   a | bcde |\n| --: | ---: |\n"


def test_programs_get_every_digit() -> None:
    records = [
        {"model": "a|b", "n": 12, "t/s": 3.14159, "there": True},
        {"model": "long name", "n": None, "t/s": None, "there": False},
    ]
    assert json.loads(TABLE.render("json")) == records
    assert [json.loads(line) for line in TABLE.render("jsonl").splitlines()] == records
    rows = list(csv.reader(io.StringIO(TABLE.render("csv"))))
    assert rows == [
        ["model", "n", "t/s", "there"], ["a|b", "12", "3.14159", "True"], ["long name", "", "nan", "False"]
    ]  # fmt: skip


def test_unknown_form() -> None:
    with pytest.raises(UsageError, match=r"^output form 'jsn' is not known\.$") as e:
        TABLE.render("jsn")
    assert e.value.hint == "did you mean json? Known: md, csv, json, jsonl."
