"""`run`, `chat` and `completion` as a user meets them: whole outputs on a fake model, and a few on a real one."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.shell_completion import BashComplete
from support.cli import Cli, Ran
from support.fake_llama import FakeLlama

from ggufloop.cli import cli
from ggufloop.cli import input as lines

CLI = [sys.executable, "-c", "from ggufloop.cli import main; main()"]


class Bench:
    """Runs commands on a FakeLlama in place of the engine; `model` is a real (tiny) file, `llm` the last one opened."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
        self.model = str(model)
        self.llm = FakeLlama()
        self.prepare: Callable[[FakeLlama], None] = lambda llm: None
        self._monkeypatch, self._cli = monkeypatch, cli
        monkeypatch.setitem(sys.modules, "ggufloop.engine", types.SimpleNamespace(LoopedLlama=self._open))

    def _open(self, path: Path, **kwargs: Any) -> FakeLlama:
        self.llm = FakeLlama(path, **kwargs)
        self.prepare(self.llm)
        return self.llm

    def __call__(self, *args: str, stdin: bytes = b"") -> Ran:
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        return self._cli(args[0], *(self.model if arg == "MODEL" else arg for arg in args[1:]))

    def chat(self, *said: str, args: tuple[str, ...] = ()) -> Ran:
        """Pipe lines into a chat with seed 7."""
        return self("chat", "MODEL", "-s", "7", *args, stdin="".join(f"{line}\n" for line in said).encode())


@pytest.fixture
def bench(tiny_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, cli: Cli) -> Bench:
    return Bench(tiny_model("llama"), monkeypatch, cli)


def foot(prompt: int, generated: int, loop: str = "plain", cut: bool = False) -> str:
    end = f" | cut by -n {generated}: a larger -n gives more" if cut else ""
    return f"[ Prompt: {prompt} tokens, 100.0 t/s | Generation: {generated} tokens, 10.0 t/s | {loop}{end} ]\n"


def test_one_answer_is_on_stdout_and_its_footer_on_stderr(bench: Bench) -> None:
    assert bench("run", "MODEL", "-s", "7", "-p", "Hi") == (0, "Hi: plain answer, seed 7\n", foot(21, 24))
    looped = bench("run", "MODEL", "-s", "7", "-p", "Hi", "--window", "2:5", "--kv", "each", "-n", "4")
    assert looped == (0, "Hi: \n", foot(21, 4, "window 2:5, K 3, kv=each", cut=True))


def test_flags_reach_the_model(bench: Bench) -> None:
    flags = "-c 512 -b 64 -ub 32 -t 3 -ngl 5 -fa off -ctk q8_0 -ctv bf16 -nr --temp 0 --top-k 3 --top-p 0.5 --min-p 0.1"
    assert bench("run", "MODEL", "-p", "Hi", *flags.split(), "--repeat-penalty", "1.1").code == 0
    assert bench.llm.n_ctx() == 512
    assert bench.llm.kwargs == {
        "n_seq": 1, "n_batch": 64, "n_ubatch": 32, "n_threads": 3, "n_threads_batch": 3, "n_gpu_layers": 5,
        "flash_attn": False, "repack": False,
        "type_k": 8, "type_v": 30, "verbose": False, "rpc_servers": None, "split_mode": "layer",
        "tensor_split": None, "main_gpu": 0, "device": None,
    }  # fmt: skip
    assert bench.llm.sampling == {"temp": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "repeat_penalty": 1.1}
    assert bench("run", "MODEL", "-p", "Hi").code == 0
    assert bench.llm.n_ctx() == 1024  # what the file says, being less than 4096
    assert bench.llm.kwargs["flash_attn"] is bench.llm.kwargs["repack"] is True
    assert bench.llm.sampling == {"temp": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0}


def test_without_a_model_it_says_what_to_type(bench: Bench) -> None:
    hint = "a GGUF file, a name of `ggufloop list`, or user/repo[:quant].\n"
    for words in (["run"], ["run", "-p", "Hi"], ["chat"]):
        typed = f"type `ggufloop {words[0]} smollm2-135m`, or "
        assert bench(*words) == (2, "", f"error: no model is given.\n  {typed}{hint}")


