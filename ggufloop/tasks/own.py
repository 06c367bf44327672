"""Questions of your own: a csv, JSON lines or JSON file as a task of lm-eval, with no code and no YAML.

    own = read(Path("mine.csv"))          # columns question, choices, answer: scored; or prompt, target: written
    own.config("mine", shots=2)           # the task, as lm-eval takes it

A `question` is asked as "Question: ...\\nAnswer:", a `prompt` as it stands. Whether answers are given as the choice's
text, as letters or as numbers from 0 is decided over the whole file, not row by row, and a file that can be read in two
ways is refused: a wrong key would give a score that looks like any other. docs/tasks.md has the rules.
"""

from __future__ import annotations

import ast
import csv
import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop import reading
from ggufloop.errors import GgufloopError, UsageError

PLAIN, YAML = (".csv", ".jsonl", ".json"), (".yaml", ".yml")
"""What the name of a file of questions ends in, and of one of lm-eval's."""

LONGEST = 100_000
"""Characters of a cell. More is a quote that was never closed, or no question."""
_WRITTEN_TOKENS = 64
_DELIMITERS = ",;\t"
_KINDS = ("text", "letter", "number")
_COLUMNS = "question, choices and answer, or prompt and target"
_LISTED = 'Write them in one cell like ["red", "green"] or red|green, or in columns A, B, C.'


@dataclass(frozen=True)
class OwnQuestion:
    """A question. number: its row in the file. choices: none where the answer is written; answer: the right one's
    index, or the text to be written."""

    number: int
    prompt: str
    choices: tuple[str, ...]
    answer: int | str


@dataclass(frozen=True)
class OwnTask:
    """The questions of a file: of all of them the answers are scored, or of all of them written."""

    path: Path
    rows: tuple[OwnQuestion, ...]

    @property
    def written(self) -> bool:
        """Whether the model writes the answer."""
        return not self.rows[0].choices

    def config(self, name: str, shots: int = 0) -> dict[str, Any]:
        """The task in lm-eval's words. shots: examples that may be shown, the first of the others in the file."""
        from datasets import Dataset

        answer = "target" if self.written else "answer"
        docs = [
            {"row": row.number, "prompt": row.prompt, answer: row.answer} | (
                {"choices": list(row.choices)} if row.choices else {})
            for row in self.rows
        ]  # fmt: skip
        data = Dataset.from_list(docs)
        shown = data.select(range(min(shots + 1, len(docs))))  # one more, for the question itself is never among them
        common = {
            "task": name,
            "custom_dataset": lambda **metadata: {"test": data},
            "test_split": "test",
            "fewshot_split": "test",
            "fewshot_config": {"sampler": "first_n", "process_docs": lambda docs: shown},
            "doc_to_text": "prompt",
            "metadata": {"version": 1.0},
        }
        if not self.written:
            metrics = [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")]
            return common | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "answer",
                             "metric_list": metrics}  # fmt: skip
        # Blanks around it, a full stop behind it and case do not count.
        exact = {"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True,
                 "regexes_to_ignore": [r"^\s+", r"\s*\.?\s*$"]}  # fmt: skip
        return common | {"output_type": "generate_until", "doc_to_target": "target", "metric_list": [exact],
                         "generation_kwargs": {"until": ["\n"], "do_sample": False,
                                               "max_gen_toks": _WRITTEN_TOKENS}}  # fmt: skip


def is_file(name: str) -> bool:
    """Whether a task is named by a file, its questions or lm-eval's YAML."""
    return Path(name).suffix.lower() in (*PLAIN, *YAML)


def is_plain(name: str) -> bool:
    """Whether a task is named by the file of its questions."""
    return Path(name).suffix.lower() in PLAIN


def task_name(name: str) -> str:
    """What a task is called: as it is named, a file by its stem."""
    return Path(name).stem if is_file(name) else name


