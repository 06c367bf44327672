"""Turn a conversation into the text a model was trained on, with the chat template its GGUF carries.

    template = ChatTemplate.of(llm) or PLAIN
    prompt = template.render([{"role": "user", "content": "Hello"}])
    brief = template.having(template.arguments_for(think=False))         # where it has a switch for that

A last message of the assistant's is one that is begun: the prompt ends in the middle of it, as llama-server has it.
llama-cpp-python falls back to the llama-2 format in silence when the metadata has no template, and replaces some
templates it recognises by formats that lose the system prompt. So the template is rendered here, exactly as it is
written, and a missing one is the caller's to announce. The surroundings (trimmed blocks, loop controls, tojson,
raise_exception, strftime_now) are the ones templates are written for.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any, NoReturn, Protocol, TypedDict

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from ggufloop.errors import GgufloopError, UsageError, nearest

THINKING = (
    ("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>", "<channel|>"),
)  # fmt: skip
"""What models think between; the first where a template does not say."""
SWITCHES = ("enable_thinking", "thinking")
"""How templates spell the argument that turns thinking on and off."""
_OURS = {"messages", "tools", "add_generation_prompt"}


class Message(TypedDict):
    """One entry of a conversation; role is system, user or assistant."""

    role: str
    content: str


class _HasMetadata(Protocol):
    metadata: dict[str, str]

    def token_bos(self) -> int: ...
    def token_eos(self) -> int: ...
    def detokenize(self, tokens: list[int], prev_tokens: list[int] | None = None, special: bool = False) -> bytes: ...


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks what training scores; its content is plain text here."""

    tags = {"generation"}  # noqa: RUF012  # the base class declares it so

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


TEMPLATE_FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip
"""What compiling or rendering somebody's template may raise."""


def _words(e: BaseException) -> str:
    text = str(e).rstrip(".") or type(e).__name__
    return f"line {e.lineno}: {text}" if isinstance(e, jinja2.TemplateSyntaxError) else text


def unreadable(e: BaseException) -> GgufloopError:
    """What to say of a template that does not compile."""
    return GgufloopError(f"the model's chat template cannot be read: {_words(e)}.", _WITHOUT)


def refused(e: BaseException) -> GgufloopError:
    """What to say of a template that fails on a conversation."""
    return GgufloopError(f"the model's chat template refuses this conversation: {_words(e)}.", _WITHOUT)


def lazily_compiled(formatter: Any) -> Any:
    """llama_cpp's Jinja2ChatFormatter, made to compile a template when it is first used.

    It compiles all of a model's while it loads, so one that is wrong would keep the model from everything that needs
    no template. Raises GgufloopError when used.
    """

    class Lazy(formatter):  # type: ignore[misc]  # llama_cpp is untyped here
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._compile = partial(formatter.__init__, self, *args, **kwargs)
            self._compiled = False

        def __call__(self, **kwargs: Any) -> Any:
            if not self._compiled:
                try:
                    self._compile()
                except TEMPLATE_FAILURES as e:
                    raise unreadable(e) from e
                self._compiled = True
            messages, begun = split_begun(kwargs["messages"])
            try:
                found = super().__call__(**kwargs | {"messages": messages})
            except TEMPLATE_FAILURES as e:
                raise refused(e) from e
            return dataclasses.replace(found, prompt=begin(found.prompt, begun, tags_of(self.template)))

    return Lazy


def tags_of(source: str) -> tuple[str, str]:
    """The tags a template's model thinks between."""
    return next((tags for tags in THINKING if tags[1] in source), THINKING[0])


def split_begun(messages: Sequence[Mapping[str, Any]]) -> tuple[Sequence[Mapping[str, Any]], str]:
    """What the prompt asks, and how the answer begins: the last message if it is the assistant's, '' if not."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str) or last.get("tool_calls"):
        return messages, ""
    return messages[:-1], last["content"]


def opened(prompt: str, tags: tuple[str, str]) -> str:
    """The tag with which a prompt begins the answer's thinking, and the space after it; '' if it does not."""
    return prompt[prompt.rindex(tags[0]) :] if prompt.rstrip().endswith(tags[0]) else ""


def begin(prompt: str, begun: str, tags: tuple[str, str]) -> str:
    """A prompt with its answer begun: thinking that it has opened ends there, unless the answer begins with it."""
    thinks = opened(prompt, tags) if begun else ""
    if thinks and begun.lstrip().startswith(tags[0]):
        return prompt[: -len(thinks)] + begun
    return prompt + (f"\n{tags[1]}\n\n" if thinks else "") + begun


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which bounds `range`, but neither 9**9**9 (even while compiling) nor 'a' * 10**9."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = isinstance(left, int | float) and isinstance(right, int | float)
        if operator == "**" and not (numbers and abs(left) < 2**64 and abs(right) < 64):
            raise jinja2.TemplateError(f"{operator} of these operands is too large")
        if operator == "*" and not numbers and not _small(left, right):
            raise jinja2.TemplateError("a repeated text is too long")
        return super().call_binop(context, operator, left, right)


def _small(left: Any, right: Any, most: int = 2**20) -> bool:
    text, times = (left, right) if isinstance(right, int) else (right, left)
    return not isinstance(times, int) or len(text) * times <= most