def test_where_a_prompt_comes_from(bench: Bench, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("from a file\n", encoding="utf-8-sig")

    def asked(*args: str, stdin: bytes = b"") -> str:
        assert bench("run", "MODEL", *args, stdin=stdin).code == 0
        return bench.llm.prompts[-1]

    assert asked(stdin=b"piped\n") == "[user]piped\n[assistant]"
    assert asked("-p", "Sum up:", stdin=b"a\nb\n") == "[user]Sum up:\na\nb\n[assistant]"
    assert asked("-f", str(file)) == "[user]from a file\n[assistant]"
    assert asked("-f", str(file), stdin=b"piped") == "[user]from a file\npiped\n[assistant]"
    assert asked("-p", "Hi", "-sys", "Be brief.") == "[system]Be brief.\n[user]Hi\n[assistant]"
    assert asked("-p", "Once", "--raw") == "Once"


def test_a_model_without_a_template_continues_text_and_chats_in_plain_turns(bench: Bench) -> None:
    bench.prepare = lambda llm: llm.metadata.clear()
    result = bench("run", "MODEL", "-p", "Hi", "-sys", "S", "-n", "3")
    assert result.err.splitlines()[0] == (
        "note: this model has no chat template: it continues the text as it is, and -sys is left out."
    )
    assert bench.llm.prompts == ["Hi"]
    result = bench.chat("Hi")
    assert result.err.startswith("note: this model has no chat template: it gets a plain 'User: ... Assistant: ...'")
    assert bench.llm.prompts == ["User: Hi\nAssistant:"]


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        ("-p x -f y", 2, "error: the prompt is given twice.\n  give -p or -f, not both."),
        ("-f /no/file", 1, "error: cannot read /no/file: No such file or directory.\n  give -f a text file."),
        (
            "",
            2,
            "error: standard input is empty.\n  give a prompt with -p, -f or a pipe, or run in a terminal to chat.",
        ),
        (
            "-p caf\udce9",
            2,
            "error: the prompt is not UTF-8 text.\n  convert it, for example with iconv -t UTF-8.",
        ),
        (
            "--raw -sys S -p x",
            2,
            "error: -sys needs a chat template, and --raw uses none.\n  put the text into the prompt.",
        ),
        (
            "-p x --temp nan",
            2,
            "error: temp nan is not a number of 0 or more.\n  0 always takes the likeliest token.",
        ),
        (
            "-p x -n 0",
            2,
            "error: n 0 is not a whole number of 1 or more, or -1.\n"
            "  -1 goes on until the model ends or the context is full.",
        ),
        (
            "-p x -s -2",
            2,
            "error: seed -2 is not a whole number from 0 to 4294967294, or -1.\n  -1 draws one.",
        ),
        (
            "-p x --raw --prefill S",
            2,
            "error: --prefill needs a chat template, and --raw uses none.\n  put the text into the prompt.",
        ),
        (
            "-p x --raw --think on",
            2,
            "error: --think and --chat-template-kwargs are of a chat template, and none is used "
            "here.\n  leave them out, or leave out --raw.",
        ),
        (
            "-p x --think on",
            2,
            "error: this model has no chat template, so there is nothing to switch.\n"
            "  leave out --think and --chat-template-kwargs.",
        ),
        (
            "-p x --chat-template-kwargs {a:1}",
            2,
            "Error: Invalid value for '--chat-template-kwargs': '{a:1}' cannot be read: "
            "Expecting property name enclosed in double quotes at column 2",
        ),
        (
            "-p x --chat-template-kwargs [1]",
            2,
            "Error: Invalid value for '--chat-template-kwargs': '[1]' is no JSON "
            "object; write it like '{\"enable_thinking\": false}'",
        ),
        ("-p x -n many", 2, "Error: Invalid value for '-n' / '--predict': 'many' is not a valid integer."),
        ("-p x -c -1", 2, "Error: Invalid value for '-c' / '--ctx-size': -1 is not in the range x>=0."),
        ("-p x -b 0", 2, "Error: Invalid value for '-b' / '--batch-size': 0 is not in the range x>=1."),
        (
            "-p x -fa maybe",
            2,
            "Error: Invalid value for '-fa' / '--flash-attn': 'maybe' is not known; known: auto, on, off.",
        ),
        (
            "-p x -ctk q8",
            2,
            "Error: Invalid value for '-ctk' / '--cache-type-k': 'q8' is not known; did you mean q8_0? "
            "Known: f32, f16, bf16, q8_0, q4_0, q4_1, iq4_nl, q5_0, q5_1.",
        ),
        (
            "-p x -ctv q8_0 -fa off",
            2,
            "error: a V cache of type q8_0 needs flash attention, and -fa is off.\n"
            "  leave out -fa off, or use -ctv f16.",
        ),
        ("-p x --K 3", 2, "Error: --K needs --window A:B (or --window auto): without a window nothing loops."),
        (
            "-p x --window 2:9",
            2,
            "error: window 2:9 is out of range: this model has 7 layers.\n  use 1:6 at most.",
        ),
        (
            f"-c 256 -p {'x' * 300}",
            1,
            "error: the prompt has 319 tokens, and the context holds 256.\n"
            "  give a larger context with -c, or a shorter prompt.",
        ),
    ],
)
def test_what_cannot_be_run_says_why(bench: Bench, args: str, code: int, message: str) -> None:
    result = bench("run", "MODEL", *args.split())
    usage = "Usage: ggufloop run [OPTIONS] MODEL\nTry 'ggufloop run --help' for help.\n\n"
    assert result == (code, "", (usage if message.startswith("Error") else "") + message + "\n")
    assert bench.llm.prompts == []


