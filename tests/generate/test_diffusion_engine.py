"""The diffusion sampler on the real engine: tiny LLaDA and Dream models, plain and looped, and the example script."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from support import ROOT, tiny
from support.rewrite import rewritten

from ggufloop.engine import LoopedLlama
from ggufloop.generate.diffusion import Head, Schedule, denoise

MASK = 258
PROMPT = [84, 104, 101, 32, 99, 97, 116]
KEYS: dict[str, dict[str, Any]] = {
    "llada": {"tokenizer.ggml.mask_token_id": MASK, "diffusion.shift_logits": False},
    "dream": {"tokenizer.ggml.mask_token_id": MASK},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("diffusion")

    def get(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        if not path.exists():
            plain = tiny.write(folder / f"{arch}-plain.gguf", tiny.Tiny(arch, head=16, n_layer=6))
            rewritten(plain, path, KEYS[arch])
        return path

    return get


@contextmanager
def opened(path: Path, loop: str | None = None) -> Iterator[LoopedLlama]:
    llm = LoopedLlama(
        path, n_ctx=64, n_batch=64, n_ubatch=64, n_threads=1, n_threads_batch=1, flash_attn=False, verbose=False,
        loop=loop,
    )  # fmt: skip
    try:
        yield llm
    finally:
        llm.close()


@pytest.mark.parametrize(("arch", "shifted"), [("llada", False), ("dream", True)])
@pytest.mark.parametrize("loop", [None, "2:4 k=3", "2:5 k=2 mode=layer"])
def test_each_token_is_the_likeliest_where_the_model_is_surest(
    model: Callable[[str], Path], arch: str, shifted: bool, loop: str | None
) -> None:
    n = 8
    with opened(model(arch), loop) as llm:
        head = Head.of(llm)
        assert head == Head(MASK, shifted)
        result = denoise(llm, head, PROMPT, Schedule(n, n))
        text = [*PROMPT, *[MASK] * n]
        for step in result.steps:  # the definition, with the model alone
            llm.reset()
            rows = llm.logits(text).astype(np.float64)
            rows[:, MASK] = -np.inf
            p = np.exp(rows - rows.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            sure = {i: p[i - shifted].max() for i in range(len(PROMPT), len(text)) if text[i] == MASK}
            at = max(sure, key=lambda i: sure[i])
            assert step.kept == ((at - len(PROMPT), int(p[at - shifted].argmax())),)
            text[at] = step.kept[0][1]
        assert list(result.tokens) == text[len(PROMPT) :]
        assert MASK not in result.tokens


@pytest.mark.parametrize("arch", ["llada", "dream"])
def test_every_place_sees_the_whole_text_and_a_loop_moves_it(model: Callable[[str], Path], arch: str) -> None:
    def rows(llm: LoopedLlama, tokens: list[int]) -> np.ndarray:
        llm.reset()
        return llm.logits(tokens)

    text = [*PROMPT, *[MASK] * 8]
    with opened(model(arch)) as llm:
        plain = rows(llm, text)
        assert np.abs(rows(llm, [*text[:-1], 65])[0] - plain[0]).max() > 1e-3, "the last token shows in the first row"
        llm.set_loop("2:4 k=1")
        np.testing.assert_array_equal(rows(llm, text), plain)
        for kv in ("first", "last", "each"):  # nothing is stored, so they are one loop
            llm.set_loop(f"2:4 k=3 kv={kv}")
            looped = rows(llm, text)
            assert np.isfinite(looped).all()
            assert np.abs(looped - plain).max() > 1e-3
            if kv == "first":
                first = looped
            np.testing.assert_allclose(looped, first, atol=1e-5)


@pytest.fixture
def example() -> ModuleType:
    path = ROOT / "scripts" / "diffusion_example.py"
    spec = importlib.util.spec_from_file_location("diffusion_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example(model: Callable[[str], Path], example: ModuleType, tiny_model: Callable[[str], Path]) -> None:
    args = ["-p", "The cat", "--raw", "-n", "8", "--steps", "4", "-c", "64", "-t", "1"]
    path = model("llada")

    def run(*args: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(example.main, list(args))
        return done.exit_code, done.stdout, done.stderr

    for loop, flags in ((None, ()), ("2:4 k=3", ("--window", "2:4", "--K", "3"))):
        with opened(path, loop) as llm:
            tokens = list(denoise(llm, Head.of(llm), llm.tokenize(b"The cat"), Schedule(8, 4)).tokens)
            end = next((i for i, token in enumerate(tokens) if llm.is_eog(token)), 8)
            text = llm.detokenize(tokens[:end]).decode("utf-8", "replace")
        described = "window 2:4, K 3" if loop else "plain"
        assert run(str(path), *args, *flags) == (0, f"{text}\n", f"[ 4 evaluations | {described} ]\n")
    code, _, err = run(str(path), *args, "-v")
    assert (code, len(err.splitlines())) == (0, 5)
    assert err.startswith("  1 '")
    assert run(str(tiny_model("llama")), *args)[::2] == (
        1,
        "Error: this model has no mask token: it is no masked diffusion model. "
        "`ggufloop run` generates with other models.\n",
    )
    assert run(str(path), *args, "--steps", "9")[2] == (
        "Error: steps 9 is not in the range 1 to 8. each step keeps one token or more.\n"
    )
