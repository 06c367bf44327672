"""Model files by their header alone: what is said of good ones, of bad ones, and the K/V memory llama.cpp confirms."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGUFReader, GGUFWriter
from support import tiny
from support.cli import Cli

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.models import architectures, registry
from ggufloop.models import gguf as modelfile
from ggufloop.models.gguf import check_model_file, read_header, read_model
from ggufloop.models.info import KV_PREDICTED, KV_TYPES, describe, plain_kv_bytes

TinyModel = Callable[[str], Path]


# good files

TEXT = """\
file          {path}
name          {name}
architecture  gemma3
layers        8, width 64
attention     4 heads, 2 of K and V, size 32
              7 of 8 layers see the last 16 tokens only
context       {context} tokens
vocabulary    {vocabulary} tokens ({tokenizer})
chat template {template}
weights       {mib:.1f} MiB, 32.00 bits per weight in truth

| type | tensors | weights | MiB | bits per weight |
| ---- | ------: | ------: | --: | --------------: |
| F32  | {tensors:>7} | {weights:>7} | {mib:.1f} |              32 |

can loop      yes, windows within 1:7
suggested     --window 3:5 (rule of thumb: 4 layers centred at 0.48 of the depth), which rests on {rests}
K/V cache     0.5 MiB for 256 tokens in f16
memory        {memory:.1f} MiB without a loop, compute buffers aside
"""
LOOPED = """
loop          4:6 k=3 kv=each
evaluations   3 of the window, 4 layers more per looped token
cost          1.50 times a plain token's
K/V cache     0.8 MiB, 0.2 MiB more
memory        {memory:.1f} MiB with the loop
"""


def test_text(tiny_model: TinyModel, cli: Cli) -> None:
    path = tiny_model("gemma3")
    reader = GGUFReader(path)  # another reader says what is in the file
    weights = sum(int(t.n_elements) for t in reader.tensors)
    name, template = reader.get_field("general.name"), reader.get_field("tokenizer.chat_template")
    mib = weights * 4 / 2**20
    plain = TEXT.format(
        path=path,
        name=name.contents() if name else "none",
        context=reader.get_field("gemma3.context_length").contents(),
        vocabulary=len(reader.get_field("tokenizer.ggml.tokens").data),
        tokenizer=reader.get_field("tokenizer.ggml.model").contents(),
        template="yes" if template else "no",
        tensors=len(reader.tensors),
        weights=weights,
        mib=mib,
        memory=mib + 0.5,
        rests="a rule of depth from published work, not on a gain measured on this file: it may harm. "
        "`ggufloop sweep` measures.",
    )
    assert cli("inspect", path, "-c", 256) == (0, plain, "")
    looped = plain + LOOPED.format(memory=mib + 0.75)
    assert cli("inspect", "-m", path, "-c", 256, "--window", "4:6", "--kv", "each") == (0, looped, "")


def test_json(tiny_model: TinyModel, cli: Cli) -> None:
    code, out, err = cli(
        "inspect", tiny_model("deepseek2"), "-o", "json", "-c", 300, "--window", "auto", "--kv", "each"
    )
    data = json.loads(out)
    assert (code, err) == (0, f"note: --window 2:4 rests on {data['suggested_window_rests_on']}\n")
    per_layer = 64 * 2 * 512  # one row of latent and rotary values, f16, 300 tokens padded to 512
    assert data["kv_bytes_per_layer"] == [per_layer] * 6
    assert data["latent_kv"] is True
    assert (data["experts"], data["experts_used"]) == (8, 2)
    assert (data["suggested_window"], data["can_loop"], data["reason"]) == ([2, 4], True, None)
    assert data["suggested_window_rests_on"].startswith("a rule of depth from published work, not on a gain measured")
    assert data["loop"] == {
        "spec": "2:4 k=3 kv=each", "window": [2, 4], "evaluations": 3, "extra_layer_evaluations": 4,
        "relative_cost": 1 + 4 / 6, "extra_kv_bytes": 2 * 2 * per_layer,
    }  # fmt: skip
    assert data["schema_version"] == 1


def test_every_flag_of_a_loop_arrives(tiny_model: TinyModel, cli: Cli) -> None:
    flags = "--window 2:4 --K 4 --mode layer --kv last --routing free --decode entropy:1.5"
    more = "--loop-attention 8 --loop-sinks 2 --halt 0.01"
    code, out, err = cli("inspect", tiny_model("qwen3"), *flags.split(), *more.split())
    assert (code, err) == (0, "")
    spec = "2:4 k=4 mode=layer kv=last decode=entropy:1.5 routing=free attention=8 sinks=2 halt=0.01"
    assert f"loop          {spec}\n" in out
    assert "cost          2.33 times a plain token's at most\n" in out


@pytest.mark.model
def test_real_models(smollm2: Path, gemma: Path, cli: Cli) -> None:
    code, out, err = cli("inspect", smollm2, "--window", "auto", "--K", 6, "--passes", 3)
    rests = f"rests on {registry.rests_on(smollm2)}"
    assert (code, err) == (0, f"note: --window 12:16 {rests}\n")
    assert (
        out
        == f"""\
