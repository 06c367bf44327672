"""`Chatted`: what LoopedLlama's chat completions take beyond llama_cpp's own.

    llm.create_chat_completion([..., {"role": "assistant", "content": "Sure, "}])         # goes on from there
    llm.create_chat_completion(messages, chat_template_kwargs={"enable_thinking": False})  # as llama-server has it

Both need the model's template as it is written (models/template.py). llama_cpp replaces some that it recognises by
formats of its own, which have no room for these.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from ggufloop.errors import UsageError
from ggufloop.models.template import arguments_for, split_begun


class Chatted:
    """A part of LoopedLlama, before llama_cpp.Llama."""

    def create_chat_completion(
        self: Any, messages: Any, *args: Any, chat_template_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """llama_cpp's; a last message of the assistant's is continued, and chat_template_kwargs reach the template.

        Raises UsageError for a model without a template, and for arguments that it does not read.
        """
        plain = super().create_chat_completion  # type: ignore[misc]  # llama_cpp.Llama's
        if self.chat_handler is not None or not (chat_template_kwargs or split_begun(messages)[1]):
            return plain(messages, *args, **kwargs)
        template = self._chat_handlers.get("chat_template.default")
        if template is None:
            raise UsageError("this model has no chat template to begin an answer in, or to give arguments to.",
                             "end with a message of the user's.")  # fmt: skip
        arguments_for(self.metadata.get("tokenizer.chat_template"), None, chat_template_kwargs)
        asked = inspect.signature(plain).bind(messages, *args, **kwargs)
        asked.apply_defaults()
        return template(llama=self, **asked.arguments, **(chat_template_kwargs or {}))
