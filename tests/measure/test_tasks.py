"""`ggufloop eval`: what lm-eval is told against `LoopedLlama.logits`, the comparison by hand, and bad input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.cli import Cli

from ggufloop.engine import ACTIVE, LoopedLlama
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.measure.stats import mcnemar_exact, wilson

pytest.importorskip("lm_eval")

import lm_eval.tasks
from lm_eval.utils import get_rolling_token_windows

from ggufloop.measure import tasks_report
from ggufloop.measure.lm_eval_model import LoopedLM
from ggufloop.measure.tasks import Item, compare, evaluate
from ggufloop.tasks.loading import load_tasks
from ggufloop.tasks.questions import questions

LOOP = "2:5 k=2 solver=naive"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path))


@pytest.fixture
def llm(tiny_model: Callable[[str], Path]) -> Iterator[LoopedLlama]:
    llm = LoopedLlama(tiny_model("llama"), n_ctx=256, n_seq=8, n_threads=1, n_threads_batch=1, type_k=0, type_v=0,
                      flash_attn=False, verbose=False)  # fmt: skip
    yield llm
    llm.close()


def log_softmax(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    rows -= rows.max(-1, keepdims=True)
    return rows - np.log(np.exp(rows).sum(-1, keepdims=True))


def answer_logprobs(llm: LoopedLlama, prompt: str, choices: list[str]) -> list[float]:
    """By definition: the prompt's tokens are a step, an answer's are another."""
    found = []
    for choice in choices:
        before = llm.tokenize(prompt.encode(), special=True)
        tokens = llm.tokenize(f"{prompt} {choice}".encode(), special=True)[len(before) :]
        llm.reset()
        rows = llm.logits(before)[-1:]
        if len(tokens) > 1:
            rows = np.concatenate([rows, llm.logits(tokens[:-1])])
        found.append(float(log_softmax(rows)[range(len(tokens)), tokens].sum()))
    return found


@pytest.mark.parametrize("task", ["brackets", "arithmetic_guess"])
def test_scores_are_those_of_logits(llm: LoopedLlama, task: str) -> None:
    tasks = load_tasks([task])
    asked = questions(task)[:4]
    for loop in (None, LOOP):
        llm.set_loop(loop)
        run = evaluate(llm, tasks, limit=len(asked))
        wanted = [answer_logprobs(llm, q["prompt"], q["choices"]) for q in asked]
        for sample, scores, q in zip(run.samples, wanted, asked, strict=True):
            np.testing.assert_allclose([score for score, _ in sample["filtered_resps"]], scores, rtol=1e-6)
            assert sample["acc"] == (int(np.argmax(scores)) == q["answer"])
        for item, scores, q in zip(run.items[task], wanted, asked, strict=True):
            assert item.right == (int(np.argmax(scores)) == q["answer"])
            assert item.gold == pytest.approx(scores[q["answer"]], rel=1e-6)
        assert run.results["results"][task]["acc,none"] == np.mean([i.right for i in run.items[task]])


def request(*args: object) -> SimpleNamespace:
    return SimpleNamespace(args=args)


def test_a_text_longer_than_the_context_is_rolled_over(llm: LoopedLlama) -> None:
    text = "".join(chr(97 + i * i % 23) for i in range(600))
    tokens = llm.tokenize(text.encode(), add_bos=False)
    for loop in (None, LOOP):
        llm.set_loop(loop)
        (found,) = LoopedLM(llm).loglikelihood_rolling([request(text)])
        total = n = 0
        for context, targets in get_rolling_token_windows(tokens, llm.token_eos(), llm.n_ctx(), 1):
            llm.reset()
            logs = log_softmax(llm.logits(context))[len(context) - len(targets) :]
            total += logs[range(len(targets)), targets].sum()
            n += len(targets)
        assert n == len(tokens) > 2 * llm.n_ctx()
        assert found == pytest.approx(total, rel=1e-6)


def test_answers_are_greedy_and_end_at_a_stop_string(llm: LoopedLlama) -> None:
    llm.set_loop(LOOP)
    prompt = "The quick brown fox"
    (found,) = LoopedLM(llm).generate_until([request(prompt, {"until": [], "max_gen_toks": 24})])
    llm.reset()
    row, pieces = llm.logits(llm.tokenize(prompt.encode(), special=True))[-1], b""
    for _ in range(24):
        token = int(row.argmax())
        if llm.is_eog(token):
            break
        pieces += llm.detokenize([token])
        row = llm.logits([token])[-1]
    wanted = pieces.decode("utf-8", "ignore")
    assert wanted
    assert found.replace("\ufffd", "") == wanted
    stop = found[5:7]
    (cut,) = LoopedLM(llm).generate_until([request(prompt, {"until": [stop], "max_gen_toks": 24})])
    assert cut == found[: found.index(stop)]


def test_the_chat_template_is_the_models(llm: LoopedLlama) -> None:
    lm = LoopedLM(llm)
    with pytest.raises(UsageError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hi"}])
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<go>{% endif %}"
    )
    llm.metadata["tokenizer.chat_template"] = source
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}]
    assert lm.apply_chat_template(talk[:1]) == "<user>Hi<go>"
    assert lm.apply_chat_template(talk, add_generation_prompt=False) == "<user>Hi<go>The"
    assert lm.chat_template(True) == source
    run = evaluate(llm, load_tasks(["arithmetic_guess"]), limit=2, chat=True)
    assert [s["arguments"][0][0] for s in run.samples] == [
        f"<user>{q['prompt']}<go>" for q in questions("arithmetic_guess")[:2]
    ]


def test_a_question_that_does_not_fit_is_refused_before_any_is_scored(llm: LoopedLlama) -> None:
    with pytest.raises(GgufloopError, match=r"a question has \d+ tokens, and the context holds 256") as e:
        evaluate(llm, load_tasks(["mmlu_dev"]), limit=20)
    assert "-c" in e.value.hint
    assert llm.n_tokens == 0


def items(right: str, gold: list[float] | None = None) -> list[Item]:
    return [Item("t", i, float(c), gold[i] if gold else None) for i, c in enumerate(right)]


def test_the_comparison_by_hand() -> None:
    gold = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0]
    plain, looped = items("11110000", gold), items("10111100", [g + 0.5 + 0.01 * g for g in gold])
    c = compare(plain, looped)
    assert (c.n, c.gained, c.lost) == (8, 2, 1)
    assert (c.plain, c.looped) == (wilson(4, 8), wilson(5, 8))
    assert c.difference.mean == pytest.approx(1 / 8)
    assert c.difference.low < 0 < c.difference.high
    assert c.p == mcnemar_exact(2, 1) == 1.0
    assert not c.conclusive
    assert c.gold.mean == pytest.approx(0.5 - 0.045)
    assert c.gold.low > 0.4  # paired: the spread of gold itself is far larger
    assert c.needed > 100
    same = compare(plain, plain)
    assert (same.needed, same.gained + same.lost, same.flips_below) == (None, 0, wilson(0, 8).high)
    assert compare(items("10"), items("11")).gold is None
    many = compare(items("0" * 12), items("1" * 12))
    assert many.conclusive
    assert many.p == pytest.approx(2 / 2**12)


def test_runs_over_other_questions_are_not_compared() -> None:
    with pytest.raises(UsageError, match="not over the same questions"):
        compare(items("10"), items("101"))
    with pytest.raises(UsageError, match="1 questions"):
        compare(items("1"), items("0"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["bracket"], "task 'bracket' is not known"),
        (["brackets", "brackets"], "named twice"),
        ([""], "no task is named"),
    ],
)
def test_task_names(names: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda include_path, **_: real(None, include_path, False))
    with pytest.raises(UsageError, match=message) as e:
        load_tasks(names)
    if names == ["bracket"]:
        assert e.value.hint.startswith("did you mean brackets?")


def test_paired_on_the_command_line(tiny_model: Callable[[str], Path], tmp_path: Path, cli: Cli) -> None:
    args = ["eval", str(tiny_model("llama")), "--tasks", "arithmetic_guess,brackets", "--limit", "6", "-t", "1"]
    loop = ["--window", "2:5", "--K", "3", "--paired", "--log-samples", str(tmp_path / "log.jsonl")]
    words = [sys.executable, "-c", "from ggufloop.cli import main; main()", *args, *loop]
    env = {**os.environ, "GGUFLOOP_LIB_DIR": str(ACTIVE.directory)}  # the cache folder is another in these tests
    done = subprocess.run(words, capture_output=True, text=True, env=env)  # no bars: that depends on who imports tqdm
    out = done.stdout
    assert (done.returncode, done.stderr) == (0, "")
    assert out.count("|arithmetic_guess|") == 2
    assert "brackets: looped against plain on the same questions (95 % intervals)\n" in out
    assert re.search(r"  choice log-prob\.     [-+]\d\.\d{4} \[.*\(nats; by it alone: ", out)
    assert re.search(r"  verdict on accuracy  cannot tell: \d+ questions would(, and there are \d{3,})?\n", out)
    assert "right answer's logp" not in out
    assert re.search(r"\n  accuracy 0\.\d{3} .* is not above chance, 0\.\d{3};", out)
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(s["loop"], s["task"]) for s in logged] == [
        (loop, task) for loop in ("plain", "2:5 k=3") for task in ("arithmetic_guess", "brackets") for _ in range(6)
    ]
    code, out, _ = cli(*args, *loop, "--noise-floor", "-o", "json")
    data = json.loads(out)
    assert code == 0
    assert data["schema_version"] == 1
    plain, looped, again = (r["loop"] for r in data["runs"])
    assert (plain, looped) == ("plain", "2:5 k=3")
    assert again.startswith("2:5 k=3 ")
    assert {c["noise_floor"]["difference"]["n"] for c in data["paired"].values()} == {6}
    for task, c in data["paired"].items():
        golds = [[s["filtered_resps"][s["target"]][0] for s in logged if (s["loop"], s["task"]) == (name, task)]
                 for name in ("plain", "2:5 k=3")]  # fmt: skip
        assert c["n"] == c["gold_logprob"]["n"] == 6
        assert c["gold_logprob"]["mean"] == pytest.approx(np.mean(np.subtract(*golds[::-1])))
        assert c["looped"]["mean"] - c["plain"]["mean"] == pytest.approx(c["difference"]["mean"])
        assert c["verdict"]["word"] == "cannot tell"
        assert c["choice"]["gain"]["n"] == 6
        assert sum(c["guard"]["letters"]) == pytest.approx(1)
        assert c["guard"]["accuracy"]["mean"] == c["plain"]["mean"]


def test_what_a_task_has_is_said() -> None:
    """And that there are enough questions is not."""
    c = compare(items("11110000"), items("10111100"))
    assert f"  verdict on accuracy  cannot tell: {c.verdict.needed} questions would\n" in tasks_report.text("t", c)
    assert f"cannot tell: {c.verdict.needed} questions would, and there are 90\n" in tasks_report.text("t", c, 90)
    assert "not scored: no answers are offered\n" in tasks_report.text("t", c)


def test_one_question_is_not_compared(tiny_model: Callable[[str], Path], cli: Cli) -> None:
    args = ["--tasks", "brackets", "--limit", "1", "--window", "2:5", "--paired", "-t", "1"]
    code, out, err = cli("eval", tiny_model("llama"), *args)
    assert code == 0
    assert out.count("|brackets|") == 2
    assert "note: brackets has 1 questions that are right or wrong: nothing to compare.\n" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "error: no task is named.\n"),
        (["--tasks", "brackets", "--paired"], "error: --paired compares a loop with the plain model"),
        (["--tasks", "brackets", "--noise-floor"], "error: --noise-floor is of a comparison.\n"),
        (["--tasks", "brackets", "-o", "md"], "error: output form 'md' is not known.\n"),
        (["--tasks", "brackets", "--log-samples", "/no/such/folder/x"], "error: there is no folder /no/such/folder.\n"),
    ],
)
def test_bad_flags(tiny_model: Callable[[str], Path], cli: Cli, args: list[str], message: str) -> None:
    code, out, err = cli("eval", tiny_model("llama"), *args)
    assert (code, out) == (2, "")
    assert err.startswith(message)
