"""A protocol: what is to be measured of a model, written down before, and run step by step.

    protocol = read_protocol(Path("docs/protocol.toml"))
    for step in protocol.steps_for("smollm2-135m"):
        step.tasks, protocol.specs(step, path)

The file names loops by their settings behind the window, and steps: tasks of lm-eval, texts, lengths of RULER's tasks,
or a ladder of quantisations on texts; under which loops, how many, of which models. `protocol_run.py` runs them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufloop import reading, recipes
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.loop import LoopSpec
from ggufloop.measure.longctx_run import SAMPLES, LongPlan
from ggufloop.measure.perplexity import LEAST_CONTEXT
from ggufloop.models import registry
from ggufloop.models.info import describe
from ggufloop.study import ladder_files

KEYS = ("loops", "roles", "step")
_LIKE = "docs/protocol.toml shows what a protocol holds."
PRIMARY, SECONDARY, CONTROL = ROLES = ("primary", "secondary", "control")


@dataclass(frozen=True)
class ProtocolStep:
    """Tasks of lm-eval, texts, or tasks of RULER's, under some loops by their names, or by settings of their own.

    sample   questions drawn of each task; of RULER's, samples of each at each of the lengths
    chunks   of ctx_size tokens, of each text; types: of the files to be made of the model, each measured on the texts
    models   as `ggufloop list` names them; empty for all
    window   if not the model's own
    """

    name: str
    loops: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    ruler: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    sample: int | None = None
    chunks: int | None = None
    ctx_size: int = 512
    models: tuple[str, ...] = ()
    window: str | None = None


@dataclass(frozen=True)
class Protocol:
    """loops: settings behind the window, by name; roles: of those that are not secondary."""

    loops: dict[str, str]
    roles: dict[str, str]
    steps: tuple[ProtocolStep, ...]

    def steps_for(self, name: str) -> list[ProtocolStep]:
        """Those for the model that `ggufloop list` calls so; all for one that no step names."""
        if not any(name in step.models for step in self.steps):
            return list(self.steps)
        return [step for step in self.steps if not step.models or name in step.models]

    @property
    def apart(self) -> set[str]:
        """Tasks that are asked with another window than the model's, so that no figure puts them with others."""
        return {task for step in self.steps if step.window is not None for task in step.tasks}

    def planned(self, models: Collection[str]) -> dict[str, set[str]]:
        """What the pooled figure of each model file is of: its tasks under the primary loops, as measures. Of these
        files, and of all that the protocol names if one of these is among them."""
        named = {name for step in self.steps for name in step.models}
        files = {entry.file: name for name in named if (entry := registry.find(name)) is not None}
        whole = {*models, *(files if not files.keys().isdisjoint(models) else ())}
        return {file: {self.measure(step, task) for step in self.steps_for(files.get(file, file))
                       if step.window is None and any(self.roles.get(loop) == PRIMARY for loop in step.loops)
                       for task in step.tasks} for file in sorted(whole)}  # fmt: skip

    def measure(self, step: ProtocolStep, task: str) -> str:
        """What a step's scores of a task are called: with its sample, if another step asks another sample of it."""
        samples = {other.sample for other in self.steps if task in other.tasks}
        return f"{task} ({step.sample})" if len(samples) > 1 and step.sample is not None else task

    def specs(self, step: ProtocolStep, path: Path) -> dict[str, LoopSpec]:
        """The loops of a step on a model file, by name. Raises UsageError for a model too small for the window."""
        window = step.window or "{}:{}".format(*window_of(path))
        return {name: LoopSpec.parse(f"{window} {self.loops.get(name, name)}") for name in step.loops}


def read_protocol(path: Path) -> Protocol:
    """Raises GgufloopError for a file that is none, naming what is wrong."""
    try:
        table = reading.toml(path.read_bytes())
        loops = reading.typed(table.pop("loops"), dict[str, str], "loops")
        roles = reading.typed(table.pop("roles", {}), dict[str, tuple[str, ...]], "roles")
        given = reading.typed(table.pop("step"), tuple[dict[str, Any], ...], "step")
        steps = tuple(_step(each, loops) for each in given)
        for name, settings in loops.items():
            try:
                LoopSpec.parse(f"1:2 {settings}")
            except UsageError as e:
                raise ValueError(f"loop {name}: {e.message}") from None
        of = {name: role for role, names in roles.items() for name in names}
        wrong = [*(name for name in of if name not in loops), *(role for role in roles if role not in ROLES)]
        if wrong:
            raise ValueError(f"roles: {wrong[0]!r} is no loop or role of this protocol")
        if table:
            raise ValueError(f"{next(iter(table))!r} is nothing a protocol has; {nearest(next(iter(table)), KEYS)}")
    except OSError as e:
        raise GgufloopError(f"cannot read {path}: {e.strerror}.", _LIKE) from None
    except KeyError as e:
        raise GgufloopError(f"{path} has no {e.args[0]!r}.", _LIKE) from None
    except ValueError as e:
        raise GgufloopError(f"{path}: {e}.", _LIKE) from None
    return Protocol(loops, of, steps)


def _step(table: dict[str, Any], loops: dict[str, str]) -> ProtocolStep:
    named_ = {key.replace("-", "_"): value for key, value in table.items()}
    step = reading.build(ProtocolStep, {"loops": list(loops), **named_})
    own = [name for name in step.loops if name not in loops]
    unknown = next((name for name in own if "=" not in name), None)
    if unknown is not None:
        raise ValueError(f"step {step.name}: no loop is called {unknown!r}")
    try:
        for text in [*(f"1:2 {name}" for name in own), *([f"{step.window} k=2"] if step.window is not None else [])]:
            LoopSpec.parse(text)
        for type_ in step.types:
            ladder_files.type_name(type_)
        if step.ruler and step.lengths:
            long_plan(step, step.ruler)
    except UsageError as e:
        raise ValueError(f"step {step.name}: {e.message}") from None
    if sum(map(bool, (step.tasks, step.texts, step.ruler))) != 1:
        raise ValueError(f"step {step.name}: it has tasks, texts or ruler, one of them")
    if bool(step.ruler) != bool(step.lengths) or (step.types and not step.texts):
        raise ValueError(f"step {step.name}: lengths go with ruler, and types with texts")
    if step.types and (step.chunks == 1 or step.ctx_size < LEAST_CONTEXT):
        raise ValueError(f"step {step.name}: a ladder is of 2 chunks at least, of {LEAST_CONTEXT} tokens")
    if any(count is not None and count < 1 for count in (step.sample, step.chunks, step.ctx_size, *step.lengths)):
        raise ValueError(f"step {step.name}: sample, chunks, ctx-size and lengths are counts")
    return step


def long_plan(step: ProtocolStep, tasks: tuple[str, ...]) -> LongPlan:
    """What is asked of some of the step's tasks of RULER's. Raises UsageError for one that is not known."""
    return LongPlan(step.lengths, tasks, step.sample or SAMPLES)


def window_of(path: Path) -> tuple[int, int]:
    """The published rule: the middle four layers, or those published for the model. Raises UsageError."""
    return recipes.recipe_window("paper", describe(path).n_layer, path.name)
