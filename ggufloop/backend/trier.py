"""The process in which a model file is computed on for the first time: `trial.check` starts it, nothing imports it.

    python -c "..." FOLDER FILE BYTES REPACK           # what it prints last is {"done": true}, or {"failed": what}

The file is used as a command uses it, but on the CPU alone and with a context of next to nothing: its text is cut into
tokens, one token is evaluated, then 32, which other kernels multiply. BYTES: of memory of its own at most, beside the
file, which is mapped; 0 for no limit. REPACK: 1 or 0, as ContextSettings.repack.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

from ggufloop.backend.process import answers

BATCH = 32


def main() -> None:
    """Compute on the file that the arguments name."""
    send = answers()
    path, most = Path(sys.argv[2]), int(sys.argv[3])
    if most:
        with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (most, resource.getrlimit(resource.RLIMIT_DATA)[1]))
    try:
        _compute(path, repack=sys.argv[4] == "1")
        answer: dict[str, object] = {"done": True}
    except Exception as e:
        answer = {"failed": f"{type(e).__name__}: {e}", "ours": type(e).__module__ == "ggufloop.errors"}
        if isinstance(e, MemoryError):
            answer["ours"] = True  # no word on the file
    send(answer)
    os._exit(0)  # at its end llama_cpp frees what may be half made


def _compute(path: Path, repack: bool) -> None:
    from ggufloop.backend.settings import NO_FLASH_ATTENTION
    from ggufloop.engine import LoopedLlama
    from ggufloop.errors import GgufloopError, UsageError
    from ggufloop.models.gguf import read_header

    llm = LoopedLlama(
        path,
        n_ctx=2 * BATCH,
        n_batch=BATCH,
        n_ubatch=BATCH,
        n_gpu_layers=0,
        device="none",
        flash_attn=read_header(path).text("general.architecture") not in NO_FLASH_ATTENTION,
        repack=repack,
        n_threads=min(4, os.cpu_count() or 1),
        verbose=True,  # its last words are asked for
    )
    n = llm.n_vocab()
    with contextlib.suppress(GgufloopError):  # a model without a tokenizer
        llm.detokenize(llm.tokenize(b"The 3 quick brown foxes\n\xc3\xa9", add_bos=True, special=True))
    llm.eval([n // 2])
    tokens = [i * (n - 1) // BATCH for i in range(BATCH)]
    try:
        llm.eval(tokens)
    except UsageError:  # a model without a cache takes a text as a whole
        llm.reset()
        llm.eval(tokens)
    llm.synchronize()
