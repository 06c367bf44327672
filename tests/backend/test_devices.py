"""Models spread over two RPC workers on loopback give the CPU's logits, plain and looped; what cannot work is refused.

A split by layers computes the same operations on the same numbers, so it is bit for bit what one CPU computes. A split
by tensors adds partial sums in another order, and llama.cpp offers it with flash attention only, which rounds K and V
to 11 bits: a change of the weights by 1e-7 moves these logits by up to 5e-3 with flash attention and by 4e-5 without.
Hence `ROUNDING`, and the stronger statement that each plan's result is nearest to the same plan on the CPU.

Each model runs in a process of its own, because llama.cpp ends the process where it meets what it cannot split.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, rpc_worker, tiny
from support.rpc_worker import Worker, environment, free_port

from ggufloop.backend import devices, library, rpc
from ggufloop.backend.devices import Placement, parse_servers, parse_split_mode, parse_tensor_split
from ggufloop.backend.ggml import Device, Ggml
from ggufloop.engine import LoopedLlama
from ggufloop.errors import BackendError, GgufloopError, UsageError
from ggufloop.loop import KV_POLICIES, MODES

ROUNDING = 1e-2
"""Most a tensor split may change a logit; a plan changes some by 0.3 and more."""

# dense, mixture of experts, sliding window, MLA; wide enough for feed-forward rows to be split in two
_WIDE = {"n_ff": 256, "n_ff_expert": 256}
FAMILIES = {name: replace(tiny.FAMILIES[name], **_WIDE) for name in ("llama", "qwen3moe", "gemma3", "deepseek2")}
# rounding to 11 bits moves tokens across ties of the router, which no bound holds; with all experts there are none
FAMILIES["all experts"] = replace(FAMILIES["qwen3moe"], experts_used=4)

LOOPS = [
    None,
    *(f"k=3 mode={mode} kv={kv}" for mode in MODES for kv in KV_POLICIES),
    "k=2 kv=each decode=bypass",
    "k=3 attention=4 sinks=1",
    "k=5",
    "k=5 halt=0.2",
    "k=5 mode=layer kv=frozen halt=0.2",
    "k=3 decode=entropy:4.5",
]
MOE = ["k=3 routing=frozen", "k=3 mode=layer routing=free"]

_PROGRAM = """
import json, sys
import numpy as np
from ggufloop.engine import LoopedLlama
path, out, settings, plans = sys.argv[1], sys.argv[2], *map(json.loads, sys.argv[3:])
llm = LoopedLlama(path, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False, **settings)
tokens = np.random.default_rng(3).integers(0, 256, 27).tolist()
rows = []
for plan in plans:
    llm.set_loop(plan)
    llm.reset()
    steps = [tokens[:24], *([t] for t in tokens[24:])]
    rows.append(np.concatenate([llm.logits(step) for step in steps]))
np.save(out, rows)
llm.close()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


@pytest.fixture(scope="module")
def workers(folder: Path) -> Iterator[list[Worker]]:
    with rpc_worker.running(folder) as one, rpc_worker.running(folder) as two:
        yield [one, two]


@pytest.fixture(scope="module")
def model(folder: Path) -> Callable[[str], Path]:
    def get(family: str) -> Path:
        path = folder / f"{family}.gguf"
        return path if path.exists() else tiny.write(path, FAMILIES[family])

    return get


def plans(family: str) -> list[str | None]:
    t = FAMILIES[family]
    loops = LOOPS + (MOE if t.experts else [])
    return [loop and "{}:{} {}".format(*t.window, loop) for loop in loops]


def logits(path: Path, loops: list[str | None], **settings: object) -> np.ndarray:
    """(plan, token, vocabulary): 24 tokens in two ubatches, then three alone, under each plan, by a process."""
    out = path.with_suffix(".npy")
    settings = {"n_ctx": 256, "n_ubatch": 12, "flash_attn": True, "type_k": 0, "type_v": 0, **settings}
    words = [sys.executable, "-c", _PROGRAM, str(path), str(out), json.dumps(settings), json.dumps(loops)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out)


def servers(workers: list[Worker]) -> str:
    return ",".join(w.address for w in workers)


# the same numbers


