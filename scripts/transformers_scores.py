"""The scores of `ggufloop eval` beside those of lm-eval's own `hf` backend on the weights of the same file.

    python3 scripts/bootstrap.py python -m pip install transformers accelerate torch==2.13.0
    python3 scripts/bootstrap.py python scripts/transformers_scores.py smollm2-135m --tasks piqa [--limit 80] [--twin]

transformers reads the GGUF file's weights into float32 and computes with its own model code, its own tokenizer and
lm-eval's own batching: nothing of llama.cpp or of ours but the questions. Where the two agree, a score that differs
from a published one differs by the file. --twin computes ours with the file's F32 twin as well, so that quantised
activations are no difference either. An answer's log-probabilities are compared one by one.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np

from ggufloop.errors import GgufloopError
from ggufloop.measure.eval_run import EvalPlan, EvalResult, run_eval
from ggufloop.measure.published import published
from ggufloop.measure.tasks import Run, ask
from ggufloop.models.gguf import read_header
from ggufloop.models.info import describe
from ggufloop.models.registry import resolve
from ggufloop.table import Cell, Column, Table
from ggufloop.tasks.loading import Tasks

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from support.dequantise import dequantise


def theirs(path: Path, tasks: Tasks, limit: int | None, batch_size: int) -> Run:
    """What lm-eval's `hf` backend makes of the file's weights in float32."""
    from lm_eval.models.huggingface import HFLM
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if (
        read_header(path).text("tokenizer.ggml.pre") == "smollm"
    ):  # transformers reads no pre-tokenizer: as its tokenizer.json has it
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    model = AutoModelForCausalLM.from_pretrained(**where, dtype="float32")
    return ask(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu"), tasks, limit)


def rows(name: str, run: Run, reference: Run, tasks: Tasks) -> list[list[Cell]]:
    """A row per task: its scores, how many questions are judged otherwise, and how far log-probabilities differ."""
    found: list[list[Cell]] = []
    for measure, items in run.items.items():
        other = {(item.task, item.doc): item for item in reference.items[measure]}
        pairs = [(item, other[item.task, item.doc]) for item in items]
        apart = [np.abs(np.subtract(a.answers, b.answers)) for a, b in pairs if a.answers]
        flips = sum(a.right != b.right for a, b in pairs)
        acc = sum(item.right for item in items) / len(items)
        members = tasks.members[measure]
        norm = run.results["results"][members[0]].get("acc_norm,none") if len(members) == 1 else None
        far = float(np.median(np.concatenate(apart))) if apart else None
        found.append([measure, name, len(items), acc, math.sqrt(acc * (1 - acc) / len(items)), norm, flips, far])
    return found


@click.command()
@click.argument("model")
@click.option("--tasks", "names", required=True, metavar="NAME,...")
@click.option("--limit", type=click.IntRange(min=1), help="Only the first questions of each task.")
@click.option("--twin", is_flag=True, help="Compute ours with the file's F32 twin too.")
@click.option("--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Of the hf backend.")
def main(model: str, names: str, limit: int | None, twin: bool, batch_size: int) -> None:
    """Print the plain scores of a model file by ggufloop and by transformers, question by question the same."""
    try:
        path = resolve(model)
        plan = EvalPlan(tuple(names.split(",")), limit=limit, offline=True)
        tasks = plan.load()
        reference = theirs(path, tasks, limit, batch_size)
        found = rows("transformers", reference, reference, tasks)
        with TemporaryDirectory() as folder:
            for name, file in [
                (path.name, path),
                *([("F32 twin", dequantise(path, Path(folder) / "twin.gguf"))] * twin),
            ]:
                result = run_eval(file, None, plan, tasks=tasks)
                assert isinstance(result, EvalResult)
                (run,) = result.runs.values()
                found += rows(name, run, reference, tasks)
    except ImportError as e:
        raise click.ClickException(f"{e}. pip install transformers accelerate torch==2.13.0") from None
    except GgufloopError as e:
        raise click.ClickException(f"{e.message} {e.hint}") from None
    columns = (Column("task"), Column("computed by"), Column("n", "d"), Column("acc", ".4f"), Column("s.e.", ".4f"),
               Column("acc_norm", ".4f"), Column("judged otherwise", "d"),
               Column("log p, median apart", ".4f"))  # fmt: skip
    click.echo(Table(columns, found).render("md"))
    for name in plan.names:
        for score in published(path.name, describe(path).n_layer, name):
            click.echo(f"published, {name}: {score.line()}")


if __name__ == "__main__":
    main()