class ChatTemplate:
    """A compiled chat template.

    source: Jinja text. bos, eos: the text of those tokens. stop: strings that end an answer, for formats whose turns
    do not end in a token of their own. tags: what its model thinks between; arguments: what else it is rendered with
    (`having`). Raises GgufloopError if the source does not compile.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "", stop: tuple[str, ...] = ()) -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals.update(
            bos_token=bos,
            eos_token=eos,
            raise_exception=_refuse,
            strftime_now=lambda form: datetime.datetime.now().strftime(form),
        )
        self.stop, self.tags, self.arguments = stop, tags_of(source), dict[str, Any]()
        self._environment, self._source = environment, source
        try:
            self._template = environment.from_string(source)
        except TEMPLATE_FAILURES as e:
            raise unreadable(e) from e

    @classmethod
    def of(cls, model: _HasMetadata) -> ChatTemplate | None:
        """The template a loaded model carries, None if it carries none."""
        source = model.metadata.get("tokenizer.chat_template")
        if not source:
            return None

        def text(token: int) -> str:
            return model.detokenize([token], special=True).decode("utf-8", "replace") if token >= 0 else ""

        return cls(source, bos=text(model.token_bos()), eos=text(model.token_eos()))

    @classmethod
    def needed(cls, model: _HasMetadata, hint: str = "leave out --apply-chat-template.") -> ChatTemplate:
        """The same. Raises UsageError if the model carries none."""
        found = cls.of(model)
        if found is None:
            raise UsageError("this model has no chat template.", hint)
        return found

    @cached_property
    def _reads(self) -> tuple[set[str], list[str]]:
        """Names it may take, and those that it does not set itself."""
        tree = self._environment.parse(self._source)
        found = jinja2.meta.find_undeclared_variables(tree) - _OURS
        stored = {name.name for name in tree.find_all(jinja2.nodes.Name) if name.ctx == "store"} - set(SWITCHES)
        return found, sorted(found - stored)

    def arguments_for(self, think: bool | None = None, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What to render it with so that its model thinks or not, and with what else is given by name.

        Raises UsageError for what the template does not read.
        """
        known, own = self._reads
        takes = f"it reads {', '.join(own)} (--chat-template-kwargs)." if own else "leave it out: it reads none."
        for name in given or {}:
            if name not in known:
                raise UsageError(f"the model's chat template reads no {name!r}.", nearest(name, own) if own else takes)
        switch = next((name for name in SWITCHES if name in known), None)
        if think is None:
            return dict(given or {})
        if switch is None:
            raise UsageError("the model's chat template has no switch for thinking.", takes)
        if switch in (given or {}):
            raise UsageError(f"thinking is switched twice, by {switch} too.", "give one of them.")
        return {**(given or {}), switch: think}

    def having(self, arguments: Mapping[str, Any]) -> ChatTemplate:
        """The same template, rendered with these arguments, and those it has, from now on."""
        found = copy.copy(self)
        found.__dict__.pop("_forgets", None)
        found.arguments = {**self.arguments, **arguments}
        return found

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt that asks for the next answer, or goes on with one that is begun.

        tools: functions the model may call, in OpenAI's form. Raises GgufloopError if the template refuses
        the messages.
        """
        asked, begun = split_begun(messages)
        try:
            prompt = self._template.render(messages=asked, add_generation_prompt=True, tools=tools, **self.arguments)
        except TEMPLATE_FAILURES as e:
            raise refused(e) from e
        return begin(prompt, begun, self.tags)

    def opened(self, prompt: str) -> str:
        """What a prompt of its begins the answer's thinking with, '' if it does not."""
        return opened(prompt, self.tags)

    def recalled(self, answer: str) -> str:
        """An answer as a later prompt tells it. Templates leave out thinking that ended; those get none that was cut
        off either."""
        before, tag, thought = answer.rpartition(self.tags[0])
        return before if tag and self.tags[1] not in thought and self._forgets else answer

    @cached_property
    def _forgets(self) -> bool:
        said = {"role": "assistant", "content": f"{self.tags[0]}\nTHOUGHT\n{self.tags[1]}\n\nSAID"}
        try:
            return "THOUGHT" not in self.render(
                [{"role": "user", "content": "A"}, said, {"role": "user", "content": "B"}]
            )
        except GgufloopError:
            return False


def arguments_for(source: str | None, think: bool | None, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a model's template, None for a model without one, is rendered with. Raises UsageError, GgufloopError."""
    if think is None and not given:
        return {}
    if source is None:
        raise UsageError("this model has no chat template, so there is nothing to switch.",
                         "leave out --think and --chat-template-kwargs.")  # fmt: skip
    return ChatTemplate(source).arguments_for(think, given)


_WITHOUT = "`ggufloop run --raw -p TEXT` continues a text without a template."

PLAIN = ChatTemplate(
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% elif m.role == 'user' %}User: {{ m.content }}\n"
    "{% else %}Assistant: {{ m.content }}\n"
    "{% endif %}{% endfor %}Assistant:",
    stop=("\nUser:",),
)
"""For models without a template: turns a base model can guess from the text alone."""