@pytest.mark.parametrize("family", ["llama", "qwen3moe", "gemma3", "deepseek2"])
@pytest.mark.parametrize("flash_attn", [False, True])
def test_split_by_layers(family: str, flash_attn: bool, model: Callable[[str], Path], workers: list[Worker]) -> None:
    path, marks = model(family), [w.mark() for w in workers]
    here = logits(path, plans(family), flash_attn=flash_attn)
    assert [w.nodes(m) for w, m in zip(workers, marks, strict=True)] == [0, 0]
    there = logits(path, plans(family), flash_attn=flash_attn, rpc_servers=servers(workers), tensor_split="1,1")
    assert all(w.nodes(m) > 0 for w, m in zip(workers, marks, strict=True))
    assert np.array_equal(here, there)
    assert all(np.abs(looped - here[0]).max() > 0.1 for looped in here[1:])
    full, halted = (here[LOOPS.index(loop)] for loop in ("k=5", "k=5 halt=0.2"))
    assert np.abs(full - halted).max() > 0.1


@pytest.mark.parametrize(
    ("family", "shares"), [("llama", "1,1"), ("llama", "3,1"), ("all experts", "1,1"), ("gemma3", "1,1")]
)
def test_split_by_tensors(family: str, shares: str, model: Callable[[str], Path], workers: list[Worker]) -> None:
    path, marks = model(family), [w.mark() for w in workers]
    here = logits(path, plans(family))
    there = logits(path, plans(family), rpc_servers=servers(workers), split_mode="tensor", tensor_split=shares)
    assert all(w.nodes(m) > 0 for w, m in zip(workers, marks, strict=True))
    for i, rows in enumerate(there):
        distances = [np.abs(rows - other).max() for other in here]
        assert distances[i] < ROUNDING
        different = [d for d, other in zip(distances, here, strict=True) if np.abs(other - here[i]).max() > 0]
        assert min(different) > 4 * distances[i], plans(family)[i]


def test_tensor_split_after_every_change_of_the_loop(model: Callable[[str], Path], workers: list[Worker]) -> None:
    """Plans whose graphs have more nodes but fewer sums over the devices than the one before, and back."""
    loops = ["2:5 k=9 kv=frozen", "2:5 k=8 kv=first", "2:5 k=9 kv=frozen", "2:5 k=4 kv=each", "2:5 k=9 kv=frozen", None]
    here = logits(model("llama"), loops)
    there = logits(model("llama"), loops, rpc_servers=servers(workers), split_mode="tensor")
    assert np.abs(here - there).max() < ROUNDING


@pytest.fixture(scope="module")
def dirty_workers(folder: Path) -> Iterator[list[Worker]]:
    with rpc_worker.running(folder, dirty=True) as one, rpc_worker.running(folder, dirty=True) as two:
        yield [one, two]


@pytest.mark.parametrize("mode", ["layer", "tensor"])
@pytest.mark.parametrize("shares", ["1,0", "0,1"])
def test_a_device_without_a_share_adds_nothing(
    mode: str, shares: str, model: Callable[[str], Path], dirty_workers: list[Worker]
) -> None:
    """Not even what its memory held before; a model with few heads or rows leaves a device without some matrix, too."""
    path, loops = model("llama"), [None, "2:5 k=3 kv=each"]
    there = logits(path, loops, rpc_servers=servers(dirty_workers), split_mode=mode, tensor_split=shares)
    assert np.array_equal(logits(path, loops), there)


# who computes


def load(path: Path, **settings: object) -> LoopedLlama:
    return LoopedLlama(path, n_ctx=64, n_batch=64, n_threads=1, n_threads_batch=1, verbose=False, **settings)


def sent(llm: LoopedLlama, workers: list[Worker], loop: str | None) -> tuple[int, ...]:
    """Nodes each worker is given for eight tokens."""
    llm.set_loop(loop)
    llm.reset()
    marks = [w.mark() for w in workers]
    llm.logits(list(range(8)))
    return tuple(w.nodes(m) for w, m in zip(workers, marks, strict=True))


def test_passes_are_computed_where_the_layer_is(model: Callable[[str], Path], workers: list[Worker]) -> None:
    """Layers 0 to 3 of 7 are on the first worker, 4 to 6 and the output matrix on the second."""
    llm = load(model("llama"), rpc_servers=[w.address for w in workers], tensor_split=[1, 1])
    plain = sent(llm, workers, None)
    first, second, both = (sent(llm, workers, f"{w} k=3") for w in ("1:3", "4:6", "3:5"))
    llm.close()
    assert plain[0] > 0
    assert plain[1] > 0
    assert first[0] > plain[0] + 40
    assert first[1] == plain[1]
    assert second[0] == plain[0]
    assert second[1] > plain[1] + 40
    assert all(b > p + 20 for b, p in zip(both, plain, strict=True))


