"""The options of a loop, made of the table that LoopSpec is; and the loops that they say.

`--window auto` is resolved by the command, which knows the model; what a setting may be by itself is checked as it is
parsed, the rest in `loop_from_flags`, before any model is loaded. A command that runs a model reads

    @model_options
    @loop_options
    def command(model, model_path, hf, hf_file, offline, window, **loop):
        path = model_from_flags(model, model_path, hf, offline, hf_file)
        spec = loop_from_flags(window, loop_suggestion(path), **loop)

A command that runs several loops in turn takes lists where the table has `many`: `loop_list_options` and
`loops_from_flags`. A list stays the text that was typed, which a study's file repeats.

`--recipe` is a loop as it was published (recipes.py): it says whatever no flag beside it says, the window too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ggufloop.cli.options import number_ranges, split_list
from ggufloop.errors import UsageError
from ggufloop.loop import DEFAULT_K, LoopSpec, settled
from ggufloop.recipes import RECIPES, recipe_loop, recipe_settings
from ggufloop.setting import Setting, settings

C = TypeVar("C", bound=Callable[..., Any])

Suggest = Callable[..., "tuple[int, int] | LoopSpec"]
"""What `--window auto` means for a model: suggest(); with the name of a recipe, that recipe's loop on it."""

LOOP_FLAGS = (*(name for name in settings(LoopSpec) if name != "window"), "recipe")
"""The parameters of `loop_options` besides the window."""


class LoopOption(click.Option):
    """One setting. section: where a command's help has it."""

    section = "Loop"


class _Recipe(click.ParamType[str]):
    """The name of a recipe, or several."""

    name = "recipe"

    def __init__(self, many: bool) -> None:
        self.many = many

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        for name in split_list(value, "--recipe") if self.many else [value]:
            recipe_settings(name)
        return value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(name) for name in RECIPES if name.startswith(incomplete)]


class _Spelled(click.ParamType[Any]):
    """What the text of an option means, refused in the words of the table; of a list, the text."""

    name = "setting"

    def __init__(self, setting: Setting, many: bool) -> None:
        self.setting, self.many = setting, many

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str) or self.setting.name == "window":
            return value
        values = _values(self.setting, value, self.many)
        return value if self.many else values[0]

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        words = [f"{word}:" if each.argument else word for word, each in self.setting.words.items()]
        known = ["auto"] if self.setting.name == "window" else words
        return [CompletionItem(word) for word in known if word.startswith(incomplete)]


def _values(setting: Setting, text: str, many: bool = True) -> list[Any]:
    """What an option's text says, several values of a list. Raises UsageError."""
    if setting.name == "window":
        return split_list(text, setting.flag)
    if many and setting.kind is int:
        return [setting.check(number) for number in number_ranges(text, setting.flag)]
    words = split_list(text, setting.flag) if many else [text]
    return [setting.check(setting.read(word, f"{setting.flag} ")) for word in words]


def loop_options(command: C, loop: type[LoopSpec] = LoopSpec, lists: bool = False) -> C:
    """Add the loop flags to a command; their values go to `loop_from_flags`."""
    command = click.option(
        "--recipe", cls=LoopOption, type=_Recipe(lists), metavar="NAME,..." if lists else "NAME",
        help=f"A loop as it was published, window and all: {', '.join(RECIPES)}. Flags beside it count instead.",
    )(command)  # fmt: skip
    for setting in reversed(settings(loop).values()):
        many = lists and setting.many
        value = setting.metavar or (setting.name.upper() if setting.words else "N" if setting.kind is int else "X")
        more = " In a list 2:5 is 2,3,4." if many and setting.kind is int else ""
        if setting.name == "window" and not lists:
            more = " Without it nothing loops."
        command = click.option(
            setting.flag, setting.name, cls=LoopOption, type=_Spelled(setting, many),
            metavar=f"{value},..." if many else value, help=setting.line() + more,
        )(command)  # fmt: skip
    return command


def loop_list_options(command: C) -> C:
    """Add the loop flags with lists where there may be several; their values go to `loops_from_flags`."""
    return loop_options(command, lists=True)


def window_suggestion(path: Path) -> Callable[[], tuple[int, int]]:
    """What `--window auto` means where only a window counts."""

    def suggest() -> tuple[int, int]:
        found = loop_suggestion(path)()
        return found.window if isinstance(found, LoopSpec) else found

    return suggest


