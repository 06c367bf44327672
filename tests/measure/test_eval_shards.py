"""`ggufloop eval` in slices: its journal, shards, `merge`, and what either refuses. A run by itself is the oracle."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support import PYTHONPATH

pytest.importorskip("lm_eval")

from ggufloop.backend.settings import ContextSettings
from ggufloop.engine import ACTIVE
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure import slices, workers
from ggufloop.measure.eval_journal import read_journal
from ggufloop.measure.eval_run import EvalPlan, run_eval
from ggufloop.measure.merge import merge_evals
from ggufloop.measure.slices import Answered, Answers, Shard, ShardDone, Sliced, docs_of, slices_of
from ggufloop.tasks.loading import load_tasks

if TYPE_CHECKING:
    from support.cli import Cli, Ran

TASKS = "brackets,arithmetic_guess"
SIZE = 4
START = f"import ggufloop.measure.slices as s; s.SCORED = {SIZE}; from ggufloop.cli import main; main()"


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Three of each task, and a cache of this test's own."""
    monkeypatch.setattr(slices, "SCORED", SIZE)
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path / "cache"))
    for name in list(os.environ):
        if name.startswith("SLURM_"):
            monkeypatch.delenv(name)
    return iter([None])


@pytest.fixture
def asked(tiny_model: Callable[[str], Path]) -> list[str]:
    return ["eval", str(tiny_model("llama")), "--tasks", TASKS, "--limit", "10", "-t", "1", "--no-try",
            "--window", "2:5", "--K", "3", "--paired"]  # fmt: skip


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answers(path: Path) -> dict[tuple[str, str, int], Any]:
    return {(r["loop"], r["task"], r["start"]): (r["asked"], r["answers"]) for r in lines(path)[1:] if "answers" in r}