def kept_name(name: str) -> str:
    """What a study keeps a task's answers under: a file's with the beginning of its sha256, so that a changed file is
    another task. Raises UsageError as `content` does."""
    if not is_file(name):
        return name
    return f"{task_name(name)} {hashlib.sha256(content(Path(name))).hexdigest()[:8]}"


def content(path: Path) -> bytes:
    """The bytes of a file of questions. Raises UsageError if there is none, GgufloopError if it cannot be read."""
    try:
        return reading.content(path, "name a file of questions.")
    except FileNotFoundError:
        raise UsageError(
            f"there is no file {path}.", "--tasks takes names of tasks and files ending in "
            f"{', '.join((*PLAIN, YAML[0]))}, separated by commas.",
        ) from None  # fmt: skip


def read(path: Path) -> OwnTask:
    """The questions of a file. Raises UsageError if there is none, GgufloopError for one that cannot be understood,
    naming row, value and rule."""
    data = content(path)
    try:
        rows = list(_csv(data) if path.suffix.lower() == ".csv" else _json(data, path.suffix.lower() == ".jsonl"))
    except ValueError as e:
        hint = "save it as UTF-8, in Excel as 'CSV UTF-8'." if "UTF-8" in str(e) else "mend it."
        raise GgufloopError(f"{path}: {e}.", hint) from None
    if not rows:
        raise GgufloopError(f"{path} has no questions.", f"it has columns {_COLUMNS}, and a row for each question.")
    shape = _Shape.of(path, list(rows[0][1]))
    asked = [(n, *_asked(path, shape, n, cells)) for n, cells in rows]
    if shape.choices:
        indices = _indices(path, [(n, choices, answer) for n, _, choices, answer in asked])
        found = [OwnQuestion(n, prompt, choices, i) for (n, prompt, choices, _), i in zip(asked, indices, strict=True)]
    else:
        found = [OwnQuestion(n, prompt, (), _target(path, n, answer)) for n, prompt, _, answer in asked]
    seen: dict[tuple[str, tuple[str, ...]], int] = {}
    for row in found:
        first = seen.setdefault((row.prompt, row.choices), row.number)
        if first != row.number:
            raise GgufloopError(f"{path}: row {row.number} asks what row {first} asks.",
                                "leave one out: each counts as a question of its own.")  # fmt: skip
    return OwnTask(path, tuple(found))


