"""Options that mean the same in every command: the model and its context, and the loop.

Spelled as llama.cpp spells them where it has them. `--window auto` is resolved by the command, which knows the
model; everything else about a loop is checked here, before any model is loaded. A command that runs a model reads

    @model_options
    @loop_options
    def command(model, model_path, hf, hf_file, offline, window, **loop):
        path = model_from_flags(model, model_path, hf, offline, hf_file)
        spec = loop_from_flags(window, loop_suggestion(path), **loop)

A command that runs several loops in turn takes lists of windows, K, modes, solvers, beta and kv instead:
`loop_list_options` and `loops_from_flags`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from ggufloop.errors import UsageError
from ggufloop.loop import KV_POLICIES, MODES, ROUTINGS, SOLVERS, LoopSpec

C = TypeVar("C", bound=Callable[..., Any])

Suggest = Callable[[], "tuple[int, int] | LoopSpec"]

DEFAULT_K = 3
LOOP_FLAGS = (
    "k", "mode", "solver", "damping", "beta", "mu", "passes", "kv", "decode", "routing", "attention", "sinks", "halt"
)  # fmt: skip
"""The parameters of `loop_options` besides the window."""
_FLAGS = {"k": "--K", "attention": "--loop-attention", "sinks": "--loop-sinks"}
MODEL_FLAGS = ("model", "model_path", "hf", "offline", "hf_file")
"""The parameters of `model_options`, in the order of `model_from_flags`."""


def _words(known: Iterable[str]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Shell completion from a few words."""
    return lambda ctx, param, incomplete: [word for word in known if word.startswith(incomplete)]


