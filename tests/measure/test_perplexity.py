"""`ggufloop perplexity`: llama-perplexity itself digit by digit, float64 from `logits`, and the command.

llama-perplexity is run where a library built with --with-tools is in the cache. The second oracle always runs: the
protocol in a few lines of float64 over `LoopedLlama.logits`.
"""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import re
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from support.cli import Cli
from support.hub_server import HubServer

from ggufloop import logits
from ggufloop.backend import library
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.measure import corpus, divergence
from ggufloop.measure.perplexity import KLBase, Other, perplexity, tokenize

TinyModel = Callable[[str], Path]
REAL = ("smollm2", "gemma")
SETTINGS = {"n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}


@pytest.fixture(scope="module")
def text() -> str:
    """Python's own help, less than all of it."""
    return corpus.local("pydoc").text[:40_000]


@pytest.fixture(scope="module")
def tool() -> Path:
    """llama-perplexity, stock. Skips the test where it is not built."""
    found = [
        b.directory / "llama-perplexity" for b in library.installed() if "llama-perplexity" in b.programs and b.stock
    ]
    found = [path for path in found if path.is_file()]
    if not found:
        pytest.skip("no llama-perplexity in the cache; run: ggufloop build --stock --with-tools")
    return found[0]


def opened(path: Path, n_ctx: int, loop: str | None = None, n_batch: int = 2048) -> LoopedLlama:
    return LoopedLlama(path, n_ctx=n_ctx, n_batch=n_batch, loop=loop, **SETTINGS)


def model_path(name: str, request: pytest.FixtureRequest) -> Path:
    path = request.getfixturevalue(name)
    assert isinstance(path, Path)
    return path


def log_probabilities(llm: LoopedLlama, tokens: Sequence[int], n_ctx: int, chunks: int) -> np.ndarray:
    """The protocol, naively: float64 (tokens scored, n_vocab) log-probabilities of the second halves."""
    out = []
    for i in range(chunks):
        chunk = list(tokens[i * n_ctx : (i + 1) * n_ctx])
        if llm.adds_tokens()[0]:
            chunk[0] = llm.token_bos()
        llm.reset()
        rows = llm.logits(chunk)[n_ctx // 2 : -1].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        out.append(rows - np.log(np.exp(rows).sum(axis=1, keepdims=True)))
    return np.concatenate(out)


def targets(tokens: Sequence[int], n_ctx: int, chunks: int) -> np.ndarray:
    return np.concatenate([tokens[i * n_ctx + n_ctx // 2 + 1 : (i + 1) * n_ctx] for i in range(chunks)])


def run_tool(tool: Path, model: Path, *args: object) -> str:
    words = [tool, "-m", model, "-t", "1", *args]
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=True, encoding="utf-8")
    return done.stdout + done.stderr


def numbers(block: str) -> list[str]:
    """The lines of the KL block as llama-perplexity prints them."""
    lines = block[block.index("====== Perplexity statistics") :].splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("Same top p"))
    return lines[: end + 1]


@pytest.fixture
def expf_of_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama-perplexity's own exponential. `logits.expf` is rounded better, which the last printed digit may show."""
    source, built = tmp_path / "expf.c", tmp_path / "expf.so"
    loop = "for (long i = 0; i < n; i++) y[i] = expf(x[i]);"
    source.write_text(f"#include <math.h>\nvoid all(const float * x, float * y, long n) {{ {loop} }}\n")
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", built, "-lm"], check=True)
    of_c = ctypes.CDLL(str(built))["all"]

    def expf(x: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        x = np.ascontiguousarray(x)
        out = np.empty_like(x) if out is None else out
        of_c(x.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p), ctypes.c_long(x.size))
        return out

    monkeypatch.setattr(logits, "expf", expf)
    monkeypatch.setattr(divergence, "expf", expf)


@pytest.mark.model
@pytest.mark.usefixtures("expf_of_c")
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(("n_ctx", "chunks", "n_batch"), [(128, 3, 128), (100, 2, 100), (256, 2, 64)])
def test_the_line_is_llama_perplexitys(
    name: str,
    n_ctx: int,
    chunks: int,
    n_batch: int,
    request: pytest.FixtureRequest,
    tool: Path,
    text: str,
    tmp_path: Path,
) -> None:
    """A context of 100 is rounded up by llama.cpp, the chunk is not; batches of 64 cut chunks of 256."""
    model, file = model_path(name, request), tmp_path / "text.txt"
    file.write_text(text)
    args = ("-f", file, "-c", n_ctx, "-b", n_batch, "-ub", n_batch, "--chunks", chunks)
    line = re.search(r"Final estimate: PPL = .*", run_tool(tool, model, *args))
    assert line is not None
    llm = LoopedLlama(model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_batch, **SETTINGS)
    result = perplexity(llm, tokenize(llm, text), n_ctx, chunks)
    llm.close()
    assert f"Final estimate: PPL = {result.model.ppl:.4f} +/- {result.model.error:.5f}" == line[0]


@pytest.mark.model
@pytest.mark.usefixtures("expf_of_c")
@pytest.mark.parametrize("name", REAL)
def test_the_block_is_llama_perplexitys(
    name: str, request: pytest.FixtureRequest, tool: Path, text: str, tmp_path: Path
) -> None:
    """The base is the same model with a V cache of 4 bits; its file is written by llama-perplexity and read by both."""
    model, file, kept = model_path(name, request), tmp_path / "text.txt", tmp_path / "base.kld"
    file.write_text(text)
    args = ("-c", 128, "-b", 128)
    run_tool(tool, model, "-f", file, *args, "--chunks", 3, "-ctv", "q4_0", "--kl-divergence-base", kept)
    printed = run_tool(tool, model, *args, "--kl-divergence-base", kept, "--kl-divergence")
    stored = KLBase.open(kept)
    llm = opened(model, stored.n_ctx)
    assert stored.tokens == tokenize(llm, text)[: 3 * 128]
    result = perplexity(llm, stored.tokens, stored.n_ctx, base=stored)
    llm.close()
    assert result.against is not None
    assert result.n == 3 * 63
    assert numbers(result.against.kl.block()) == numbers(printed)


@pytest.mark.model
@pytest.mark.parametrize(("name", "loop"), [("smollm2", "12:16 k=3 kv=frozen"), ("gemma", "7:11 k=2")])
def test_every_number_is_that_of_float64(name: str, loop: str, request: pytest.FixtureRequest, text: str) -> None:
    """Plain and looped, from all their logits. What is packed in 16 bits is right to half a step of 16/65535 nats.

    llama-perplexity leaves tokens of a base probability under exp(-16) out of the KL, and so does this oracle.
    """
    n_ctx, chunks = 128, 2
    llm = opened(model_path(name, request), n_ctx, loop)
    tokens = tokenize(llm, text)
    result = perplexity(llm, tokens, n_ctx, chunks, base=Other(llm))
    assert str(llm.loop) == loop
    looped = log_probabilities(llm, tokens, n_ctx, chunks)
    llm.set_loop(None)
    plain = log_probabilities(llm, tokens, n_ctx, chunks)
    chosen = targets(tokens, n_ctx, chunks)
    n_bytes = sum(len(llm.detokenize([t])) for t in chosen.tolist())
    llm.close()

    place = np.arange(len(chosen))
    nll, base = -looped[place, chosen], -plain[place, chosen]
    against = result.against
    assert against is not None
    for figure, x in ((result.model, nll), (against.base, base)):
        assert f"{figure.ppl:.4f}" == f"{math.exp(x.mean()):.4f}"
        assert f"{figure.error:.5f}" == f"{math.exp(x.mean()) * x.std() / math.sqrt(len(x) - 1):.5f}"
        assert figure.bits_per_byte == pytest.approx(x.sum() / math.log(2) / n_bytes, rel=1e-6)
    assert (result.n, result.n_bytes) == (len(chosen), n_bytes)

    change = base - nll  # a gain: above 0 the model is better
    assert against.over_tokens.mean == pytest.approx(change.mean(), abs=1e-6)
    assert against.over_tokens.n == len(chosen)
    assert against.over_tokens.high - against.over_tokens.mean == pytest.approx(
        1.979 * change.std(ddof=1) / math.sqrt(len(chosen)), rel=1e-3
    )  # Student's t with 125 degrees of freedom
    assert against.over_chunks is not None
    assert against.over_chunks.n == chunks
    assert against.over_chunks.high - against.over_chunks.mean == pytest.approx(
        12.706 * change.reshape(chunks, -1).mean(axis=1).std(ddof=1) / math.sqrt(chunks * 0.6 / 1.4), rel=1e-3
    )  # neighbours, taken to correlate at .4
    assert against.gain == against.over_chunks

    step = 16 / 65535
    kl = np.where(plain > -16, np.exp(plain) * (plain - looped), 0).sum(axis=1)
    assert against.kl.kl.mean == pytest.approx(kl.mean(), abs=step / 2)
    assert against.kl.kl_at[1.0] == pytest.approx(kl.max(), abs=step)
    assert against.kl.same_top.mean == (plain.argmax(axis=1) == looped.argmax(axis=1)).mean()
    assert against.kl.log_ratio.mean == pytest.approx(
        -change.mean(), abs=step / 2
    )  # of perplexities, as llama.cpp has it
    p_diff = np.exp(-nll) - np.exp(-base)
    assert against.kl.p_diff.mean == pytest.approx(p_diff.mean(), abs=step / 2)
    assert against.kl.p_diff_rms.mean == pytest.approx(math.sqrt((p_diff**2).mean()), abs=step / 2)


@pytest.fixture(scope="module")
def llm(tiny_model: TinyModel) -> Iterator[LoopedLlama]:
    model = opened(tiny_model("llama"), 64)
    yield model
    model.close()


def kept_file(path: Path, llm: LoopedLlama, tokens: Sequence[int], n_ctx: int, chunks: int) -> Path:
    """A file as --kl-divergence-base writes it, packed by hand to the nearest step."""
    rows = log_probabilities(llm, tokens, n_ctx, chunks)
    n_vocab = rows.shape[1]
    out = [b"_logits_", struct.pack("<Iii", n_ctx, n_vocab, chunks)]
    out.append(np.asarray(tokens[: n_ctx * chunks], dtype="<i4").tobytes())
    for row in rows:
        low = max(row.min(), row.max() - 16)
        scale = (row.max() - low) / 65535
        steps = np.rint(np.maximum(row - low, 0) / scale).astype("<u2")
        out.append(struct.pack("<ff", scale, low) + steps.tobytes() + b"\xff\xff" * (n_vocab % 2))
    path.write_bytes(b"".join(out))
    return path


def test_a_kept_file_says_what_the_model_said(llm: LoopedLlama, text: str, tmp_path: Path) -> None:
    tokens = tokenize(llm, text)
    stored = KLBase.open(kept_file(tmp_path / "plain.kld", llm, tokens, 32, 4))
    llm.set_loop("2:5 k=3")
    from_file = perplexity(llm, stored.tokens, stored.n_ctx, base=stored).against
    direct = perplexity(llm, tokens, 32, 4, base=Other(llm)).against
    llm.set_loop(None)
    assert from_file is not None
    assert direct is not None
    assert from_file.kl.kl.mean == pytest.approx(direct.kl.kl.mean, abs=2e-5)
    assert from_file.kl.kl.mean > 0.001
    assert from_file.kl.same_top == direct.kl.same_top
    assert from_file.base.nll == pytest.approx(direct.base.nll, abs=16 / 65535)


def test_a_kept_file_of_another_model(llm: LoopedLlama, text: str, tmp_path: Path) -> None:
    path = kept_file(tmp_path / "plain.kld", llm, tokenize(llm, text), 32, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(GgufloopError, match=f"is cut short: {len(whole) - 1} bytes of {len(whole)}"):
        KLBase.open(path)
    path.write_bytes(whole[:8] + struct.pack("<Iii", 32, 4, 2) + bytes(4 * 64) + bytes(2 * 15 * 2 * 8))
    with pytest.raises(GgufloopError, match="has a vocabulary of 4 tokens, the model one of"):
        perplexity(llm, [1] * 64, 32, base=KLBase.open(path))


def test_bits_per_byte_counts_the_bytes_of_the_tokens_scored(llm: LoopedLlama) -> None:
    """Characters of three bytes are three tokens here, so every token is a byte."""
    result = perplexity(llm, tokenize(llm, "\N{EURO SIGN} " * 100), 64)
    assert result.n_bytes == result.n == result.chunks * 31
    assert result.model.bits_per_byte == pytest.approx(result.model.nll / math.log(2))


def test_chunks(llm: LoopedLlama, text: str) -> None:
    tokens = tokenize(llm, text)[:200]
    told: list[tuple[float, float]] = []
    result = perplexity(llm, tokens, 64, progress=lambda step: told.append((step.done, step.total)))
    assert (result.chunks, result.n, result.loop, result.against) == (3, 3 * 31, None, None)
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    one = perplexity(llm, tokens, 64, chunks=1)
    assert one.chunks == 1
    assert one.model.ppl == perplexity(llm, tokens[:64], 64).model.ppl
    with pytest.raises(GgufloopError, match="the text has 63 tokens, and a chunk is 64"):
        perplexity(llm, tokens[:63], 64)
    with pytest.raises(UsageError, match="chunks of 3 tokens"):
        perplexity(llm, tokens, 3)


def test_memory_does_not_grow_with_the_text(llm: LoopedLlama, text: str) -> None:
    """Ten chunks more add their tokens' numbers, under a quarter of what their logits or packed distributions are."""
    tokens = tokenize(llm, text)

    def peak(chunks: int) -> int:
        tracemalloc.start()
        perplexity(llm, tokens, 64, chunks, base=Other(llm))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    llm.set_loop("2:5 k=2")
    try:
        peak(2)
        assert peak(12) - peak(2) < 0.25 * 10 * 31 * llm.n_vocab() * 2
    finally:
        llm.set_loop(None)


# The command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Run:
    """run("--text", ...) on the tiny model; exit code, stdout and stderr."""
    model = str(tiny_model("llama"))

    def call(*args: object, command: str = "perplexity", name: str = model) -> tuple[int, str, str]:
        return cli(command, name, "-t", "1", *args)

    return call


@pytest.fixture
def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(text[:2000])
    return path


def test_what_is_printed(run: Run, file: Path) -> None:
    code, out, err = run("--text", file, "-c", 64, "--chunks", 5, command="ppl")
    assert (code, err) == (0, "")
    assert re.fullmatch(
        rf"model   llama\.gguf, no loop\ntext    {re.escape(str(file))}, n = 155 tokens in 5 chunks of 64\n\n"
        r"Final estimate: PPL = \d+\.\d{4} \+/- \d+\.\d{5}\nbits per byte: \d+\.\d{4}\n",
        out,
    )


def test_a_loop_is_compared_with_the_plain_model(run: Run, file: Path) -> None:
    code, out, _ = run("--text", file, "-c", 64, "--chunks", 5, "--window", "2:5", "--K", 3)
    assert code == 0
    pattern = r"over chunks: ([-+.\d]+) \[([-+.\d]+), ([-+.\d]+)\] nats per token, n = 5 chunks\n"
    change = re.search(pattern, out)
    assert change is not None
    mean, low, high = map(float, change.groups())
    assert low < mean < high
    same = low <= 0 <= high
    assert ("no difference can be concluded" in out) == same
    assert ("better than the base.\n" in out) == (high < 0)
    theirs, ours = out.split("\n====== Errors over 5 chunks ======\n")
    assert theirs.endswith(" %\n")
    assert re.search(r"\nMean    KLD: .*\n", theirs)
    (mean, wide), (same, narrow) = (re.search(r"Mean    KLD: +(\S+) . +(\S+)", s).groups() for s in (ours, theirs))  # type: ignore[union-attr]
    assert mean == same
    assert wide != narrow
    assert ours.endswith("Fewer than 10 of 155 tokens lie beyond percentiles above 93.55 or below 6.452 %.\n")
    code, out, _ = run("--text", file, "-c", 64, "--window", "2:5", "--kl-base", "none")
    assert code == 0
    assert "KLD" not in out


def test_programs_get_every_number(run: Run, file: Path) -> None:
    args = ("--text", file, "-c", 64, "--chunks", 4, "--window", "2:5", "--K", 2)
    data = json.loads(run(*args, "-o", "json")[1])
    assert data["schema_version"] == 1
    assert re.fullmatch("[0-9a-f]{64}", data["model_sha256"])
    assert data["base"]["sha256"] == data["model_sha256"]
    assert (data["loop"], data["n"], data["chunks"], data["n_ctx"]) == (str(LoopSpec.parse("2:5 k=2")), 124, 4, 64)
    assert "patch_id" in data
    assert set(data["kl_statistics"]["kl_at"]) >= {"0.0", "0.5", "0.999"}
    assert data["kl_over_chunks"]["kl"]["mean"] == pytest.approx(data["kl_statistics"]["kl"]["mean"])
    rows = [json.loads(line) for line in run(*args, "-o", "jsonl")[1].splitlines()]
    assert [row["loop"] for row in rows] == ["plain", data["loop"]]
    assert rows[1]["ppl"] == data["ppl"]
    assert rows[0]["ppl"] == data["base"]["ppl"]
    assert rows[1]["gain"] == data["gain"]["over_chunks"]["mean"]
    assert rows[1]["kl"] == data["kl_statistics"]["kl"]["mean"]
    assert rows[0]["kl"] is None
    assert run(*args, "-o", "md")[1].count("\n") == 4
    assert run(*args, "-o", "csv")[1].count("\n") == 3


def test_another_model_as_the_base(run: Run, file: Path, tiny_model: TinyModel) -> None:
    """The same model as its own base: nothing changes. Another one: as looked from both sides."""
    args = ("--text", file, "-c", 64, "--chunks", 4, "-o", "json")
    same = json.loads(run(*args, "--kl-base", tiny_model("llama"))[1])
    assert same["gain"]["over_chunks"]["mean"] == 0
    assert same["kl_statistics"]["same_top"]["mean"] == 1
    there = json.loads(run(*args, "--kl-base", tiny_model("qwen3"))[1])
    back = json.loads(run(*args, "--kl-base", tiny_model("llama"), name=str(tiny_model("qwen3")))[1])
    assert there["base"]["ppl"] == back["ppl"]
    assert there["gain"]["over_tokens"]["mean"] == -back["gain"]["over_tokens"]["mean"]
    assert there["kl_statistics"]["kl"]["mean"] > 0.1


def test_a_kept_file_brings_its_text(run: Run, file: Path, llm: LoopedLlama, tmp_path: Path, text: str) -> None:
    kept = kept_file(tmp_path / "plain.kld", llm, tokenize(llm, text), 32, 4)
    code, out, _ = run("--kl-base", kept, "--window", "2:5")
    assert code == 0
    assert "n = 60 tokens in 4 chunks of 32" in out
    assert run("--kl-base", kept, "--text", file)[::2] == (
        2,
        f"error: {kept} brings its own text and -c 32.\n  leave out --text, --hf-dataset and -c.\n",
    )


def test_bad_input(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short, empty, latin = tmp_path / "short.txt", tmp_path / "empty.txt", tmp_path / "latin.txt"
    short.write_text("too short")
    empty.write_text("\n")
    latin.write_bytes(b"caf\xe9")
    known = (
        "give --text a file or one of pydoc, sdist-docs, brown, wiki, c4, code, multilingual, technical; "
        "or --hf-dataset."
    )
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((), 2, f"no text is given.\n  {known}"),
        (("--text", short, "--hf-dataset", "wikitext"), 2, f"the text is given twice.\n  {known}"),
        (("--text", short), 1, "the text has 9 tokens, and a chunk is 512.\n  give a longer text, or a smaller -c."),
        (("--text", empty), 1, f"{empty} is empty.\n  give a text of some thousand words."),
        (("--text", latin), 1, f"{latin} is not UTF-8 text: byte 0xe9 at position 3.\n"
                               "  convert it, for example with iconv -t UTF-8."),
        (("--text", tmp_path / "no"), 1, f"cannot read {tmp_path / 'no'}: No such file or directory.\n"
                                         "  give --text a text file, or one of pydoc, sdist-docs, brown, "),
        (("--text", short, "-c", 3), 2, "-c 3 leaves nothing to score.\n  give 4 or more."),
        (("--text", short, "-o", "xml"), 2, "output form 'xml' is not known.\n  known: text, json, jsonl, csv, md."),
        (("--text", short, "--kl-base", "plain"), 2, "the plain model compared with itself differs nowhere.\n"
                                                     "  give --window as well."),
        (("--hf-dataset", "wiki text"), 2, "data set 'wiki text' is not USER/REPO:FILE.\n"
                                           "  write it so, or take 'wikitext'."),
    ]  # fmt: skip
    for args, code, message in cases:
        found = run(*args)
        assert found[:2] == (code, ""), args
        assert found[2].startswith(f"error: {message}"), found[2]
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))
    assert run("--text", "sdist-docs")[2] == (
        f"error: the source archive {library.SDIST} is not in the cache.\n"
        "  run: ggufloop build; or take --text pydoc.\n"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/meminfo")
def test_a_context_that_does_not_fit(run: Run, file: Path) -> None:
    """Asked for, it would end the process, not raise."""
    code, out, err = run("--text", file, "-c", 2_000_000_000)
    assert (code, out) == (1, "")
    assert re.fullmatch(
        r"error: .* needs .* \(weights .*, K/V cache of 2000000000 tokens .*\), and \d+\.\d GB of memory are free\.\n"
        r"  give a smaller -c; GGUFLOOP_MEMORY_CHECK=off tries it all the same\.\n",
        err,
    )


def test_named_texts() -> None:
    assert len(corpus.local("pydoc").text) > 300_000
    if (library.cache_dir() / "sdist" / library.SDIST).is_file():
        assert "llama.cpp" in corpus.local("sdist-docs").text


def zipped(name: str, text: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, text)
    return out.getvalue()


def test_a_data_set_of_the_hub(tiny_model: TinyModel, tmp_path: Path, text: str) -> None:
    """In a process of its own, which meets the stand-in from its first import of huggingface-hub."""
    repos = {
        "datasets/ggml-org/ci": {"wikitext-2-raw-v1.zip": zipped("wikitext-2-raw/wiki.test.raw", text[:2000])},
        "datasets/user/texts": {"a/b.txt": text[:2000].encode()},
    }
    with HubServer(repos) as server:
        environment = {
            **os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }  # fmt: skip

        def run(name: str, **more: str) -> tuple[int, str]:
            words = ["ppl", str(tiny_model("llama")), "-c", "64", "--chunks", "2", "-t", "1", "--hf-dataset", name]
            done = subprocess.run(
                [sys.executable, "-c", "from ggufloop.cli import main; main()", *words],
                env=environment | more, capture_output=True, text=True,
            )  # fmt: skip
            return done.returncode, done.stdout if done.returncode == 0 else done.stderr.splitlines()[-2]

        code, out = run("wikitext")
        assert code == 0
        assert "text    wikitext, n = 62 tokens" in out
        assert run("user/texts:a/b.txt")[1].splitlines()[3:] == out.splitlines()[3:]
        asked = len(server.requests)
        assert run("wikitext", HF_HUB_OFFLINE="1")[1] == out
        assert len(server.requests) == asked
        code, line = run("user/texts:c.txt")
        assert (code, line) == (1, "error: Hugging Face data set user/texts has no file c.txt.")
        code, line = run("user/none:c.txt")
        assert (code, line) == (1, "error: Hugging Face has no repository user/none, or it is private.")
        code, line = run("ggml-org/ci:wikitext-2-raw-v1.zip:none.txt")
        assert line == "error: wikitext-2-raw-v1.zip of ggml-org/ci is no zip archive with none.txt in it."
    code, line = run("user/texts:other.txt", HF_ENDPOINT="http://127.0.0.1:9")
    assert code == 1
    assert line.startswith("error: cannot download other.txt of user/texts:"), line
