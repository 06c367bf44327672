"""How much of a loop's effect --passes misses: KL(full || reduced) over KL(full || plain), per token of prose.

    python3 scripts/bootstrap.py python scripts/passes_error.py [MODEL] [--window 12:16] [-n 384] [--twin]

--twin computes with the model's F32 twin (the same weights, exact arithmetic), where the reduction is not hidden by
the 8-bit activations of quantised files. The column `noise` is the KL to a run whose damping differs by 1e-5: what
arithmetic alone does.
"""

from __future__ import annotations

import pydoc_data.topics
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError
from ggufloop.loop import LoopSpec, parse_window
from ggufloop.models import registry
from ggufloop.table import Column, Table

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from support.dequantise import dequantise


def log_probs(llm: LoopedLlama, tokens: list[int], loop: LoopSpec | None) -> np.ndarray:
    """Log-probabilities of the vocabulary after every token, float64 (n, n_vocab), from an empty cache."""
    llm.set_loop(loop)
    llm.reset()
    rows = llm.logits(tokens).astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def kl(p: np.ndarray, q: np.ndarray) -> tuple[float, float]:
    """Mean of KL(p || q) over tokens and its standard error."""
    values = (np.exp(p) * (p - q)).sum(-1)
    return float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5)


@click.command()
@click.argument("model", default="smollm2-135m")
@click.option("--window", default="12:16", show_default=True)
@click.option("-n", "n", type=click.IntRange(32, 4096), default=384, show_default=True, help="Tokens.")
@click.option("--twin", is_flag=True, help="Compute with the F32 twin of the file.")
@click.option("-o", "form", default="md", show_default=True, help="md, csv, json or jsonl.")
def main(model: str, window: str, n: int, twin: bool, form: str) -> None:
    """Print the share of KL(loop || plain) that two and three passes miss, for K 6 and 12, beta 0 and 0.5."""
    columns = ["K", "beta", "passes", "n", "effect", "effect se", "missed", "missed se", "share", "noise"]
    rows: list[list[float | int]] = []
    try:
        window_ = parse_window(window)
        with TemporaryDirectory() as folder:
            path = registry.resolve(model)
            if twin:
                path = dequantise(path, Path(folder) / "twin.gguf")
            llm = LoopedLlama(path, n_ctx=n, n_batch=512, n_threads=2, n_threads_batch=2, verbose=False)
            topics = pydoc_data.topics.topics
            tokens = llm.tokenize((topics["class"] + topics["exceptions"] + topics["objects"]).encode())[:n]
            plain = log_probs(llm, tokens, None)
            for k in (6, 12):
                for beta in (0.0, 0.5):
                    full = log_probs(llm, tokens, LoopSpec(window_, k, beta=beta))
                    near = log_probs(llm, tokens, LoopSpec(window_, k, beta=beta, damping=(1 + 1e-5) / k))
                    for passes in (2, 3):
                        reduced = log_probs(llm, tokens, LoopSpec(window_, k, beta=beta, passes=passes))
                        effect, missed = kl(full, plain), kl(full, reduced)
                        share = missed[0] / effect[0]
                        rows.append([k, beta, passes, len(tokens), *effect, *missed, share, kl(full, near)[0]])
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    forms = {"share": ".4f"} | dict.fromkeys(("effect", "effect se", "missed", "missed se", "noise"), ".6f")
    click.echo(Table(tuple(Column(c, forms.get(c, "")) for c in columns), rows).render(form), nl=False)


if __name__ == "__main__":
    main()
