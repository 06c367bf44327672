"""One table of settings: a row more in it is a setting more of the text, the flags, the schema, C and the page."""

from __future__ import annotations

import ctypes
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner
from support import ROOT

from ggufloop.backend import capi
from ggufloop.cli.loop_options import LoopOption, loop_options
from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec, schema
from ggufloop.server.serve import Site
from ggufloop.setting import Word, row, settings


@dataclass(frozen=True)
class Wider(LoopSpec):
    """A loop with two settings that nobody else has heard of."""

    tint: str = row(
        str, "red", "The colour of a pass", words={"red": Word("warm"), "blue": Word("cold")}, in_plan=True, many=True,
        control=True, unless=("mode", "layer", "blue"),
    )  # fmt: skip
    glow: float | None = row(
        float, None, "How bright", low=1, high=9, hint="5 is bright.", flag="--loop-glow", in_plan=True
    )


TEXT = "2:4 k=3 tint=blue glow=1.5"


def served(folder: Path) -> Any:
    """What the page is given."""
    text = (folder / "settings.js").read_text(encoding="utf-8")
    assert (text[:15], text[-2:]) == ("export default ", ";\n")
    return json.loads(text[15:-2])


def test_a_row_is_in_the_text() -> None:
    loop = Wider.parse(TEXT)
    assert (loop.tint, loop.glow, str(loop)) == ("blue", 1.5, TEXT)
    assert str(Wider((2, 4), 3, tint="red", mode="layer")) == "2:4 k=3 mode=layer tint=red"
    assert Wider((2, 4), 3, mode="layer").tint == "blue"
    for text, message in (
        ("tint=bleu", "tint 'bleu' is not known."),
        ("glow=10", "glow 10 is not a number in the range 1 to 9."),
        ("glow=much", "glow 'much' is not a number."),
        ("glov=1", "loop setting 'glov' is not known."),
    ):
        with pytest.raises(UsageError) as e:
            Wider.parse(f"2:4 k=3 {text}")
        assert e.value.message == message
    assert e.value.hint.startswith("did you mean glow?")


def said(words: str, lists: bool) -> Any:
    """What a command with these options is told: the values, or the error; its help for --help."""

    @click.command()
    def command(**flags: Any) -> None:
        click.echo(json.dumps(flags))

    done = CliRunner().invoke(loop_options(command, Wider, lists), words.split())
    if done.exception is not None:
        return done.exception
    return " ".join(done.output.split()) if "--help" in words else json.loads(done.output)


def test_a_row_is_a_flag() -> None:
    told = said("--tint blue --loop-glow 2", lists=False)
    assert (told["tint"], told["glow"], told["kv"]) == ("blue", 2.0, None)
    assert set(told) == {*settings(LoopSpec), "tint", "glow", "recipe"}
    error = said("--tint bleu", lists=False)
    assert isinstance(error, UsageError)
    assert (error.message, error.hint) == ("tint 'bleu' is not known.", "did you mean blue? Known: red, blue.")
    text = said("--help", lists=False)
    assert "--tint TINT The colour of a pass: red, blue (default red; with mode layer: blue)." in text
    assert "--loop-glow X How bright." in text


def test_a_row_may_be_a_list() -> None:
    told = said("--tint red,blue --K 2:4", lists=True)
    assert (told["tint"], told["k"]) == ("red,blue", "2:4")
    assert str(said("--tint red,bleu", lists=True)) == "tint 'bleu' is not known."
    assert str(said("--loop-glow 1,2", lists=True)) == "glow '1,2' is not a number."  # which is none
    assert "--tint TINT,... The colour" in said("--help", lists=True)


def test_a_row_is_in_the_c_struct() -> None:
    fields = capi.plan_fields(Wider)
    assert fields[:-2] == capi.plan_fields(LoopSpec)
    assert fields[-2:] == [("tint", ctypes.c_int32), ("glow", ctypes.c_double)]
    rows = settings(Wider)
    assert [rows["tint"].in_struct("blue"), rows["glow"].in_struct(None), rows["glow"].in_struct(2.5)] == [1, 0, 2.5]


def test_a_row_is_in_the_schema() -> None:
    properties = schema(Wider)["properties"]
    assert properties.keys() - schema()["properties"].keys() == {"tint", "glow"}
    assert properties["glow"] == {"description": "How bright.", "type": "number", "minimum": 1, "maximum": 9}
    assert [word["const"] for word in properties["tint"]["oneOf"]] == ["red", "blue"]
    assert (properties["tint"]["default"], properties["tint"]["control"]) == ("red", True)


def test_the_page_is_given_the_table() -> None:
    with Site(None) as site:
        assert served(site.folder) == json.loads(json.dumps(schema()))


def test_the_schema_says_what_a_loop_may_be() -> None:
    """Its defaults, words and ranges against what LoopSpec takes and refuses."""
    plain, properties = LoopSpec((2, 4), 3), schema()["properties"]
    assert [name for name in properties if name != "window"] == re.findall(r"\w+(?=,|\.$)", known_settings())
    room: dict[str, dict[str, Any]] = {
        "mu": {"solver": "heavy-ball"}, "passes": {"k": 2}, "sinks": {"attention": 1}
    }  # fmt: skip
    for name, rule in properties.items():
        if name == "window":
            continue
        assert rule.get("default", getattr(plain, name)) == getattr(plain, name), name
        for word in rule.get("oneOf", []):
            value = word.get("const") or f"{word['title']}:{word['value']['default']}"
            assert getattr(LoopSpec(**{"window": (2, 4), "k": 2, name: value}), name) == value
        beyond = [rule[end] + step for end, step in (("minimum", -1), ("maximum", 1)) if end in rule]
        for value in [*beyond, "nonsense"]:
            with pytest.raises(UsageError):
                LoopSpec(**{"window": (2, 4), "k": 2, name: value} | room.get(name, {}))
        if rule["type"] == "integer":
            for value in (rule["minimum"], rule["maximum"]):
                LoopSpec(**{"window": (2, 4), "k": 2, name: value} | room.get(name, {}))


def known_settings() -> str:
    """The settings in the words of an error."""
    with pytest.raises(UsageError) as e:
        LoopSpec.parse("2:4 k=3 nonsense=1")
    return e.value.hint.removeprefix("known: ")


def test_options_say_where_help_has_them_and_a_page_has_them_all() -> None:
    command = loop_options(click.Command("x"))
    assert [param.name for param in command.params] == ["recipe", *reversed(settings(LoopSpec))]
    assert {param.section for param in command.params if isinstance(param, LoopOption)} == {"Loop"}
    page = (ROOT / "docs" / "loops.md").read_text(encoding="utf-8")
    assert {setting.flag for setting in settings(LoopSpec).values()} <= set(re.findall(r"--[\w-]+", page))