def test_n_gpu_layers(model: Callable[[str], Path], workers: list[Worker]) -> None:
    counts = {}
    for n in (0, 2, -1):
        llm = load(model("llama"), rpc_servers=[w.address for w in workers], tensor_split=[1, 1], n_gpu_layers=n)
        counts[n] = sent(llm, workers, None)
        llm.close()
    assert counts[0] == (0, 0)
    assert 0 < sum(counts[2]) < sum(counts[-1]) / 2


def test_one_device_of_several(model: Callable[[str], Path], workers: list[Worker]) -> None:
    addresses = servers(workers)
    with_rpc = [d.name for d in rpc.connect(Ggml(library.locate().directory), parse_servers(addresses))]
    for settings, used in (
        ({"split_mode": "none", "main_gpu": 1}, [False, True]),
        ({"split_mode": 0, "main_gpu": -1}, [False, False]),
        ({"device": [with_rpc[0]]}, [True, False]),
        ({"device": "none"}, [False, False]),
        ({"device": f"{with_rpc[1]},{with_rpc[0]}", "tensor_split": [1]}, [False, True]),
    ):
        llm = load(model("llama"), rpc_servers=addresses, **settings)
        assert [n > 0 for n in sent(llm, workers, "2:4 k=2")] == used, settings
        llm.close()
    llm = load(model("llama"))  # the servers belonged to those models, not to the process
    assert sent(llm, workers, "2:4 k=2") == (0, 0)
    llm.close()


def test_state_names_the_servers(model: Callable[[str], Path], workers: list[Worker]) -> None:
    import pickle

    llm = load(model("llama"), rpc_servers=servers(workers), tensor_split="1,1", loop="2:4 k=2")
    rows = llm.logits([1, 2, 3])
    again = pickle.loads(pickle.dumps(llm))
    llm.close()
    marks = [w.mark() for w in workers]
    assert np.array_equal(again.logits([1, 2, 3]), rows)
    assert all(w.nodes(m) > 0 for w, m in zip(workers, marks, strict=True))
    again.close()


# refusals

REFUSALS = [
    ({"rpc_servers": "nowhere"}, "'nowhere' is no address of an RPC server."),
    ({"rpc_servers": "127.0.0.1:0"}, "port '0' in '127.0.0.1:0' is not a number from 1 to 65535."),
    ({"rpc_servers": "127.0.0.1:65536"}, "port '65536' in '127.0.0.1:65536' is not a number from 1 to 65535."),
    ({"rpc_servers": "127.0.0.1:x"}, "port 'x' in '127.0.0.1:x' is not a number from 1 to 65535."),
    ({"rpc_servers": ["::1:50052"]}, "'::1:50052' is no address of an RPC server."),
    ({"rpc_servers": "a:1,"}, "'' is no address of an RPC server."),
    ({"rpc_servers": "a:1,a:1"}, "the RPC server a:1 is given twice."),
    ({"split_mode": "tensors"}, "split mode 'tensors' is unknown."),
    ({"split_mode": 4}, "split mode 4 is unknown."),
    ({"tensor_split": "3,-1"}, "'-1' is no share of a tensor split."),
    ({"tensor_split": "3,x"}, "'x' is no share of a tensor split."),
    ({"tensor_split": [1.0, float("inf")]}, "inf is no share of a tensor split."),
    ({"tensor_split": [1, 2]}, "tensor split 1,2 has 2 shares for 0 devices: only the CPU."),
    ({"main_gpu": 1}, "main GPU 1 does not exist: only the CPU."),
    ({"main_gpu": -1}, "main GPU -1, the CPU, needs split mode none, not layer."),
    ({"split_mode": "tensor"}, "split mode tensor needs a GPU or another machine, and there is only the CPU."),
    ({"split_mode": "row"}, "split mode row needs a GPU or another machine, and there is only the CPU."),
    ({"device": "CUDA7"}, "device 'CUDA7' is unknown."),
]
OVER_RPC = [
    ({"tensor_split": "3,1,2"}, "has 3 shares for 2 devices: RPC"),
    ({"split_mode": "row"}, "split mode row does not work over RPC."),
    ({"split_mode": "none", "tensor_split": "1,1"}, "split mode none uses one device: nothing to share."),
    ({"main_gpu": 2, "split_mode": "none"}, "main GPU 2 does not exist: RPC"),
    ({"device": "RPC"}, "device 'RPC' is unknown."),
    ({"split_mode": "tensor", "flash_attn": False}, "split mode tensor needs flash attention."),
]