def test_input_that_is_not_utf8(bench: Bench) -> None:
    message = "error: standard input is not UTF-8 text: byte 0xe9 at position 3.\n"
    assert bench("run", "MODEL", stdin=b"caf\xe9 x").err.startswith(message)
    result = bench("chat", "MODEL", "-s", "7", stdin=b"caf\xe9\nHi\n")
    assert result.err.startswith(message)
    assert (result.code, result.out) == (1, "Hi: plain answer, seed 7\n")


def test_notes(bench: Bench) -> None:
    err = bench("run", "MODEL", "-p", "Hi", "-c", "2048", "--window", "2:4", "--damping", "0.5", "-n", "1").err
    assert err.splitlines()[:2] == [
        "note: K times damping is 1.5 here, not 1 as in a damped loop.",
        "note: a context of 2048 tokens is more than the 1024 this model was trained on.",
    ]
    bench.prepare = lambda llm: llm.replies.append(b"")
    assert bench("run", "MODEL", "-p", "Hi") == (
        0,
        "",
        "[ Prompt: 21 tokens, 100.0 t/s | Generation: 0 tokens | plain ]\n"
        "note: the model ended its answer before it began.\n",
    )
    bench.prepare = lambda llm: llm.replies.append(b"x" * 99)
    assert bench("run", "MODEL", "-c", "30", "-p", "Hi").err.endswith(
        "note: the answer ends here because the context of 30 tokens is full. A larger -c holds more.\n"
    )


def interrupt_at(*tokens: int) -> Callable[[FakeLlama], None]:
    def prepare(llm: FakeLlama) -> None:
        llm.on_token = lambda i: signal.raise_signal(signal.SIGINT) if i in tokens else None

    return prepare


