"""A conversation at the terminal, or line by line from a pipe; COMMANDS are what a line beginning with / can be.

What a command is asked to show goes to stdout with the answers, so that a script can read it; acknowledgements,
footers and errors go to stderr. From a pipe a failed line does not stop the ones after it, but the exit code is 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from ggufloop.cli import input as lines
from ggufloop.cli import terminal
from ggufloop.cli.context import Opened
from ggufloop.cli.loop_options import Suggest
from ggufloop.cli.types import OneOf
from ggufloop.cli.width import tell
from ggufloop.errors import GgufloopError, UsageError, nearest
from ggufloop.generate.chat import Conversation
from ggufloop.generate.complete import Answer, Emit, Stopped, first_difference
from ggufloop.generate.sampling import Sampling
from ggufloop.loop import DEFAULT_K, LoopSpec
from ggufloop.models.template import PLAIN

COMMANDS = {
    "/help": ("", "list these commands"),
    "/exit": ("", "leave (/bye, /quit and Ctrl-D do too)"),
    "/clear": ("", "forget the conversation, keep the settings"),
    "/regen": ("", "answer the last message again, differently"),
    "/system": ("[TEXT | off]", "set, remove or show the system prompt"),
    "/think": ("[on | off]", "let the model think before it answers, or not"),
    "/prefill": ("[TEXT]", "begin the next answer with TEXT"),
    "/set": ("NAME VALUE", "change temp, top-k, top-p, min-p, repeat-penalty, seed or n"),
    "/show": ("", "show the model, the loop and all settings"),
    "/save": ("FILE", "save the conversation"),
    "/load": ("FILE", "go on with a saved conversation"),
    "/stats": ("", "speeds so far, by loop"),
    "/loop": ("[A:B [K] [NAME=VALUE ...] | auto [K] | off]", "set, remove or show the loop"),
    "/ab": ("", "answer the last message plain and looped, and compare"),
}


ALIASES = {"/bye": "/exit", "/quit": "/exit"}


class Repl:
    """Reads messages and commands until the input ends; `failed` tells whether any of them did not work.

    suggest: the window, or loop, that `/loop auto` means.
    """

    def __init__(self, chat: Conversation, n_layer: int, suggest: Suggest) -> None:
        self.chat = chat
        self.n_layer = n_layer
        self.suggest = suggest
        self.failed = False
        self._interrupted = False

    def run(self) -> None:
        """Converse. Raises KeyboardInterrupt on the second Ctrl-C in a row, or the first if nobody is typing."""
        read = lines.line_reader(list(COMMANDS))
        while True:
            try:
                self._next(read)
            except EOFError:
                return
            except lines.Unreadable:
                raise
            except GgufloopError as e:
                terminal.error(e)
                self.failed = True

    def _next(self, read: lines.Read) -> None:
        try:
            text = read()
        except KeyboardInterrupt:
            if self._interrupted or not lines.is_interactive():
                raise
            self._interrupted = True
            click.echo("Ctrl-C again leaves, and so do Ctrl-D and /exit.", err=True)
            return
        self._interrupted = False
        self.handle(text)

    def _stream(self, ask: Callable[[Emit, Stopped], Answer]) -> Answer | None:
        """Print an answer; None if it was stopped."""
        answer = terminal.stream(ask, self.chat.template.tags)
        self._interrupted = answer is None or answer.finish == "interrupted"
        return None if self._interrupted else answer

    def handle(self, text: str) -> None:
        """Answer one message or carry out one command. Raises EOFError to leave, GgufloopError."""
        name, _, rest = text.strip().partition(" ")
        if not name:
            return
        if not name.startswith("/"):
            self._stream(lambda emit, stopped: self.chat.ask(text, emit, stopped))
            return
        name = ALIASES.get(name, name)
        if name not in COMMANDS:
            raise UsageError(f"command {name!r} is not known.", nearest(name, COMMANDS))
        rest = rest.strip()
        usage = COMMANDS[name][0]
        if rest and not usage:
            raise UsageError(f"{name} takes nothing after it, not {rest!r}.", f"write {name} alone.")
        if not rest and usage and not usage.startswith("["):
            raise UsageError(f"{name} needs more.", f"write it like {name} {usage}")
        getattr(self, name.replace("/", "do_"))(rest)

    def do_help(self, rest: str) -> None:
        rows = [(f"{name} {usage}".strip(), text) for name, (usage, text) in COMMANDS.items()]
        width = max(len(left) for left, _ in rows)
        for left, text in rows:
            click.echo(f"{left:{width}}  {text}")
        click.echo(r"A line ending in \ goes on in the next one.")

    def do_exit(self, rest: str) -> None:
        raise EOFError

    def do_clear(self, rest: str) -> None:
        self.chat.clear()
        click.echo("the conversation is forgotten.", err=True)

    def do_regen(self, rest: str) -> None:
        if self._stream(self.chat.regenerate) and self.chat.sampling.temp == 0:
            terminal.note("temp 0 always gives the same answer; /set temp 0.8 gives others.")

    def do_system(self, rest: str) -> None:
        if not rest:
            click.echo(self.chat.system or "no system prompt")
            return
        self.chat.set_system(None if rest == "off" else rest)
        click.echo(f"system prompt {'removed' if rest == 'off' else 'set'}; it holds from the next answer.", err=True)

    def do_think(self, rest: str) -> None:
        if rest:
            self.chat.set_think(OneOf(("on", "off"), what="/think").convert(rest, None, None) == "on")
        given = ", ".join(f"{name} {json.dumps(value)}" for name, value in self.chat.template.arguments.items())
        told = f"the chat template gets {given}" if given else "thinking is as the chat template has it"
        click.echo(f"{told}; it holds from the next answer." if rest else told, err=bool(rest))

    def do_prefill(self, rest: str) -> None:
        self.chat.set_prefill(rest)
        click.echo("the next answer begins with it." if rest else "the next answer begins by itself.", err=True)

    def do_set(self, rest: str) -> None:
        name, _, value = rest.partition(" ")
        if not value.strip():
            raise UsageError(f"/set {name} needs a value.", "write it like /set temp 0.5")
        self.chat.set_sampling(name, value.strip())
        click.echo(str(self.chat.sampling), err=True)

    def do_show(self, rest: str) -> None:
        chat = self.chat
        turns = f"{len(chat.turns)}"
        if chat.dropped:
            turns += f", of which the oldest {chat.dropped} no longer fit the context"
        rows = {
            "model": f"{chat.name}, {self.n_layer} layers",
            "loop": str(chat.model.loop or "none (plain)"),
            "system": chat.system or "none",
            "sampling": str(chat.sampling),
            "turns": turns,
            "context": self._context(),
        }
        for name, value in rows.items():
            tell(f"{name:9} {value}\n")

    def do_stats(self, rest: str) -> None:
        for loop, total in self.chat.totals().items():
            answers = "1 answer" if total.answers == 1 else f"{total.answers} answers"
            tell(f"{terminal.describe(loop)}: {answers} | {terminal.speeds(total)}\n")
        click.echo(f"context: {self._context()}")

    def _context(self) -> str:
        used = self.chat.answers[-1].context if self.chat.answers and self.chat.turns else 0
        return f"{used} of {self.chat.model.n_ctx()} tokens in use"

    def do_save(self, rest: str) -> None:
        path = Path(rest).expanduser()
        self.chat.save(path)
        click.echo(f"saved {_turns(self.chat)} to {path}.", err=True)

    def do_load(self, rest: str) -> None:
        path = Path(rest).expanduser()
        model = self.chat.load(path)
        loop = terminal.describe(self.chat.model.loop)
        click.echo(f"loaded {_turns(self.chat)} from {path}; {loop}.", err=True)
        if model != self.chat.name:
            terminal.note(f"it was saved with {model}, this is {self.chat.name}.")

    def do_loop(self, rest: str) -> None:
        if not rest:
            loop = self.chat.model.loop
            cost = ""
            if loop is not None:
                most = "at most " if loop.halt is not None else ""
                cost = f" ({most}{loop.relative_cost(self.n_layer):.2f} times the layer evaluations)"
            click.echo(f"{terminal.describe(loop)}{cost}")
            return
        loop = None if rest == "off" else self._parse_loop(rest)
        self.chat.set_loop(loop)
        click.echo(f"from the next answer on: {terminal.describe(loop)}.", err=True)
        terminal.note_horizon(loop)

    def _parse_loop(self, rest: str) -> LoopSpec:
        """'14:20 3 kv=each' or 'auto' in the words of LoopSpec.parse."""
        window, *words = rest.split()
        if window == "auto":
            found = self.suggest()
            if isinstance(found, LoopSpec):
                if not words:
                    return found
                found = found.window
            window = "{}:{}".format(*found)
        if words and "=" not in words[0]:
            words[0] = f"k={words[0]}"
        if not any(word.lower().startswith("k=") for word in words):
            words.insert(0, f"k={DEFAULT_K}")
        return LoopSpec.parse(" ".join([window, *words]))

    def do_ab(self, rest: str) -> None:
        loop = self.chat.last_loop
        if loop is None:
            raise UsageError("there is no loop to compare with.", f"set one, for example /loop auto {DEFAULT_K}")
        answers = []
        for arm in (None, loop):
            click.echo(f"--- {terminal.describe(arm)}")
            answer = self._stream(partial(self.chat.replay, arm))
            if answer is None:
                return
            answers.append(answer)
        plain, looped = (answer.tokens for answer in answers)
        at = first_difference(plain, looped)
        if at is None:
            click.echo(f"--- both gave the same {len(plain)} tokens")
        else:
            a, b = (self._token(tokens, at) for tokens in (plain, looped))
            click.echo(f"--- they differ from token {at + 1} on: plain {a}, looped {b}")

    def _token(self, tokens: tuple[int, ...], i: int) -> str:
        if i == len(tokens):
            return "ends"
        return repr(self.chat.model.detokenize([tokens[i]]).decode("utf-8", "replace"))


def _turns(chat: Conversation) -> str:
    return "1 turn" if len(chat.turns) == 1 else f"{len(chat.turns)} turns"


def converse(opened: Opened, sampling: Sampling, system: str | None) -> None:
    """Chat until the user leaves; from a pipe, leave with exit code 1 if a line failed."""
    llm = opened.llm
    template = opened.template
    if template is None:
        terminal.note("this model has no chat template: it gets a plain 'User: ... Assistant: ...' text.")
    chat = Conversation(llm, template or PLAIN, sampling, system, opened.path.name)
    if lines.is_interactive():
        loop = terminal.describe(llm.loop)
        click.echo(f"{chat.name}, {llm.n_layer()} layers, context {llm.n_ctx()}, {loop}", err=True)
        click.echo("/help lists the commands. Ctrl-C stops an answer, Ctrl-D leaves.", err=True)
    repl = Repl(chat, llm.n_layer(), opened.suggest)
    repl.run()
    if repl.failed and not lines.is_interactive():
        click.get_current_context().exit(1)
