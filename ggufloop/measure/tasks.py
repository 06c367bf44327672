"""Tasks of lm-eval under a loop, and the paired comparison of a loop with the plain model on the same questions.

    tasks = load_tasks(["mmlu_dev", "arc_challenge"])
    run = evaluate(llm, tasks, limit=100)                         # lm-eval's own results, and an Item per question
    compare(plain.items["mmlu_dev"], looped.items["mmlu_dev"])    # accuracies, difference, flips, what n it takes

lm-eval asks, scores and aggregates; this module hands it the model and keeps what it says of each question. The tasks
in `tasks/` need no network, and are found without lm-eval's own 14,000, which take half a minute to read. Needs the
extra `eval`.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.files import PACKAGE
from ggufloop.measure.endpoints import ChanceGuard, choice_log_probability, fit_temperature, guard
from ggufloop.measure.stats import Estimate, PairedEstimate, n_for_power, paired_bootstrap, wilson
from ggufloop.measure.verdict import ACCURACY, CHOICE, WORTHS, Verdict, judge, judge_flips
from ggufloop.progress import Progress, silent
from ggufloop.tasks.questions import MAKERS

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

TASKS = tuple(MAKERS)
"""The tasks that ship with ggufloop."""

SEED = 1234
_FOLDER = PACKAGE / "tasks"
_RIGHT = ("acc", "exact_match")
_INSTALL = "pip install 'ggufloop[eval]'"


@dataclass(frozen=True)
class Item:
    """What was measured on one question. right: 1 or 0. gold: log-probability of the right answer in nats, None where
    the task does not score answers it offers; answers, target: of all that it offers, and which is right."""

    task: str
    doc: int
    right: float
    gold: float | None
    answers: tuple[float, ...] = ()
    target: int | None = None


@dataclass(frozen=True)
class Run:
    """lm-eval's results; items by the name that was asked for, a group's together; samples as it logs them."""

    results: dict[str, Any]
    items: dict[str, list[Item]]
    samples: list[dict[str, Any]]

    def table(self) -> str:
        """lm-eval's table, the one of groups after it."""
        from lm_eval.utils import make_table

        groups = "\n" + make_table(self.results, "groups") if "groups" in self.results else ""
        return str(make_table(self.results)) + groups


@dataclass(frozen=True)
class Tasks:
    """Loaded tasks: lm-eval's manager and objects, which tasks each name that was asked for holds, and all of these."""

    manager: Any
    loaded: list[Any]
    members: dict[str, list[str]]
    leaves: dict[str, Any]

    def sizes(self) -> dict[str, int]:
        """How many questions each task has."""
        return {name: len(task.eval_docs) for name, task in self.leaves.items()}

    def versions(self) -> dict[str, str]:
        """What each task calls its version."""
        return {name: str((task.config.metadata or {}).get("version", "")) for name, task in self.leaves.items()}


@dataclass(frozen=True)
class Comparison:
    """The plain model and a loop on the same n questions.

    plain, looped  accuracies with Wilson's interval
    difference     of the accuracies, looped minus plain (`stats.flips_interval`)
    gained, lost   questions that became right, and wrong
    p              McNemar's exact test of gained against lost
    gold           change of the right answer's log-probability in nats, paired bootstrap; None if it is not scored. No
                   evidence: it has the wrong sign as often as not
    verdict        on accuracy, the primary measure
    choice         on the choice log-probability (`endpoints.py`), secondary; None where a question offers no answers
    guard          the plain model against chance; None likewise
    needed         questions at which a test would see the observed difference with 80 % power; None if it is 0
    """

    n: int
    plain: Estimate
    looped: Estimate
    difference: PairedEstimate
    gained: int
    lost: int
    p: float
    gold: PairedEstimate | None
    needed: int | None
    verdict: Verdict
    choice: Verdict | None
    guard: ChanceGuard | None

    @property
    def flips_below(self) -> float:
        """Upper end of Wilson's interval for the share of questions that flip."""
        return wilson(self.gained + self.lost, self.n).high

    @property
    def conclusive(self) -> bool:
        """Whether McNemar's test tells the two apart at 5 %."""
        return self.p < 0.05


def _require() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["TQDM_DISABLE"] = "1"  # lm-eval's own bars; tqdm reads it when it is imported
    try:
        from lm_eval import evaluator
    except ImportError as e:
        raise UsageError(f"tasks need lm-eval, which is not installed ({e}).", _INSTALL) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It would name the commit of whatever folder the user is in, and git complains where that is no repository.
    evaluator.get_git_commit_hash = lambda: None


def load_tasks(names: Sequence[str]) -> Tasks:
    """lm-eval's tasks, groups or tags of these names, their questions read.

    Raises UsageError for no name, one given twice or one that is not known, GgufloopError if its questions cannot be
    had.
    """
    if not names or not all(names):
        raise UsageError("no task is named.", f"name some, such as --tasks {TASKS[0]},{TASKS[1]}.")
    if len(set(names)) < len(names):
        raise UsageError(f"a task is named twice in {','.join(names)}.", "name each once.")
    _require()
    from lm_eval.tasks import TaskManager

    ours = all(name in TASKS for name in names)
    manager = TaskManager(include_path=str(_FOLDER), include_defaults=not ours)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, {*TASKS, *manager.task_index}, n=3)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise UsageError(
                f"task {name!r} is not known.", f"{hint}Without a network: {', '.join(TASKS)}; else any of lm-eval's."
            )
    members, objects = {}, []
    leaves: dict[str, Any] = {}
    for name in names:
        loaded = _load(manager, name)
        members[name] = list(loaded["tasks"])
        leaves |= loaded["tasks"]
        nested = {child for children in loaded["group_map"].values() for child in children}
        objects += [o for part in ("groups", "tasks") for key, o in loaded[part].items() if key not in nested]
    every = [task for names_ in members.values() for task in names_]
    if len(set(every)) < len(every):
        raise UsageError(f"some of {','.join(names)} hold the same task.", "leave out the one that the other holds.")
    return Tasks(manager, objects, members, leaves)


