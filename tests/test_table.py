"""One row source, four forms."""

from __future__ import annotations

import csv
import io
import json

import pytest

from ggufloop.errors import UsageError
from ggufloop.table import Column, Table, block, fold

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


WIDE = Table(
    (Column("type"), Column("MiB", ".1f"), Column("gain by looping"), Column("verdict")),
    [
        ("Q4_0", 87.5, "+0.0123 [-0.0040, +0.0310]", "cannot tell: 1200 chunks would"),
        ("a|b", 138.4, "", "no effect larger than 0.01"),
    ],
)


def test_a_table_that_fits_is_md() -> None:
    text = f"words before\n\n{TABLE.render('md')}after"
    assert fold(text, 36) == text
    assert fold(text, 32) != text


def test_a_wide_table_loses_its_bars_then_wraps_then_is_cut_then_is_blocks() -> None:
    md = f"here:\n{WIDE.render('md')}end"
    assert max(map(len, md.splitlines())) == 78
    assert (
        fold(md, 77)
        == """\
here:
type    MiB  gain by looping             verdict
----  -----  --------------------------  ------------------------------
Q4_0   87.5  +0.0123 [-0.0040, +0.0310]  cannot tell: 1200 chunks would
a|b   138.4                              no effect larger than 0.01
end"""
    )
    assert (
        fold(md, 50)
        == """\
here:
type    MiB  gain by looping     verdict
----  -----  ------------------  -----------------
Q4_0   87.5  +0.0123             cannot tell: 1200
             [-0.0040, +0.0310]  chunks would
a|b   138.4                      no effect larger
                                 than 0.01
end"""
    )
    assert (
        fold(md, 39)
        == """\
here:
type    MiB  gain by looping
----  -----  --------------------------
Q4_0   87.5  +0.0123 [-0.0040, +0.0310]
a|b   138.4

type  verdict
----  ------------------------------
Q4_0  cannot tell: 1200 chunks would
a|b   no effect larger than 0.01
end"""
    )
    assert (
        fold(md, 31)
        == """\
here:
type: Q4_0 | MiB: 87.5
  gain by looping: +0.0123
    [-0.0040, +0.0310]
  verdict: cannot tell: 1200
    chunks would

type: a|b | MiB: 138.4
  verdict: no effect larger
    than 0.01
end"""
    )


def test_groups_of_columns_start_with_what_tells_the_rows_apart() -> None:
    table = Table(
        (Column("type"), Column("MiB", ".0f"), Column("loop"), Column("gain")),
        [("Q4", 9, "plain", ""), ("Q4", 9, "k=2", "+0.01[+0.00,+0.02]"), ("Q8", 17, "plain", "")],
    )
    assert fold(table.render("md"), 35).splitlines()[:2] == ["type  loop   MiB", "----  -----  ---"]
    assert fold(table.render("md"), 35).splitlines()[6:9] == [
        "type  loop   gain", "----  -----  ------------------", "Q4    plain"
    ]  # fmt: skip
    same = Table(table.columns, [table.rows[0], table.rows[0]])
    assert fold(same.render("md"), 20).startswith("type: Q4 | MiB: 9\n")  # nothing tells these apart


def test_nothing_is_lost_at_any_width() -> None:
    md = WIDE.render("md")
    words = {word for row in WIDE.rows for cell in row if isinstance(cell, str) for word in cell.split()}
    for width in range(24, 90):
        lines = fold(md, width).splitlines()
        assert max(map(len, lines)) <= width, width
        assert words | {"87.5", "138.4"} <= {word for line in lines for word in line.replace("\\|", "|").split()}, width


def test_lm_evals_table_folds_too() -> None:
    """Its bars touch the words, and two of its names are empty."""
    md = (
        "|Tasks|Metric|   |Value|   |Stderr|\n|-----|------|---|----:|---|-----:|\n"
        "|mmlu |acc   |\u2191  | 0.25|\u00b1  |  0.01|\n"
    )
    assert fold(md, 80) == md
    assert fold(md, 33).splitlines()[0] == "Tasks  Metric     Value"


def test_a_block_leaves_out_what_is_empty() -> None:
    assert block(("a", "b", "", "d"), ("1", "", "x", "y z"), 20) == ["a: 1 | x | d: y z"]


def test_words_fold_between_words() -> None:
    assert fold("short\n\nbad words", 9) == "short\n\nbad words"
    assert fold("a sentence of some words", 12) == "a sentence\n  of some\n  words"
    assert fold("name    what it is called", 17) == "name    what it\n        is called"
    assert fold("ggufloop/of/a/path/without/end x", 9) == "ggufloop/of/a/path/without/end\n  x"
