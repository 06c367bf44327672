"""The diffusion sampler on the real engine: tiny LLaDA and Dream models, plain and looped, and `run` of them."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.cli import Cli
from support.rewrite import rewritten

from ggufloop.engine import LoopedLlama, llama_cpp
from ggufloop.generate.diffusion import ARCHITECTURES, Head, Schedule, denoise

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


@pytest.fixture(autouse=True)
def nothing_piped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"")))


ASK = ["-p", "The cat", "--raw", "-n", "8", "-c", "64", "-t", "1"]


def test_run_writes_with_it(model: Callable[[str], Path], cli: Cli) -> None:
    path = model("llada")
    for loop, flags in ((None, ()), ("2:4 k=3", ("--window", "2:4", "--K", "3"))):
        with opened(path, loop) as llm:
            tokens = list(denoise(llm, Head.of(llm), llm.tokenize(b"The cat"), Schedule(8, 4)).tokens)
            end = next((i for i, token in enumerate(tokens) if llm.is_eog(token)), 8)
            text = llm.detokenize(tokens[:end]).decode("utf-8", "replace")
        described = "window 2:4, K 3" if loop else "plain"
        ran = cli("run", path, *ASK, *flags)
        assert (ran.code, ran.out) == (0, f"{text}\n"), "temperature 0, and half as many steps as tokens"
        assert re.fullmatch(rf"\[ 8 tokens in 4 evaluations, [0-9.]+ t/s \| {described} ]", ran.err.splitlines()[-1])
    assert cli("run", path, *ASK, "--temp", "9", "-s", "1").out != cli("run", path, *ASK).out


def test_run_shows_the_answer_grow(model: Callable[[str], Path], cli: Cli) -> None:
    flags = ("--diffusion-visual", "--diffusion-steps", "8", "--diffusion-block-length", "4")
    lines = cli("run", model("dream"), *ASK, *flags).err.splitlines()
    assert [line[:5] for line in lines[-9:-1]] == [f"  {i} '" for i in range(1, 9)]
    assert lines[-6].endswith("....'"), "the second block is untouched when the first is full"
    assert lines[-1].startswith("[ 8 tokens in 8 evaluations")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "llada", *ASK, "--diffusion-steps", "9"],
         "steps 9 is not in the range 1 to 8, the tokens of the answer.\n  each step keeps one token or more."),
        (["run", "llada", *ASK, "--top-k", "3"], "--top-k is not for llada.gguf, which is a diffusion model."),
        (["run", "llama", *ASK, "--diffusion-steps", "4"],
         "--diffusion-steps is not for llama.gguf, which is no diffusion model."),
        (["chat", "llada"],
         "llada.gguf is a diffusion model (llada): it writes one whole answer to one prompt.\n"
         '  use: ggufloop run MODEL -p "..."'),
        (["serve", "dream"], "dream.gguf is a diffusion model (dream): it writes one whole answer to one prompt."),
        (["run", "llada", "-p", "The cat", "--raw", "-n", "250", "-c", "64"],
         "the prompt has 7 tokens and the answer 250; the context holds 256."),
    ],
)  # fmt: skip
def test_what_is_refused(
    words: list[str],
    message: str,
    model: Callable[[str], Path],
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    cli: Cli,
) -> None:
    name = words[1]
    path = tmp_path / f"{name}.gguf"
    path.symlink_to(tiny_model(name) if name == "llama" else model(name))
    ran = cli(words[0], path, *words[2:])
    assert (ran.code, ran.out) == (2, "")
    assert f"error: {message}" in ran.err


@pytest.mark.parametrize("arch", ["llada", "dream", "llama"])
def test_llama_cpp_calls_the_same_models_diffusion(
    arch: str, model: Callable[[str], Path], tiny_model: Callable[[str], Path]
) -> None:
    with opened(tiny_model(arch) if arch == "llama" else model(arch)) as llm:
        assert llama_cpp.llama_model_is_diffusion(llm.model) == (arch in ARCHITECTURES)
