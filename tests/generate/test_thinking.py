"""Models that think, and answers that are begun: templates written here, a fake model, the terminal, and the API."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from support.cli import Cli
from support.fake_llama import FakeLlama
from support.rewrite import rewritten

from ggufloop.backend.settings import ContextSettings
from ggufloop.cli import terminal
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.generate.chat import Conversation, Turn
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import LoopSpec
from ggufloop.measure.longctx_run import LongPlan, run_long_context
from ggufloop.measure.sweep_run import SweepPlan, run_sweep
from ggufloop.models.template import PLAIN, ChatTemplate, arguments_for
from ggufloop.server.words import server_words

SAID = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}"
    "\n{% endfor %}"
)
SWITCHED = (
    SAID + "[assistant]{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n{% endif %}"
)
OPENS = SAID + "[assistant]{{ depth | default('high') }}{{ '<think>\n' }}"
KEEPS = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]{{ '<think>\n' }}"
HI = {"role": "user", "content": "Hi"}


def conversation(source: str, *replies: bytes) -> tuple[Conversation, FakeLlama]:
    llm = FakeLlama()
    llm.replies = list(replies)
    return Conversation(llm, ChatTemplate(source), Sampling(seed=7)), llm


def test_thinking_is_switched_by_the_templates_own_name() -> None:
    template = ChatTemplate(SWITCHED)
    assert template.render([HI]) == "[user]Hi\n[assistant]"
    assert template.having(template.arguments_for(False)).render([HI]) == "[user]Hi\n[assistant]<think>\n\n</think>\n"
    assert template.having(template.arguments_for(True)).render([HI]) == "[user]Hi\n[assistant]"
    older = "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ thinking }}"
    assert arguments_for(older, True, None) == {"thinking": True}
    assert ChatTemplate(older).having({"thinking": True}).render([HI]) == "True"
    assert arguments_for(OPENS, None, {"depth": "low"}) == {"depth": "low"}


@pytest.mark.parametrize(
    ("source", "think", "given", "message", "hint"),
    [
        (SAID, False, None, "the model's chat template has no switch for thinking.", "leave it out: it reads none."),
        (None, False, None, "this model has no chat template, so there is nothing to switch.",
         "leave out --think and --chat-template-kwargs."),
        (OPENS, True, None, "the model's chat template has no switch for thinking.",
         "it reads depth (--chat-template-kwargs)."),
        (OPENS, None, {"dept": 1}, "the model's chat template reads no 'dept'.", "did you mean depth? Known: depth."),
        (OPENS, None, {"messages": []}, "the model's chat template reads no 'messages'.", "known: depth."),
        (SWITCHED, True, {"enable_thinking": False}, "thinking is switched twice, by enable_thinking too.",
         "give one of them."),
    ],
)  # fmt: skip
def test_what_a_template_does_not_read_is_refused(
    source: str | None, think: bool | None, given: dict[str, object] | None, message: str, hint: str
) -> None:
    with pytest.raises(UsageError) as e:
        arguments_for(source, think, given)
    assert (e.value.message, e.value.hint) == (message, hint)


def test_a_begun_answer_goes_on_where_the_template_leaves_off() -> None:
    begun = [HI, {"role": "assistant", "content": "Sure, "}]
    assert ChatTemplate(SWITCHED).render(begun) == "[user]Hi\n[assistant]Sure, "
    assert PLAIN.render(begun) == "User: Hi\nAssistant:Sure, "
    closed = "[user]Hi\n[assistant]high<think>\n\n</think>\n\nSure, "
    assert ChatTemplate(OPENS).render(begun) == closed, "an answer is begun, no thought"
    thought = [HI, {"role": "assistant", "content": "<think>\nThey greet"}]
    assert ChatTemplate(OPENS).render(thought) == "[user]Hi\n[assistant]high<think>\nThey greet"
    called = [HI, {"role": "assistant", "content": "", "tool_calls": [1]}]
    assert ChatTemplate(SWITCHED).render(called) == "[user]Hi\n[assistant]\n[assistant]", "nothing to go on with"


def test_a_begun_answer_is_whole_where_it_is_shown_kept_and_answered_again() -> None:
    chat, llm = conversation(SWITCHED, b" red", b" blue", b" green", b"ok")
    chat.set_prefill("Colours:")
    pieces: list[str] = []
    answer = chat.ask("Hi", emit=pieces.append)
    assert "".join(pieces) == answer.text == "Colours: red", "its leading space is the answer's"
    assert len(answer.tokens) == 4, "what was given is not counted as generated"
    assert chat.regenerate().text == "Colours: blue"
    assert chat.replay(None).text == "Colours: green"
    assert llm.prompts == ["[user]Hi\n[assistant]Colours:"] * 3
    chat.ask("And?")
    assert llm.prompts[-1].endswith("[assistant]Colours: blue\n[user]And?\n[assistant]"), "once"


def test_a_thought_that_the_prompt_opens_is_a_part_of_the_answer() -> None:
    chat, llm = conversation(KEEPS, b"\nHm.\n</think>\n\nHello", b"Yo")
    pieces: list[str] = []
    answer = chat.ask("Hi", emit=pieces.append)
    assert "".join(pieces) == answer.text == "<think>\nHm.\n</think>\n\nHello"
    assert chat.messages()[1]["content"] == answer.text
    chat.ask("Yo")
    assert f"[assistant]{answer.text}\n[user]Yo" in llm.prompts[-1], "this template keeps it, and reads it whole"


def test_thinking_that_was_cut_off_is_forgotten_where_the_template_forgets_the_rest() -> None:
    chat, llm = conversation(OPENS, b"ok", b"ok")
    chat.turns = [Turn("a", "<think>\nyes\n</think>\n\nA", 0), Turn("b", "<think>\nfar too lo", 0)]
    chat.ask("c")
    assert llm.prompts[-1].endswith(
        "[user]a\n[assistant]\n\nA\n[user]b\n[assistant]\n[user]c\n[assistant]high<think>\n"
    )
    assert chat.turns[1].answer == "<think>\nfar too lo", "it is kept, and saved"
    chat.template = ChatTemplate(KEEPS)
    chat.ask("d")
    assert "[assistant]<think>\nfar too lo\n" in llm.prompts[-1]


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (b"<think>hm</think>Hi", "\x1b[2m<think>hm</think>\x1b[0mHi\n"),
        (b"2 <thin 3 < 4", "2 <thin 3 < 4\n"),
        (b"<think>endless", "\x1b[2m<think>endless\x1b[0m\n"),
        (b"a<think>b</think>c<think>d</think>", "a\x1b[2m<think>b</think>\x1b[0mc\x1b[2m<think>d</think>\x1b[0m\n"),
        (b"ends in <", "ends in <\n"),
    ],
)
def test_thinking_is_dim_at_a_terminal(reply: bytes, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are tokens here, so every tag comes in pieces."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for source, before, after in ((SWITCHED, "", ""), (KEEPS, "\x1b[2m<think>\n", "\x1b[0m")):
        if before and b"<think>" in reply:
            continue
        chat, _ = conversation(source, reply)
        monkeypatch.setattr(sys, "stdout", Screen())
        terminal.stream(lambda emit, stopped, chat=chat: chat.ask("Hi", emit, stopped), chat.template.tags)
        assert sys.stdout.getvalue() == before + shown.removesuffix("\n") + after + "\n"
    chat, _ = conversation(SWITCHED, reply)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "stdout", Screen())
    terminal.stream(lambda emit, stopped: chat.ask("Hi", emit, stopped), chat.template.tags)
    assert sys.stdout.getvalue() == reply.decode() + "\n"


@pytest.fixture
def thinker(tiny_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return rewritten(tiny_model("llama"), tmp_path / "thinker.gguf", {"tokenizer.chat_template": SWITCHED})


def test_the_api_begins_answers_and_tells_the_template(thinker: Path, tiny_model: Callable[[str], Path]) -> None:
    from ggufloop.engine import LoopedLlama

    with closing(LoopedLlama(thinker, n_ctx=128, n_threads=1)) as llm:
        begun = [HI, {"role": "assistant", "content": "Sure, "}]

        def said(prompt: str) -> str:
            llm.reset()
            return llm.create_completion(llm.tokenize(prompt.encode(), add_bos=False, special=True), max_tokens=8,
                                         temperature=0.0)["choices"][0]["text"]  # fmt: skip

        def chatted(messages: list[dict[str, str]], **more: object) -> str:
            llm.reset()
            found = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0, **more)
            return found["choices"][0]["message"]["content"]

        plain, off = said("[user]Hi\n[assistant]"), said("[user]Hi\n[assistant]<think>\n\n</think>\n")
        on_with = said("[user]Hi\n[assistant]Sure, ")
        assert len({plain, off, on_with}) == 3, "else this shows nothing"
        for form in (llm.chat_format, "chatml"):  # llama_cpp's own, for templates that it recognises
            llm.chat_format = form
            assert chatted(begun) == on_with
            assert chatted([HI], chat_template_kwargs={"enable_thinking": False}) == off
        llm.chat_format = "chat_template.default"
        assert chatted([HI]) == plain
        pieces = llm.create_chat_completion(begun, max_tokens=8, temperature=0.0, stream=True)
        assert "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces) == on_with
        with pytest.raises(UsageError, match="reads no 'enable_thinkin'"):
            chatted([HI], chat_template_kwargs={"enable_thinkin": False})
    with (
        closing(LoopedLlama(tiny_model("llama"), n_ctx=128, n_threads=1)) as llm,
        pytest.raises(UsageError, match="no chat template to begin an answer in"),
    ):
        llm.create_chat_completion(begun)


def test_eval_asks_as_the_switch_says_and_its_journal_knows(thinker: Path, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("lm_eval")
    asked = ["eval", thinker, "--tasks", "brackets", "--limit", "3", "-t", "1", "--no-try"]
    out = ["--out", tmp_path / "out", "--apply-chat-template"]
    ran = cli(*asked, *out, "--think", "off", "--log-samples", tmp_path / "off.jsonl", "-o", "json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["chat_template_kwargs"] == {"enable_thinking": False}
    samples = [json.loads(line) for line in (tmp_path / "off.jsonl").read_text().splitlines()]
    assert all("[assistant]<think>\n\n</think>\n" in json.dumps(s["arguments"]).encode().decode("unicode_escape")
               for s in samples)  # fmt: skip
    ran = cli(*asked, *out)
    assert ran.code == 1
    assert "chat_template_kwargs" in ran.err, "another argument is another run"
    ran = cli(*asked, "--think", "off")
    assert ran == (2, "", "error: --think and --chat-template-kwargs are of a chat template, and none is used here.\n"
                          "  give --apply-chat-template.\n")  # fmt: skip


def test_a_sweeps_journal_knows_it_too(thinker: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    loops, settings = [LoopSpec((2, 5), 2)], ContextSettings(n_ctx=512, n_threads=1, try_first=False)
    told = {"enable_thinking": False}
    for template in (told, told, {}):
        plan = SweepPlan(tasks=("brackets",), limit=4, chat=True, racing=False, template=template)
        if template:
            found = run_sweep(thinker, loops, plan, tmp_path / "sweep.jsonl", settings)
            assert found.header["measures"][0]["chat_template_kwargs"] == told
        else:
            with pytest.raises(GgufloopError, match="measures"):
                run_sweep(thinker, loops, plan, tmp_path / "sweep.jsonl", settings)


def test_long_contexts_are_asked_as_the_switch_says(thinker: Path, tmp_path: Path) -> None:
    plan = LongPlan((1000,), ("niah_single_1",), n=2, chat=True)
    settings, journal = ContextSettings(n_threads=1, try_first=False), tmp_path / "longctx.jsonl"
    off = replace(plan, template={"enable_thinking": False})
    for each in (off, off):
        run_long_context(thinker, [], each, journal, settings)
    assert json.loads(journal.read_text().splitlines()[0])["chat_template_kwargs"] == {"enable_thinking": False}
    with pytest.raises(GgufloopError, match="chat_template_kwargs"):
        run_long_context(thinker, [], plan, journal, settings)


def test_the_server_is_told_in_its_own_words(thinker: Path) -> None:
    more = dict.fromkeys(("mmproj", "model_draft", "reasoning_budget")) | {"embeddings": False, "jinja": False}
    given = (thinker, ContextSettings(n_threads=1), Sampling(), None, 1, more)
    told = {"enable_thinking": False, "depth": "low"}
    assert " ".join(server_words(*given, told)).count('--reasoning off --chat-template-kwargs {"depth": "low"}') == 1
    assert not {"--reasoning", "--chat-template-kwargs"} & set(server_words(*given))


def test_the_server_is_told_of_the_kernels(thinker: Path) -> None:
    more = dict.fromkeys(("mmproj", "model_draft", "reasoning_budget")) | {"embeddings": False, "jinja": False}
    for repack in (True, False):
        words = server_words(thinker, ContextSettings(n_threads=1, repack=repack), Sampling(), None, 1, more)
        assert ("--no-repack" in words) is not repack