file          {smollm2}
name          Smollm2 135M 8k Lc100K Mix1 Ep2
architecture  llama
layers        30, width 576
attention     9 heads, 3 of K and V, size 64
context       8192 tokens
vocabulary    49152 tokens (gpt2)
chat template yes
weights       92.1 MiB, Q4_1 by its label, 5.74 bits per weight in truth

| type | tensors |   weights |  MiB | bits per weight |
| ---- | ------: | --------: | ---: | --------------: |
| Q4_1 |     210 | 106168320 | 63.3 |               5 |
| Q8_0 |       1 |  28311552 | 28.7 |             8.5 |
| F32  |      61 |     35136 |  0.1 |              32 |

can loop      yes, windows within 1:29
suggested     --window 12:16 (ours: the gentlest of 12:16, 14:18 and 20:24 by NLL on 512 tokens, K=3), which {rests}
K/V cache     90.0 MiB for 4096 tokens in f16
memory        182.1 MiB without a loop, compute buffers aside

loop          12:16 k=6 passes=3 (ours: the gentlest of 12:16, 14:18 and 20:24 by NLL on 512 tokens, K=3)
evaluations   3 of the window, 8 layers more per looped token
cost          1.27 times a plain token's
K/V cache     90.0 MiB, no more
memory        182.1 MiB with the loop
"""
    )
    info = describe(gemma)
    assert (info.label, round(info.bits_per_weight, 2), info.chat_template) == ("Q4_K_M", 7.36, None)
    assert [il for il, layer in enumerate(info.layers) if not layer.sliding] == [5, 11, 17]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_header_agrees_with_gguf(tiny_model: TinyModel, family: str) -> None:
    path = tiny_model(family)
    header, reader = read_header(path), GGUFReader(path)
    assert [(t.name, t.type, t.shape, t.nbytes) for t in header.tensors] == [
        (t.name, t.tensor_type.name, tuple(int(n) for n in t.shape), int(t.n_bytes)) for t in reader.tensors
    ]
    for key, value in header.metadata.items():
        contents = reader.get_field(key).contents()
        assert value == contents or value.length == len(contents)
    assert {*header.metadata, "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"} == {*reader.fields}


# K/V memory, as llama.cpp logs it

CONFIGURATIONS = [
    {"n_ctx": 100},
    {"n_ctx": 1000, "type_k": "q8_0", "type_v": "q8_0", "flash_attn": True},
    {"n_ctx": 600, "type_k": "q5_1", "type_v": "q5_1", "flash_attn": True, "swa_full": False, "n_ubatch": 64},
    {"n_ctx": 1200, "n_seq_max": 3, "swa_full": False},
    {"n_ctx": 1200, "n_seq_max": 3, "kv_unified": True, "swa_full": False, "type_k": "bf16", "type_v": "bf16"},
    {"n_ctx": 300, "type_k": "f32", "type_v": "f32", "swa_full": False},
]
PROGRAM = """
import ctypes, json, re, sys
from ggufloop.engine import llama_cpp
jobs = json.load(sys.stdin)
log = []
keep = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text.decode()))
llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
sizes = []
for path, configurations in jobs:
    model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
    for c in configurations:
        p = llama_cpp.llama_context_default_params()
        p.n_batch = p.n_ubatch = 512
        for name, value in c.items():
            setattr(p, {"flash_attn": "flash_attn_type"}.get(name, name), value)
        p.flash_attn_type = int(c.get("flash_attn", False))
        log.clear()
        context = llama_cpp.llama_init_from_model(model, p)
        sizes.append([float(x) for x in re.findall(r"size = +([0-9.]+) MiB [(]", "".join(log))])
        llama_cpp.llama_free(context)