def test_ctrl_c_stops_one_answer_with_130_after_its_footer(bench: Bench) -> None:
    bench.prepare = interrupt_at(2)
    stopped = "[ Prompt: 21 tokens, 100.0 t/s | Generation: 3 tokens, 10.0 t/s | plain | stopped ]\n"
    assert bench("run", "MODEL", "-p", "Hi") == (130, "Hi:\n", stopped)
    bench.prepare = interrupt_at(0)
    assert bench("run", "MODEL", "-p", "Hi") == (130, "", "[ stopped before the first token ]\n")
    assert bench.llm.resets == 1
    bench.prepare = lambda llm: setattr(llm, "on_token", twice)

    def twice(i: int) -> None:
        if i == 1:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    assert bench("run", "MODEL", "-p", "Hi") == (130, "H\n", "\ninterrupted\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_chat_ctrl_c_stops_the_answer_and_twice_leaves(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    typed: Iterator[str | type[BaseException]] = iter(
        ["Hi", "Yo", KeyboardInterrupt, "Oh", KeyboardInterrupt, KeyboardInterrupt, "never"]
    )

    def read() -> str:
        word = next(typed)
        if isinstance(word, str):
            return word
        raise word

    monkeypatch.setattr(lines, "is_interactive", lambda: True)
    monkeypatch.setattr(lines, "line_reader", lambda commands: read)
    bench.prepare = lambda llm: setattr(llm, "on_token", once)

    def once(i: int) -> None:
        if i == 2 and len(bench.llm.prompts) == 1:
            signal.raise_signal(signal.SIGINT)

    result = bench("run", "MODEL", "-s", "7", "-n", "4", "--window", "2:4", "--K", "2")
    again = "Ctrl-C again leaves, and so do Ctrl-D and /exit."
    looped = "window 2:4, K 2"
    assert result.code == 130
    assert result.out == "Hi:\nYo: \nOh: \n"
    assert result.err.splitlines() == [
        f"{Path(bench.model).name}, 7 layers, context 1024, {looped}",
        "/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.",
        f"[ Prompt: 21 tokens, 100.0 t/s | Generation: 3 tokens, 10.0 t/s | {looped} | stopped ]",
        foot(45, 4, looped, cut=True).strip(),
        again,
        foot(70, 4, looped, cut=True).strip(),
        again,
        "",
        "interrupted",
    ]
    typed = iter(["Hi", KeyboardInterrupt])
    assert bench("run", "MODEL").err.endswith(
        "stopped ]\n\ninterrupted\n"
    )  # the second in a row, after a stopped answer


HELP = """\
/help                                              list these commands
/exit                                              leave (/bye, /quit and Ctrl-D do too)
/clear                                             forget the conversation, keep the settings
/regen                                             answer the last message again, differently
/system [TEXT | off]                               set, remove or show the system prompt
/think [on | off]                                  let the model think before it answers, or not
/prefill [TEXT]                                    begin the next answer with TEXT
/set NAME VALUE                                    change temp, top-k, top-p, min-p, repeat-penalty, seed or n
/show                                              show the model, the loop and all settings
/save FILE                                         save the conversation
/load FILE                                         go on with a saved conversation
/stats                                             speeds so far, by loop
/loop [A:B [K] [NAME=VALUE ...] | auto [K] | off]  set, remove or show the loop
/ab                                                answer the last message plain and looped, and compare
A line ending in \\ goes on in the next one.
"""


