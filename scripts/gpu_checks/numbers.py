"""Whether the device computes what it should: against the plain model, a file with the window repeated, and the CPU.

Where two devices are compared, they round differently, plain model included. So the bound of a loop is `FACTOR` times
what the plain model's own logits differ by, on the same tokens: a loop evaluates at most three times the layers. What
compares a device with itself has no such excuse and must be equal, or, where it computes the same sum in another
order, within the same bound.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from support import archs, tiny, zoo

from ggufloop.loop import KV_POLICIES, MODES
from gpu_checks.device import evaluate, opened, prompt_and_more, row, spread

FACTOR = 4.0
KV_FAMILIES = ("llama", "qwen3moe", "gemma3", "deepseek2")  # dense, mixture, sliding window, MLA
KV_TYPES = {"F16": 1, "BF16": 30, "q8_0": 8, "q4_0": 2}  # ggml's numbers
# with all experts chosen a token cannot tip over a tie of the router, which no bound on rounding holds
FAMILIES = {name: replace(t, experts_used=t.experts or 2) for name, t in tiny.FAMILIES.items()}
FAMILIES["deepseek2"] = replace(tiny.FAMILIES["deepseek2"], experts_used=4)  # two of four groups of two


def window_kv(folder: Path, case: str) -> None:
    """Plain tokens after a looped prompt, in models whose layers behind the window hear no other position: their
    logits are the plain model's if, and only if, the window kept what the plain model keeps.
    """
    for family in KV_FAMILIES:
        known = archs.ROWS[family]
        path = zoo.write(folder / f"deaf-{family}.gguf", known, deaf_from=known.window[1])
        steps = prompt_and_more(44)
        loop = "{}:{} k=3 decode=bypass kv=".format(*known.window)
        with opened(path, "device", flash_attn=known.flash_attn) as llm:
            plain = evaluate(llm, None, steps)
            other = evaluate(llm, None, [steps[0][::-1], *steps[1:]])
            rows = evaluate(llm, loop + "first", steps)
            last = evaluate(llm, loop + "last", steps)
        kept, moved = spread(rows[44:], plain[44:]), spread(rows[:44], plain[:44])
        blind = min(spread(other[44:], plain[44:]), spread(last[44:], plain[44:]), moved) < 0.02
        row("window K/V", f"{family}{case}", kept, 0.0, note="cannot fail: nothing moves" if blind else "",
            **({"ok": False} if blind else {}))  # fmt: skip


def repeated(folder: Path, case: str) -> None:
    """Naive K=2 with a slot per pass is the model with its window there twice, however K and V are stored."""
    t = replace(tiny.FAMILIES["llama"], head=64)  # the smallest heads CUDA's flash attention has
    path = tiny.write(folder / "llama64.gguf", t)
    twice = tiny.repeat_window(path, folder / "llama64-twice.gguf", t.window, 2)
    steps = prompt_and_more(44)
    loop = "{}:{} k=2 solver=naive kv=each".format(*t.window)
    for flash in (False, True):
        for name, number in KV_TYPES.items():
            types = {"type_k": number, "type_v": number if flash or name in ("F16", "BF16") else 1}
            results = {}
            for place in ("cpu", "device"):
                with opened(twice, place, flash_attn=flash, **types) as llm:
                    results[place] = evaluate(llm, None, steps)
            with opened(path, "device", flash_attn=flash, **types) as llm:
                looped, plain = evaluate(llm, loop, steps), evaluate(llm, None, steps)
            noise = spread(results["cpu"], results["device"])
            told = f"{'flash attention' if flash else 'no flash attention'}, K {name}{case}"
            moved = spread(looped, plain)
            row("repeated", told, spread(looped, results["device"]), min(FACTOR * noise, moved / 4),
                note=f"repeated file, device to CPU: {noise:.1e}")  # fmt: skip


def _against_cpu(check: str, name: str, path: Path, loops: list[str]) -> None:
    """Rows of loops on the device against the CPU, the bound from the plain model."""
    steps = prompt_and_more(44)
    results = {}
    for place in ("cpu", "device"):
        with opened(path, place) as llm:
            results[place] = [evaluate(llm, loop, steps) for loop in [None, *loops]]
    here, there = results["cpu"], results["device"]
    noise = spread(here[0], there[0])
    moved = min(spread(looped, here[0]) for looped in here[1:])
    if noise > moved / FACTOR:
        row(check, name, noise, moved / FACTOR, ok=False, note="the plain model differs as much as a loop changes")
        return
    worst = max(range(len(loops)), key=lambda i: spread(here[1 + i], there[1 + i]))
    row(check, name, spread(here[1 + worst], there[1 + worst]), FACTOR * noise,
        note=f"{len(loops)} loops; worst {loops[worst]}; plain {noise:.1e}, a loop moves {moved:.1g}")  # fmt: skip


def recurrent(folder: Path, case: str) -> None:
    """States of a delta net and of Mamba-2: a prompt in two batches, then tokens that depend on the state it left."""
    for name, t in tiny.HYBRIDS.items():
        path = tiny.write(folder / f"{name}.gguf", t)
        window = "{}:{}".format(*t.window)
        loops = [f"{window} k=3 kv={kv} mode={mode}" for kv in ("first", "each") for mode in MODES]
        _against_cpu("recurrent", f"{name}{case}", path, loops)


def families(folder: Path, case: str) -> None:
    """Every tiny family, K/V policy and mode."""
    for name, t in FAMILIES.items():
        path = tiny.write(folder / f"all-{name}.gguf", t)
        window = "{}:{}".format(*t.window)
        loops = [f"{window} k=3 mode={mode} kv={kv}" for mode in MODES for kv in KV_POLICIES]
        _against_cpu("families", f"{name}{case}", path, loops)


def experts(folder: Path, case: str) -> None:
    """128 experts in host memory, 8 used: prompts of 32 tokens and more are computed on the device, which is sent the
    experts a node asks for. Later passes ask for others, and must not read what was never sent.
    """
    t = replace(tiny.FAMILIES["qwen3moe"], experts=128, experts_used=8)
    path = tiny.write(folder / "experts.gguf", t)
    window = "{}:{}".format(*t.window)
    loops = [None, f"{window} k=3 routing=free", f"{window} k=3 kv=each routing=free",
             f"{window} k=3 mode=layer routing=free", f"{window} k=3 routing=frozen"]  # fmt: skip
    for prompt in (40, 128, 200):
        steps = [prompt_and_more(prompt)[0]]
        results = {}
        for place in ("device", "host experts"):
            with opened(path, place) as llm:
                results[place] = [evaluate(llm, loop, steps) for loop in loops]
        apart = [spread(a, b) for a, b in zip(*results.values(), strict=True)]
        row("experts", f"128 on the host, {prompt} tokens{case}", max(apart[1:]), FACTOR * apart[0],
            note=f"to all on the device; plain {apart[0]:.1e}")  # fmt: skip
