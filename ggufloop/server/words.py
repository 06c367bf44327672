"""llama-server's command line, and what may not be in it: `server_words(path, settings, sampling, loop, ...)`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufloop.backend.settings import ContextSettings
from ggufloop.errors import UsageError
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import LoopSpec
from ggufloop.models.registry import suggest_window
from ggufloop.models.template import SWITCHES
from ggufloop.opening import check_loops

MENU = ("k=3", "k=6 passes=3")
"""What the list of models offers of the suggested window: what every model that loops can run."""
_SAMPLING = {
    "n": "-n", "seed": "-s", "temp": "--temp", "top_k": "--top-k", "top_p": "--top-p", "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty",
}  # fmt: skip
_CONTEXT = {
    "n_batch": "-b", "n_ubatch": "-ub", "n_gpu_layers": "-ngl", "rpc_servers": "--rpc", "split_mode": "-sm",
    "tensor_split": "-ts", "main_gpu": "-mg", "device": "-dev", "flash_attn": "-fa", "type_k": "-ctk", "type_v": "-ctv",
}  # fmt: skip
_OURS = {"-m": "MODEL", "--model": "MODEL", "--host": "--host", "--port": "--port", "--loop": "--window"}
"""What ggufloop has to know of llama-server's flags, and how it is told."""
_HANDED = {"mmproj": "--mmproj", "model_draft": "-md", "reasoning_budget": "--reasoning-budget"}


def model_name(path: Path) -> str:
    """What the API calls a model: its name of `ggufloop list`, else its file's."""
    from ggufloop.models import registry

    entry = registry.entry_for(path)
    return entry.name if entry is not None else path.stem.replace("@", "-")


def menu(path: Path, loop: LoopSpec | None) -> list[LoopSpec]:
    """Loops the list of models offers: the one served, and two of the suggested window."""
    found = [] if loop is None else [loop]
    if loop is None or loop.kv != "each":  # the slots of kv each serve no other loop
        try:
            window = "{}:{}".format(*suggest_window(path)[0])
            found += [LoopSpec.parse(f"{window} {settings}") for settings in MENU]
            check_loops(path, found)
        except UsageError:  # a model too small, or one that does not loop there
            found = found[:1] if loop is not None else []
    return list(dict.fromkeys(found))


def server_words(
    path: Path,
    settings: ContextSettings,
    sampling: Sampling,
    loop: LoopSpec | None,
    parallel: int,
    more: dict[str, Any],
    template: Mapping[str, Any] | None = None,
) -> list[str]:
    """The arguments of llama-server. parallel: answers at a time; more: flags that are handed on, by name; template:
    what the chat template is rendered with."""
    threads = str(settings.threads)
    words = ["-m", str(path), "-a", model_name(path), "-t", threads, "-tb", threads]
    # every answer has a context, and K/V, of its own: what it computes does not depend on the others
    words += ["-np", str(parallel), "-c", str(parallel * settings.context(path)), "--no-kv-unified"]
    for names, values in ((_CONTEXT, vars(settings)), (_SAMPLING, vars(sampling)), (_HANDED, more)):
        words += [w for name, flag in names.items() if values[name] is not None for w in (flag, str(values[name]))]
    words += ["--no-repack"] * (not settings.repack)
    words += ["--embeddings"] * more["embeddings"] + ["--jinja"] * more["jinja"]
    others = dict(template or {})
    think = others.pop(SWITCHES[0], None)  # which the server wants told by a flag of its own
    if isinstance(think, bool):
        words += ["--reasoning", "on" if think else "off"]
    if others:
        words += ["--chat-template-kwargs", json.dumps(others)]
    if loop is not None:
        words += ["--loop", str(loop)]
    return words + [word for each in menu(path, loop) for word in ("--loop-menu", str(each))]


def check_more(words: tuple[str, ...]) -> None:
    """Raise UsageError for a flag of llama-server that ggufloop has to be told itself."""
    for word in words:
        flag = word.split("=")[0]
        if flag in _OURS:
            raise UsageError(f"{flag} after -- would go past ggufloop.", f"give {_OURS[flag]} before it.")


def check_webui(folder: Path | None) -> None:
    """Raise UsageError unless a page is there."""
    if folder is not None and not (folder / "index.html").is_file():
        raise UsageError(
            f"{folder} holds no index.html, so it is not llama.cpp's page as it is when built.",
            "build tools/ui of a llama.cpp (npm install, npm run build), and name the folder that makes.",
        )