def test_slash_commands_show_on_stdout_and_acknowledge_on_stderr(bench: Bench) -> None:
    def out(*said: str) -> str:
        result = bench.chat(*said)
        assert result.code == 0, result.err
        return result.out

    def err(*said: str) -> str:
        result = bench.chat(*said)
        assert (result.code, result.out) == (0, "")
        return result.err

    assert out("/help") == HELP
    assert out("", "  ", "/exit", "/help") == out("/bye", "/help") == out("/quit", "/help") == ""
    assert out("/prefill Oh, ", "a", "b") == "Oh,a: plain answer, seed 7\nb: plain answer, seed 8\n"
    assert bench.llm.prompts[0] == "[user]a\n[assistant]Oh,"
    assert out("/think") == "thinking is as the chat template has it\n"
    bench.prepare = lambda llm: llm.metadata.update({"tokenizer.chat_template": "{{ enable_thinking }}[user]"})
    assert out("/think off", "/think", "a") == (
        "the chat template gets enable_thinking false\n: plain answer, seed 7\n"
    )
    assert bench.llm.prompts == ["False[user]"]
    bench.prepare = lambda llm: None
    assert out("a \\", "b") == "a : plain answer, seed 7\n"
    assert bench.llm.prompts == ["[user]a \nb\n[assistant]"]
    assert out("a", "/regen") == "a: plain answer, seed 7\na: plain answer, seed 8\n"
    assert out("a", "/clear", "b") == "a: plain answer, seed 7\nb: plain answer, seed 7\n"
    assert bench.llm.prompts[-1] == "[user]b\n[assistant]"
    assert out("/system", "/system Be brief.", "/system", "a", "/system off", "/system") == (
        "no system prompt\nBe brief.\na: plain answer, seed 7\nno system prompt\n"
    )
    assert bench.llm.prompts == ["[system]Be brief.\n[user]a\n[assistant]"]
    assert out("/loop", "/loop 2:4", "/loop", "/loop 2:5 6 beta=0.5 kv=each", "/loop", "/loop off", "/loop") == (
        "plain\n"
        "window 2:4, K 3 (1.57 times the layer evaluations)\n"
        "window 2:5, K 6, beta=0.5, kv=each (3.14 times the layer evaluations)\n"
        "plain\n"
    )
    assert err("/loop 2:5 k=4 damping=0.5", "/loop 2:3 1", "/loop auto 2", "/loop off") == (
        "from the next answer on: window 2:5, K 4, damping=0.5.\n"
        "note: K times damping is 2 here, not 1 as in a damped loop.\n"
        "from the next answer on: window 2:3, K 1 (one evaluation: plain).\n"
        "note: --window 2:4 rests on a rule of depth from published work, not on a gain measured on this file: it may "
        "harm. `ggufloop sweep` measures.\n"
        "from the next answer on: window 2:4, K 2.\n"
        "from the next answer on: plain.\n"
    )
    assert err("/set temp 0", "/set n 5", "/clear", "/set seed 9") == (
        "temp 0, top-k 40, top-p 0.95, min-p 0.05, repeat-penalty 1, seed 7, n -1\n"
        "temp 0, top-k 40, top-p 0.95, min-p 0.05, repeat-penalty 1, seed 7, n 5\n"
        "the conversation is forgotten.\n"
        "temp 0, top-k 40, top-p 0.95, min-p 0.05, repeat-penalty 1, seed 9, n 5\n"
    )
    assert bench.chat("/set temp 0", "a", "/regen").err.endswith(
        "note: temp 0 always gives the same answer; /set temp 0.8 gives others.\n"
    )
    assert out("/show", "a", "/loop 2:4 2", "/system S", "/show").splitlines()[-6:] == [
        f"model     {Path(bench.model).name}, 7 layers",
        "loop      2:4 k=2",
        "system    S",
        "sampling  temp 0.8, top-k 40, top-p 0.95, min-p 0.05, repeat-penalty 1, seed 7, n -1",
        "turns     1",
        "context   43 of 1024 tokens in use",
    ]
    assert out("a", "b", "/loop 2:4 2", "c", "/stats").splitlines()[-3:] == [
        "plain: 2 answers | Prompt: 83 tokens, 100.0 t/s | Generation: 46 tokens, 10.0 t/s",
        "window 2:4, K 2: 1 answer | Prompt: 106 tokens, 100.0 t/s | Generation: 24 tokens, 10.0 t/s",
        "context: 130 of 1024 tokens in use",
    ]


def test_ab_answers_the_last_message_both_ways_and_says_where_they_part(bench: Bench) -> None:
    result = bench.chat("a", "/loop 2:4 2", "/ab", "/loop off", "b")
    assert result == (
        0,
        "a: plain answer, seed 7\n"
        "--- plain\n"
        "a: plain answer, seed 7\n"
        "--- window 2:4, K 2\n"
        "a: looped answer, seed 7\n"
        "--- they differ from token 4 on: plain 'p', looped 'l'\n"
        "b: plain answer, seed 8\n",
        foot(20, 23)
        + "from the next answer on: window 2:4, K 2.\n"
        + foot(20, 23)
        + foot(20, 24, "window 2:4, K 2")
        + "from the next answer on: plain.\n"
        + foot(63, 23),
    )

    def same(llm: FakeLlama) -> None:
        llm.replies = [b"same", b"same", b"same", b"same", b"same and more"]

    bench.prepare = same
    out = bench.chat("a", "/ab", "/ab", args=("--window", "2:4")).out
    assert re.findall("--- [bt].*", out) == [
        "--- both gave the same 4 tokens",
        "--- they differ from token 5 on: plain ends, looped ' '",
    ]