json.dump(sizes, sys.stdout)
"""


def test_kv_memory_is_what_llama_cpp_allocates(tiny_model: TinyModel) -> None:
    numbers = {"f32": 0, "f16": 1, "q5_1": 7, "q8_0": 8, "bf16": 30}
    paths = [tiny_model(family) for family in tiny.FAMILIES if family in KV_PREDICTED]
    coded = [{k: numbers[v] if k.startswith("type") else v for k, v in c.items()} for c in CONFIGURATIONS]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([(str(p), coded) for p in paths]),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logged = iter(json.loads(done.stdout))
    for path in paths:
        info = describe(path)
        for c in CONFIGURATIONS:
            expected = sum(plain_kv_bytes(info, **c)) / 2**20
            caches = next(logged)
            assert len(caches) == (2 if info.sliding_window else 1)
            assert sum(caches) == pytest.approx(expected, abs=0.0051 * len(caches)), (path.name, c)


def test_kv_memory_of_a_loop_is_what_the_library_adds(tiny_model: TinyModel) -> None:
    from ggufloop.engine import LoopedLlama  # not at the top: the other tests here need no backend

    for family in ("llama", "gemma3", "deepseek2"):
        path = tiny_model(family)
        spec = LoopSpec(tiny.FAMILIES[family].window, k=4, kv="each")
        for swa_full in (True, False):
            sizes = plain_kv_bytes(describe(path), 700, swa_full=swa_full)
            llm = LoopedLlama(path, n_ctx=700, swa_full=swa_full, verbose=False)
            assert llm.memory_bytes() == sum(sizes), family
            llm.set_loop(spec)
            assert llm.memory_bytes() == sum(sizes) + spec.extra_kv_bytes(sizes), family
            llm.close()


def test_kv_settings_that_cannot_be(tiny_model: TinyModel) -> None:
    plain, latent = describe(tiny_model("llama")), describe(tiny_model("deepseek2"))
    for info, settings, message in (
        (plain, {"type_k": "q9_0"}, "K cache type 'q9_0' is not known."),
        (latent, {"type_k": "q8_0"}, "cache types q8_0 and f16 differ, but this model keeps K and V in one row."),
    ):
        with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
            plain_kv_bytes(info, 512, **settings)
    with pytest.raises(UsageError, match=r"^context -1 is negative\.$"):
        plain_kv_bytes(plain, -1)
    assert set(KV_TYPES) >= {"f16", "q8_0", "q4_0"}


# bad files


def gguf(*keys: bytes, version: int = 3, tensors: int = 0, n_keys: int | None = None, rest: bytes = b"") -> bytes:
    return (
        b"GGUF" + struct.pack("<IQQ", version, tensors, len(keys) if n_keys is None else n_keys) + b"".join(keys) + rest
    )


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def number(key: bytes, value: int) -> bytes:
    return text(key) + struct.pack("<II", 4, value)


def words(key: bytes, *values: bytes) -> bytes:
    return text(key) + struct.pack("<IIQ", 9, 8, len(values)) + b"".join(map(text, values))


def tensor(name: bytes, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


AGAIN = "it was damaged on the way or on disk: download or copy it again."
GIVE = "give a model in GGUF format."
CONVERT = "get it from another source, or convert it again."
QWEN = (text(b"general.architecture") + struct.pack("<I", 8) + text(b"qwen3"), number(b"qwen3.embedding_length", 64),
        number(b"qwen3.context_length", 64))  # fmt: skip
ONE = {"tensors": 1, "rest": tensor(b"t", 1) + bytes(64)}

BAD = {
    "empty": (b"", "is empty.", AGAIN),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(99), "is not a GGUF file: it looks like a PNG image.", GIVE),
    "flipped magic": (b"FUGG" + bytes(99),
                      "is not a GGUF file: it looks like a GGUF file with its magic reversed.", GIVE),
    "flipped bit": (b"GGUG" + bytes(99), "is not a GGUF file: it starts with b'GGUG' instead of b'GGUF'.", GIVE),
    "wheel": (b"PK\x03\x04" + bytes(9), "is not a GGUF file: it looks like a zip archive (a wheel, or a PyTorch"
              " checkpoint).", GIVE),
    "safetensors": (struct.pack("<Q", 99) + b'{"a":', "is not a GGUF file: it looks like a safetensors file.", GIVE),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid",
            "is not a GGUF file: it looks like a git-lfs pointer, not the file itself.", GIVE),
    "page": (b"<!DOCTYPE html>", "is not a GGUF file: it looks like an HTML or XML page.", GIVE),
    "short": (b"GG", "is not a GGUF file: it starts with b'GG' instead of b'GGUF'.", GIVE),
    "magic alone": (b"GGUF", "is truncated: its header is incomplete after 4 bytes.", AGAIN),
    "version 1": (gguf(version=1), "has GGUF version 1; versions 2 and 3 can be read.", "convert it again."),
    "big-endian": (gguf(version=3 << 24), "is a big-endian GGUF file; only little-endian ones run here.",
                   "convert it again."),
    "tensor count": (gguf(tensors=2**63), f"is corrupt: it claims {2**63} tensors.", AGAIN),
    "key count": (gguf(n_keys=2**40), f"is corrupt: it claims {2**40} metadata keys.", AGAIN),
    "string length": (gguf(struct.pack("<Q", 2**62), n_keys=1),
                      f"is corrupt: it claims {2**62} bytes for one string.", AGAIN),
    "array length": (gguf(text(b"a") + struct.pack("<IIQ", 9, 8, 2**50)),
                     f"is corrupt: it claims {2**50} entries in 'a'.", AGAIN),
    "array cut off": (gguf(text(b"a") + struct.pack("<IIQ", 9, 8, 2**20)),
                      "is truncated: its header is incomplete after 49 bytes.", AGAIN),
    "key type": (gguf(text(b"a") + struct.pack("<I", 77)), "is corrupt: key 'a' has unknown type 77.", AGAIN),
    "key twice": (gguf(number(b"a", 1), number(b"a", 1)), "is corrupt: metadata key 'a' is given twice.", AGAIN),
    "key empty": (gguf(number(b"", 1)), "is corrupt: a metadata key is empty.", AGAIN),
    "alignment": (gguf(number(b"general.alignment", 24)),
                  "is corrupt: its alignment is 24, not a power of two.", AGAIN),
    "token twice": (gguf(words(b"tokenizer.ggml.tokens", b"a", b"b", b"a")),
                    "is corrupt: 1 of its tokens are there twice.", AGAIN),
    "tensor type": (gguf(tensors=1, rest=tensor(b"t", 32, kind=4)),
                    "is corrupt: tensor 't' has unknown type 4.", AGAIN),
    "tensor rows": (gguf(tensors=1, rest=tensor(b"t", 33, kind=8)),
                    "is corrupt: tensor 't' has rows of 33, not a multiple of the 32 of Q8_0.", AGAIN),
    "tensor dimensions": (gguf(tensors=1, rest=tensor(b"t", 1, 1, 1, 1, 1)), "is corrupt: tensor 't' has 5 dimensions.",
                          AGAIN),
    "tensor shape": (gguf(tensors=1, rest=tensor(b"t", 2**40, 2**40)),
                     f"is corrupt: tensor 't' has the shape ({2**40}, {2**40}).", AGAIN),
    "tensor name": (gguf(tensors=1, rest=tensor(b"t" * 64, 1)),
                    "is corrupt: the tensor name 'tttttttttttttttttttt'... is longer than 63 bytes.", AGAIN),
    "tensor offset": (gguf(tensors=1, rest=tensor(b"t", 1, offset=32)), "is corrupt: tensor 't' is at 32 instead of 0.",
                      AGAIN),
    "tensor twice": (gguf(tensors=2, rest=tensor(b"t", 1) + tensor(b"t", 1, offset=32)),
                     "is corrupt: tensor 't' is given twice.", AGAIN),
    "no weights": (gguf(number(b"a", 1)),
                   "has no tensors: it holds a vocabulary only.", "give a file with the weights."),
    "no architecture": (gguf(**ONE), "is no model that can run: it does not say its architecture.", CONVERT),
    "no layers": (gguf(*QWEN, **ONE), "is no model that can run: its qwen3.block_count is missing.", CONVERT),
    "too many layers": (gguf(*QWEN, number(b"qwen3.block_count", 513), **ONE),
                        "is no model that can run: its qwen3.block_count is 513, not in 1 to 512.", CONVERT),
    "experts": (gguf(*QWEN, number(b"qwen3.block_count", 4), number(b"qwen3.expert_count", 4), **ONE),
                "is no model that can run: it uses 0 of 4 experts.", CONVERT),
}  # fmt: skip


@pytest.mark.parametrize(("data", "message", "hint"), BAD.values(), ids=BAD)
def test_bad_files(tmp_path: Path, cli: Cli, data: bytes, message: str, hint: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    assert cli("inspect", path) == (1, "", f"error: {path} {message}\n  {hint}\n")


def test_files_that_are_not_there(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "a.gguf"
    hint = "check the path; `ggufloop list` shows the models known by name."
    assert cli("inspect", path) == (1, "", f"error: model file {path} does not exist.\n  {hint}\n")
    assert cli("inspect", tmp_path) == (
        1, "", f"error: {tmp_path} is a folder, not a model file.\n  name the .gguf file in it.\n"
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(GgufloopError, match=r"is not a regular file\.$"):
        check_model_file(tmp_path / "pipe.gguf")


def test_truncated_files(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    data = tiny_model("qwen3").read_bytes()
    path = tmp_path / "cut.gguf"
    path.write_bytes(data[:1000])
    message = f"error: {path} is truncated: its header is incomplete after 1000 bytes.\n  {AGAIN}\n"
    assert cli("inspect", path) == (1, "", message)
    end = read_header(tiny_model("qwen3")).data_end
    path.write_bytes(data[: end - 1])
    message = f"error: {path} is truncated: {end} bytes expected, it has {end - 1}.\n  {AGAIN}\n"
    assert cli("inspect", path) == (1, "", message)
    path.write_bytes(data[:end])
    check_model_file(path)


def test_corrupted_files_end_in_an_error_or_are_fine(tiny_model: TinyModel, tmp_path: Path) -> None:
    data = tiny_model("deepseek2").read_bytes()
    header = read_header(tiny_model("deepseek2"))
    head = header.data_end - sum(t.nbytes for t in header.tensors)
    rng = random.Random(1)
    errors = []
    for i in range(400):
        damaged = bytearray(data)
        at, n = rng.randrange(head), rng.randrange(1, 9)
        if i % 4 == 0:
            damaged[at] ^= 1 << rng.randrange(8)
        elif i % 4 == 1:
            damaged[at : at + n] = rng.choice((b"\xff", b"\0", b"\x7f")) * n
        elif i % 4 == 2:
            del damaged[at : at + n]
        else:
            damaged[at:at] = rng.randbytes(n)
        path = tmp_path / f"{i}.gguf"
        path.write_bytes(damaged)
        try:
            describe(path)
        except GgufloopError as e:
            errors.append(e)
        path.unlink()
    assert 200 < len(errors) < 380  # what hits a name or a token may do no harm
    assert all(e.hint and "\n" not in e.message for e in errors)


def write_split(folder: Path, count: int = 2) -> list[Path]:
    paths = []
    for i in range(count):
        path = folder / f"m-{i + 1:05d}-of-{count:05d}.gguf"
        writer = GGUFWriter(path, "qwen3")
        if i == 0:
            writer.add_block_count(3)
            writer.add_embedding_length(32)
            writer.add_context_length(64)
            writer.add_head_count(1)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", count)
        writer.add_tensor(f"t{i}", tiny.np.zeros(32, dtype="float32"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        paths.append(path)
    return paths


def test_split_models(tmp_path: Path) -> None:
    first, second = write_split(tmp_path)
    assert [h.path for h in read_model(first)] == [first, second]
    assert describe(first).elements == 64

    def message(path: Path) -> str:
        with pytest.raises(GgufloopError) as e:
            check_model_file(path)
        return e.value.message

    assert message(second) == f"{second} is part 2 of 2."
    renamed = first.rename(tmp_path / "m.gguf")
    assert message(renamed) == f"{renamed} is one of 2 parts by its content, but of 1 by its name."
    renamed.rename(first)
    second.unlink()
    assert message(first) == f"{first} is the first of 2 parts; missing: m-00002-of-00002.gguf."


# architectures


@pytest.mark.parametrize(
    ("arch", "reason", "hint"),
    [
        ("eagle3", "it is a draft model without a stack of its own", "run it without --window. docs/architectures.md "),
        ("bert", "it computes embeddings, not the next token", "run it without --window. "),
        ("qwen33", "the pinned llama.cpp does not know it", "did you mean qwen3? docs/architectures.md lists all "),
        ("?", "the pinned llama.cpp does not know it", "run it without --window. "),
    ],
)
def test_architectures_that_cannot_loop(arch: str, reason: str, hint: str) -> None:
    with pytest.raises(GgufloopError) as e:
        architectures.check_architecture(arch)
    assert e.value.message == f"architecture {arch} cannot loop: {reason}."
    assert e.value.hint.startswith(hint)


def test_inspect_of_an_architecture_that_cannot_loop(tiny_model: TinyModel, tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny_model("gemma3").read_bytes().replace(b"gemma3", b"eagle3"))
    code, out, err = cli("inspect", path)
    assert (code, err) == (0, "")
    assert out.endswith("\ncan loop      no: it is a draft model without a stack of its own\n")
    assert "architecture  eagle3\n" in out
    assert cli("inspect", path, "--window", "2:4")[0] == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--window", "2:6"], "window 2:6 touches layer 5, the last one, which cannot be looped.\n  use 1:5 at most."),
        (["--K", "3"], "--K needs --window A:B (or --window auto): without a window nothing loops."),
        (["--loop-sinks", "4"], "--loop-sinks needs --window A:B (or --window auto): without a window nothing loops."),
        (["--window", "2:4", "--loop-sinks", "4"], "sinks 4 needs attention.\n  say how many last positions"),
        (["-o", "jsn"], "output form 'jsn' is not known.\n  did you mean json? Known: text, json."),
        (["-ctv", "q8"], "'q8' is not known; did you mean q8_0? Known: f32, "),
    ],
)
def test_bad_flags(tiny_model: TinyModel, cli: Cli, args: list[str], message: str) -> None:
    code, out, err = cli("inspect", tiny_model("qwen3"), *args)
    assert (code, out) == (2, "")
    assert message in err


def test_a_token_longer_than_the_file_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "long.gguf"
    array = text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3)
    path.write_bytes(gguf(array, struct.pack("<Q", 2**40), n_keys=1) + bytes(2**25))
    modelfile.type_sizes()
    tracemalloc.start()
    with pytest.raises(GgufloopError, match=r"is truncated: its header is incomplete after \d+ bytes"):
        modelfile.read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**22
