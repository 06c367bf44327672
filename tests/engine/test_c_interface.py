"""The patch's C interface refuses what Python refuses, in the same words, and then leaves the context as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support import PYTHONPATH, archs, contexts, headers, zoo

from ggufloop.backend import capi
from ggufloop.backend.library import patches_dir
from ggufloop.engine import LoopedLlama, llama_cpp
from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec
from ggufloop.models.architectures import WINDOW_RULES, check_loop, refusal
from ggufloop.models.gguf import read_header

LIB = capi.declare(llama_cpp.llama_cpp._lib)
TOKENS = np.random.default_rng(3).integers(0, 250, 20).tolist()

RULED = [name for name, row in archs.ROWS.items() if row.arch in WINDOW_RULES]
INDEXED = [name for name, row in archs.ROWS.items() if row.arch in ("deepseek32", "dots3note", "glm-dsa", "minimax-m3")]
SETTINGS = ["k=2", "k=2 kv=last", "k=2 kv=frozen", "k=2 attention=8", "k=2 kv=each"]


def load(path: Path, **settings: object) -> LoopedLlama:
    defaults = {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    return LoopedLlama(path, **(defaults | settings))  # type: ignore[arg-type]


def set_in_c(llm: LoopedLlama, loop: LoopSpec | None) -> str:
    """What the C function says to a plan; nothing if it takes it."""
    code = LIB.llama_loop_set(llm.ctx, capi.params(loop) if loop else None)
    return LIB.llama_loop_error().decode() if code else ""


def said_by_python(llm: LoopedLlama, loop: LoopSpec) -> str:
    try:
        llm.check(loop)
    except GgufloopError as e:
        return f"{e.message}\n{e.hint}"
    return ""


@pytest.mark.parametrize("name", sorted({*RULED, *INDEXED}))
def test_c_refuses_the_windows_that_python_refuses_in_the_same_words(name: str, tmp_path: Path) -> None:
    """All windows of the tiny model, one past its end; fails if a rule is missing in either language or differs."""
    row = archs.ROWS[name]
    path = zoo.write(tmp_path / "model.gguf", row)
    llm = load(path)
    refused = 0
    for first in range(1, row.n_layer):
        for last in range(first + 1, row.n_layer + 2):
            for settings in SETTINGS[:4] if last == first + 1 else SETTINGS[:1]:
                loop = LoopSpec.parse(f"{first}:{last} {settings}")
                python = said_by_python(llm, loop)
                assert set_in_c(llm, loop) == python, str(loop)
                refused += bool(python)
    assert refused >= row.n_layer, "the windows that touch the end at least"
    llm.close()


RULE_METADATA: dict[str, tuple[str, dict[str, object]]] = {
    "gemma4": ("gemma4", {"attention.shared_kv_layers": 2}),
    "deci": ("deci", {"feed_forward_length": [96, 96, 96, 0, 96, 96]}),
    "rwkv6": ("rwkv6", {"rescale_every_n_layers": 3}),
    "qwen3vl": ("qwen3vl", {"n_deepstack_layers": 2}),
    "granite": ("granite", {"deepstack_mapping": [-1, -1, 0, -1, -1, -1]}),
    "kimi-k3": ("kimi-k3", {"attn_res.block_size": 3}),
}


def test_some_model_breaks_every_rule() -> None:
    """The tests that compare the languages would be silent about a rule that none of their models meets."""
    met = set()
    rows = [archs.ROWS[name] for name in RULED]
    rows += [
        archs.Row(**{**vars(archs.ROWS[n]), "meta": {**archs.ROWS[n].meta, **m}}) for n, m in RULE_METADATA.values()
    ]
    for row in rows:
        metadata = row.metadata(260)
        for window in ((a, b) for a in range(1, row.n_layer - 1) for b in range(a + 1, row.n_layer)):
            for rule, _, _ in WINDOW_RULES[row.arch]:
                if rule(window, row.n_layer, lambda key, other, r=row, m=metadata: m.get(f"{r.arch}.{key}", other)):
                    met.add(rule)
    assert met == {rule for rules in WINDOW_RULES.values() for rule, _, _ in rules}


@pytest.mark.parametrize("arch", sorted(RULE_METADATA))
def test_metadata_that_rules_out_windows_does_so_in_c_too(arch: str, tmp_path: Path) -> None:
    """As above with the metadata that makes each rule bite."""
    name, more = RULE_METADATA[arch]
    base = archs.ROWS[name]
    row = archs.Row(**{**vars(base), "meta": {**base.meta, **more}})
    path = zoo.write(tmp_path / "model.gguf", row)
    llm = load(path)
    metadata = read_header(path).metadata
    said = set()
    for first in range(1, row.n_layer - 1):
        for last in range(first + 1, row.n_layer):
            loop = LoopSpec.parse(f"{first}:{last} k=2")
            try:
                check_loop(arch, loop, row.n_layer, metadata)
                python = ""
            except GgufloopError as e:
                python = f"{e.message}\n{e.hint}"
            assert set_in_c(llm, loop) == python, str(loop)
            said.add(bool(python))
    assert said == {True, False}
    llm.close()


@pytest.mark.parametrize("name", [name for name, row in archs.ROWS.items() if refusal(row.arch)])
def test_an_architecture_that_cannot_loop_is_refused_in_c(name: str, tmp_path: Path) -> None:
    """Those whose graph would pass through the window, and compute something else than the loop."""
    llm = load(zoo.write(tmp_path / "model.gguf", archs.ROWS[name]))
    loop = LoopSpec.parse("{}:{} k=2".format(*archs.ROWS[name].window))
    assert set_in_c(llm, loop) == said_by_python(llm, loop)
    assert set_in_c(llm, loop).startswith(f"architecture {archs.ROWS[name].arch} cannot loop: ")
    llm.close()


def test_a_context_of_a_draft_head_cannot_loop(tmp_path: Path) -> None:
    """It has the layers for multi-token prediction alone; a plan would be kept and never met."""
    path = zoo.write(tmp_path / "model.gguf", archs.ROWS["qwen35 nextn"])
    params = llama_cpp.llama_model_default_params()
    params.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx, settings.ctx_type = 64, 1
    context = llama_cpp.llama_init_from_model(model, settings)
    assert context
    try:
        assert LIB.llama_loop_set(context, capi.params(LoopSpec.parse("2:6 k=2"))) < 0
        assert LIB.llama_loop_error().startswith(b"a context of a draft head (MTP) has no layers to loop.\n")
    finally:
        llama_cpp.llama_free(context)
        llama_cpp.llama_model_free(model)


def test_a_refused_plan_leaves_the_context_as_it_was(tiny_model: Callable[[str], Path]) -> None:
    """The plan in force, what the cache holds, and the outputs of the last decode."""
    llm, alone = (load(tiny_model("llama"), logits_all=True) for _ in range(2))
    for model in (llm, alone):
        model.set_loop("2:4 k=3 kv=each")
        model.eval(TOKENS)
    rows = np.ctypeslib.as_array(llama_cpp.llama_get_logits(llm.ctx), shape=(len(TOKENS), llm.n_vocab())).copy()
    for field, value in (("last", 99), ("first", 0), ("n_eval", 0), ("kv", 7), ("halt", -1.0), ("attention", -1)):
        bad = capi.params(LoopSpec.parse("2:4 k=2"))
        setattr(bad, field, value)
        assert LIB.llama_loop_set(llm.ctx, bad) < 0, field
        assert b"\n" in LIB.llama_loop_error(), "what is wrong and what to do"
        for i in (0, len(TOKENS) - 1):
            row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, i), shape=(llm.n_vocab(),))
            np.testing.assert_array_equal(row, rows[i])
    for token in (5, 6, 7):
        np.testing.assert_array_equal(llm.logits([token]), alone.logits([token]))
    llm.close()
    alone.close()


def test_python_keeps_loop_and_cache_when_a_plan_is_refused(tiny_model: Callable[[str], Path]) -> None:
    llm = load(tiny_model("llama"))
    llm.set_loop("2:4 k=2")
    llm.eval(TOKENS)
    with pytest.raises(GgufloopError):
        llm.set_loop("2:99 k=2")
    assert (str(llm.loop), llm.n_tokens) == (str(LoopSpec.parse("2:4 k=2")), len(TOKENS))
    llm.close()


SHORT = """
import json, resource, sys
import numpy as np
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
tokens = list(range(20))
llm = LoopedLlama(sys.argv[1], n_ctx=65536, n_threads=1, n_threads_batch=1, verbose=False)
llm.set_loop("2:4 k=2")
before = llm.logits(tokens)
with open("/proc/self/statm") as f:
    pages = int(f.read().split()[0])
