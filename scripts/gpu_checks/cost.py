"""What a loop costs on the device: splits of the graph, compute buffers, tokens per second over the layer count."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from support import tiny

from ggufloop.loop import LoopSpec
from ggufloop.measure.bench import Variant, Workload, compare, ratio, sample
from gpu_checks.device import evaluate, logged, opened, prompt_and_more, row

SHAPES = {  # layers, width, heads, K/V heads, feed-forward, vocabulary
    "tiny": (8, 256, 4, 2, 512, 1024),
    "8b": (32, 4096, 32, 8, 14336, 128256),
}
WINDOWS = {"tiny": (3, 5), "8b": (14, 18)}
ROUNDS = {"tiny": 2, "8b": 5}
LOOPS = ["k=3 kv=first", "k=3 kv=frozen", "k=3 kv=each", "k=3 kv=first mode=layer", "k=3 kv=frozen mode=layer",
         "k=3 kv=each mode=layer"]  # fmt: skip


def random_model(path: Path, size: str) -> Path:
    """A llama of random Q4_0 blocks, all layers alike: the bytes and shapes of a real one, at the speed of the disk."""
    if path.exists():
        return path
    n_layer, width, heads, kv_heads, n_ff, n_vocab = SHAPES[size]
    head = width // heads
    rng = np.random.default_rng(1)
    writer = GGUFWriter(path, "llama")
    for key, value in {
        "vocab_size": n_vocab, "block_count": n_layer, "context_length": 8192, "embedding_length": width,
        "feed_forward_length": n_ff, "attention.head_count": heads, "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": head, "rope.freq_base": 5e5,
    }.items():  # fmt: skip
        tiny.add(writer, f"llama.{key}", value)
    words, types = tiny.vocabulary()
    more = n_vocab - len(words)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*words, *(f"<|{i}|>" for i in range(more))])
    writer.add_token_types([*types, *[tiny.TokenType.CONTROL] * more])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(words.index("<|endoftext|>"))
    writer.add_add_bos_token(False)

    def blocks(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        out = rng.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        scale = np.float16(gain / (4.6 * np.sqrt(columns)))  # 4.6: the deviation of a random nibble
        out[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        return out.reshape(rows, -1)

    matrices = {
        "attn_q": blocks(width, width), "attn_output": blocks(width, width),
        "attn_k": blocks(kv_heads * head, width), "attn_v": blocks(kv_heads * head, width),
        "ffn_gate": blocks(n_ff, width), "ffn_up": blocks(n_ff, width), "ffn_down": blocks(width, n_ff),
    }  # fmt: skip
    table, ones = blocks(n_vocab, width, np.sqrt(width)), np.ones(width, np.float32)
    writer.add_tensor("token_embd.weight", table, raw_dtype=GGMLQuantizationType.Q4_0)
    for il in range(n_layer):
        for name, data in matrices.items():
            writer.add_tensor(f"blk.{il}.{name}.weight", data, raw_dtype=GGMLQuantizationType.Q4_0)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{il}.{name}.weight", ones)
    writer.add_tensor("output_norm.weight", ones)
    writer.add_tensor("output.weight", table, raw_dtype=GGMLQuantizationType.Q4_0)
    return tiny.finish(writer, path)


def _splits(lines: list[str]) -> int:
    """Splits of the last graph that was laid out; the log numbers them from 0."""
    numbers = [int(n) for line in lines for n in re.findall(r"## SPLIT #(\d+)", line)]
    return numbers[-1] + 1 if numbers else 0


def splits(folder: Path, case: str) -> None:
    """A window on one device adds no split to the graph; one that straddles adds some for each further pass."""
    os.environ["GGML_SCHED_DEBUG"] = "1"  # before the context is made
    t = tiny.FAMILIES["llama"]
    path = tiny.write(folder / "splits.gguf", t)
    a, b = t.window
    for place, layers in (("all layers on the device", -1), ("window straddles", t.n_layer - a)):
        counted = {}
        for loop in [None, *(f"{a}:{b} k=3 kv={kv}" for kv in ("first", "frozen", "each"))]:
            with opened(path, "device", n_gpu_layers=layers) as llm, logged() as lines:
                llm.set_loop(loop)
                evaluate(llm, loop, [prompt_and_more(8)[0]])
                del lines[:-400]
                counted[loop] = _splits(lines)
        plain = counted.pop(None)
        for loop, n in counted.items():
            bound = plain if layers < 0 else None
            row("splits", f"{place}, {loop}{case}", n, bound, note=f"plain {plain}")


def memory(folder: Path, case: str, size: str) -> None:
    """Compute buffers as llama.cpp logs them when it reserves."""
    path = random_model(folder / f"random-{size}.gguf", size)
    window = "{}:{}".format(*WINDOWS[size])
    buffers: dict[str | None, dict[str, float]] = {}
    with logged() as lines:
        for loop in [None, *(f"{window} {words}" for words in LOOPS)]:
            lines.clear()
            with opened(path, "device", n_ctx=2048, flash_attn=True, loop=loop):
                told = re.findall(r"(\S+) compute buffer size = +([\d.]+) MiB", "".join(lines))
            buffers[loop] = {name: float(mib) for name, mib in told}  # a later reservation takes an earlier one's place
    plain = sum(buffers[None].values())
    for loop, found in buffers.items():
        parts = ", ".join(f"{name} {mib:.1f}" for name, mib in found.items())
        row(
            "compute buffers",
            f"{loop or 'plain'}{case}",
            sum(found.values()),
            unit="MiB",
            note=f"{parts}; plain {plain:.1f}",
        )


def _measure(llm: Any, loops: list[str | None], work: Workload, rounds: int) -> list[Any]:
    variants = [Variant(LoopSpec.parse(loop) if loop else None) for loop in loops]
    return compare(variants, work, rounds, lambda variant, w, i: sample(llm, w, variant.loop, i))


def layers(folder: Path, case: str, size: str) -> None:
    """Time of prefill and decode as a multiple of the plain model's, beside the multiple of layers evaluated."""
    path = random_model(folder / f"random-{size}.gguf", size)
    window = "{}:{}".format(*WINDOWS[size])
    loops = [None, *(f"{window} {words}" for words in LOOPS)]
    with opened(path, "device", n_ctx=2048, n_batch=2048, flash_attn=True) as llm:
        for name, work in (("prefill 512", Workload(512, 0)), ("decode 32 after 512", Workload(0, 32, 512))):
            results = _measure(llm, loops, work, ROUNDS[size])
            row("speed", f"{name}, plain{case}", results[0].mean_ts, unit="t/s")
            for loop, result in zip(loops[1:], results[1:], strict=True):
                assert loop is not None
                spec = LoopSpec.parse(loop)
                count = 1 + spec.extra_layer_evaluations() / llm.n_layer()
                over = ratio(result, results[0])
                row("speed", f"{name}, {loop}{case}", over.mean, unit="x plain",
                    note=f"layers {count:.2f}, {result.mean_ts:.1f} t/s [{over.low:.2f}, {over.high:.2f}]")  # fmt: skip


def graphs(folder: Path, case: str, size: str) -> None:
    """Decoding alone, for a process with CUDA graphs and one without."""
    path = random_model(folder / f"random-{size}.gguf", size)
    window = "{}:{}".format(*WINDOWS[size])
    with opened(path, "device", n_ctx=2048, flash_attn=True) as llm:
        for loop in (None, f"{window} k=3 kv=first", f"{window} k=3 kv=frozen"):
            (result,) = _measure(llm, [loop], Workload(0, 32, 64), ROUNDS[size])
            row("CUDA graphs", f"decode 32, {loop or 'plain'}{case}", result.mean_ts, unit="t/s")