def start(*words: object) -> subprocess.Popen[str]:
    env = {**os.environ, "GGUFLOOP_LIB_DIR": str(ACTIVE.directory), "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen([sys.executable, "-c", START, *map(str, words)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=env)  # fmt: skip


def wait_for_lines(path: Path, n: int, process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < n:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.001)


@pytest.fixture(scope="module")
def halves(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The journals of both shards of two, computed once."""
    out = tmp_path_factory.mktemp("halves")
    plan = EvalPlan(tuple(TASKS.split(",")), 10, paired=True)
    settings = ContextSettings(n_threads=1, try_first=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(slices, "SCORED", SIZE)
        done = [run_eval(tiny_model("llama"), LoopSpec((2, 5), k=3), plan, out, settings, shard=Shard(i, 2))
                for i in (1, 2)]  # fmt: skip
    return [each.journal for each in done if isinstance(each, ShardDone)]


@pytest.fixture
def both(halves: list[Path], tmp_path: Path) -> list[Path]:
    """A copy that a test may damage."""
    return [Path(shutil.copy(path, tmp_path / path.name)) for path in halves]


def shards(cli: Cli, asked: list[str], out: Path, n: int) -> list[Path]:
    found = []
    for i in range(1, n + 1):
        ran = cli(*asked, "--out", out, "--shard", f"{i}/{n}")
        assert (ran.code, ran.err) == (0, ""), ran
        found.append(out / "llama" / f"eval-{i}-of-{n}.jsonl")
        assert str(found[-1]) in ran.out
    return found


def test_other_kernels_are_another_run(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    plan, settings = EvalPlan(("brackets",), 4), ContextSettings(n_threads=1, try_first=False)
    run_eval(tiny_model("llama"), None, plan, tmp_path, settings)
    with pytest.raises(GgufloopError, match="settings"):
        run_eval(tiny_model("llama"), None, plan, tmp_path, replace(settings, repack=False))


def test_four_shards_are_one_run(cli: Cli, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit: every answer, what lm-eval makes of them, and the verdicts, in words and as JSON."""
    alone = {form: cli(*asked, "--out", tmp_path / "one", "-o", form) for form in ("text", "json")}
    parts = shards(cli, asked, tmp_path / "four", 4)
    assert alone["json"].out == cli(*asked, "-o", "json").out
    assert not list((tmp_path / "cache" / "eval").glob("*.jsonl"))  # without a folder it is gone when the run is done
    for form, ran in alone.items():
        merged = cli("merge", *parts, "-o", form, "--out", tmp_path / "whole")
        assert (ran.code, merged.code, merged.err) == (0, 0, "")
        assert merged.out == ran.out
    one = answers(tmp_path / "one" / "llama" / "eval.jsonl")
    assert len(one) == 2 * 2 * 3
    assert answers(tmp_path / "whole" / "llama" / "eval.jsonl") == one
    assert [len(answers(part)) for part in parts] == [4, 4, 2, 2]
    assert not set.intersection(*(set(answers(part)) for part in parts))
    again = cli(*asked, "--out", tmp_path / "whole", "-o", "json")
    assert again.out == alone["json"].out
    assert cli("merge", *parts, "-o", "md").err.startswith("error: an evaluation has no form 'md'.\n")
    monkeypatch.setattr(slices, "SCORED", 64)
    with pytest.raises(GgufloopError, match=r'brackets is .*"slice": 4} in the journals and .*"slice": 64} here'):
        merge_evals(parts)


def test_a_run_by_itself_takes_over_what_shards_have_left(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    """One of two is there: only the other half is computed, and the answers are those of a run without shards."""
    alone = cli(*asked, "--out", tmp_path / "one", "-o", "json")
    first = tmp_path / "two" / "llama" / "eval-1-of-2.jsonl"
    cli(*asked, "--out", tmp_path / "two", "--shard", "1/2")
    other = lines(first)
    other[0]["limit"] = 9
    (first.parent / "eval-1-of-3.jsonl").write_text("".join(json.dumps(r) + "\n" for r in other))  # of another run
    changed = lines(first)
    for r in changed[2:]:
        r["answers"] = [[[-1.0, False]] * len(question) for question in r["answers"]]
    whole = first.with_name("eval.jsonl")
    ran = cli(*asked, "--out", tmp_path / "two", "-o", "json")
    assert ran.out == alone.out
    assert "eval-1-of-3.jsonl is of another run (limit), and left alone." in ran.err
    assert answers(whole) == answers(tmp_path / "one" / "llama" / "eval.jsonl")
    whole.unlink()
    first.write_text("".join(json.dumps(r) + "\n" for r in changed))  # so that it is seen who computed what
    cli(*asked, "--out", tmp_path / "two")
    told, right = answers(whole), answers(tmp_path / "one" / "llama" / "eval.jsonl")
    assert {key for key in right if told[key] != right[key]} == set(answers(first))


def test_a_sample_is_drawn_and_its_shards_are_one_run(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    asked = [word for word in asked if word not in ("--limit", "10")] + ["--sample", "9"]
    alone = cli(*asked, "-o", "json")
    parts = shards(cli, asked, tmp_path, 2)
    assert cli("merge", *parts, "-o", "json").out == alone.out
    told = json.loads(alone.out)
    assert (told["drawn"], told["limit"]) == (9, None)
    assert {name: each["n"] for name, each in told["paired"].items()} == dict.fromkeys(TASKS.split(","), 9)
    refused = cli(*asked, "--limit", "3")
    assert (refused.code, refused.err) == (
        2, "error: --limit takes the first questions, --sample draws from all.\n  give one of them.\n"
    )  # fmt: skip
    tasks = load_tasks(TASKS.split(","))
    few, more = (docs_of(slices_of(tasks, drawn=n)) for n in (9, 40))
    for name in few:
        assert len(few[name]) == 9
        assert set(few[name]) < set(more[name])
        assert few[name] != list(range(9))


def test_what_is_registered_comes_first(halves: list[Path]) -> None:
    header, begun, *rest = lines(halves[0])
    assert header["kind"] == "eval"
    assert (header["primary"], header["worth"], header["level"], header["looks"]) == ("accuracy", 0.01, 0.05, 1)
    assert header["patch_id"] == ACTIVE.patch_id
    assert header["tasks"]["brackets"]["n"] == 10
    assert begun["loops"] == ["plain", "2:5 k=3"]
    assert [len(r["answers"]) for r in rest] == 2 * [4, 2, 4]
    assert all(len(pair) == 2 for r in rest for question in r["answers"] for pair in question)


def test_a_second_loop_finds_the_plain_answers(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    other = [*asked[: asked.index("--K")], "--K", "2", "--paired"]
    cli(*asked, "--out", tmp_path)
    together = cli(*other, "--out", tmp_path, "-o", "json")
    found = answers(tmp_path / "llama" / "eval.jsonl")
    assert [loop for loop, task, first in found if (task, first) == ("brackets", 0)] == ["plain", "2:5 k=3", "2:5 k=2"]
    assert together.out == cli(*other, "--out", tmp_path / "alone", "-o", "json").out


def test_a_shard_that_was_killed_goes_on(cli: Cli, asked: list[str], halves: list[Path], tmp_path: Path) -> None:
    """It loses the slice it was at, and the end is that of one that was not."""
    whole = halves
    path = tmp_path / "killed" / "llama" / "eval-1-of-2.jsonl"
    process = start(*asked, "--out", tmp_path / "killed", "--shard", "1/2")
    wait_for_lines(path, 4, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    path.write_bytes(path.read_bytes()[:-20])  # the last line too, as a machine that loses power leaves it
    before = answers_before(path)
    ran = cli(*asked, "--out", tmp_path / "killed", "--shard", "1/2")
    assert ran.code == 0
    assert ran.err == f"note: the last line of {path} was cut short; it is left out.\n"
    assert path.read_text().startswith(before)
    assert answers(path) == answers(whole[0])
    merged = [cli("merge", first, whole[1], "-o", "json").out for first in (whole[0], path)]
    assert merged[0] == merged[1]


def answers_before(path: Path) -> str:
    text = path.read_text()
    return text[: text.rindex("\n") + 1]


def test_ctrl_c_loses_nothing(asked: list[str], cli: Cli, tmp_path: Path) -> None:
    asked = [*asked, "--limit", "40"]
    process = start(*asked, "-o", "json")
    folder = tmp_path / "cache" / "eval"
    until = time.monotonic() + 60
    while not (kept := list(folder.glob("*.jsonl"))):
        assert time.monotonic() < until
        time.sleep(0.001)
    wait_for_lines(kept[0], 4, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.split("\n") == [
        "stopped; what is answered is kept, and the same command goes on.",
        "",
        "interrupted",
        "",
    ]
    before = kept[0].read_text()
    os.link(kept[0], tmp_path / "kept")
    ran = cli(*asked, "-o", "json")
    assert (tmp_path / "kept").read_text().startswith(before)
    assert not kept[0].exists()
    assert ran.out == cli(*asked, "-o", "json").out


def test_another_run_is_refused(cli: Cli, asked: list[str], tmp_path: Path) -> None:
    cli(*asked, "--out", tmp_path)
    code, out, err = cli(*asked, "--limit", "6", "--out", tmp_path)
    assert (code, out) == (1, "")
    assert "eval.jsonl is of another run: limit is 10 there and 6 here" in err, err


def change(path: Path, at: int, **fields: Any) -> Path:
    """A copy whose line `at` says something else."""
    read = lines(path)
    read[at] |= fields
    other = path.with_name(f"other-{path.name}")
    other.write_text("".join(json.dumps(line) + "\n" for line in read))
    return other


def test_what_merge_refuses(cli: Cli, both: list[Path], tmp_path: Path) -> None:
    one, two = both
    for at, fields, message in (
        (0, {"model_sha256": "f" * 64}, r"not of one run: model_sha256 is "),
        (0, {"patch_id": "x"}, r"not of one run: patch_id is "),
        (0, {"tasks": {}}, r"not of one run: tasks is "),
        (0, {"seed": 1}, r"not of one run: seed is 1234 and 1\."),
        (0, {"shard": "2/3"}, r"not of one run: they are shards 1/2, 2/3"),
        (0, {"kind": "sweep"}, r"is no journal of an evaluation"),
        (1, {"loops": ["plain", "2:5 k=2"]}, r"loops are plain, 2:5 k=3 and plain, 2:5 k=2"),
        (2, {"task": "mmlu"}, r"line 3 of .* is damaged: mmlu from question 4 on is no slice"),
    ):
        with pytest.raises(GgufloopError, match=message):
            merge_evals([one, change(two, at, **fields)])
    with pytest.raises(UsageError, match="is named twice"):
        merge_evals([one, one])
    with pytest.raises(UsageError, match="no journal is named"):
        merge_evals([])
    with pytest.raises(GgufloopError, match="is not there, or holds nothing yet"):
        merge_evals([one, tmp_path / "none"])
    with pytest.raises(GgufloopError, match="this is not all: 6 of 6 slices of shard 2/2 are missing"):
        merge_evals([one])
    two.write_text("\n".join(two.read_text().splitlines()[:-2]) + "\n")
    code, out, err = cli("merge", one, two)
    assert (code, out) == (1, "")
    assert err.startswith(
        "error: this is not all: 2 of 6 slices of shard 2/2 are missing.\n  name the journals of all "
    )


def test_other_devices_are_noted(cli: Cli, both: list[Path]) -> None:
    one, two = both
    ran = cli("merge", one, change(two, 1, device="CUDA0 (H200)"))
    assert ran.code == 0
    assert ran.err.startswith("note: not all of this was computed on the same device: CPU (")
    assert ran.err.endswith("; CUDA0 (H200). They round differently.\n")


def test_slurm_names_the_shard(cli: Cli, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"ID": 5, "COUNT": 3, "MIN": 4}.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    ran = cli(*asked, "--out", tmp_path)
    assert ran.out.startswith("shard 2/3: 2 of 6 slices are in ")
    assert ran.out.endswith(f"when all 3 are done: ggufloop merge {tmp_path}/llama/eval-*-of-3.jsonl\n")
    ran: Ran = cli(*asked)
    assert (ran.code, ran.err.split("\n")[0]) == (
        2, "error: shard 2/3 (SLURM_ARRAY_TASK_ID; --shard 1/1 does all) keeps its part for a merge, and no folder is "
        "given.")  # fmt: skip


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ({}, None),
        ({"ID": "0", "COUNT": "4", "MIN": "0"}, "1/4"),
        ({"ID": "4", "COUNT": "4", "MIN": "1"}, "4/4"),
        ({"ID": "6", "COUNT": "4", "MIN": "0", "STEP": "2"}, "4/4"),
        ({"ID": "7", "COUNT": "3", "MIN": "1"}, UsageError),  # --array=1,3,7
        ({"ID": "3", "COUNT": "4", "MIN": "0", "STEP": "2"}, UsageError),
    ],
)
def test_slurm_variables(words: dict[str, str], found: Any) -> None:
    env = {f"SLURM_ARRAY_TASK_{name}": value for name, value in words.items()}
    if found is UsageError:
        with pytest.raises(UsageError, match="is no shard of it"):
            Shard.of_array(env)
    else:
        shard = Shard.of_array(env)
        assert (shard and str(shard)) == found


@pytest.mark.parametrize("word", ["0/4", "5/4", "4", "1/0", "a/b", "-1/4", "1/4/2"])
def test_no_shard(word: str) -> None:
    with pytest.raises(UsageError, match="is no shard"):
        Shard.parse(word)


def test_small_tasks_are_dealt_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every question in one slice; MMLU's 57 leaves do not all fall to the first shard."""
    monkeypatch.setattr(slices, "SCORED", 64)
    found = slices_of(load_tasks(["mmlu_dev", TASKS.split(",")[0]]))
    docs = [(s.task, doc) for s in found for doc in s.docs]
    assert len(docs) == len(set(docs))
    parts = [Shard(i + 1, 4).share(found) for i in range(4)]
    assert sorted(str(each) for part in parts for each in part) == sorted(map(str, found))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


class Request:
    def __init__(self, doc: int, *args: Any) -> None:
        self.task_name, self.doc_id, self.args = "t", doc, args


@pytest.mark.parametrize(
    ("kind", "answer"),
    [("loglikelihood", (float("-inf"), False)), ("loglikelihood", (-0.1 - 0.2, True)), ("generate_until", "a\0\ud800"),
     ("loglikelihood_rolling", float("inf"))],
)  # fmt: skip
def test_what_is_read_again_is_what_was_told(kind: str, answer: Any, tmp_path: Path) -> None:
    """Also what JSON has no word for."""
    from ggufloop.measure.journal import Journal

    requests = [Request(doc, f"prompt {doc}") for doc in range(10)]
    told = []
    for _ in range(2):
        with Journal.open(tmp_path / "j", {"a": 1}) as journal:
            known = [Answered(**{**r, "answers": tuple(r["answers"])}) for r in journal.records]
            sliced = Sliced(Answers(known, lambda a: journal.add(vars(a))), "plain", {"t": 4})
            told.append(sliced.answer(kind, requests, lambda parts: ([answer for _ in part] for part in parts)))
    assert told[0] == told[1]
    assert len(lines(tmp_path / "j")) == 1 + 3
    if kind != "generate_until":
        assert told[0] == [answer] * 10


def test_changed_questions_are_refused() -> None:
    answers = Answers()
    for prompts in (["a", "b"], ["a", "c"]):
        sliced = Sliced(answers, "plain", {"t": 4})
        requests = [Request(doc, prompt) for doc, prompt in enumerate(prompts)]
        if prompts[1] == "b":
            sliced.answer("loglikelihood", requests, lambda parts: ([(-1.0, True)] * len(p) for p in parts))
            continue
        with pytest.raises(GgufloopError, match="questions 0 on of t are not those that were answered before"):
            sliced.answer("loglikelihood", requests, lambda parts: [])


def test_a_journal_is_read_while_it_is_written(both: list[Path]) -> None:
    """Half a line is not there yet."""
    path = both[0]
    known = {(s.task, s.start): s for s in slices_of(load_tasks(TASKS.split(",")), 10)}
    whole = read_journal(path, known)[1]
    path.write_bytes(path.read_bytes()[:-30])
    assert read_journal(path, known)[1] == whole[:-1]


def test_workers_are_one_run(cli: Cli, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slices, "SCORED", 64)  # theirs
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(ACTIVE.directory))
    two = cli(*asked, "--out", tmp_path / "two", "--workers", 2, "-o", "json")
    assert two.code == 0, two.err
    assert two.out == cli(*asked, "--out", tmp_path / "one", "-o", "json").out
    names = sorted(path.name for path in (tmp_path / "two" / "llama").glob("*.jsonl"))
    assert names == ["eval-1-of-2.jsonl", "eval-2-of-2.jsonl", "eval.jsonl"]
    code, out, err = cli(*asked, "--limit", "4", "--out", tmp_path / "two", "--workers", 2)
    assert (code, out) == (1, "")
    assert re.match(r"error: shard [12]/2: .* is of another run: limit is 10 there and 4 here", err)
    assert cli(*asked, "--workers", 2).err.startswith("error: --workers keep their parts in journals, and no folder is")
    assert cli(*asked, "--workers", 2, "--shard", "1/2").err.startswith("error: --workers makes shards of its own.\n")


def test_the_second_loop_of_workers_has_a_progress_of_its_own() -> None:
    """Which began at the first one's 100 % and stayed there."""
    told: list[tuple[str, float]] = []
    together = workers.Together(2, lambda step: told.append((step.text, step.done)))
    for i, text, done in ((0, "plain", 4), (1, "plain", 2), (0, "k=2", 1), (1, "plain", 4), (1, "k=2", 1)):
        together(i, {"step": {"text": text, "done": done, "total": 4, "unit": ""}})
    assert told == [("2 workers: plain", 50), ("2 workers: plain", 75), ("2 workers: k=2", 12.5),
                    ("2 workers: plain", 100), ("2 workers: k=2", 25)]  # fmt: skip


def test_a_worker_that_dies_takes_the_others_along(
    tiny_model: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last line is told; the same call goes on."""
    from ggufloop.measure import workers

    monkeypatch.setattr(slices, "SCORED", 64)  # theirs
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(ACTIVE.directory))
    mark = tmp_path / "died"
    dies = (
        "import os, sys; sys.path.insert(0, sys.argv[1]); from ggufloop.measure import shard_child as c; real = c.do\n"
        "def do(job, send):\n"
        f"    if job['shard'] == '2/2' and not os.path.exists({str(mark)!r}):\n"
        f"        open({str(mark)!r}, 'w').close(); print('the last words', file=sys.stderr, flush=True); os.abort()\n"
        "    return real(job, send)\n"
        "c.do = do; c.main()"
    )
    monkeypatch.setattr(workers, "_START", dies)
    plan = EvalPlan(tuple(TASKS.split(",")), 10, paired=True)
    given = (tiny_model("llama"), LoopSpec((2, 5), k=3), plan, tmp_path, ContextSettings(n_threads=2, try_first=False))
    with pytest.raises(GgufloopError, match=r"shard 2/2: llama.cpp ended its process \(SIGABRT\): the last words"):
        workers.eval_by_workers(2, *given)
    assert workers.eval_by_workers(2, *given).compared["brackets"].n == 10