unlimited = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (600 << 20), unlimited[1]))
try:
    llm.set_loop("1:5 k=64 kv=each")
    said = ""
except GgufloopError as e:
    said = e.message
resource.setrlimit(resource.RLIMIT_AS, unlimited)
kept = llm.n_tokens
llm.reset()
print(json.dumps([said, str(llm.loop), kept, bool((llm.logits(tokens) == before).all())]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of address space")
def test_slots_that_do_not_fit_the_memory_are_one_sentence(tiny_model: Callable[[str], Path]) -> None:
    """And the context goes on under the loop it had."""
    words = [sys.executable, "-c", SHORT, str(tiny_model("llama"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    said, loop, kept, same = json.loads(done.stdout)
    assert said.startswith("out of memory")
    assert (loop, kept, same) == (str(LoopSpec.parse("2:4 k=2")), 0, True)


LIMITED = """
import resource, sys
import numpy as np
from pathlib import Path
from support.contexts import Context, Part, text
from ggufloop.backend import capi
path, before, after, n_ctx, margin = sys.argv[1:]
with Context(Path(path), before, n_ctx=int(n_ctx), n_ubatch=32, swa_full=False) as c:
    rows = c.decode(Part(text(20)))[0]
    with open("/proc/self/statm") as f:
        pages = int(f.read().split()[0])
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (int(margin) << 20), unlimited[1]))
    try:
        c.set_loop(after)
        said = "took it"
    except capi.Refused as e:
        said = e.message
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    c.clear()
    print(said, "|", bool((c.decode(Part(text(20)))[0] == rows).all()))
"""


def limited(*words: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, words)],
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "GGML_NO_BACKTRACE": "1"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-300:]}"
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of address space")
def test_the_graph_of_the_plan_before_fits_after_slots_that_did_not(tmp_path: Path) -> None:
    """The scheduler then has room for the plan refused, whose graph is smaller: its slots are of the large kind."""
    path = contexts.write("gemma3", tmp_path)  # odd layers see everything, even ones slide
    said = limited(path, "2:3 k=64 kv=each", "3:4 k=7 kv=each", 524288, 250)
    assert said == "out of memory: the K/V slots of the loop do not fit. | True\n"


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and a limit of address space")
def test_a_scheduler_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """ggml does not look at what malloc returns."""
    said = limited(contexts.write("llama", tmp_path), "2:4 k=2", "1:5 k=64", 256, 300)
    assert said.startswith("out of memory")
    assert said.endswith("| True\n")


def test_recurrent_layers_with_a_state_per_pass_cannot_be_switched_off(tiny_model: Callable[[str], Path]) -> None:
    """A token with one pass would leave the states of the other passes behind."""
    llm = load(tiny_model("qwen35"))
    window = next((a, a + 1) for a in range(1, llm.n_layer() - 1) if LIB.llama_loop_is_recurrent(llm.ctx, a))
    each = LoopSpec(window, k=2, solver="naive", kv="each")
    assert LIB.llama_loop_set(llm.ctx, capi.params(each)) == 0
    assert LIB.llama_loop_enable(llm.ctx, False) < 0
    assert LIB.llama_loop_error().startswith(b"window %d:%d has recurrent layers" % window)
    first = LoopSpec(window, k=2, solver="naive", kv="first")
    assert LIB.llama_loop_set(llm.ctx, capi.params(first)) == 0
    assert LIB.llama_loop_enable(llm.ctx, False) == 0
    llm.close()


RESERVES = """
import ctypes, sys
from ggufloop.engine import LoopedLlama, llama_cpp
llm = LoopedLlama(sys.argv[1], n_ctx=64, n_threads=1, n_threads_batch=1, verbose=False)
log = []
callback = llama_cpp.llama_log_callback(lambda level, text, data: log.append(text))
llama_cpp.llama_log_set(callback, ctypes.c_void_p())
loops = ["2:4 k=6", "1:3 k=2 kv=frozen", None, "2:4 k=3"]
counts = []
for loop in loops + loops * 2:
    llm.set_loop(loop)
    llm.logits(list(range(20)))
    counts.append(sum(b"reserve took" in line for line in log))
print(*counts)
"""


def test_going_back_to_a_plan_or_to_none_reserves_nothing(tiny_model: Callable[[str], Path]) -> None:
    """Once the larger ones were set, what llama.cpp logs when it reserves its buffers is not heard again."""
    words = [sys.executable, "-c", RESERVES, str(tiny_model("llama"))]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", *["2"] * 11], done.stderr[-2000:]


def test_the_header_is_c(tmp_path: Path) -> None:
    """llama-loop.h can be included from C, like llama.h."""
    program = '#include "llama-loop.h"\nint main(void) { return llama_loop_abi() != LLAMA_LOOP_ABI; }\n'
    (tmp_path / "a.c").write_text(program)
    include = [f"-I{folder}" for folder in (patches_dir(), headers.unpack(tmp_path / "include"))]
    words = ["cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", *include, str(tmp_path / "a.c")]
    subprocess.run(words, check=True)
