"""Bookkeeping of a server without a model: what a prompt may start from, what is kept, and whose turn it is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ggufloop.errors import UsageError
from ggufloop.loop import LoopSpec
from ggufloop.sampling import Sampling
from ggufloop.sequences import Draw
from ggufloop.server.jobs import Ask, FairQueue, Job
from ggufloop.server.limits import Limits
from ggufloop.server.slots import Cuts, History, Saved, Step, Store

LOOP = LoopSpec((2, 4), 3)
CUTS = Cuts(8, 4)


def conversation(prompt: list[int], answer: list[int], looped: bool = True) -> History:
    """What a sequence holds after an answer, all of whose tokens but the last were evaluated."""
    steps = [Step(0, True, reads=True), *(Step(len(prompt) + i, looped) for i in range(len(answer)))]
    return History([*prompt, *answer], steps, len(prompt), "a")


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 400))
def test_cuts_are_those_of_a_text_read_in_batches_and_ubatches(n_batch: int, n_ubatch: int, n: int) -> None:
    cuts = Cuts(n_batch, min(n_batch, n_ubatch))
    ends = {0}
    for batch in range(0, n + n_batch, n_batch):
        ends |= {min(batch + k, batch + n_batch) for k in range(0, n_batch + cuts.n_ubatch, cuts.n_ubatch)}
    assert cuts.before(n) == max(end for end in ends if end <= n)
    assert cuts.after(n) == min(end for end in ends if end > n)


def test_a_conversation_goes_on_where_it_was() -> None:
    history = conversation(list(range(10)), [50, 51, 52])
    said = [*range(10), 50, 51, 52, 60, 61]
    assert history.reusable(said, CUTS, client="a", can_rewind=True) == (13, 13)
    assert history.reusable(said, CUTS, client="a", can_rewind=False) == (13, 13)
    assert history.reusable(said, CUTS, client=None, can_rewind=True) == (8, 0), "only whole cuts of its beginning"
    assert history.reusable(said, CUTS, client=None, can_rewind=False) == (0, 0)
    assert history.reusable(said, CUTS, client="b", can_rewind=True) == (8, 0), "it is not this client's"
    history.ended = False
    assert history.reusable(said, CUTS, client="a", can_rewind=True) == (8, 0), "its prompt was not read to the end"


def test_another_text_starts_only_where_reading_it_anew_is_cut_too() -> None:
    history = conversation(list(range(10)), [50, 51, 52])
    for client in ("a", "b", None):
        assert history.reusable([*range(9), 99, 99], CUTS, client, True) == (8, 0)
        assert history.reusable([*range(7), 99, 99], CUTS, client, True) == (4, 0)
        assert history.reusable([*range(3), 99, 99], CUTS, client, True) == (0, 0)
        assert history.reusable([*range(10), 50, 99, 99], CUTS, client, True) == (8, 0), "no answer ended there"


def test_a_prompt_told_again_leaves_a_token_to_evaluate() -> None:
    history = conversation(list(range(8)), [50, 51])
    assert history.reusable(list(range(8)), CUTS, "a", True) == (4, 0)
    assert conversation([1], []).reusable([1], CUTS, "a", True) == (0, 0)


def test_an_answer_written_plain_is_read_again_under_a_loop() -> None:
    history = conversation(list(range(10)), [50, 51, 52], looped=False)
    assert history.reusable([*range(10), 50, 51, 52, 60], CUTS, "a", True) == (10, 10)
    assert history.reusable([*range(10), 50, 51, 60], CUTS, "a", True) == (8, 0), "that is another conversation"


def test_a_second_answer_to_the_same_history_starts_where_the_first_did() -> None:
    history = conversation(list(range(10)), [50, 51, 52])
    history.steps.append(Step(13, True, reads=True))  # the next message, and its answer
    history.tokens += [60, 61]
    history.steps.append(Step(15, True))
    history.tokens.append(70)
    assert history.reusable([*range(10), 50, 51, 52, 60, 61], CUTS, "a", True) == (13, 13)
    assert history.reusable([*range(10), 50, 51, 52, 80], CUTS, "a", True) == (13, 13)


@given(st.data())
def test_what_is_reused_is_what_both_texts_begin_with(data: st.DataObject) -> None:
    tokens = st.lists(st.integers(0, 2), min_size=1, max_size=30)
    prompt, answer, said = data.draw(tokens), data.draw(tokens), data.draw(tokens)
    history = conversation(prompt, answer, data.draw(st.booleans()))
    for client in ("a", None):
        n, step = history.reusable(said, CUTS, client, data.draw(st.booleans()))
        assert 0 <= step <= n < len(said)
        assert history.tokens[:n] == said[:n]
        assert n == 0 or step in (0, n)
        if client is None and n:
            assert CUTS.before(n) == n <= len(prompt)


def test_a_prompt_that_begins_like_a_short_one_is_no_conversation() -> None:
    """Unless something was answered, or there is much to read."""
    for n, reused in ((8, 8), (9, 8), (63, 60), (64, 64), (70, 70)):
        assert conversation(list(range(n)), []).reusable([*range(n), 99], CUTS, "a", True)[0] == reused
    assert conversation(list(range(9)), [50]).reusable([*range(9), 50, 99], CUTS, "a", True) == (10, 10)


def saved(tokens: list[int], loop: LoopSpec | None = None, size: int = 1000) -> Saved:
    return Saved(loop, conversation(tokens[:-1], tokens[-1:]), np.zeros(size, dtype=np.uint8))


def test_the_store_is_bounded_and_forgets_what_is_longest_unused() -> None:
    store = Store(3 * 1500)
    for i in range(10):
        store.put(saved([i, 1, 2, 3, 4]))
        assert store.size <= store.capacity
    assert len(store) == 3
    kept = [store.find(None, [i, 1, 2, 3, 4, 5], CUTS, "a", True)[0] for i in range(10)]
    assert kept == [0] * 7 + [5] * 3
    store.put(saved([9], size=10**6))
    assert len(store) == 3, "what does not fit at all takes nobody's place"


def test_the_store_keeps_loops_apart_and_a_conversation_once() -> None:
    store = Store(10**6)
    store.put(saved([1, 2, 3]))
    store.put(saved([1, 2, 3, 4, 5]))
    assert len(store) == 1
    store.put(saved([1, 2, 3, 4, 5, 6], LOOP))
    assert store.find(None, [1, 2, 3, 4, 5, 6, 7], CUTS, "a", True)[0] == 5
    n, entry = store.find(LOOP, [1, 2, 3, 4, 5, 6, 7], CUTS, "a", True)
    assert (n, entry is not None and entry.loop) == (6, LOOP)
    assert entry is not None
    store.take(entry)
    assert store.find(LOOP, [1, 2, 3, 4, 5, 6, 7], CUTS, "a", True) == (0, None)
    assert store.size == sum(s.size for s in [saved([1, 2, 3, 4, 5])])


def job(client: str) -> Job:
    return Job(Ask((1,), None, Draw(Sampling(seed=1))), client, lambda event: None)


def test_clients_take_turns() -> None:
    queue = FairQueue()
    jobs = [job(c) for c in "aaaabbc"]
    for j in jobs:
        queue.put(j)
    served = []
    while len(queue):
        j = next(queue.in_order())
        queue.take(j)
        served.append(j)
    assert "".join(j.client for j in served) == "abcabaa"
    for a, b in pairwise([served.index(j) for j in jobs if j.client == "a"]):
        assert a < b


def test_a_new_client_waits_for_one_job_of_each_other_at_most() -> None:
    queue = FairQueue()
    for _ in range(100):
        queue.put(job("greedy"))
    queue.take(next(queue.in_order()))
    queue.put(job("new"))
    order = [j.client for j in queue.in_order()]
    assert order.index("new") <= 1


def test_jobs_can_leave_the_queue() -> None:
    queue = FairQueue()
    jobs = [job("a"), job("a"), job("b")]
    for j in jobs:
        queue.put(j)
    jobs[0].cancel()
    assert queue.take_if(lambda j: j.cancelled) == [jobs[0]]
    assert list(queue.in_order()) == [jobs[1], jobs[2]]
    assert len(queue.take_if(lambda j: True)) == 2
    assert len(queue) == 0


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ({"parallel": 0}, "parallel 0 is less than 1"),
        ({"parallel": 65}, "parallel 65 is more than 64"),
        ({"queue": -1}, "queue -1 is less than 0"),
        ({"body_bytes": 10}, "body_bytes 10 is less than 1024"),
        ({"prompt_tokens": 0}, "prompt_tokens 0 is less than 1"),
        ({"max_tokens": 0}, "max_tokens 0 is less than 1"),
    ],
)
def test_limits_that_serve_nobody_are_refused(bound: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Limits(**bound)
