"""Turn a conversation into the text a model was trained on, with the chat template its GGUF carries.

    template = ChatTemplate.of(llm) or PLAIN
    prompt = template.render([{"role": "user", "content": "Hello"}])

llama-cpp-python falls back to the llama-2 format in silence when the metadata has no template, and replaces some
templates it recognises by formats that lose the system prompt. So the template is rendered here, exactly as it is
written, and a missing one is the caller's to announce. The surroundings (trimmed blocks, loop controls, tojson,
raise_exception, strftime_now) are the ones templates are written for.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol, TypedDict

import jinja2
import jinja2.ext
import jinja2.sandbox

from ggufloop.errors import GgufloopError, UsageError


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
            try:
                return super().__call__(**kwargs)
            except TEMPLATE_FAILURES as e:
                raise refused(e) from e

    return Lazy


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
    do not end in a token of their own. Raises GgufloopError if the source does not compile.
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
        self.stop = stop
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

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt that asks for the next answer.

        tools: functions the model may call, in OpenAI's form. Raises GgufloopError if the template refuses
        the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=tools)
        except TEMPLATE_FAILURES as e:
            raise refused(e) from e


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