def test_save_and_load(bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "a chat.json"
    result = bench.chat("/loop 2:4 2", "Hi", f"/save {path}", "/clear", "/loop off", "/load ~/a chat.json", "Yo")
    assert result.err.splitlines()[2:-1] == [
        f"saved 1 turn to {path}.",
        "the conversation is forgotten.",
        "from the next answer on: plain.",
        f"loaded 1 turn from {path}; window 2:4, K 2.",
    ]
    assert bench.llm.prompts[-1] == "[user]Hi\n[assistant]Hi: looped answer, seed 7\n[user]Yo\n[assistant]"
    path.write_text(path.read_text().replace(Path(bench.model).name, "other.gguf"))
    assert bench.chat(f"/load {path}").err.splitlines()[-1] == (
        f"note: it was saved with other.gguf, this is {Path(bench.model).name}."
    )


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("/lop", "command '/lop' is not known.",
         "did you mean /loop? "
         "Known: /help, /exit, /clear, /regen, /system, /think, /prefill, /set, /show, /save, /load, /stats, "
             "/loop, /ab."),
        ("/clear all", "/clear takes nothing after it, not 'all'.", "write /clear alone."),
        ("/save", "/save needs more.", "write it like /save FILE"),
        ("/regen", "there is no answer yet.", "ask something first."),
        ("/ab", "there is no loop to compare with.", "set one, for example /loop auto 3"),
        ("/set temp", "/set temp needs a value.", "write it like /set temp 0.5"),
        ("/set top-kk 3", "setting 'top-kk' is not known.",
         "did you mean top-k? Known: temp, top-k, top-p, min-p, repeat-penalty, seed, n."),
        ("/think off", "the model's chat template has no switch for thinking.", "leave it out: it reads none."),
        ("/think of", "/think 'of' is not known.", "did you mean off? Known: on, off."),
        ("/loop 2-5", "window 2-5 is not of the form first:end.",
         "windows are half-open: layers 2 to 5 are --window 2:6."),
        ("/loop 2:9", "window 2:9 is out of range: this model has 7 layers.", "use 1:6 at most."),
        ("/loop 2:4 three", "k 'three' is not a whole number.", "write it like k=3."),
        ("/loop 2:4 3 kv=eech", "kv 'eech' is not known.", "did you mean each? Known: first, last, each, frozen."),
        ("/load /no/chat", "cannot read /no/chat: No such file or directory.", "name a file that /save wrote."),
        ("x" * 2000, "the prompt has 2019 tokens, and the context holds 1024.",
         "give a larger context with -c, or a shorter prompt."),
    ],
)  # fmt: skip
def test_a_line_that_fails_says_why_and_the_next_one_is_answered(
    bench: Bench, line: str, message: str, hint: str
) -> None:
    assert bench.chat(line, "Hi") == (
        1,
        "Hi: plain answer, seed 7\n",
        f"error: {message}\n  {hint}\n" + foot(21, 24),
    )


def test_dropped_turns_are_announced(bench: Bench) -> None:
    note = "note: the context is full: the oldest {} left out. A larger -c holds more.\n"
    err = bench.chat("a", "b", "c", "d", args=("-c", "120")).err
    assert err.count("note:") == err.count(note.format("turn was")) == 2
    assert bench.chat("a", "b", "x" * 80, args=("-c", "120", "-n", "9")).err.endswith(note.format("2 turns were"))


def test_colour_is_for_terminals_that_want_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown() -> str:
        screen = Screen()
        monkeypatch.setattr(sys, "stderr", screen)
        monkeypatch.setattr(sys, "stdout", screen)
        bench("run", "MODEL", "-p", "Hi", "-s", "7")
        return screen.getvalue()

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    bench.prepare = lambda llm: llm.replies.append(b"a\x1b[2Jb\tc")
    loading = f"loading {Path(bench.model).name} ..."
    before = f"\r{loading}\r{' ' * len(loading)}\ra[2Jb\tc\n"  # a model's escape codes are not for the screen
    assert shown() == f"{before}\x1b[2m{foot(21, 8).strip()}\x1b[0m\n"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown() == before + foot(21, 8)


