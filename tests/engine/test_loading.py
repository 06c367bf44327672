"""What happens when a model does not load, or computes nonsense: llama.cpp's reason, Ctrl-C, memory, NaN."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from support.rewrite import rewritten

from ggufloop import engine
from ggufloop.backend import memory
from ggufloop.backend.llama_log import CONTINUED, DEBUG, ERROR, WARNING, LlamaLog
from ggufloop.cli import main
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.interrupts import Held
from ggufloop.loop import LoopSpec

SETTINGS: dict[str, Any] = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


@pytest.fixture(autouse=True)
def no_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", None)


def without(missing: str) -> Callable[[str, np.ndarray], dict[str, np.ndarray]]:
    return lambda name, data: {} if name == missing else {name: data}


def with_another(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    return {name: data} | ({"blk.3.surprise.weight": data} if name == "output_norm.weight" else {})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tensors": without("blk.3.attn_q.weight")}, "cannot use .*: tensor 'blk.3.attn_q.weight' not found"),
        ({"tensors": with_another}, r"wrong number of tensors; expected \d+, got \d+"),
        ({"keys": {"tokenizer.ggml.pre": "nobody-knows"}}, "unknown pre-tokenizer type: 'nobody-knows'"),
        ({"keys": {"tokenizer.ggml.model": "nobody-knows"}}, "unknown tokenizer: 'nobody-knows'"),
    ],
)
def test_a_model_that_does_not_load_says_llama_cpps_reason(
    changes: dict[str, Any], reason: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rewritten(tiny_model("llama"), tmp_path / "m.gguf", **changes)
    with pytest.raises(GgufloopError, match=reason) as e:
        LoopedLlama(path, **SETTINGS)
    assert "memory" not in e.value.hint
    assert "-v" in e.value.hint


def test_the_reason_of_an_earlier_failure_is_forgotten(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    bad = rewritten(tiny_model("llama"), tmp_path / "a.gguf", tensors=without("blk.3.attn_q.weight"))
    worse = rewritten(tiny_model("llama"), tmp_path / "b.gguf", tensors=without("blk.4.attn_q.weight"))
    for path, layer in ((bad, 3), (worse, 4), (bad, 3)):
        with pytest.raises(GgufloopError, match=rf"blk\.{layer}\.attn_q"):
            LoopedLlama(path, **SETTINGS)


def test_the_log_shows_warnings_and_errors_and_no_debug_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """llama_cpp's own table of levels is one off: it shows debug lines and hides errors."""
    log = LlamaLog(shown=lambda: True)
    log(WARNING, b"load: odd\n")
    log(DEBUG, b"node 17\n")
    log(CONTINUED, b"of 1000\n")
    log(ERROR, b"llama_model_load: error loading model: no 'x'.\n")
    log(ERROR, b"failed to load model\xff\n")
    assert (
        capsys.readouterr().err
        == "load: odd\nllama_model_load: error loading model: no 'x'.\nfailed to load model\ufffd\n"
    )
    assert log.reason == "no 'x'"


# Ctrl-C


