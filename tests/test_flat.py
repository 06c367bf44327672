"""Tables for programs: a loop's settings apart, plain names, and every command's csv in pandas."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli import Cli

from ggufloop.errors import UsageError
from ggufloop.flat import flat, frame, loop_cells, plain_name
from ggufloop.loop import LoopSpec
from ggufloop.setting import settings
from ggufloop.table import Table, columns

LOOPS = ["12:16 k=3", "2:4 k=6 beta=0.25 kv=frozen decode=first:16",
         "3:9 k=2 mode=layer solver=naive kv=last halt=0.01", "1:2 k=4 solver=heavy-ball mu=0.5 damping=0.25",
         "1:2 k=2 attention=64 sinks=4 routing=frozen"]  # fmt: skip


@pytest.mark.parametrize("text", LOOPS)
def test_a_loop_is_its_columns(text: str) -> None:
    """All of them: a setting that is left out, or under another's name, makes another loop."""
    cells = loop_cells(text)
    assert list(cells) == list(settings(LoopSpec))
    assert LoopSpec(**{name: value for name, value in cells.items() if value is not None}) == LoopSpec.parse(text)


def test_what_is_no_loop_has_none() -> None:
    for text in ("plain", "placebo", None, 3):
        assert set(loop_cells(text).values()) == {None}


def test_names() -> None:
    names = ["p (Holm)", "KL +/-", "t/s", "SNR dB", "window SNR dB", "A_K low", "same top +/-", "n"]
    assert list(map(plain_name, names)) == [
        "p_holm", "kl_error", "t_per_s", "snr_db", "window_snr_db", "a_k_low", "same_top_error", "n"
    ]  # fmt: skip


def test_a_table_for_programs() -> None:
    table = Table(columns("loop", "t/s:.1f"), [["plain", float("nan")], ["12:16 k=3", 1234.5]])
    head, plain, looped = flat(table).render("csv").splitlines()
    assert head == ",".join(["loop", *settings(LoopSpec), "t_per_s"])
    assert plain == "plain" + "," * (len(settings(LoopSpec)) + 1)
    assert looped.startswith("12:16 k=3,12:16,3,block,euler,")
    assert looped.endswith(",1234.5")


def test_without_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UsageError, match="needs pandas") as e:
        frame(Table(columns("n"), [[1]]))
    assert e.value.hint == "pip install 'ggufloop[lab]'"


LOOP = ("--window", "2:5", "--K", "2")
COMMANDS = {
    "eval": (("--tasks", "brackets", "--limit", "6", *LOOP, "--paired"), ("plain", "gain", "p", "score"), 2),
    "sweep": (("--start", "2,3", "--width", "2", "--K", "2,3", "--text", "TEXT", "-c", "64", "--journal", "JOURNAL"),
              ("plain", "gain", "low", "high", "p", "cost"), 4),
    "perplexity": (("--text", "TEXT", "-c", "64,128", *LOOP), ("ppl", "ppl_error", "bits_per_byte"), 4),
    "trace": (("-p", "Hello there, all of you", *LOOP), ("layer", "pass", "n"), None),
    "bench": (("-p", "8", "-n", "2", "-r", "2", *LOOP), ("avg_ts", "n_prompt"), 2),
    "snr": ((), ("weights", "bits_per_weight"), None),
    "longctx": ((*LOOP, "--tasks", "niah_single_1", "-c", "2048", "-n", "2", "--journal", "JOURNAL"),
                ("score", "plain"), 2),
}  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_loads_in_pandas(
    tiny_model: Callable[[str], Path], tmp_path: Path, cli: Cli, command: str
) -> None:
    pandas = pytest.importorskip("pandas")
    if command == "eval":
        pytest.importorskip("lm_eval")
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i * i % 23) for i in range(1000)))
    words, numbers, n = COMMANDS[command]
    places = {"TEXT": text, "JOURNAL": tmp_path / "kept.jsonl"}
    threads = () if command == "snr" else ("-t", "1")
    code, out, err = cli(command, tiny_model("llama"), *(places.get(w, w) for w in words), *threads, "-o", "csv")
    assert code == 0, err
    found = pandas.read_csv(io.StringIO(out))
    assert n is None or len(found) == n
    assert all(name == plain_name(name) for name in found.columns)
    assert all(pandas.api.types.is_numeric_dtype(found[name]) for name in numbers)
    if command != "snr":
        looped = found[found["loop"].notna() & (found["loop"] != "plain")]
        assert len(looped)
        for row in looped.to_dict("records"):
            loop = LoopSpec.parse(row["loop"])
            assert (row["window"], row["k"], row["kv"]) == ("{}:{}".format(*loop.window), loop.k, loop.kv)
    if command in ("eval", "sweep", "perplexity", "longctx"):
        assert set(looped["verdict"]) <= {"helps", "hurts", "no effect larger than", "cannot tell"}
