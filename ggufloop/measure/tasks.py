"""Tasks of lm-eval under a loop, and the paired comparison of a loop with the plain model on the same questions.

    tasks = load_tasks(["mmlu_dev", "arc_challenge"])
    run = evaluate(llm, tasks, limit=100)                         # lm-eval's own results, and an Item per question
    compare(plain.items["mmlu_dev"], looped.items["mmlu_dev"])    # accuracies, difference, flips, what n it takes

lm-eval asks, scores and aggregates; this module hands it the model and keeps what it says of each question. Tasks come
from `tasks/loading.py`. Needs the extra `eval`.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ggufloop.errors import UsageError
from ggufloop.loop import loop_text
from ggufloop.measure.endpoints import (
    ChanceGuard,
    NoiseFloor,
    choice_log_probability,
    fit_temperature,
    guard,
    noise_floor,
)
from ggufloop.measure.slices import Answers, Sliced, sizes_of
from ggufloop.measure.stats import Estimate, PairedEstimate, n_for_power, paired_bootstrap, wilson
from ggufloop.measure.verdict import ACCURACY, CHOICE, LEVEL, WORTHS, Verdict, judge, judge_flips
from ggufloop.progress import Progress, silent
from ggufloop.tasks.loading import Tasks, require

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

SEED = 1234
_RIGHT = ("acc", "exact_match")


@dataclass(frozen=True)
class Item:
    """What was measured on one question. right: 1 or 0. gold: log-probability of the right answer in nats, None where
    the task does not score answers it offers; answers, target: of all that it offers, and which is right. norm: right
    by lm-eval's acc_norm, log-probability over length, None where the task has none."""

    task: str
    doc: int
    right: float
    gold: float | None
    answers: tuple[float, ...] = ()
    target: int | None = None
    norm: float | None = None


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


def evaluate(
    llm: LoopedLlama,
    tasks: Tasks,
    limit: int | None = None,
    chat: bool = False,
    progress: Progress = silent,
    docs: Mapping[str, Sequence[int]] | None = None,
    answers: Answers | None = None,
    template: Mapping[str, Any] | None = None,
) -> Run:
    """Run tasks under the loop in force, the first `limit` questions of each; chat: in the model's chat template,
    template: with these arguments.

    docs: the questions of each task to run instead, by their numbers; lm-eval's own standard errors are left
    out then. answers: those there are already, which are not computed again; it keeps the others.

    Raises GgufloopError if a question does not fit the context, UsageError if the model has no chat template.
    """
    require()
    from ggufloop.measure.lm_eval_model import LoopedLM

    loop = loop_text(llm.loop)
    sliced = Sliced(answers or Answers(), loop, sizes_of(tasks), docs)
    return ask(LoopedLM(llm, progress, sliced, template), tasks, limit, chat, docs)


def ask(
    model: Any, tasks: Tasks, limit: int | None = None, chat: bool = False,
    docs: Mapping[str, Sequence[int]] | None = None,
) -> Run:  # fmt: skip
    """What lm-eval makes of what one of its models answers; as `evaluate`."""
    require()
    import lm_eval

    with contextlib.redirect_stdout(io.StringIO()):  # it says there that it bootstraps
        results = lm_eval.simple_evaluate(
            model,
            tasks=tasks.loaded if docs is None else [tasks.leaves[task] for task in docs],
            task_manager=tasks.manager,  # or it reads all of its own again
            limit=limit,
            num_fewshot=tasks.num_fewshot,
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
    norm = float(sample["acc_norm"]) if "acc_norm" in sample["metrics"] else None
    return Item(task, int(sample["doc_id"]), float(right), gold, tuple(float(a[0]) for a in answers), target, norm)


def compare(
    plain: Sequence[Item], looped: Sequence[Item], worth: float = WORTHS[ACCURACY], level: float = LEVEL
) -> Comparison:
    """Compare two runs over the same questions. worth: the smallest difference of accuracy that would matter; level: of
    its test.

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
    verdict = judge_flips(gained, lost, n, worth, level=level)
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


def noise_between(looped: Sequence[Item], again: Sequence[Item]) -> NoiseFloor:
    """How far two runs of one loop differ in accuracy. Raises UsageError as `endpoints.noise_floor` does."""
    return noise_floor([i.right for i in looped], [i.right for i in again])


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