@pytest.mark.parametrize(("settings", "message"), REFUSALS, ids=str)
def test_refusal(settings: dict[str, object], message: str, tiny_model: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError) as caught:
        load(tiny_model("llama"), **settings)
    assert caught.value.message == message
    assert caught.value.hint


@pytest.mark.parametrize(("settings", "message"), OVER_RPC, ids=str)
def test_refusal_over_rpc(
    settings: dict[str, object], message: str, tiny_model: Callable[[str], Path], workers: list[Worker]
) -> None:
    with pytest.raises(UsageError) as caught:
        load(tiny_model("llama"), rpc_servers=servers(workers), **settings)
    assert message in caught.value.message
    assert caught.value.hint


def renamed(path: Path, arch: str, **meta: object) -> Path:
    """A copy of the tiny llama that says it is another architecture: enough for what is asked before loading."""
    t = FAMILIES["llama"]
    return tiny.write(path, replace(t, arch=arch, meta={**t.meta, **meta}))


@pytest.mark.parametrize(
    ("arch", "meta", "why"),
    [
        ("llama", {"attention.head_count_kv": 1}, "it has a single K/V head"),
        ("llama", {"attention.head_count_kv": [2, 2, 1, 2, 2, 2, 2]}, "it has a single K/V head"),
        ("bloom", {}, "the bias of its attention depends on how many heads there are"),
        ("phi2", {"attention.max_alibi_bias": 8.0}, "the bias of its attention depends on how many heads there are"),
        ("rwkv7", {}, "llama.cpp would end the process"),
        ("qwen3next", {}, "llama.cpp would end the process"),
    ],
)
def test_tensors_that_cannot_be_split(
    arch: str, meta: dict[str, object], why: str, folder: Path, workers: list[Worker]
) -> None:
    settings = {"rpc_servers": servers(workers), "split_mode": "tensor", "flash_attn": True}
    with pytest.raises(UsageError) as caught:
        load(renamed(folder / "renamed.gguf", arch, **meta), **settings)
    assert caught.value.message == f"the tensors of this {arch} model cannot be split: {why}."
    assert caught.value.hint == "use split mode layer."


def test_tensors_llama_cpp_itself_refuses_to_split(folder: Path, workers: list[Worker]) -> None:
    with pytest.raises(GgufloopError) as caught:
        load(
            renamed(folder / "renamed.gguf", "olmo2"),
            rpc_servers=servers(workers), split_mode="tensor", flash_attn=True,
        )  # fmt: skip
    assert "try split mode layer" in caught.value.hint


def test_names_and_shares() -> None:
    assert parse_tensor_split("3,1") == parse_tensor_split("3/1") == parse_tensor_split([3, 1, 0, 0]) == [3, 1]
    assert parse_tensor_split(None) == parse_tensor_split([0.0] * 16) == []
    assert [parse_split_mode(m) for m in (*devices.SPLIT_MODES, 0, 1, 2, 3)] == [*devices.SPLIT_MODES] * 2
    with pytest.raises(UsageError) as caught:
        parse_split_mode("tensr")
    assert caught.value.hint == "did you mean tensor? Known: none, layer, row, tensor."
    assert [str(a) for a in parse_servers(" host:1 , 10.0.0.1:65535")] == ["host:1", "10.0.0.1:65535"]
    assert parse_servers(None) == []


def test_settings_that_ask_for_nothing_load_nothing(tmp_path: Path) -> None:
    settings = {"n_ctx": 8, "tensor_split": None, "rpc_servers": None}
    assert Placement.take(settings, tmp_path / "no library", tmp_path / "no model") == Placement()
    assert settings == {"n_ctx": 8, "split_mode": 1, "tensor_split": None}


