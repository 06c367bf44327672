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
from typing import Any, NoReturn, Protocol, TypedDict

import jinja2
import jinja2.ext
import jinja2.sandbox

from ggufloop.errors import GgufloopError


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


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


class ChatTemplate:
    """A compiled chat template.

    source: Jinja text. bos, eos: the text of those tokens. stop: strings that end an answer, for formats whose turns
    do not end in a token of their own. Raises GgufloopError if the source does not compile.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "", stop: tuple[str, ...] = ()) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals.update(
            bos_token=bos,
            eos_token=eos,
            raise_exception=_refuse,
            strftime_now=lambda form: datetime.datetime.now().strftime(form),
        )
        self.stop = stop
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as e:
            raise GgufloopError(f"the model's chat template cannot be read: {e}.", _WITHOUT) from e

    @classmethod
    def of(cls, model: _HasMetadata) -> ChatTemplate | None:
        """The template a loaded model carries, None if it carries none."""
        source = model.metadata.get("tokenizer.chat_template")
        if not source:
            return None

        def text(token: int) -> str:
            return model.detokenize([token], special=True).decode("utf-8", "replace") if token >= 0 else ""

        return cls(source, bos=text(model.token_bos()), eos=text(model.token_eos()))

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt that asks for the next answer.

        tools: functions the model may call, in OpenAI's form. Raises GgufloopError if the template refuses
        the messages.
        """
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=tools)
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as e:
            raise GgufloopError(f"the model's chat template refuses this conversation: {e}.", _WITHOUT) from e


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