def _models(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Shell completion of a model: the names of `ggufloop list`, and files."""
    from ggufloop.models import registry

    names = [CompletionItem(m.name) for m in registry.models() if m.name.startswith(incomplete)]
    return [*names, CompletionItem(incomplete, type="file")]


_MODEL = [
    click.argument("model", required=False, metavar="MODEL", shell_complete=_models),
    click.option(
        "-m",
        "--model",
        "model_path",
        metavar="FILE",
        shell_complete=_models,
        help="A GGUF file, or any other spelling of MODEL.",
    ),
    click.option("-hf", "--hf-repo", "hf", metavar="USER/REPO[:QUANT]", help="A Hugging Face repository."),
    click.option("-hff", "--hf-file", "hf_file", metavar="FILE", help="Which file of the repository."),
    click.option("--offline", is_flag=True, help="Use only what is downloaded already."),
]

_LOOP = {
    "--window": click.option(
        "--window",
        metavar="A:B",
        shell_complete=_words(["auto"]),
        help="Loop layers A to B-1 (half-open), or 'auto'. Without it nothing loops.",
    ),
    "--K": click.option("--K", "k", type=int, default=None, help="Outer steps of the solver (default 3).", metavar="K"),
    "--mode": click.option(
        "--mode", default=None, shell_complete=_words(MODES), help=f"One of {', '.join(MODES)} (default block)."
    ),
    "--solver": click.option(
        "--solver",
        default=None,
        shell_complete=_words(SOLVERS),
        help=f"One of {', '.join(SOLVERS)} (default euler).",
    ),
    "--damping": click.option(
        "--damping", type=float, default=None, help="Weight of one evaluation in one step (default 1/K)."
    ),
    "--beta": click.option(
        "--beta", type=float, default=None, help="Anchor: weight of the plain result, 0 to 1 (default 0)."
    ),
    "--mu": click.option("--mu", type=float, default=None, help="Momentum of heavy-ball (default 0.5)."),
    "--passes": click.option("--passes", type=int, default=None, help="Run the K euler steps in 2 or 3 evaluations."),
    "--kv": click.option(
        "--kv",
        default=None,
        shell_complete=_words(KV_POLICIES),
        help=f"What the cache holds: {', '.join(KV_POLICIES)} (default first).",
    ),
    "--decode": click.option(
        "--decode",
        default=None,
        shell_complete=_words(("full", "bypass", "first:", "entropy:")),
        help="Which generated tokens loop: full (default), bypass, first:n, entropy:t (those the plain model is unsure "
        "of).",
    ),
    "--routing": click.option(
        "--routing",
        default=None,
        shell_complete=_words(ROUTINGS),
        help="Experts of later passes: free, or frozen to the first pass's (default in mode layer).",
    ),
    "--loop-attention": click.option(
        "--loop-attention",
        "attention",
        type=int,
        default=None,
        metavar="W",
        help="Passes after the first attend to the last W positions only.",
    ),
    "--loop-sinks": click.option(
        "--loop-sinks",
        "sinks",
        type=int,
        default=None,
        metavar="S",
        help="With --loop-attention: and to the first S positions (default 0).",
    ),
    "--halt": click.option(
        "--halt",
        type=float,
        default=None,
        metavar="TAU",
        help="Run no further pass for a batch once one moves its tokens by less than this share.",
    ),
}

_LISTS = {
    "--window": click.option("--window", metavar="A:B,...", shell_complete=_words(["auto"]),
                             help="Loop layers A to B-1 (half-open), or 'auto'."),
    "--K": click.option("--K", "k", metavar="K,...",
                        help="Outer steps of the solver (default 3); 1 is the plain model; 2:5 is 2,3,4."),
    "--mode": click.option("--mode", metavar="MODE,...", shell_complete=_words(MODES),
                           help=f"{', '.join(MODES)} (default block)."),
    "--solver": click.option("--solver", metavar="SOLVER,...", shell_complete=_words(SOLVERS),
                             help=f"{', '.join(SOLVERS)} (default euler)."),
    "--beta": click.option("--beta", metavar="X,...", help="Anchor: weight of the plain result, 0 to 1 (default 0)."),
    "--kv": click.option("--kv", metavar="POLICY,...", shell_complete=_words(KV_POLICIES),
                         help=f"What the cache holds: {', '.join(KV_POLICIES)} (default first)."),
}  # fmt: skip
"""The flags of which there may be several, as lists."""


def adder(options: Iterable[Callable[[Any], Any]]) -> Callable[[C], C]:
    """A decorator that adds these options to a command, in this order."""

    def add(command: C) -> C:
        for option in reversed(list(options)):
            command = option(command)
        return command

    return add


model_options: Callable[[Any], Any] = adder(_MODEL)
"""MODEL (a path, a name of `ggufloop list` or user/repo[:quant]), -m, -hf, -hff and --offline."""


def resolve_flags(
    model: str | None, model_path: str | None, hf: str | None, offline: bool, hf_file: str | None = None
) -> Path:
    """The model file the flags of `model_options` name, downloaded if need be; its content is not looked at.

    Raises UsageError unless exactly one of them names a model, GgufloopError if it cannot be had.
    """
    from ggufloop.cli.progress import download_progress
    from ggufloop.models import registry  # what a download needs is not imported for --help

    given = [text for text in (model, model_path, hf) if text is not None]
    if not given:
        raise UsageError(
            "no model is given.", "name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant]."
        )
    if len(given) > 1:
        raise UsageError(
            f"the model is given {len(given)} times: {', '.join(given)}.", "give MODEL, -m or -hf, not several."
        )
    with download_progress() as progress:
        return registry.resolve(given[0] if hf is None else None, hf, offline, progress, hf_file)


def model_from_flags(
    model: str | None, model_path: str | None, hf: str | None, offline: bool, hf_file: str | None = None
) -> Path:
    """As `resolve_flags`, and the file is known to be a whole GGUF model. Raises UsageError, GgufloopError."""
    from ggufloop.models.gguf import read_model

    path = resolve_flags(model, model_path, hf, offline, hf_file)
    read_model(path)
    return path


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

    def suggest() -> tuple[int, int] | LoopSpec:
        from ggufloop.cli import terminal
        from ggufloop.models import registry

        saved = registry.saved_loop(path)
        if saved is None:
            return registry.suggest_window(path)[0]
        if not saved.applies:
            terminal.note(f"the loop {saved.loop} was confirmed on {saved.file} and is not used for {path.name}; "
                          f"to try it: {as_flags(saved.loop)}")  # fmt: skip
            return registry.suggest_window(path)[0]
        if not saved.file:
            terminal.note(f"the loop {saved.loop} of entry {saved.entry} does not say which file it was confirmed on; "
                          "`ggufloop sweep --save` would.")  # fmt: skip
        return saved.loop

    return cache(suggest)


def as_flags(loop: LoopSpec) -> str:
    """A loop as flags: '--window 12:16 --K 3 --solver heun'."""
    window, *words = str(loop).split()
    pairs = [("window", window), *(word.split("=", 1) for word in words)]
    return " ".join(f"{_FLAGS.get(name, f'--{name}')} {value}" for name, value in pairs)


def loop_options(command: C) -> C:
    """Add the loop flags to a command; their values go to `loop_from_flags`."""
    for option in reversed(_LOOP.values()):
        command = option(command)
    return command


def loop_list_options(command: C) -> C:
    """Add the loop flags with lists for the flags of `_LISTS`; their values go to `loops_from_flags`."""
    for option in reversed((_LOOP | _LISTS).values()):
        command = option(command)
    return command


def loop_from_flags(window: str | None, suggest: Suggest, **flags: Any) -> LoopSpec | None:
    """The LoopSpec the loop flags say, None without --window.

    window: the flag's text; 'auto' calls `suggest()` for the model's window, or for its loop, which is taken whole if
    no other flag is given. flags: the other loop flags by name, None where not given: a flag that is given at its
    default counts as given. Raises UsageError.
    """
    given = {name: flags[name] for name in LOOP_FLAGS if flags.get(name) is not None}
    if window is None:
        if given:
            name = next(iter(given))
            flag = _FLAGS.get(name, f"--{name}")
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


def _decimals(text: str, flag: str) -> list[float]:
    try:
        return [float(word) for word in split_list(text, flag)]
    except ValueError:
        raise UsageError(f"{flag} {text!r} is no list of numbers.", f"write it like {flag} 0,0.5.") from None


def loops_from_flags(
    window: str | None, suggest: Suggest, refused: list[UsageError] | None = None, **flags: Any
) -> list[LoopSpec]:
    """Every loop that the flags of `loop_list_options` say: all windows, each with all K, and so on.

    refused: gets the reasons of combinations that are no loop, such as repeat with kv first, instead of raising them.
    Empty without --window. Raises UsageError as `loop_from_flags`.
    """
    lists: dict[str, list[Any]] = {
        "window": [] if window is None else split_list(window, "--window"),
        "mode": [None] if flags["mode"] is None else split_list(flags["mode"], "--mode"),
        "solver": [None] if flags["solver"] is None else split_list(flags["solver"], "--solver"),
        "k": [None] if flags["k"] is None else number_ranges(flags["k"], "--K"),
        "beta": [None] if flags["beta"] is None else _decimals(flags["beta"], "--beta"),
        "kv": [None] if flags["kv"] is None else split_list(flags["kv"], "--kv"),
    }
    if window is None:
        first = {name: values[0] for name, values in lists.items() if values}
        loop_from_flags(None, suggest, **flags | first)  # raises for a flag that needs a window
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
    return loops