def _csv(data: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a csv file with their numbers, the header's being 1. Raises ValueError."""
    text = reading.text(data)
    if "\0" in text:
        raise ValueError("it has a zero byte, and is no text")
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number = 0
    try:
        for number, cells in enumerate(lines, 1):
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _names(cells)
                continue
            if len(cells) != len(header):
                raise ValueError(f"row {number} has {len(cells)} cells, and the header has {len(header)}")
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as e:
        raise ValueError(f"row {number + 1} cannot be read: {e}") from None


def _json(data: bytes, lines: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    """The records of a JSON list or of JSON lines with their numbers from 1. Raises ValueError."""
    if lines:
        words = [(n, line) for n, line in enumerate(reading.text(data).split("\n"), 1) if line.strip()]
    else:
        words = [(0, reading.text(data))]
    for n, line in words:
        try:
            value = reading.json(line)
        except ValueError as e:
            raise ValueError(f"row {n}: {e}" if lines else f"{e}; a .json file is one list, a .jsonl file has a "
                             "record in each line") from None  # fmt: skip
        if not lines and not isinstance(value, list):
            raise ValueError("it is no list of records")
        for number, record in [(n, value)] if lines else enumerate(value, 1):
            if not isinstance(record, dict):
                raise ValueError(f"row {number} is no record: write it like "
                                 '{"question": "...", "choices": ["...", "..."], "answer": 0}')  # fmt: skip
            yield number, dict(zip(_names(list(record)), record.values(), strict=True))


def _names(cells: Sequence[str]) -> list[str]:
    """Names of columns, in lower case. Raises ValueError for one that is there twice."""
    names = [cell.strip().lower() for cell in cells]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"it has two columns {twice}")
    return names


@dataclass(frozen=True)
class _Shape:
    """Which columns hold what. choices: none where the answer is written."""

    text: str
    choices: tuple[str, ...]
    answer: str

    @classmethod
    def of(cls, path: Path, columns: list[str]) -> _Shape:
        """Raises GgufloopError for columns that are missing, or of which only one can be meant."""

        def refuse(what: str, hint: str = f"its columns are {_COLUMNS}.") -> GgufloopError:
            return GgufloopError(f"{path} has {what}: it has {', '.join(columns) or 'no columns'}.", hint)

        texts = [name for name in ("question", "prompt") if name in columns]
        if len(texts) != 1:
            raise refuse("columns question and prompt both" if texts else "no column question or prompt")
        numbered = sorted((int(m[1]), m[0]) for m in (re.fullmatch(r"choice_?(\d{1,3})", c) for c in columns) if m)
        letters = [chr(97 + i) for i in range(26) if all(chr(97 + j) in columns for j in range(i + 1))]
        sources = [
            found
            for found in (("choices",) if "choices" in columns else (), tuple(name for _, name in numbered),
                          tuple(letters) if len(letters) > 1 else ())
            if found
        ]  # fmt: skip
        if len(sources) > 1:
            raise refuse("choices in several ways", f"keep one: {' or '.join(s[0] for s in sources)}.")
        answers = [name for name in ("answer", "target") if name in columns]
        if len(answers) != 1:
            raise refuse("columns answer and target both" if answers else "no column answer or target")
        if answers == ["answer"] and not sources:
            raise refuse("answers and no choices", "give choices in one column, as a JSON list or separated by |, or "
                         "in columns A, B, C, D or choice_1, choice_2; an answer to be written is called target.",
                         )  # fmt: skip
        if answers == ["target"] and sources:
            raise refuse("choices and a target", "call it answer to have the choices scored, or leave them out.")
        return cls(texts[0], sources[0] if sources else (), answers[0])


def _asked(path: Path, shape: _Shape, n: int, cells: dict[str, Any]) -> tuple[str, tuple[str, ...], Any]:
    """The prompt, choices and answer of a row, the answer as it stands. Raises GgufloopError."""
    missing = next((name for name in (shape.text, *shape.choices[:2], shape.answer) if name not in cells), None)
    if missing is not None:
        raise GgufloopError(f"{path}: row {n} has no {missing}.", "every row has the same columns.")
    text = _text(path, n, shape.text, cells[shape.text])
    prompt = f"Question: {text.strip()}\nAnswer:" if shape.text == "question" else text
    if not shape.choices:
        return prompt, (), cells[shape.answer]
    if shape.choices == ("choices",):
        words = [_text(path, n, "choices", word).strip() for word in _listed(path, n, cells["choices"])]
    else:
        given = [cells.get(name) for name in shape.choices]
        while given and (given[-1] is None or not str(given[-1]).strip()):
            given.pop()
        words = [_text(path, n, name, word).strip() for name, word in zip(shape.choices, given, strict=False)]
    if len(words) < 2:
        raise GgufloopError(f"{path}: row {n} has {len(words)} choice{'s' * (len(words) != 1)}.",
                            f"a question has two or more. {_LISTED}")  # fmt: skip
    twice = next((word for word in words if words.count(word) > 1), None)
    if twice is not None:
        raise GgufloopError(f"{path}: row {n} has the choice {reading.shown(twice)} twice.", "each is another.")
    return prompt, tuple(words), cells[shape.answer]


def _text(path: Path, n: int, column: str, value: Any) -> str:
    """A cell as text, numbers as JSON writes them. Raises GgufloopError for none, and for one without end."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise GgufloopError(f"{path}: row {n}: {column} is {reading.shown(value)}, not text.", "write it as text.")
    if not value.strip():
        raise GgufloopError(f"{path}: row {n}: {column} is empty.", "fill it in, or leave the row out.")
    if len(value) > LONGEST:
        raise GgufloopError(f"{path}: row {n}: {column} has {len(value):,} characters, and {LONGEST:,} is the most.",
                            "is a quote not closed?")  # fmt: skip
    return value


def _listed(path: Path, n: int, value: Any) -> list[Any]:
    """Choices in one cell: a list of JSON or Python, or a text with | between them. Raises GgufloopError."""
    if isinstance(value, list):
        return value
    text = _text(path, n, "choices", value).strip()
    if text.startswith("["):
        for parse in (reading.json, ast.literal_eval):
            try:
                found = parse(text)
            except (ValueError, SyntaxError, MemoryError, RecursionError):
                continue
            if isinstance(found, list):
                return found
        raise GgufloopError(f"{path}: row {n}: choices {reading.shown(text)} are no JSON list.",
                            _LISTED)  # fmt: skip
    return text.split("|")


def _indices(path: Path, rows: Sequence[tuple[int, tuple[str, ...], Any]]) -> list[int]:
    """Which choice each answer is. Raises GgufloopError for an answer that is none, and where it may be another."""
    read = {kind: [_meant(kind, answer, choices) for _, choices, answer in rows] for kind in _KINDS}
    fits = [kind for kind, found in read.items() if None not in found]
    if not fits:
        kind = max(_KINDS, key=lambda each: sum(i is not None for i in read[each]))
        n, choices, answer = rows[read[kind].index(None)]
        said = reading.shown(answer)
        if all(i is None for i in read[kind]):
            what = f"is no letter, no number from 0 and none of its choices, {reading.shown('|'.join(choices))}"
        elif kind == "text":
            what = f"is none of its choices, {reading.shown('|'.join(choices))}"
        elif kind == "letter":
            what = f"is none of the letters A to {chr(64 + len(choices))}, which other answers are"
        else:
            what = f"is none of the numbers 0 to {len(choices) - 1}: answers that are numbers count from 0"
        raise GgufloopError(f"{path}: row {n}: answer {said} {what}.",
                            "give all answers as letters, all as numbers from 0, or all as their texts.")  # fmt: skip
    for k, (n, choices, answer) in enumerate(rows):
        meant = {kind: choices[read[kind][k] or 0] for kind in fits}
        if len(set(meant.values())) > 1:
            ways = " or ".join(f"the {kind} of {reading.shown(choice)}" for kind, choice in meant.items())
            raise GgufloopError(f"{path}: row {n}: answer {reading.shown(answer)} may be {ways}.",
                                "give all answers as letters, which are none of the choices.")  # fmt: skip
    if fits == ["number"] and 0 not in read["number"]:
        raise GgufloopError(f"{path}: answers are numbers from 0, and none is 0: they may be counted from 1.",
                            "subtract 1, or give letters or the texts.")  # fmt: skip
    return [i for i in read[fits[0]] if i is not None]


def _meant(kind: str, answer: Any, choices: tuple[str, ...]) -> int | None:
    """The index an answer has when it is taken as a text, a letter or a number; None if it is none."""
    if isinstance(answer, bool):
        return None
    if isinstance(answer, (int, float)):
        return int(answer) if kind == "number" and answer in range(len(choices)) else None
    if not isinstance(answer, str):
        return None
    word = answer.strip()
    if kind == "text":
        return choices.index(word) if word in choices else None
    if kind == "letter":
        i = ord(word.upper()) - 65 if len(word) == 1 and word.isascii() else -1
    else:
        i = int(float(word)) if re.fullmatch(r"\d{1,3}(\.0+)?", word) else -1
    return i if 0 <= i < len(choices) else None


def _target(path: Path, n: int, value: Any) -> str:
    word = _text(path, n, "target", value).strip()
    if "\n" in word:
        raise GgufloopError(f"{path}: row {n}: target {reading.shown(word)} has several lines.",
                            "what is written ends with its line: give one.")  # fmt: skip
    return word
