"""A file of questions as a task: what is asked against the same task in lm-eval's YAML, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import Cli

from ggufloop.engine import ACTIVE
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.tasks import own

pytest.importorskip("lm_eval")

import lm_eval.tasks

from ggufloop.measure import sweep_run
from ggufloop.measure.items import TaskMeasure
from ggufloop.tasks.loading import check_tasks, load_tasks
from ggufloop.tasks.questions import questions, questions_path

CHOICES = 'question,A,B,C,answer\n"Which is red, always?",sky,"blood, fresh",snow,B\nTwo and two?,3,4,,B\n' \
          "Which {{is}} green?,grass,coal,milk,A\n"  # fmt: skip
WRITTEN = "prompt;target\nThe capital of France is;Paris\nTwo and two are;4\nThe sky is;Blue\n"

YAML = """
task: by_hand
dataset_path: csv
dataset_kwargs: {{data_files: {{test: {file}}}, cache_dir: {cache}, delimiter: "{delimiter}", keep_default_na: false}}
test_split: test
fewshot_split: test
fewshot_config: {{sampler: first_n}}
include: common.inc
"""
SCORED = """
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{[A, B, C] if C else [A, B]}}"
doc_to_target: "{{['A', 'B', 'C'].index(answer)}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
GENERATED = """
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 64}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GGUFLOOP_LIB_DIR", str(ACTIVE.directory))  # which is in the other cache


def asked(task: Any, shots: int) -> list[list[Any]]:
    """What lm-eval would ask a model."""
    task.set_config(key="num_fewshot", value=shots)
    task.build_all_requests(limit=None, rank=0, world_size=1)
    return [request.args for request in task.instances]


@pytest.mark.parametrize(("text", "rest"), [(CHOICES, SCORED), (WRITTEN, GENERATED)], ids=["scored", "written"])
@pytest.mark.parametrize("shots", [0, 2])
def test_it_is_the_task_by_hand(tmp_path: Path, text: str, rest: str, shots: int) -> None:
    """A prompt, an answer or an example that differs by a blank would fail it."""
    file, yaml = tmp_path / "mine.csv", tmp_path / "hand.yaml"
    file.write_text(text)
    (tmp_path / "common.inc").write_text(rest)
    yaml.write_text(YAML.format(file=file, cache=tmp_path / "data", delimiter=";" if ";" in text else ","))
    tasks = load_tasks([str(file), str(yaml)], num_fewshot=shots)
    assert tasks.members == {"mine": ["mine"], "hand": ["by_hand"]}
    mine, hand = tasks.leaves.values()
    assert asked(mine, shots) == asked(hand, shots) != []
    docs = list(zip(mine.eval_docs, hand.eval_docs, strict=True))
    assert [str(mine.doc_to_target(a)) for a, _ in docs] == [str(hand.doc_to_target(b)) for _, b in docs]
    assert tasks.digests["mine"] == tasks.digests["by_hand"]
    assert tasks.versions()["mine"] == f"1.0 (sha256 {tasks.digests['mine']})"


def test_no_question_is_its_own_example(tmp_path: Path) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(CHOICES)
    (task,) = load_tasks([str(file)], num_fewshot=2).leaves.values()
    for doc, (prompt, _) in zip([d for d in task.eval_docs for _ in d["choices"]], asked(task, 2), strict=True):
        *examples, question = prompt.split("\n\n")
        assert question == doc["prompt"]
        assert len(examples) == 2
        assert not any(doc["prompt"] in example for example in examples)
    with pytest.raises(UsageError, match="mine is to show 3 worked examples, and there are 2 here"):
        load_tasks([str(file)], num_fewshot=3)


def test_our_own_questions_as_a_file() -> None:
    """The form in which they are kept is one that is read."""
    rows = questions("brackets")
    (task,) = load_tasks([str(questions_path("brackets"))]).leaves.values()
    assert [(d["prompt"], d["choices"], d["answer"]) for d in task.eval_docs] == [
        (q["prompt"], q["choices"], q["answer"]) for q in rows
    ]


@pytest.mark.parametrize(
    ("written", "target", "right"),
    [(" Paris.", "paris", 1), ("Paris", "Paris", 1), ("in Paris", "Paris", 0), ("3.5", "35", 0), ("-1", "1", 0)],
)
def test_what_counts_as_the_same_text(tmp_path: Path, written: str, target: str, right: int) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(json.dumps({"prompt": "x", "target": target}) + "\n")
    (task,) = load_tasks([str(file)]).leaves.values()
    assert task.process_results(task.eval_docs[0], [written]) == {"exact_match": right}


@pytest.mark.parametrize(
    "rows",
    [
        'question,choices,answer\nq1,"[""x"", ""y, z""]",0\nq2,"[""u"", ""v""]",1\n',
        "question,choices,answer\nq1,\"['x', 'y, z']\",x\nq2,\"['u', 'v']\",v\n",
        'question,choices,answer\nq1,"x|y, z",a\nq2,u|v,B\n',
        "Question;choice_1;choice_2;Answer;note\r\nq1;x;y, z;0;-\r\n\r\nq2;u;v;1;-\r\n",
        "\ufeffquestion\ta\tb\tanswer\nq1\tx\ty, z\t0.0\nq2\tu\tv\t1.0\n",
    ],
)
def test_ways_to_write_it(tmp_path: Path, rows: str) -> None:
    file = tmp_path / "mine.csv"
    file.write_bytes(rows.encode())
    assert [(r.prompt, r.choices, r.answer) for r in own.read(file).rows] == [
        ("Question: q1\nAnswer:", ("x", "y, z"), 0),
        ("Question: q2\nAnswer:", ("u", "v"), 1),
    ]


def csv_of(*answers: str, choices: str = "x|y|z") -> bytes:
    return ("question,choices,answer\n" + "".join(f"q{i},{choices},{a}\n" for i, a in enumerate(answers))).encode()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.csv", b"", "has no questions."),
        ("a.csv", b"question,choices,answer\n", "has no questions."),
        ("a.csv", b"text,choices,answer\nq,x|y,0\n", "has no column question or prompt: it has text, choices, answer."),
        ("a.csv", b"question,answer\nq,x\n", "has answers and no choices: it has question, answer."),
        ("a.csv", b"question,prompt,target\nq,p,x\n", "has columns question and prompt both"),
        ("a.csv", b"question,choices,A,B,answer\nq,x|y,x,y,A\n", "has choices in several ways"),
        ("a.csv", b"question,choices\nq,x|y\n", "has no column answer or target"),
        ("a.csv", b"prompt,choices,target\nq,x|y,x\n", "has choices and a target"),
        ("a.csv", b"prompt,prompt,target\nq,x,x\n", ": it has two columns prompt."),
        ("a.csv", csv_of("0", "3"), ": row 3: answer '3' is none of the numbers 0 to 2: answers that are numbers"),
        ("a.csv", csv_of("1", "2"), ": answers are numbers from 0, and none is 0: they may be counted from 1."),
        ("a.csv", csv_of("A", "D"), ": row 3: answer 'D' is none of the letters A to C, which other answers are."),
        ("a.csv", csv_of("x", "w"), ": row 3: answer 'w' is none of its choices, 'x|y|z'."),
        ("a.csv", csv_of("why"), ": row 2: answer 'why' is no letter, no number from 0 and none of its choices"),
        ("a.csv", csv_of("1", "2", choices="2|1|3"), ": row 3: answer '2' may be the text of '2' or the number of"),
        ("a.csv", csv_of("A", choices="B|A"), ": row 2: answer 'A' may be the text of 'A' or the letter of 'B'."),
        ("a.csv", csv_of("x", choices="x|x"), ": row 2 has the choice 'x' twice."),
        ("a.csv", csv_of("x", choices="x"), ": row 2 has 1 choice."),
        ("a.csv", csv_of("x", choices="x||y"), ": row 2: choices is empty."),
        ("a.csv", csv_of("x", choices="[x"), ": row 2: choices '[x' are no JSON list."),
        ("a.csv", csv_of("x") + b" q0,x|y|z,x\n", ": row 3 asks what row 2 asks."),
        ("a.csv", csv_of("x") + b"q1,x|y|z\n", ": row 3 has 2 cells, and the header has 3."),
        ("a.csv", csv_of("x") + b'"q1,x|y|z,x\n', ": row 3 cannot be read: unexpected end of data."),
        ("a.csv", b"prompt,target\n" + b"x" * 200_000 + b",y\n", ": row 2 cannot be read: field larger than field"),
        ("a.csv", b"prompt,target\n" + b"x" * 110_000 + b",y\n", ": row 2: prompt has 110,000 characters, and 100,000"),
        ("a.csv", b"prompt,target\ncaf\xe9,y\n", ": it is not UTF-8 text: byte 0xe9 at position 17."),
        ("a.csv", "prompt,target\nq,y\n".encode("utf-16"), ": it is not UTF-8 text: byte 0xff at position 0."),
        ("a.csv", b"prompt,target\nq\0,y\n", ": it has a zero byte, and is no text."),
        ("a.csv", b'prompt,target\nq,"x\ny"\n', ": row 2: target 'x\\ny' has several lines."),
        ("a.csv", b"prompt,target\nq,\n", ": row 2: target is empty."),
        ("a.jsonl", b'{"prompt": "q"\n', ": row 1: Expecting ',' delimiter at column 15."),
        ("a.jsonl", b'[1]\n', ': row 1 is no record: write it like {"question"'),
        ("a.jsonl", b'{"prompt": "q", "target": true}\n', ": row 1: target is True, not text."),
        ("a.jsonl", b'{"prompt": "q", "target": ["x", "y"]}\n', ": row 1: target is ['x', 'y'], not text."),
        ("a.jsonl", b'{"prompt": "q", "target": "x"}\n{"target": "x"}\n', ": row 2 has no prompt."),
        ("a.jsonl", b'{"prompt": "q", "choices": ["x", "y"], "answer": 2}\n', ": row 1: answer 2 is no letter"),
        ("a.json", b'{"prompt": "q", "target": "x"}\n{"prompt"', "; a .json file is one list, a .jsonl file has"),
        ("a.json", b'{"prompt": "q", "target": "x"}', ": it is no list of records."),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    file = tmp_path / name
    file.write_bytes(data)
    with pytest.raises(GgufloopError) as e:
        check_tasks([str(file)])
    assert e.value.message.startswith(str(file))
    assert said in e.value.message
    assert "\n" not in e.value.message + e.value.hint
    assert e.value.hint


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["no.csv"], "there is no file no.csv."),
        (["no.yaml"], "there is no file no.yaml."),
        (["a.csv", "b/a.jsonl"], "two tasks are called a: a.csv, b/a.jsonl."),
        (["brackets", "brackets.csv"], "two tasks are called brackets: "),
        (["notes.txt"], "notes.txt is no file of questions."),
        (["brackts"], "task 'brackts' is not known."),
    ],
)
def test_names_are_told_before_a_model_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, names: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    for command in ("eval", "sweep", "compare"):
        code, out, err = cli(command, "no-such-model", "--tasks", ",".join(names))
        assert (code, out) == (2, "")
        assert err.startswith(f"error: {said}")


def test_a_file_of_lm_evals_that_is_none(tmp_path: Path) -> None:
    for text, said in [("task: x\ndoc_to_text: [", "while parsing"), ("a: 1\n", "Unknown config shape")]:
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(GgufloopError, match=f"a.yaml is no task that can be read: .*{said}") as e:
            load_tasks([str(tmp_path / "a.yaml")])
        assert "\n" not in e.value.message


def test_a_folder_of_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lm_eval.tasks.TaskManager  # all of lm-eval's take a quarter of a minute
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: real(None, include_path, False))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "mine.csv").write_text(CHOICES)
    (folder / "common.inc").write_text(SCORED)
    (folder / "a.yaml").write_text(YAML.format(file=tmp_path / "mine.csv", cache=tmp_path / "data", delimiter=","))
    (folder / "b.yaml").write_text("group: my_own_two\ntask: [by_hand, brackets]\n")
    tasks = load_tasks(["my_own_two"], include_path=str(folder))
    assert tasks.members == {"my_own_two": ["by_hand", "brackets"]}
    assert set(tasks.digests) == {"by_hand", "brackets"}
    by_file = load_tasks([str(folder / "b.yaml")], include_path=str(folder))
    assert by_file.members == {"b": ["by_hand", "brackets"]}
    assert by_file.digests == tasks.digests
    with pytest.raises(GgufloopError, match="holds 'by_hand', and there is no such task"):
        load_tasks([str(folder / "b.yaml")])
    with pytest.raises(UsageError, match="'my_own_two' is not known"):
        check_tasks(["my_own_two"])
    with pytest.raises(UsageError, match="there is no folder"):
        check_tasks(["brackets"], str(tmp_path / "nowhere"))


def test_a_changed_file_is_another_run(tiny_model: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "mine.csv"
    file.write_text(CHOICES)
    args = ["eval", tiny_model("llama"), "--tasks", file, "-t", "1", "--out", tmp_path / "out"]
    code, out, err = cli(*args)
    assert (code, err) == (0, "")
    assert "|mine " in out
    assert cli(*args)[:2] == (0, out)
    measure = TaskMeasure(str(file), load_tasks([str(file)]))
    assert (measure.name, measure.n) == ("mine", 3)
    file.write_text(CHOICES.replace("sky", "sea"))
    code, out, err = cli(*args)
    assert (code, out) == (1, "")
    assert "is of another run: tasks is" in err
    assert TaskMeasure(str(file), load_tasks([str(file)])).identity() != measure.identity()


def test_a_sweep_reads_its_tasks_before_the_model(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_run, "open_model", lambda *args, **how: pytest.fail("the model was opened"))
    with pytest.raises(UsageError, match="'brackts' is not known"):
        sweep_run.run_sweep(tiny_model("llama"), [], sweep_run.SweepPlan(tasks=("brackts",)), Path("never.jsonl"))


def test_shards_of_a_file_merge(tiny_model: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    """The merge finds the file, and a folder of tasks, by what the journals say."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    (tmp_path / "mine.csv").write_text(CHOICES)
    (folder / "common.inc").write_text(SCORED)
    (folder / "a.yaml").write_text(YAML.format(file=tmp_path / "mine.csv", cache=tmp_path / "data", delimiter=","))
    names = f"{tmp_path / 'mine.csv'},by_hand"
    args = ["--tasks", names, "--include-path", folder, "-t", "1", "--out", tmp_path / "out"]
    for i in (1, 2):
        assert cli("eval", tiny_model("llama"), *args, "--shard", f"{i}/2")[0] == 0
    code, out, _ = cli("merge", *(tmp_path / "out").rglob("eval-*.jsonl"))
    assert code == 0
    assert "|by_hand|" in out