def _load(manager: Any, name: str) -> Any:
    try:
        return manager.load([name])
    except GgufloopError:
        raise
    except Exception as e:  # whatever a task's own code and the hub's client raise
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise GgufloopError(
            f"the questions of {name} cannot be read: {reason}",
            f"tasks of lm-eval are downloaded from the hub; without a network there are {', '.join(TASKS)}.",
        ) from e


def evaluate(
    llm: LoopedLlama,
    tasks: Tasks,
    limit: int | None = None,
    chat: bool = False,
    progress: Progress = silent,
    docs: Mapping[str, Sequence[int]] | None = None,
) -> Run:
    """Run tasks under the loop in force, the first `limit` questions of each; chat: in the model's chat template.

    docs: the questions of each task to run instead, by their numbers; lm-eval's own standard errors are left out then.

    Raises GgufloopError if a question does not fit the context, UsageError if the model has no chat template.
    """
    _require()
    import lm_eval

    from ggufloop.measure.lm_eval_model import LoopedLM

    results = lm_eval.simple_evaluate(
        LoopedLM(llm, progress),
        tasks=tasks.loaded if docs is None else [tasks.leaves[task] for task in docs],
        task_manager=tasks.manager,  # or it reads all of its own again
        limit=limit,
        # Ascending: lm-eval asks in the order of the task, and names what it asked in the order of this list.
        samples=None if docs is None else {task: sorted(numbers) for task, numbers in docs.items()},
        apply_chat_template=chat,
        bootstrap_iters=1000 if docs is None else 0,
        random_seed=SEED,
        numpy_random_seed=SEED,
        torch_random_seed=SEED,
        fewshot_random_seed=SEED,
    )
    by_task = results.pop("samples")
    items = {
        name: [_item(sample, task) for task in members for sample in _first_filter(by_task.get(task, []))]
        for name, members in tasks.members.items()
    }
    samples = [{"task": task, **sample} for task, rows in by_task.items() for sample in rows]
    return Run(results, {name: [i for i in found if i is not None] for name, found in items.items()}, samples)


def _first_filter(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A task may read each answer in several ways; its first."""
    return [sample for sample in samples if sample["filter"] == samples[0]["filter"]]


def _item(sample: dict[str, Any], task: str) -> Item | None:
    """None for a task that does not say of a question whether it was answered right."""
    right = next((sample[metric] for metric in _RIGHT if metric in sample["metrics"]), None)
    if right not in (0, 1):
        return None
    target, answers = sample["target"], sample["filtered_resps"]
    scored = isinstance(target, int) and all(isinstance(a, (tuple, list)) and len(a) == 2 for a in answers)
    gold = float(answers[target][0]) if scored and 0 <= target < len(answers) else None
    if gold is None:
        return Item(task, int(sample["doc_id"]), float(right), None)
    return Item(task, int(sample["doc_id"]), float(right), gold, tuple(float(a[0]) for a in answers), target)


def compare(plain: Sequence[Item], looped: Sequence[Item], worth: float = WORTHS[ACCURACY]) -> Comparison:
    """Compare two runs over the same questions. worth: the smallest difference of accuracy that would matter.

    Raises UsageError if they are not over the same, or are fewer than 2.
    """
    if [(i.task, i.doc) for i in plain] != [(i.task, i.doc) for i in looped]:
        raise UsageError("the two runs are not over the same questions.", "run both with the same tasks and limit.")
    n = len(plain)
    if n < 2:
        raise UsageError(
            f"{n} questions that are right or wrong cannot be compared.",
            "take tasks that report acc or exact_match, and a --limit of 2 or more.",
        )
    a, b = (np.array([item.right for item in run]) for run in (looped, plain))
    gained, lost = int(np.sum(a > b)), int(np.sum(a < b))
    verdict = judge_flips(gained, lost, n, worth)
    difference = verdict.gain
    golds = [(x.gold, y.gold) for x, y in zip(looped, plain, strict=True)]
    changes = [x - y for x, y in golds if x is not None and y is not None and math.isfinite(x - y)]
    gold = paired_bootstrap(changes, seed=SEED) if len(changes) == n else None
    return Comparison(
        n=n,
        plain=wilson(int(b.sum()), n),
        looped=wilson(int(a.sum()), n),
        difference=difference,
        gained=gained,
        lost=lost,
        p=difference.p,
        gold=gold,
        needed=n_for_power(difference.mean, difference.sd) if difference.mean else None,
        verdict=verdict,
        choice=_choice(plain, looped),
        guard=_guard(plain),
    )


def _scored(items: Sequence[Item]) -> bool:
    return all(i.target is not None and all(map(math.isfinite, i.answers)) for i in items)


def _choice(plain: Sequence[Item], looped: Sequence[Item]) -> Verdict | None:
    """At the temperature that fits the plain run."""
    if not _scored(plain) or not _scored(looped):
        return None
    gold = [i.target for i in plain if i.target is not None]
    temperature = fit_temperature([i.answers for i in plain], gold)
    a, b = (choice_log_probability([i.answers for i in run], gold, temperature) for run in (looped, plain))
    return judge(a - b, WORTHS[CHOICE])


def _guard(plain: Sequence[Item]) -> ChanceGuard | None:
    if not _scored(plain):
        return None
    chosen = [int(np.argmax(i.answers)) for i in plain]
    return guard([i.right for i in plain], chosen, [len(i.answers) for i in plain])
