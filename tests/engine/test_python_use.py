"""What Python users trip over: a model that is closed, seeds that are not given, a prompt that begins with BOS."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import tiny
from support.rewrite import rewritten

from ggufloop.backend.settings import RANDOM_SEED, drawn
from ggufloop.cli import main
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.generate.complete import prompt_tokens
from ggufloop.loop import LoopSpec

SMALL = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}

# closed

USES: dict[str, Callable[[LoopedLlama], Any]] = {
    "tokenize": lambda llm: llm.tokenize(b"a"),
    "detokenize": lambda llm: llm.detokenize([1]),
    "tokenizer": lambda llm: llm.tokenizer().encode("a"),
    "create_completion": lambda llm: llm.create_completion("a", max_tokens=1),
    "call": lambda llm: llm("a", max_tokens=1),
    "stream": lambda llm: list(llm.create_completion("a", max_tokens=1, stream=True)),
    "create_chat_completion": lambda llm: llm.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=1),
    "generate": lambda llm: next(llm.generate([1, 2])),
    "sample": lambda llm: llm.sample(),
    "eval": lambda llm: llm.eval([1]),
    "eval nothing": lambda llm: llm.eval([]),
    "logits": lambda llm: llm.logits([1]),
    "each_logits": lambda llm: llm.each_logits([1], 0, lambda i, rows: None),
    "trace": lambda llm: llm.trace([1]),
    "lens": lambda llm: llm.lens(np.zeros((1, 64), np.float32), [1]),
    "embed": lambda llm: llm.embed("a"),
    "create_embedding": lambda llm: llm.create_embedding("a"),
    "save_state": lambda llm: llm.save_state(),
    "set_loop": lambda llm: llm.set_loop("2:4 k=2"),
    "set_loop None": lambda llm: llm.set_loop(None),
    "check": lambda llm: llm.check(LoopSpec((2, 4), k=2)),
    "ctx": lambda llm: llm.ctx,
    "model": lambda llm: llm.model,
    **{
        name: lambda llm, name=name: getattr(llm, name)()
        for name in ("n_ctx", "n_embd", "n_vocab", "n_layer", "model_type", "token_eos", "token_bos", "token_nl",
                     "pooling_type", "memory_bytes", "skipped_evaluations", "synchronize", "adds_tokens")
    },
    "is_eog": lambda llm: llm.is_eog(1),
    "can_rewind": lambda llm: llm.can_rewind,
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "granitehybrid"])  # one whose reset() goes into llama.cpp too
def test_a_closed_model_is_an_error(tiny_model: Callable[[str], Path], family: str) -> None:
    llm = LoopedLlama(tiny_model(family), swa_full=False, **SMALL)
    state, running = llm.save_state(), llm.generate([1, 2], temp=0.0)
    next(running)
    llm.close()
    llm.close()
    uses = USES | {"load_state": lambda llm: llm.load_state(state), "go on": lambda llm: next(running)}
    for name, use in uses.items():
        with pytest.raises(GgufloopError) as e:
            use(llm)
        assert e.value.message == "this model is closed.", name
    running.close()
    assert llm.loop is None  # what is Python's own goes on
    assert llm.metadata["general.architecture"] == family


def test_every_way_to_close(tiny_model: Callable[[str], Path]) -> None:
    with contextlib.closing(LoopedLlama(tiny_model("llama"), **SMALL)) as llm:
        answer = llm.generate([1, 2])
        next(answer)
        del llm  # the generator holds it
        next(answer)
    with pytest.raises(GgufloopError, match=r"^this model is closed\.$"):
        next(answer)
    del answer
    gc.collect()
    with contextlib.suppress(GgufloopError):
        LoopedLlama(Path("missing.gguf"))
    gc.collect()


# seeds


def texts(path: Path, *settings: str) -> list[str]:
    """What a process of its own writes under each of these settings of the model."""
    code = (
        "import sys\nfrom ggufloop.engine import LoopedLlama\n"
        f"small = dict({SMALL!r})\n"
        "for words in sys.argv[2:]:\n"
        "    llm = LoopedLlama(sys.argv[1], **small, **eval(f'dict({words})'))\n"
        "    out = llm.create_completion('a', max_tokens=24, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)\n"
        "    print(ascii(out['choices'][0]['text']))\n"
        "    llm.close()"
    )
    command = [sys.executable, "-c", code, str(path), *settings]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_seed_counts_and_none_is_random(tiny_model: Callable[[str], Path]) -> None:
    given, none = ("seed=0", "seed=7", "seed=4294967294"), ("", "seed=-1", "seed=4294967295", "seed=None")
    first, second = (texts(tiny_model("llama"), *given, *none) for _ in range(2))
    assert first[:3] == second[:3]
    assert len({*first[:3]}) == 3
    assert len({*first[3:], *second[3:]}) == 2 * len(none)


def test_drawn() -> None:
    assert [drawn(seed) for seed in (0, 1, RANDOM_SEED - 1, -2)] == [0, 1, RANDOM_SEED - 1, -2]
    for seed in (None, -1, RANDOM_SEED):
        several = {drawn(seed) for _ in range(8)}
        assert len(several) > 1
        assert all(0 <= seed < RANDOM_SEED for seed in several)


# BOS


@pytest.fixture
def begins(tiny_model: Callable[[str], Path], tmp_path: Path) -> Callable[[bool], Path]:
    """A model whose BOS is <|im_start|>, and whose tokenizer adds it, or does not."""
    bos = tiny.vocabulary()[0].index("<|im_start|>")

    def make(adds: bool) -> Path:
        keys = {"tokenizer.ggml.bos_token_id": bos, "tokenizer.ggml.add_bos_token": adds}
        return rewritten(tiny_model("llama"), tmp_path / f"bos-{adds}.gguf", keys)

    return make


def test_bos_is_there_once(begins: Callable[[bool], Path], tiny_model: Callable[[str], Path]) -> None:
    bos, a = 258, ord("a")
    with contextlib.closing(LoopedLlama(begins(True), **SMALL)) as llm:
        assert llm.token_bos() == bos
        assert prompt_tokens(llm, "a") == [bos, a]
        assert prompt_tokens(llm, "<|im_start|>a") == [bos, a]
        assert prompt_tokens(llm, "<|im_start|><|im_start|>a") == [bos, bos, a]  # the second is the user's own
    with contextlib.closing(LoopedLlama(begins(False), **SMALL)) as llm:
        assert prompt_tokens(llm, "a") == [a]
        assert prompt_tokens(llm, "<|im_start|>a") == [bos, a]
        assert prompt_tokens(llm, "<|im_start|><|im_start|>a") == [bos, bos, a]
    with contextlib.closing(LoopedLlama(tiny_model("llama"), **SMALL)) as llm:
        assert llm.token_bos() == 11  # llama.cpp's guess for a file that names none, here a tabulator
        assert prompt_tokens(llm, "\v\va") == [11, 11, a]


@pytest.mark.parametrize("command", ["run", "trace"])
def test_raw_prompts_begin_once(
    begins: Callable[[bool], Path], command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[list[int]] = []
    step = LoopedLlama._step

    def noted(self: LoopedLlama, tokens: list[int], evaluate: Any) -> None:
        seen.append(list(tokens))
        step(self, tokens, evaluate)

    monkeypatch.setattr(LoopedLlama, "_step", noted)
    monkeypatch.setattr("ggufloop.cli.input.read_piped", lambda: "")
    more = ["--raw", "-n", "1", "-s", "1"] if command == "run" else ["--window", "2:4"]
    prompts = []
    for text in ("abc", "<|im_start|>abc"):
        seen.clear()
        with pytest.raises(SystemExit), warnings.catch_warnings():
            main([command, str(begins(True)), "-p", text, "-c", "64", "-t", "1", *more])
        prompts.append(seen[0])
    assert prompts[0][0] == 258
    assert prompts[0] == prompts[1], capsys.readouterr()
