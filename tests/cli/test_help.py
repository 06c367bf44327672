"""Help in sections, at 80 columns as at 120; wrong words; one -o; and what `ggufloop results` says of a folder."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import pytest

from ggufloop.cli import cli, main
from ggufloop.cli.group import COMMANDS, GROUPS
from ggufloop.cli.help import ORDER
from ggufloop.cli.types import OUTPUT, Size
from ggufloop.loop import LoopSpec
from ggufloop.measure.corpus import Text
from ggufloop.measure.journal import Journal
from ggufloop.measure.stats import mean_interval
from ggufloop.study import file as studies
from ggufloop.study.collection import collect


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as e:
        main([str(word) for word in words])
    return (int(e.value.code or 0), *capsys.readouterr())


def sections(out: str) -> list[str]:
    return [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith((" ", "Usage"))]


def test_every_command_is_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = run(capsys, "--help")
    assert sections(out) == ["Options", *GROUPS]
    assert list(GROUPS) == ["Run", "Measure", "Quantise", "Models", "Install"]
    for name in COMMANDS:
        assert f"\n  {name} " in out


@pytest.mark.parametrize("columns", [80, 120])
def test_options_are_in_sections(columns: int, capsys: pytest.CaptureFixture[str]) -> None:
    def width(out: str) -> int:
        return max(len(line) for line in out[out.index("\nOptions:") :].splitlines())  # examples are kept whole

    for words in (["run"], ["sweep"], ["serve"], ["shannon", "fit"]):
        with pytest.raises(SystemExit):
            cli.main([*words, "--help"], terminal_width=columns, obj={})
        out = capsys.readouterr().out
        found = sections(out)
        assert found == [name for name in ORDER if name in found], "no other, in this order"
        assert width(out) <= columns
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"], terminal_width=columns, obj={})
    out = capsys.readouterr().out
    assert sections(out) == [name for name in ORDER if name != "Parts"]
    loop = out[out.index("\nLoop:") : out.index("\nSampling:")]
    assert ("--window" in loop, "--halt" in loop, "--temp" in loop) == (True, True, False)


@pytest.mark.parametrize("name", COMMANDS)
def test_o_is_one_option(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for each in command.commands.values() if isinstance(command, click.Group) else [command]:
        for param in each.params:
            if "-o" in param.opts:
                assert (param.default, param.opts) == ("text", ["-o", "--output"])
                assert set(str(param.metavar).split("|")) <= set(OUTPUT)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("list", "-o", "jsn"), "error: output form 'jsn' is not known.\n  did you mean json?"),
        (("swep",), "No such command 'swep'; did you mean sweep?"),
        (("shannon", "predct"), "No such command 'predct'; did you mean predict?"),
        (("advise", "x", "--size-budget", "4 apples"), "'4 apples' is not a size.\n  write it like 500MB or 4GB."),
        (("inspect", "x", "-ctk", "q4"), "'q4' is not known; did you mean q4_"),
        (("shannon", "fit", "pythia", "--n", "totl"), "'totl' is not known; did you mean total?"),
    ],
)
def test_a_wrong_word_gets_the_nearest(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err


def test_sizes() -> None:
    found = [Size().convert(text, None, None) for text in ("500MB", "4GiB", "1.5k", "7")]
    assert found == [500_000_000, 2**32, 1500, 7]


def test_help_and_version_load_nothing_heavy() -> None:
    heavy = "{'numpy', 'gguf', 'llama_cpp', 'huggingface_hub', 'jinja2'}"
    for words in (["--help"], ["version"]):
        code = (
            f"import sys\nfrom ggufloop.cli import main\ntry: main({words})\nexcept SystemExit: pass\n"
            f"print({heavy} & set(sys.modules))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.endswith("set()\n"), words


# results


@pytest.fixture
def folder(tmp_path: Path, tiny_model: Callable[[str], Path]) -> Path:
    """A sweep's journal, and something that is neither sweep nor study."""
    path = tmp_path / "tiny" / "sweep.jsonl"
    path.parent.mkdir()
    with Journal.open(path, {"model": "tiny.gguf", "measures": [{"text": "t"}]}) as journal:
        journal.add({"measure": "t", "loop": "plain", "items": [0, 1, 2, 3], "scores": [-2.0, -3.0, -4.0, -9.0],
                     "seconds": 1.0})  # fmt: skip
        journal.add({"measure": "t", "loop": "2:4 k=2", "items": [2, 0, 1], "scores": [-3.5, -1.0, -3.0],
                     "seconds": 1.0})  # fmt: skip
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n')
    (tmp_path / "bad.jsonl").write_text("nothing\n")
    return tmp_path


def test_results_of_a_sweep(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "results", folder, "-o", "csv")
    assert code == 0
    assert "note: left out: bad.jsonl: " in err
    plain, looped = csv.DictReader(io.StringIO(out))
    assert (plain["file"], plain["kind"], plain["model"]) == ("tiny/sweep.jsonl", "sweep", "tiny.gguf")
    assert (plain["loop"], plain["n"], float(plain["score"]), plain["gain"]) == ("plain", "4", -4.5, "")
    gain = mean_interval(np.array([1.0, 0.0, 0.5]))  # on items 0, 1 and 2, not 3
    assert (looped["loop"], looped["n"], float(looped["score"])) == ("2:4 k=2", "3", -2.5)
    assert [float(looped[name]) for name in ("gain", "low", "high")] == pytest.approx([gain.mean, gain.low, gain.high])
    code, out, _ = run(capsys, "results", folder)
    assert out.splitlines()[2].split("|")[1:5] == [" tiny/sweep.jsonl ", " sweep ", " tiny.gguf ", "    2 "]


def test_results_of_a_study(tmp_path: Path, tiny_model: Callable[[str], Path]) -> None:
    """The gain of a cell is the one that the study's own analysis judges."""
    from ggufloop.backend.settings import ContextSettings
    from ggufloop.study import analysis
    from ggufloop.study.run import StudyPlan, run_study

    text = Text("t", "Some words that are cut into tokens, over and over. " * 40)
    plan = StudyPlan(text, ("Q4_0",), chunk=32, chunks=3)
    folder = tmp_path / "llama"
    study = run_study(tiny_model("llama"), [LoopSpec((2, 5), 2)], plan, folder, ContextSettings(n_threads=1))
    assert studies.read(folder / "study.jsonl") == study
    found = collect(tmp_path)
    assert (found.files, found.skipped) == ([["llama/study.jsonl", "study", "llama.gguf", 4]], [])
    row = next(r for r in found.table().records() if (r["type"], r["loop"]) == ("Q4_0", "2:5 k=2"))
    gain = analysis.verdicts(study, "Q4_0")["2:5 k=2"].gain  # of one loop, so at the level of one
    assert [row[name] for name in ("gain", "low", "high")] == pytest.approx([gain.mean, gain.low, gain.high])
    assert (row["measure"], row["n"]) == ("t", 3)


def test_a_folder_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "results", tmp_path / "no")
    assert (code, out) == (1, "")
    assert err == f"error: there is no folder {tmp_path / 'no'}.\n  name one that holds results, such as studies.\n"


def test_a_folder_of_answers_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Their journals are left out, as some of the items chose the loop, and the folder is not called empty."""
    assert run(capsys, "results", tmp_path)[2] == f"{tmp_path} holds no sweep and no study.\n"
    (tmp_path / "m-questions").mkdir()
    (tmp_path / "m-questions" / "answer.md").touch()
    assert run(capsys, "results", tmp_path)[2] == (
        f"{tmp_path} holds no sweep and no study, but answers: read answer.md of each.\n"
    )