def test_gpus_come_before_integrated_ones() -> None:
    cpu, gpu, igpu, blas = (Device(i, k, "", k) for i, k in enumerate(("CPU", "GPU", "IGPU", "ACCEL")))
    assert devices.served([cpu, gpu, igpu, blas], None) == [gpu, igpu]
    assert devices.served([blas, cpu], None) == [cpu]
    assert devices.served([blas, cpu], "ACCEL") == [blas]
    assert devices._local([cpu, igpu, gpu, blas]) == [gpu]
    assert devices._local([cpu, igpu, blas]) == [igpu]


# servers that are none


def test_the_protocol_is_the_librarys(workers: list[Worker]) -> None:
    assert rpc._handshake(rpc.Address.parse(workers[0].address)) == rpc.PROTOCOL


def answering(answer: bytes | None) -> int:
    """The port of a server that gives one client this answer; None: it accepts and is silent."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with listener, listener.accept()[0] as client:
            client.recv(64)
            if answer is None:
                client.recv(64)  # until the client gives up
            else:
                client.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    return int(listener.getsockname()[1])


HELLO = (28).to_bytes(8, "little")
ANSWERS = [
    (None, "accepts a connection but does not answer within", "one client at a time"),
    (b"", "is no RPC server of llama.cpp.", "ggufloop rpc-server"),
    (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no RPC server of llama.cpp.", "ggufloop rpc-server"),
    (HELLO + b"\x07", "is no RPC server of llama.cpp.", "ggufloop rpc-server"),
    (HELLO + bytes([6, 0, 0]).ljust(28, b"\0"), "speaks protocol 6.0.0, this llama.cpp speaks 7.0.0.", "both ends"),
    (HELLO + bytes([7, 0, 1]).ljust(28, b"\0"), "speaks protocol 7.0.1, this llama.cpp speaks 7.0.0.", "both ends"),
    ((3).to_bytes(8, "little") + bytes([3, 6, 0]), "speaks protocol 3.6.0, this llama.cpp speaks 7.0.0.", "both ends"),
]


@pytest.mark.parametrize(("answer", "message", "hint"), ANSWERS)
def test_what_answers_is_no_server_of_ours(
    answer: bytes | None, message: str, hint: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]
) -> None:
    monkeypatch.setattr(rpc, "PATIENCE", 0.3 if answer is None else 10)
    with pytest.raises(GgufloopError) as caught:
        load(tiny_model("llama"), rpc_servers=f"127.0.0.1:{answering(answer)}")
    assert message in caught.value.message
    assert hint in caught.value.hint
    assert caught.value.exit_code == 1


def test_nobody_listens(tiny_model: Callable[[str], Path]) -> None:
    port = free_port()
    with pytest.raises(GgufloopError) as caught:
        load(tiny_model("llama"), rpc_servers=f"127.0.0.1:{port}")
    assert caught.value.message == f"there is no RPC server at 127.0.0.1:{port}: Connection refused."
    assert caught.value.hint == f"start one there: ggufloop rpc-server -p {port}"


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(address: rpc.Address) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(rpc, "_handshake", fail)
    with pytest.raises(GgufloopError, match="the host 'nohost' is unknown: Name or service not known"):
        rpc.check_server(rpc.Address("nohost", 1))


def test_a_busy_server(workers: list[Worker], monkeypatch: pytest.MonkeyPatch, model: Callable[[str], Path]) -> None:
    llm = load(model("llama"), rpc_servers=workers[0].address)  # holds its connection
    monkeypatch.setattr(rpc, "PATIENCE", 0.3)
    with pytest.raises(GgufloopError, match="does not answer within"):
        rpc.check_server(rpc.Address.parse(workers[0].address))
    llm.close()
    monkeypatch.setattr(rpc, "PATIENCE", 10)
    rpc.check_server(rpc.Address.parse(workers[0].address))


def test_a_library_without_rpc(monkeypatch: pytest.MonkeyPatch, tiny_model: Callable[[str], Path]) -> None:
    monkeypatch.setattr(Ggml, "function", lambda self, backend, name: None)
    with pytest.raises(BackendError, match=r"the llama.cpp library in .* has no RPC\."):
        load(tiny_model("llama"), rpc_servers="127.0.0.1:50052")


# the commands


def ggufloop(*words: str) -> subprocess.CompletedProcess[str]:
    program = "import sys; from ggufloop.cli import main; main(sys.argv[1:])"
    return subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_run_over_rpc(model: Callable[[str], Path], workers: list[Worker]) -> None:
    words = ["run", str(model("llama")), "--window", "2:5", "--K", "3", "--raw", "-p", "the", "-n", "8", "--temp", "0"]
    words += ["-t", "1", "-c", "64"]
    here = ggufloop(*words)
    marks = [w.mark() for w in workers]
    there = ggufloop(*words, "--rpc", servers(workers), "-ts", "1,1", "-sm", "layer", "-ngl", "-1")
    assert here.returncode == there.returncode == 0, there.stderr
    assert here.stdout == there.stdout != ""
    one, two = (w.address for w in workers)
    assert f"layers go to RPC0 ({one}), RPC1 ({two}).\n" in there.stderr
    assert "layers go to" not in here.stderr
    assert all(w.nodes(m) > 0 for w, m in zip(workers, marks, strict=True))


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (["--rpc", "here"], 2, "error: 'here' is no address of an RPC server.\n  write host:port, such as "),
        (["-ts", "1,-2"], 2, "error: '-2' is no share of a tensor split.\n"),
        (["-sm", "layers"], 2, "'layers' is not known; did you mean layer? Known: none, layer, row, tensor."),
        (["-mg", "2"], 2, "error: main GPU 2 does not exist: only the CPU.\n"),
        (["-dev", "GPU0"], 2, "error: device 'GPU0' is unknown.\n  there is none.\n"),
        (["--rpc", "127.0.0.1:1"], 1, "error: there is no RPC server at 127.0.0.1:1: Connection refused.\n"),
    ],
)
def test_flags_that_cannot_work(flags: list[str], code: int, error: str, tiny_model: Callable[[str], Path]) -> None:
    done = ggufloop("run", str(tiny_model("llama")), "--raw", "-p", "a", *flags)
    assert (done.returncode, done.stdout) == (code, "")
    assert error in done.stderr


@pytest.mark.parametrize(
    ("flags", "code", "error"),
    [
        (["-H", "0.0.0.0"], 2, "error: 0.0.0.0:50052 can be reached from other machines, and RPC asks nobody for a "
         "password.\n  add --trusted-network if only machines you trust can reach it.\n"),
        (["-H", "localhost"], 2, "error: 'localhost' is no IPv4 address.\n"),
        (["-p", "0"], 2, "0 is not in the range 1<=x<=65535"),
        (["-d", "CUDA0"], 2, "error: device 'CUDA0' is unknown.\n  known: CPU.\n"),
        (["-H", "192.0.2.1", "--trusted-network"], 1, "error: cannot listen at 192.0.2.1:50052: "),
    ],
)  # fmt: skip
def test_server_refusals(flags: list[str], code: int, error: str) -> None:
    done = ggufloop("rpc-server", *flags)
    assert (done.returncode, done.stdout) == (code, "")
    assert error in done.stderr


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        port = s.getsockname()[1]
        done = ggufloop("rpc-server", "-p", str(port))
    assert done.returncode == 1
    assert done.stderr.endswith("another program listens there; give another port with -p.\n")


def wait_for(worker: Worker, last: str) -> None:
    """Wait until this is the last line of a worker's log."""
    deadline = time.monotonic() + 20
    while not worker.log.read_text().endswith(f"{last}\n"):
        assert time.monotonic() < deadline, worker.log.read_text()
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_what_a_server_says(folder: Path, model: Callable[[str], Path]) -> None:
    with rpc_worker.running(folder, "-H", "0.0.0.0", "--trusted-network", verbose=False) as worker:
        for _ in range(2):
            llm = load(model("llama"), rpc_servers=worker.address)
            wait_for(worker, "client connected")
            llm.close()
            wait_for(worker, "client gone")
        os.kill(worker.process.pid, signal.SIGINT)
        assert worker.process.wait(20) == 130
    lines = worker.log.read_text().splitlines()
    port = worker.address.split(":")[1]
    assert lines[0].startswith(f"WARNING: RPC has no password and no encryption. Whoever reaches 0.0.0.0:{port} can")
    assert lines[2].startswith("serving CPU (")
    assert lines[2].endswith(f") at 0.0.0.0:{port}: RPC 7.0.0, threads 1. Ctrl-C ends it.")
    assert lines[3:] == [*["client connected", "client gone"] * 2, "stopped"]