@pytest.mark.parametrize(
    ("args", "incomplete", "found"),
    [
        (["run"], "smol", ["smollm2-135m"]),
        (["run", "-m"], "smol", ["smollm2-135m"]),
        (["run", "x", "--solver"], "h", ["heun", "heavy-ball"]),
        (["chat", "x", "--kv"], "f", ["first", "frozen"]),
        (["chat", "x", "-ctk"], "q5", ["q5_0", "q5_1"]),
        (["run", "x", "-fa"], "o", ["on", "off"]),
        (["completion"], "", ["bash", "zsh", "fish"]),
        ([], "compl", ["completion"]),
    ],
)
def test_the_shell_completes(args: list[str], incomplete: str, found: list[str]) -> None:
    items = BashComplete(cli, {}, "ggufloop", "_GGUFLOOP_COMPLETE").get_completions(args, incomplete)
    assert [item.value for item in items if item.type == "plain"] == found


@pytest.mark.parametrize(
    ("shell", "line"), [("bash", "complete -o"), ("zsh", "#compdef ggufloop"), ("fish", "complete --no-files")]
)
def test_completion_scripts(bench: Bench, shell: str, line: str) -> None:
    result = bench("completion", shell)
    assert (result.code, result.err) == (0, "")
    assert line in result.out
    assert "_GGUFLOOP_COMPLETE" in result.out


LOOP = ["smollm2-135m", "--window", "12:16", "--K", "3", "--temp", "0", "-n", "16", "-c", "512", "-t", "1"]


def shell(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([*CLI, *args], input=stdin, capture_output=True, text=True, encoding="utf-8", timeout=120)


@pytest.mark.model
def test_a_real_model_gives_the_same_text_by_run_and_by_chat(smollm2: Path) -> None:
    said = "Why is the sky blue?"
    footer = r"\[ Prompt: \d+ tokens, [\d.]+ t/s \| Generation: 16 tokens, [\d.]+ t/s \| %s \| cut by .* \]\n"
    run = shell("run", *LOOP, "-p", said)
    assert run.returncode == 0, run.stderr
    assert re.fullmatch(footer % "window 12:16, K 3", run.stderr)
    chat = shell("chat", *LOOP, stdin=f"{said}\n/ab\n")
    assert chat.returncode == 0, chat.stderr
    answer, plain, looped, difference = re.split(
        r"^--- (?:plain\n|window.*\n|(?=they))", chat.stdout, flags=re.MULTILINE
    )
    assert answer == looped == run.stdout
    assert plain != looped
    assert re.fullmatch(r"they differ from token \d+ on: plain '.*', looped '.*'\n", difference)
    assert re.fullmatch(footer % "window 12:16, K 3" + footer % "plain" + footer % "window 12:16, K 3", chat.stderr)


@pytest.mark.model
def test_a_real_model_is_stopped_by_ctrl_c(smollm2: Path) -> None:
    args = [*CLI, "run", *LOOP, "--raw", "-p", "1 2 3 4 5 6", "-n", "400"]
    process = subprocess.Popen(args, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert os.read(process.stdout.fileno(), 1)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(rb"\[ Prompt: .* \| window 12:16, K 3 \| stopped \]\n", err)


@pytest.mark.model
def test_a_real_context_overflows_into_a_note(smollm2: Path) -> None:
    long = "Tell me about foxes and " * 20
    chat = shell("chat", *LOOP, "-c", "256", "-n", "8", stdin=f"{long}\n{long}\n{long * 3}\nHi\n")
    assert chat.returncode == 1
    footers, lines = [], []
    for line in chat.stderr.splitlines():
        (footers if line.startswith("[") else lines).append(line)
    assert len(footers) == 3
    assert lines == [
        "note: the context is full: the oldest turn was left out. A larger -c holds more.",
        "error: the prompt has 331 tokens, and the context holds 256.",
        "  give a larger context with -c, or a shorter prompt.",
    ]
