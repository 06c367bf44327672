"""RULER's tasks under loops: what is asked of a model that reads, what a stop keeps, and what the cells say."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest

from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure.journal import Journal
from ggufloop.measure.longctx import cells, check_record, long_context
from ggufloop.measure.longctx_run import LongPlan
from ggufloop.records import Timings
from ggufloop.tasks import ruler
from ggufloop.tasks.ruler import PROSE_TASKS

LOOP = LoopSpec((2, 4), 3)
HEADER = {"what": "a test"}


class Reader:
    """A model of one token per character that looks an answer up in its prompt, and under a loop says nothing right."""

    metadata: ClassVar[dict[str, str]] = {}
    asked = 0

    def __init__(self, n_ctx: int = 4000) -> None:
        self.loop: LoopSpec | None = None
        self._n_ctx = n_ctx

    def n_ctx(self) -> int:
        return self._n_ctx

    def set_loop(self, loop: LoopSpec | None) -> None:
        self.loop = loop

    def set_seed(self, seed: int) -> None: ...
    def reset(self) -> None: ...
    def timings(self) -> Timings:
        return Timings()

    def adds_tokens(self) -> tuple[bool, bool]:
        return False, False

    def token_bos(self) -> int:
        return 0

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        return list(text)

    def detokenize(self, tokens: list[int], prev_tokens: object = None, special: bool = False) -> bytes:
        return bytes(tokens)

    def is_eog(self, token: int) -> bool:
        return token == 0

    def generate(self, tokens: list[int], **sampling: float) -> Iterator[int]:
        Reader.asked += 1
        prompt = bytes(tokens).decode()
        answer = "no" if self.loop else self._read(prompt)
        yield from [*answer.encode(), 0]

    def _read(self, prompt: str) -> str:
        if "special magic" in prompt:
            key = re.search(r"for (\S+) mentioned in the provided text is$", prompt)[1]
            return re.search(rf"for {key} is: (\S+)\.", prompt)[1]
        *_, value = re.findall(r"assgined the value (\d+)", prompt)
        chain = [re.search(rf"VAR (\w+) = {value}", prompt)[1]]
        while following := re.search(rf"VAR (\w+) = VAR {chain[-1]} ", prompt):
            chain.append(following[1])
        return " ".join(chain[:-1])  # one of five is missing


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Callable[[], Journal]]:
    opened: list[Journal] = []

    def get() -> Journal:
        for before in opened:
            before.__exit__(None, None, None)
        opened[:] = [Journal.open(tmp_path / "j.jsonl", HEADER, check_record)]
        return opened[0]

    yield get
    opened[0].__exit__(None, None, None)


def test_a_reader_answers_and_its_loop_does_not(journal: Callable[[], Journal]) -> None:
    found = long_context(Reader(), [LOOP], ["niah_single_1", "vt"], [2600, 3500], 4, journal())
    assert set(found) == {(n, task, loop) for n in (2600, 3500) for task in ("niah_single_1", "vt")
                          for loop in (PLAIN, str(LOOP))}  # fmt: skip
    assert all(
        scores == [0 if loop != PLAIN else 1 if task != "vt" else 0.8] * 4 for (_, task, loop), scores in found.items()
    )
    rows = cells(found)
    assert [(r.length, r.task, r.loop == PLAIN) for r in rows][:4] == [
        (2600, "all", True), (2600, "all", False), (2600, "niah_single_1", True), (2600, "niah_single_1", False),
    ]  # fmt: skip
    whole, lost = rows[:2]
    assert (whole.score.mean, whole.score.n, whole.gain) == (pytest.approx(0.9), 8, None)
    assert lost.gain.mean == pytest.approx(-0.9)
    assert [0 <= r.score.low < r.score.high <= 1 for r in rows] == [True] * len(rows)
    same = cells({key: [1.0] * 50 for key in found})[1]
    assert (same.gain.mean, same.gain.high) == (0, pytest.approx(3.7 / 100, abs=0.001))  # none of 100 changed
    assert [r.at_ceiling for r in rows[:6]] == [False, False, True, True, False, False]


def test_a_stopped_run_goes_on(journal: Callable[[], Journal]) -> None:
    class Stopped(Reader):
        def generate(self, tokens: list[int], **sampling: float) -> Iterator[int]:
            if Reader.asked == 3:
                raise KeyboardInterrupt
            return super().generate(tokens, **sampling)

    Reader.asked = 0
    model = Stopped()
    with pytest.raises(KeyboardInterrupt):
        long_context(model, [LOOP], ["niah_single_1"], [2600], 4, journal())
    assert model.loop is None
    before, Reader.asked = Reader.asked, 0
    found = long_context(Reader(), [LOOP], ["niah_single_1"], [2600], 4, journal())
    assert Reader.asked + before >= 8
    assert Reader.asked < 8
    assert found[2600, "niah_single_1", PLAIN] == [1] * 4


def test_what_is_refused(journal: Callable[[], Journal]) -> None:
    with pytest.raises(UsageError, match="5000 tokens do not fit the context of 4000"):
        long_context(Reader(), [], ["vt"], [2600, 5000], 2, journal())
    with pytest.raises(UsageError, match="no chat template"):
        long_context(Reader(), [], ["vt"], [2600], 2, journal(), chat=True)
    Reader.asked = 0
    with pytest.raises(UsageError, match="400 tokens do not hold a sample of niah_single_1"):
        long_context(Reader(), [], ["niah_single_1", "vt"], [2600, 400], 2, journal())
    assert Reader.asked == 0  # before anything was asked
    for plan, said in (
        ({"lengths": (512, 512)}, "a length is given twice in 512,512"), ({"lengths": ()}, "no length is given"),
        ({"tasks": ("niah",)}, "task 'niah' is not one"), ({"tasks": PROSE_TASKS}, "needs prose"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=said):
            LongPlan(**plan)
    kept = journal()
    for score in (2.0, 1.0):  # what is damaged at the end would be dropped
        record = {"length": 2600, "task": "vt", "loop": PLAIN, "sample": 0, "score": score, "answer": ""}
        kept.add(record)
    with pytest.raises(GgufloopError, match="score"):
        journal()


@pytest.mark.model
def test_a_real_model_reads_a_needle(smollm2: Path, journal: Callable[[], Journal]) -> None:
    """SmolLM2 finds most needles in 600 tokens; the samples are as long as its own tokens say."""
    llm = LoopedLlama(smollm2, n_ctx=600, n_threads=2, n_threads_batch=2, verbose=False)
    found = long_context(llm, [], ["niah_single_1"], [600], 4, journal())
    assert sum(found[600, "niah_single_1", PLAIN]) >= 2
    sample = next(ruler.samples("niah_single_1", lambda text: len(llm.tokenize(text.encode())), 600, 1))
    assert 550 < len(llm.tokenize((sample.prompt + sample.prefix).encode())) + 128 <= 600
    llm.close()


def test_an_answer_that_is_no_text_comes_back(journal: Callable[[], Journal]) -> None:
    """A model may write a zero byte, or half of a character: the journal is read again all the same."""

    class Noise(Reader):
        def generate(self, tokens: list[int], **sampling: float) -> Iterator[int]:
            Reader.asked += 1
            yield from [5, 0xE2, 0x82, 7]

        def is_eog(self, token: int) -> bool:
            return token == 7

        def detokenize(self, tokens: list[int], prev_tokens: object = None, special: bool = False) -> bytes:
            return bytes(0 if token == 5 else token for token in tokens)

    found = long_context(Noise(), [], ["niah_single_1"], [2600], 2, journal())
    Reader.asked = 0
    assert long_context(Noise(), [], ["niah_single_1"], [2600], 2, journal()) == found
    assert Reader.asked == 0