def loop_suggestion(path: Path) -> Suggest:
    """What `--window auto` means for this model file, for `loop_from_flags`: a saved loop, or a window.

    Says so where a saved loop is not of this file, or does not tell.
    """

    def suggest(recipe: str | None = None, window: Any = None) -> tuple[int, int] | LoopSpec:
        from ggufloop.cli import terminal
        from ggufloop.models import registry

        if recipe is not None:
            return _published(recipe, path, window)
        saved = registry.saved_loop(path)
        if saved is None:
            return _suggested(path)
        if not saved.applies:
            terminal.note(f"the loop {saved.loop} was confirmed on {saved.file} and is not used for {path.name}; "
                          f"to try it: {saved.loop.flags}")  # fmt: skip
            return _suggested(path)
        if not saved.file:
            terminal.note(f"the loop {saved.loop} of entry {saved.entry} does not say which file it was confirmed on; "
                          "`ggufloop sweep --save` would.")  # fmt: skip
        return saved.loop

    return cache(suggest)


def _suggested(path: Path) -> tuple[int, int]:
    """The window suggested for a model file nobody confirmed a loop on; what it rests on is said."""
    from ggufloop.cli import terminal
    from ggufloop.models import registry

    window = registry.suggest_window(path)[0]
    terminal.note("--window {}:{} rests on {}".format(*window, registry.rests_on(path)))
    return window


def _published(recipe: str, path: Path, window: Any) -> LoopSpec:
    """A recipe's loop on a model file, which is said. Raises UsageError if there is none."""
    from ggufloop.cli import terminal
    from ggufloop.models.hubfiles import split_name
    from ggufloop.models.info import describe
    from ggufloop.opening import check_loops

    info = describe(path)
    loop = recipe_loop(recipe, info.n_layer, split_name(path.name)[0], bool(info.experts), window)
    if window is None:
        try:
            check_loops(path, [loop])
        except UsageError as e:
            raise UsageError(f"recipe {recipe} cannot run on this model: {e.message}", e.hint) from None
    terminal.note(f"recipe {recipe} ({RECIPES[recipe].source}): {loop.flags}")
    return loop


def loop_from_flags(window: str | None, suggest: Suggest, recipe: str | None = None, **flags: Any) -> LoopSpec | None:
    """The LoopSpec the loop flags say, None without --window and --recipe.

    window: the flag's text; 'auto' calls `suggest()` for the model's window, or for its loop, which is taken whole if
    no other flag is given. recipe: what is not given is as `suggest(recipe)` has it. flags: the other loop flags by
    name, None where not given: a flag that is given at its default counts as given. Raises UsageError.
    """
    given = {name: flags[name] for name in LOOP_FLAGS if flags.get(name) is not None}
    if recipe is not None:
        return _with_recipe(recipe, window, suggest, given)
    if window is None:
        if given:
            name = next(iter(given))
            flag = settings(LoopSpec)[name].flag
            raise click.UsageError(f"{flag} needs --window A:B (or --window auto): without a window nothing loops.")
        return None
    found: Any = window
    if window == "auto":
        found = suggest()
        if isinstance(found, LoopSpec):
            if not given:
                return found
            found = found.window
    return LoopSpec(found, **{"k": DEFAULT_K, **given})


def _with_recipe(recipe: str, window: str | None, suggest: Suggest, given: dict[str, Any]) -> LoopSpec:
    """A recipe's loop on this model, but for what was given beside it. Raises UsageError."""
    found: Any = window
    if window == "auto":
        found = suggest()
        found = found.window if isinstance(found, LoopSpec) else found
    published = suggest(recipe, found)
    assert isinstance(published, LoopSpec)
    table = settings(LoopSpec)
    values = {name: getattr(published, name) for name in table}
    said = {name: value for name, value in values.items() if value != table[name].usual(published)}
    try:
        return LoopSpec(**said | given)
    except UsageError as e:
        if not given:
            raise
        its = published.flags.partition(" --K ")[2]
        raise UsageError(e.message, f"recipe {recipe} is --K {its}; give what does not fit as well.") from None


def loops_from_flags(
    window: str | None, suggest: Suggest, refused: list[UsageError] | None = None, **flags: Any
) -> list[LoopSpec]:
    """Every loop that the flags of `loop_list_options` say: all windows, each with all K, and so on.

    refused: gets the reasons of combinations that are no loop, such as repeat with kv first, instead of raising them.
    Empty without --window and --recipe. Raises UsageError as `loop_from_flags`.
    """
    texts = flags | {"window": window}
    lists = {
        name: [None] if texts[name] is None else _values(setting, texts[name])
        for name, setting in settled().items()
        if setting.many
    }
    recipes = texts.get("recipe")
    lists["recipe"] = [None] if recipes is None else split_list(recipes, "--recipe")
    if window is None and recipes is None:
        loop_from_flags(None, suggest, **flags)  # raises for a flag that needs a window
        return []
    loops: list[LoopSpec] = []
    for values in itertools.product(*lists.values()):
        try:
            loop = loop_from_flags(suggest=suggest, **flags | dict(zip(lists, values, strict=True)))
        except UsageError as e:
            if refused is None:
                raise
            refused.append(e)
        else:
            assert loop is not None
            loops.append(loop)
    return list(dict.fromkeys(loops)) if recipes is not None else loops
