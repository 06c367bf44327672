"""The options that name a model, in every command that has one; those that name tasks; and how lists are written.

    @model_options
    @tasks_options("Tasks of lm-eval.")
    def command(model, model_path, hf, hf_file, offline, tasks, include_path):
        path = model_from_flags(model, model_path, hf, offline, hf_file)
        names = tasks_from_flags(tasks, include_path)

Spelled as llama.cpp spells them where it has them. A loop's options: loop_options.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ggufloop.cli.types import JsonObject, OneOf
from ggufloop.errors import UsageError

C = TypeVar("C", bound=Callable[..., Any])

_NAME_ONE = "name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant]."
MODEL_FLAGS = ("model", "model_path", "hf", "offline", "hf_file")
"""The parameters of `model_options`, in the order of `model_from_flags`."""


def complete_model(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion of a model: the names of `ggufloop list`, and files."""
    from ggufloop.models import elsewhere, registry

    names = [*(model.name for model in registry.models()), *(each.name for each in elsewhere.found())]
    known = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return [*known, CompletionItem(incomplete, type="file")]


_MODEL = [
    click.argument("model", required=False, metavar="MODEL", shell_complete=complete_model),
    click.option("-m", "--model", "model_path", metavar="FILE", shell_complete=complete_model,
                 help="A GGUF file, or any other spelling of MODEL."),
    click.option("-hf", "--hf-repo", "hf", metavar="USER/REPO[:QUANT]", help="A Hugging Face repository."),
    click.option("-hff", "--hf-file", "hf_file", metavar="FILE", help="Which file of the repository."),
    click.option("--offline", is_flag=True, help="Use only what is downloaded already."),
]  # fmt: skip


def adder(options: Iterable[Callable[[Any], Any]]) -> Callable[[C], C]:
    """A decorator that adds these options to a command, in this order."""

    def add(command: C) -> C:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return add


model_options: Callable[[Any], Any] = adder(_MODEL)
"""MODEL (a path, a name of `ggufloop list` or user/repo[:quant]), -m, -hf, -hff and --offline."""