def test_ctrl_c_in_a_callback_from_c_ends_the_load(
    tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if what the handler raises is raised inside the callback, where ctypes drops it."""
    monkeypatch.setattr(engine._log, "_shown", lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        LoopedLlama(tiny_model("llama"), **SETTINGS)
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with closing(LoopedLlama(tiny_model("llama"), **SETTINGS)) as llm:  # and the next one loads
        assert llm.logits([1, 2]).shape[0] == 2


def test_a_load_is_given_up_before_its_end(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A large model takes minutes to load: the progress callback says that nobody waits any more."""
    contexts = []
    monkeypatch.setattr(Held, "__call__", lambda self: True)
    monkeypatch.setattr(engine.llama_cpp, "llama_init_from_model", lambda *a: contexts.append(a))
    with pytest.raises(GgufloopError, match="cannot use"):
        LoopedLlama(tiny_model("llama"), **SETTINGS)
    assert contexts == []


def test_held_interrupts_are_delivered_once_and_only_if_they_came() -> None:
    calls: list[int] = []
    before = signal.signal(signal.SIGINT, lambda signum, frame: calls.append(signum))
    try:
        with Held() as interrupted:
            assert not interrupted()
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert interrupted()
            assert calls == []
        assert calls == [signal.SIGINT]
        with Held():
            pass
        assert calls == [signal.SIGINT]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Held():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# templates

BROKEN = "{{ bos_token }}\n{% if messages %}\nHi"


@pytest.fixture
def broken_template(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return rewritten(tiny_model("llama"), tmp_path / "t.gguf", {"tokenizer.chat_template": BROKEN})


def test_a_chat_template_that_does_not_compile_stands_in_nobodys_way(broken_template: Path) -> None:
    with closing(LoopedLlama(broken_template, **SETTINGS)) as llm:
        answer = llm.create_completion("The cat", max_tokens=2)
        assert answer["choices"][0]["finish_reason"] in ("length", "stop")
        with pytest.raises(GgufloopError, match=r"template cannot be read: line 3: .*'endif'"):
            llm.create_chat_completion([{"role": "user", "content": "Hi"}])


def test_run_raw_needs_no_template(broken_template: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raw:
        main(["run", str(broken_template), "--raw", "-p", "The cat", "-n", "2", "-t", "1"])
    assert raw.value.code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit) as chat:
        main(["run", str(broken_template), "-p", "The cat", "-n", "2", "-t", "1"])
    out, err = capsys.readouterr()
    assert (chat.value.code, out) == (1, "")
    assert re.fullmatch(r"error: the model's chat template cannot be read: line 3: .*\n  `ggufloop run --raw .*\n", err)


# memory


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    def set_to(n: int) -> None:
        monkeypatch.setattr(memory, "free_bytes", lambda: n)

    return set_to


def test_weights_cache_and_slots_are_counted(tiny_model: Callable[[str], Path], free: Callable[[int], None]) -> None:
    path, loop = tiny_model("llama"), LoopSpec((2, 5), k=3, kv="each")
    plain = memory.Need.of(path, 256)
    need = memory.Need.of(path, 256, loops=[None, LoopSpec((2, 5), k=3), loop])
    assert plain.kv == 2 * 2 * 2 * 32 * 256 * 7  # K and V, 2 bytes, heads, width, tokens, layers
    assert plain.weights == sum(t.n_bytes for t in GGUFReader(path).tensors)
    assert (need.slots, plain.slots) == (plain.kv * 3 * 2 // 7, 0)
    free(need.total)
    memory.check([need])
    free(need.total - 1)
    with pytest.raises(
        GgufloopError, match=r"llama.*\.gguf needs .* \(weights .*, K/V cache of 256 tokens .*, slots of"
    ):
        memory.check([need])
    memory.check([plain])
    with pytest.raises(GgufloopError, match="2 files are open at once and need"):
        memory.check([plain, plain])


@pytest.mark.parametrize(
    "command", ["run -p Hi", "bench -n 8", "sweep --text {text} -c 64", "compare --text {text} -c 64"]
)
def test_every_command_refuses_a_loop_that_memory_cannot_hold(
    command: str, tiny_model: Callable[[str], Path], free: Callable[[int], None], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path, text = tiny_model("llama"), tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    monkeypatch.chdir(tmp_path)
    free(memory.Need.of(path, 512).total)
    name, *rest = command.format(text=text).split()
    with pytest.raises(SystemExit) as e:
        main([name, str(path), *rest, "--window", "2:5", "--K", "64", "--kv", "each"])
    assert e.value.code == 1
    err = capsys.readouterr().err
    assert re.search(r"error: .* needs .*slots of kv each .* of memory are free\.\n  give .*\n$", err), err


def test_a_loop_set_later_is_refused_before_it_is_allocated(
    tiny_model: Callable[[str], Path], free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(LoopedLlama(tiny_model("llama"), **SETTINGS)) as llm:
        free(1000)
        with pytest.raises(GgufloopError, match=r"adds .* of K/V cache"):
            llm.set_loop("2:5 k=8 kv=each")
        assert llm.loop is None
        llm.set_loop("2:5 k=8")
        monkeypatch.setenv("GGUFLOOP_MEMORY_CHECK", "off")
        llm.set_loop("2:5 k=8 kv=each")


def test_a_containers_limit_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    machine = memory.free_bytes()
    assert machine is not None
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("700000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 200000\n")
    assert memory.free_bytes() == 500000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_bytes() > 500000  # type: ignore[operator]


# numbers that are none


def with_nan(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    if name == "blk.3.ffn_down.weight":
        data = data.copy()
        data.flat[5] = np.nan
    return {name: data}


@pytest.fixture
def nan_model(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return rewritten(tiny_model("llama"), tmp_path / "nan.gguf", tensors=with_nan)


@pytest.mark.parametrize("logits_all", [False, True])
def test_the_first_logits_that_are_not_finite_end_an_answer(nan_model: Path, logits_all: bool) -> None:
    with closing(LoopedLlama(nan_model, logits_all=logits_all, **SETTINGS)) as llm:
        for act in (lambda: llm.create_completion("The cat", max_tokens=3), lambda: llm.logits([1, 2, 3])):
            with pytest.raises(GgufloopError, match=r"nan\.gguf computes logits that are not finite"):
                act()
        llm.set_loop("1:2 k=2")
        with pytest.raises(GgufloopError, match=r"under the loop 1:2 k=2, .*nan\.gguf"):
            llm.logits([1])


@pytest.mark.parametrize("command", ["run --raw -p Hi", "perplexity --text {text} -c 64", "sweep --text {text} -c 64"])
def test_a_measurement_of_nan_weights_ends_in_a_line(
    command: str, nan_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 200)
    monkeypatch.chdir(tmp_path)
    name, *rest = command.format(text=text).split()
    with pytest.raises(SystemExit) as e:
        main([name, str(nan_model), *rest, "--window", "2:4", "--K", "2"])
    out, err = capsys.readouterr()
    assert (e.value.code, out) == (1, "")
    assert "nan.gguf computes logits that are not finite" in err
