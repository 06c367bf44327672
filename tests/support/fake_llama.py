"""A model of a few lines for tests of what surrounds one: bytes are its tokens, so every character may be split.

It answers the last user message with the message, whether it is looped, and its seed; or whatever `replies` holds.
Its clock says 100 tokens per second for prompts and 10 for answers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from types import SimpleNamespace
from typing import Any

from ggufloop.loop import LoopSpec

EOG, BOS = 256, 257
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}[assistant]"


class FakeLlama:
    n_layers = 7
    devices = ()

    def __init__(self, path: object = "", *, n_ctx: int = 1024, loop: LoopSpec | None = None, **kwargs: Any) -> None:
        self.metadata = {"tokenizer.chat_template": TEMPLATE}
        self.kwargs = kwargs
        self.prompts: list[str] = []
        self.replies: list[bytes] = []
        self.on_token: Callable[[int], None] = lambda i: None
        self.resets = 0
        self._n_ctx = n_ctx
        self._loop: LoopSpec | None = None
        self._seed = 0
        self._counts = (0, 0)
        self.set_loop(loop)

    @property
    def loop(self) -> LoopSpec | None:
        return self._loop

    def set_loop(self, loop: LoopSpec | None) -> None:
        if loop is not None:
            loop.check(self.n_layers)
        self._loop = loop

    def n_ctx(self) -> int:
        return self._n_ctx

    def n_layer(self) -> int:
        return self.n_layers

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        tokens = [BOS] * add_bos
        for i, part in enumerate(text.split(b"<s>")):
            tokens += [BOS] * (i > 0) + list(part)
        return tokens

    def detokenize(self, tokens: Iterable[int], prev_tokens: object = None, special: bool = False) -> bytes:
        return b"".join(bytes([t]) if t < EOG else b"<s>" if t == BOS and special else b"" for t in tokens)

    def adds_tokens(self) -> tuple[bool, bool]:
        return True, False

    def token_bos(self) -> int:
        return BOS

    def token_eos(self) -> int:
        return EOG

    def is_eog(self, token: int) -> bool:
        return token == EOG

    def set_seed(self, seed: int) -> None:
        self._seed = seed

    def reset(self) -> None:
        self.resets += 1

    def timings(self) -> SimpleNamespace:
        prompt, generated = self._counts
        return SimpleNamespace(
            prompt_tokens=prompt,
            prompt_seconds=prompt / 100,
            generated_tokens=generated,
            generated_seconds=generated / 10,
        )

    def generate(self, tokens: Sequence[int], **sampling: object) -> Generator[int, None, None]:
        self.sampling = sampling
        prompt = self.detokenize(tokens).decode()
        self.prompts.append(prompt)
        if self.replies:
            reply = self.replies.pop(0)
        else:
            asked = prompt.rpartition("[user]")[2].partition("\n")[0]
            reply = f"{asked}: {'looped' if self._loop else 'plain'} answer, seed {self._seed}".encode()
        for i, token in enumerate([*reply, EOG]):
            self._counts = (len(tokens), i)
            self.on_token(i)
            yield token
