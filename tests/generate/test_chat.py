"""Generation and conversations on a fake model: what is streamed, kept, left out, saved and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.fake_llama import TEMPLATE, FakeLlama

from ggufloop.backend.settings import RANDOM_SEED
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.generate.chat import Conversation, Turn
from ggufloop.generate.complete import Interrupted, Totals, complete, first_difference
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import LoopSpec
from ggufloop.models.template import PLAIN, ChatTemplate

LOOP = LoopSpec((2, 5), 3)


def conversation(n_ctx: int = 1024, system: str | None = None, **sampling: float) -> Conversation:
    llm = FakeLlama(n_ctx=n_ctx)
    template = ChatTemplate.of(llm)
    assert template is not None
    return Conversation(llm, template, Sampling(**{"seed": 7, **sampling}), system, "fake.gguf")


@pytest.mark.parametrize(
    ("setting", "text", "message"),
    [
        ("temp", "-1", "temp -1.0 is not a number of 0 or more."),
        ("temp", "nan", "temp nan is not a number of 0 or more."),
        ("temperature", "inf", "temp inf is not a number of 0 or more."),
        ("temp", "warm", "temp warm is not a number of 0 or more."),
        ("top-k", "1.5", "top-k 1.5 is not a whole number of 0 or more."),
        ("top_p", "1.1", "top-p 1.1 is not a number from 0 to 1."),
        ("min-p", "-0.1", "min-p -0.1 is not a number from 0 to 1."),
        ("repeat-penalty", "0", "repeat-penalty 0.0 is not a number above 0."),
        ("seed", str(RANDOM_SEED), f"seed {RANDOM_SEED} is not a whole number from 0 to {RANDOM_SEED - 1}, or -1."),
        ("n", "0", "n 0 is not a whole number of 1 or more, or -1."),
        ("n", "-2", "n -2 is not a whole number of 1 or more, or -1."),
        ("top-q", "1", "setting 'top-q' is not known."),
    ],
)
def test_a_bad_sampling_value_is_named_with_its_rule(setting: str, text: str, message: str) -> None:
    with pytest.raises(UsageError) as e:
        Sampling().changed(setting, text)
    assert e.value.message == message
    assert e.value.hint


def test_sampling_defaults_are_those_of_llama_cpp_and_a_random_seed_is_drawn_once() -> None:
    assert str(Sampling()) == "temp 0.8, top-k 40, top-p 0.95, min-p 0.05, repeat-penalty 1, seed -1, n -1"
    drawn = Sampling().seeded()
    assert 0 <= drawn.seed < RANDOM_SEED
    assert drawn.seeded() == drawn


def test_a_template_sees_what_templates_are_written_for() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{% for m in messages %}\n"
        "    {% if loop.index0 == 9 %}{% break %}{% endif %}\n"
        "    {% generation %}{{ m | tojson }}{% endgeneration %}\n"
        "{% endfor %}{{ eos_token }}{{ strftime_now('%%') }}{{ tools is none }}{{ add_generation_prompt }}",
        bos="<s>",
        eos="</s>",
    )
    said = template.render([{"role": "user", "content": "caf\u00e9 <>"}])
    assert said == '<s>{"role": "user", "content": "caf\u00e9 <>"}</s>%TrueTrue'


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{% if %}",
            "the model's chat template cannot be read: line 1: Expected an expression, got 'end of statement block'.",
        ),
        (
            "{{ raise_exception('no system role') }}",
            "the model's chat template refuses this conversation: no system role.",
        ),
        ("{{ 1 / 0 }}", "the model's chat template refuses this conversation: division by zero."),
    ],
)
def test_a_template_that_fails_says_so(source: str, message: str) -> None:
    with pytest.raises(GgufloopError) as e:
        ChatTemplate(source).render([{"role": "user", "content": "x"}])
    assert e.value.message == message


def test_a_model_without_a_template_has_none_and_the_plain_one_reads_like_a_dialogue() -> None:
    llm = FakeLlama()
    llm.metadata = {}
    assert ChatTemplate.of(llm) is None
    turns = Conversation(llm, PLAIN, Sampling(), "Be brief.")
    turns.turns = [Turn("Hi", "Hello", 0)]
    assert PLAIN.render([*turns.messages(), {"role": "user", "content": "Why?"}]) == (
        "Be brief.\n\nUser: Hi\nAssistant: Hello\nUser: Why?\nAssistant:"
    )


def stream(reply: bytes, n: int = -1, stop: tuple[str, ...] = ()) -> tuple[list[str], str, str]:
    llm = FakeLlama(n_ctx=40)
    llm.replies = [reply]
    pieces: list[str] = []
    answer = complete(llm, [65], Sampling(n=n, seed=1), stop=stop, emit=pieces.append)
    assert "".join(pieces) == answer.text
    return pieces, answer.text, answer.finish


@pytest.mark.parametrize(
    ("reply", "n", "pieces", "finish"),
    [
        (b"abc", -1, ["a", "b", "c"], "stop"),
        ("a\u00e9\U0001f60a".encode(), -1, ["a", "\u00e9", "\U0001f60a"], "stop"),
        ("\U0001f60a".encode(), 4, ["\U0001f60a"], "length"),
        ("a\U0001f60a".encode(), 3, ["a"], "length"),
        (b"a\xff\xfeb", -1, ["a", "\ufffd", "\ufffd", "b"], "stop"),
        (b"", -1, [], "stop"),
        (b"x" * 99, -1, ["x"] * 39, "context"),
        (b"x" * 99, 50, ["x"] * 39, "context"),
    ],
)
def test_characters_come_out_whole_and_as_soon_as_they_are(
    reply: bytes, n: int, pieces: list[str], finish: str
) -> None:
    assert stream(reply, n) == (pieces, "".join(pieces), finish)


@pytest.mark.parametrize(
    ("reply", "pieces", "finish"),
    [
        (b"ab\nUser: hi", ["a", "b"], "stop"),
        (b"a\nUs\nUser:b", ["a", "\nUs"], "stop"),
        (b"a\nUse", ["a", "\nUse"], "stop"),
        (b"a\n\nb", ["a", "\n", "\nb"], "stop"),
    ],
)
def test_a_stop_string_ends_the_answer_and_no_part_of_it_is_shown(reply: bytes, pieces: list[str], finish: str) -> None:
    assert stream(reply, stop=("\nUser:",)) == (pieces, "".join(pieces), finish)


def test_white_space_before_a_chat_answer_is_left_out() -> None:
    chat = conversation()
    chat.model.replies = [b" \n Hi \n"]
    assert chat.ask("a").text == "Hi \n"
    assert stream(b" Hi")[1] == " Hi"


def test_a_conversation_repeats_itself_with_its_seed_and_a_regenerated_answer_is_new() -> None:
    first, second = conversation(), conversation()
    for chat in (first, second):
        chat.ask("a")
        chat.ask("b")
    assert (
        first.turns
        == second.turns
        == [Turn("a", "a: plain answer, seed 7", 7), Turn("b", "b: plain answer, seed 8", 8)]
    )
    assert first.regenerate().text == "b: plain answer, seed 9"
    assert (
        first.model.prompts[-1]
        == first.model.prompts[-2]
        == ("[user]a\n[assistant]a: plain answer, seed 7\n[user]b\n[assistant]")
    )
    first.set_sampling("seed", "3")
    assert first.ask("c").text == "c: plain answer, seed 3"
    first.clear()
    assert first.ask("d").text == "d: plain answer, seed 3"
    last_seed = conversation(seed=RANDOM_SEED - 1)
    last_seed.ask("a")
    assert last_seed.ask("b").text == "b: plain answer, seed 0"


def test_replaying_compares_loops_and_changes_nothing() -> None:
    chat = conversation()
    chat.ask("a")
    chat.set_loop(LOOP)
    chat.ask("b")
    before = (list(chat.turns), chat.model.loop, chat.dropped)
    plain, looped = chat.replay(None), chat.replay(LOOP)
    assert (plain.text, looped.text) == ("b: plain answer, seed 8", "b: looped answer, seed 8")
    assert (plain.loop, looped.loop) == (None, LOOP)
    assert (list(chat.turns), chat.model.loop, chat.dropped) == before
    assert chat.model.resets == 2  # each reads its prompt from the start
    assert first_difference(plain.tokens, looped.tokens) == 3
    assert [totals.answers for totals in chat.totals().values()] == [2, 2]
    with pytest.raises(UsageError, match="out of range"):
        chat.replay(LoopSpec((2, 9), 2))
    assert chat.model.loop == LOOP
    chat.set_loop(None)
    assert chat.last_loop == LOOP


@pytest.mark.parametrize(
    ("a", "b", "at"), [("", "", None), ("ab", "ab", None), ("ab", "ac", 1), ("ab", "abc", 2), ("", "a", 0)]
)
def test_first_difference(a: str, b: str, at: int | None) -> None:
    assert first_difference(a.encode(), b.encode()) == at


def test_the_oldest_turns_drop_when_the_context_is_full_and_the_system_prompt_stays() -> None:
    chat = conversation(n_ctx=160, system="S", n=20)
    dropped = [chat.ask(text).dropped for text in "abcdef"]
    assert dropped == [0, 0, 0, 1, 1, 1]
    assert chat.dropped == 3
    assert len(chat.turns) == 6
    assert chat.model.prompts[-1] == (
        "[system]S\n[user]d\n[assistant]d: plain answer, see\n[user]e\n[assistant]e: plain answer, see\n"
        "[user]f\n[assistant]"
    )
    assert chat.regenerate().dropped == 0


def test_a_message_that_does_not_fit_alone_is_refused_and_forgotten() -> None:
    chat = conversation(n_ctx=100)
    chat.ask("a")
    with pytest.raises(GgufloopError) as e:
        chat.ask("b" * 100)
    assert e.value.message == "the prompt has 119 tokens, and the context holds 100."
    assert [turn.user for turn in chat.turns] == ["a"]
    assert chat.ask("c" * 78).finish == "context"  # room for an answer is wished for, not required


@pytest.mark.parametrize("text", ["", " \n", "caf\udce9"])
def test_an_empty_or_undecodable_message_is_refused(text: str) -> None:
    chat = conversation()
    with pytest.raises(UsageError):
        chat.ask(text)
    assert chat.turns == []


def test_a_second_bos_is_taken_out() -> None:
    llm = FakeLlama()
    template = ChatTemplate("{{ bos_token }}" + TEMPLATE, bos="<s>")
    assert Conversation(llm, template, Sampling(seed=0)).ask("a").context == len("[user]a\n[assistant]") + 1 + 23


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    chat = conversation()
    tokens: list[str] = []
    answer = chat.ask("abc", emit=tokens.append, stopped=lambda: len(tokens) == 5)
    assert (answer.text, answer.finish) == ("abc: ", "interrupted")
    assert chat.turns == [Turn("abc", "abc: ", 7)]

    def interrupt(i: int) -> None:
        raise Interrupted

    chat.model.on_token = interrupt
    with pytest.raises(Interrupted):
        chat.ask("d")
    assert len(chat.turns) == 1
    assert chat.model.resets == 1  # how far the prompt was read is unknown


def test_totals_add_up() -> None:
    chat = conversation()
    assert Totals.of([chat.ask("a"), chat.ask("b")]) == Totals(
        2, 20 + 63, pytest.approx(0.83), 46, 46, pytest.approx(4.6)
    )


def test_a_saved_chat_is_readable_and_comes_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    chat = conversation(system="S")
    chat.set_loop(LOOP)
    chat.ask("caf\u00e9")
    chat.save(path)
    chat.save(path)  # its own files are replaced
    assert path.read_text(encoding="utf-8") == (
        '{\n  "schema_version": 1,\n  "model": "fake.gguf",\n  "loop": "2:5 k=3",\n  "messages": [\n'
        '    {\n      "role": "system",\n      "content": "S"\n    },\n'
        '    {\n      "role": "user",\n      "content": "caf\u00e9"\n    },\n'
        '    {\n      "role": "assistant",\n      "content": "caf\u00e9: looped answer, seed 7"\n    }\n  ]\n}\n'
    )
    assert [p.name for p in tmp_path.iterdir()] == ["chat.json"]
    other = conversation()
    other.ask("forgotten")
    assert other.load(path) == "fake.gguf"
    assert (other.messages(), other.model.loop) == (chat.messages(), LOOP)


SAVED = {"schema_version": 1, "model": "m", "loop": None, "messages": []}
USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "FILE is not a saved chat."),
        (b"\x89PNG\r\n", "FILE is not a saved chat."),
        (b"[" * 100_000, "FILE is not a saved chat."),
        (b"[]", "FILE is not a saved chat."),
        (json.dumps({"messages": []}), "FILE is not a saved chat."),
        (SAVED | {"schema_version": 2}, "FILE has schema version 2, and this ggufloop reads 1."),
        (SAVED | {"messages": {}}, "FILE is damaged: its loop or its messages are of the wrong kind."),
        (SAVED | {"loop": 3}, "FILE is damaged: its loop or its messages are of the wrong kind."),
        (SAVED | {"loop": "2-5 k=3"}, "window 2-5 is not of the form first:end."),
        (SAVED | {"loop": "2:9 k=3"}, "window 2:9 is out of range: this model has 7 layers."),
        (SAVED | {"messages": ["hi"]}, "FILE is damaged: a message has no text."),
        (SAVED | {"messages": [{"role": "user"}]}, "FILE is damaged: a message has no text."),
        (SAVED | {"messages": [USER]}, "FILE is damaged: its messages do not alternate between user and assistant."),
        (
            SAVED | {"messages": [ANSWER, USER]},
            "FILE is damaged: its messages do not alternate between user and assistant.",
        ),
        (SAVED | {"messages": [{"role": "user", "content": "\ud800"}, ANSWER]}, "a message of FILE is not UTF-8 text."),
        (None, "cannot read FILE: No such file or directory."),
    ],
)
def test_a_file_that_cannot_be_loaded_changes_nothing(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "chat.json"
    if isinstance(content, (str, dict)):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    if isinstance(content, bytes):
        path.write_bytes(content)
    chat = conversation(system="S")
    chat.ask("a")
    before = (chat.messages(), chat.model.loop)
    with pytest.raises(GgufloopError) as e:
        chat.load(path)
    assert e.value.message.replace(str(path), "FILE") == message
    assert e.value.hint
    assert (chat.messages(), chat.model.loop) == before


def test_saving_never_replaces_another_file_and_leaves_no_half_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = conversation()
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF")
    with pytest.raises(GgufloopError, match="not a saved chat"):
        chat.save(model)
    assert model.read_bytes() == b"GGUF"
    with pytest.raises(GgufloopError, match="No such file or directory"):
        chat.save(tmp_path / "no" / "chat.json")

    def full(path: Path, data: bytes) -> None:
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(GgufloopError, match="the disk is full: cannot write"):
        chat.save(tmp_path / "chat.json")
    assert [p.name for p in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_save_and_load_under_a_name_no_file_can_have(name: str, tmp_path: Path) -> None:
    chat = conversation()
    with pytest.raises(GgufloopError, match="cannot write"):
        chat.save(tmp_path / name)
    with pytest.raises(GgufloopError, match="cannot read"):
        chat.load(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