def _tasks(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion of tasks: names that need no hub, and files."""
    from ggufloop.tasks.loading import BENCHMARKS, TASKS

    before, comma, last = incomplete.rpartition(",")
    names = [CompletionItem(before + comma + name) for name in (*TASKS, *BENCHMARKS) if name.startswith(last)]
    return names if comma else [*names, CompletionItem(incomplete, type="file")]


def tasks_options(help: str, *names: str) -> Callable[[C], C]:
    """--tasks, with this help, and --include-path. names: others of it."""
    return adder([
        click.option("--tasks", *names, "tasks", metavar="NAME,...", shell_complete=_tasks,
                     help=f"{help} A file is a task too: .csv, .jsonl, .json, or .yaml of lm-eval."),
        click.option("--include-path", metavar="DIR", help="A folder of more of lm-eval's tasks, for --tasks."),
    ])  # fmt: skip


_TEMPLATE = [
    click.option("--think", "-rea", "--reasoning", "think", type=OneOf(("on", "off")), metavar="on|off",
                 help="Let a model think before it answers, or not, where its chat template has a switch."),
    click.option("--chat-template-kwargs", "kwargs", type=JsonObject(), metavar="JSON",
                 help="More of what the chat template reads, such as '{\"reasoning_effort\": \"low\"}'."),
]  # fmt: skip
template_options: Callable[[Any], Any] = adder(_TEMPLATE)
"""What a model's chat template is rendered with."""


def check_template(flags: dict[str, Any], hint: str = "give --apply-chat-template.") -> None:
    """Raise UsageError if a flag of `template_options` is given, for a command that is not to use a template."""
    if flags["think"] is not None or flags["kwargs"] is not None:
        raise UsageError("--think and --chat-template-kwargs are of a chat template, and none is used here.", hint)


def template_from_flags(flags: dict[str, Any], path: Path) -> dict[str, Any]:
    """What `template_options` make of the template of a model file; takes their flags out of `flags`.

    Raises UsageError for what the template does not read.
    """
    think, kwargs = flags.pop("think", None), flags.pop("kwargs", None)
    if think is None and not kwargs:
        return {}
    from ggufloop.models.info import describe
    from ggufloop.models.template import arguments_for

    return arguments_for(describe(path).chat_template, None if think is None else think == "on", kwargs)


def tasks_from_flags(tasks: str | None, include_path: str | None) -> tuple[str, ...]:
    """The tasks that are named, none if --tasks is not given: known names, files that can be understood.

    Raises UsageError and GgufloopError, before a model is looked for.
    """
    if tasks is None:
        if include_path is not None:
            raise UsageError("--include-path is where --tasks are, and none is named.", "give --tasks NAME.")
        return ()
    from ggufloop.tasks.loading import check_tasks

    names = tuple(split_list(tasks, "--tasks"))
    check_tasks(names, include_path)
    return names


def check_model(flags: dict[str, Any]) -> None:
    """Raise UsageError if the flags of `model_options` name no model, before anything is read."""
    if flags["model"] is None and flags["model_path"] is None and flags["hf"] is None:
        typed = f"{click.get_current_context().command_path} smollm2-135m"
        raise UsageError("no model is given.", f"type `{typed}`, or {_NAME_ONE.removeprefix('name one: ')}")


def resolve_flags(
    model: str | None, model_path: str | None, hf: str | None, offline: bool, hf_file: str | None = None
) -> Path:
    """The model file the flags of `model_options` name, downloaded if need be; its content is not looked at.

    Raises UsageError unless exactly one of them names a model, GgufloopError if it cannot be had.
    """
    from ggufloop.cli.progress import shown
    from ggufloop.models import registry  # what a download needs is not imported for --help

    given = [text for text in (model, model_path, hf) if text is not None]
    if not given:
        raise UsageError("no model is given.", _NAME_ONE)
    if len(given) > 1:
        raise UsageError(
            f"the model is given {len(given)} times: {', '.join(given)}.", "give MODEL, -m or -hf, not several."
        )
    with shown() as progress:
        return registry.resolve(given[0] if hf is None else None, hf, offline, progress, hf_file)


def model_from_flags(
    model: str | None, model_path: str | None, hf: str | None, offline: bool, hf_file: str | None = None
) -> Path:
    """As `resolve_flags`, and the file is known to be a whole GGUF model. Raises UsageError, GgufloopError."""
    from ggufloop.models.gguf import read_model

    path = resolve_flags(model, model_path, hf, offline, hf_file)
    read_model(path)
    return path


def split_list(text: str, flag: str) -> list[str]:
    """The entries of a comma list. Raises UsageError for an empty one."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{flag} {text!r} has an empty entry.", f"write it like {flag} 1,2,3.")
    return words


def whole_numbers(text: str, flag: str) -> list[int]:
    """The numbers of a comma list. Raises UsageError."""
    words = split_list(text, flag)
    bad = next((word for word in words if not word.isdecimal() or len(word) > 9), None)
    if bad is not None:
        raise UsageError(f"{flag} {bad!r} is not a whole number of 0 or more.", f"write it like {flag} 512,1024.")
    return [int(word) for word in words]


def number_ranges(text: str, flag: str) -> list[int]:
    """The numbers of a comma list whose entries may be ranges, half-open like windows: '1,4:10:2' is 1, 4, 6, 8.

    Raises UsageError.
    """
    found: list[int] = []
    for word in split_list(text, flag):
        parts = word.split(":")
        if len(parts) > 3 or not all(part.isdecimal() and len(part) < 6 for part in parts) or parts[2:] == ["0"]:
            raise UsageError(f"{flag} {word!r} is no number or range.", f"write it like {flag} 2,3 or {flag} 1:20:2.")
        numbers = [int(part) for part in parts]
        found += numbers if len(numbers) == 1 else range(*numbers)
    if not found:
        raise UsageError(f"{flag} {text!r} holds no number.", "ranges are half-open: 2:5 is 2, 3, 4.")
    return found
