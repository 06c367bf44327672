"""`LoopedLM`: a LoopedLlama as lm-eval's model, in this process, so that every lm-eval task runs looped.

    results = lm_eval.simple_evaluate(LoopedLM(llm), tasks=["arc_challenge"])

The answers of multiple-choice questions are scored by `multiple_choice.py`, many questions at once, which says what
that means for a loop; the model must have been opened with its n_seq=SEQUENCES. A whole text is one step per window of
the context. Nothing is cut off: a prompt that the context cannot hold is an error before anything is scored. Given
`Sliced`, it scores slice by slice what was not answered before (`slices.py`). Needs the extra `eval`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import LM, TemplateLM
from lm_eval.utils import get_rolling_token_windows

from ggufloop.errors import GgufloopError
from ggufloop.generate.complete import complete, encode, prompt_tokens
from ggufloop.generate.sampling import Sampling
from ggufloop.logits import Logits, log_probabilities
from ggufloop.measure.multiple_choice import ChoiceQuestion, score_questions
from ggufloop.measure.slices import GENERATE, LOGLIKELIHOOD, ROLLING, Sliced
from ggufloop.models.template import ChatTemplate, Message
from ggufloop.progress import Progress, Step, silent

if TYPE_CHECKING:
    from ggufloop.engine import LoopedLlama

DEFAULT_TOKENS = 256
"""Most tokens of an answer where the task does not say, as lm-eval's own models have it."""


class LoopedLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped here
    """lm-eval's view of a loaded model under the loop in force."""

    def __init__(
        self, llm: LoopedLlama, progress: Progress = silent, sliced: Sliced | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """arguments: what the chat template is rendered with."""
        super().__init__()
        self.llm = llm
        self._progress, self._done, self._total = progress, 0, 0
        self._sliced = sliced
        self._template: ChatTemplate | None = None
        self._arguments = arguments or {}

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.llm.token_eos())

    @property
    def prefix_token_id(self) -> int:
        """What a text that has no context is scored after: the token that begins one, else the one that ends one."""
        known = self.llm.adds_tokens()[0] or "tokenizer.ggml.bos_token_id" in self.llm.metadata
        return int(self.llm.token_bos()) if known else self.eot_token_id  # llama.cpp makes one up where a file has none

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens of a text, with the model's BOS unless `add_special_tokens` is False or the text has it already."""
        special = add_special_tokens is not False
        if not special:
            return list(self.llm.tokenize(encode(string, "a task's text"), add_bos=False, special=True))
        tokens = prompt_tokens(self.llm, string, "a task's text")
        if self.llm.adds_tokens()[1] and tokens[-1:] == [self.eot_token_id]:
            del tokens[-1]  # more is to follow
        return tokens

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Log-likelihood of each continuation given its context, and whether greedy decoding would produce it."""
        encode = super().loglikelihood

        def ask(parts: list[list[Any]]) -> Iterator[list[tuple[float, bool]]]:
            encoded = iter(encode([request for part in parts for request in part], disable_tqdm=disable_tqdm))
            for part in parts:
                yield self._score([next(encoded) for _ in part])

        return self._answered(LOGLIKELIHOOD, requests, ask)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> Sequence[Any]:
        """What lm-eval made tokens of, for `loglikelihood` to score. Raises GgufloopError if one does not fit."""
        for _, prompt, choice in requests:
            self._check_fits(len(prompt) + len(choice) - 1)
        return requests

    def _score(self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]]) -> list[tuple[float, bool]]:
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, prompt, _) in enumerate(requests):
            groups.setdefault(tuple(prompt), []).append(i)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        asked = list(groups.values())
        questions = [ChoiceQuestion(prompt, [requests[i][2] for i in members]) for prompt, members in groups.items()]
        for place, scored in score_questions(self.llm, questions):
            members = asked[place]
            for i, answer in zip(members, scored, strict=True):
                answers[i] = answer.logprob, answer.greedy
            self._step(len(members))
        return answers

    def _answered(self, kind: str, requests: Sequence[Any], ask: Callable[..., Iterable[list[Any]]]) -> list[Any]:
        """The answers, those that `Sliced` has not asked for. The rest counts as done from the start."""
        self._done, self._total = 0, len(requests)

        def lacking(parts: list[list[Any]]) -> Iterable[list[Any]]:
            self._done = len(requests) - sum(map(len, parts))
            return ask(parts)

        if self._sliced is not None:
            return self._sliced.answer(kind, requests, lacking)
        return [answer for part in ask([list(requests)]) for answer in part]

    def _step(self, n: int) -> None:
        self._done += n
        self._progress(Step("", self._done, self._total, "request"))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts; one longer than the context goes through it in windows."""
        return self._answered(ROLLING, requests, lambda parts: ([self._text(r) for r in part] for part in parts))

    def _text(self, request: Any) -> float:
        tokens = self.tok_encode(request.args[0], add_special_tokens=False)
        total = 0.0
        for context, targets in get_rolling_token_windows(tokens, self.prefix_token_id, self.llm.n_ctx(), 1):
            total += self._window(context, targets)
        self._step(1)
        return total

    def _window(self, context: Sequence[int], targets: Sequence[int]) -> float:
        """Log-probability of targets, which the last tokens of the context predict; all of it one step."""
        ids, first = np.asarray(targets, dtype=np.intp), len(context) - len(targets)
        total = 0.0

        def take(i: int, rows: Logits) -> None:
            nonlocal total
            total += float(log_probabilities(rows, ids[i - first : i - first + len(rows)]).logprob.sum())

        self.llm.reset()
        self.llm.each_logits(context, first, take, prompt=True)
        return total

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Answers, greedy unless the task samples, up to the first of its stop strings."""

        def ask(parts: list[list[Any]]) -> Iterator[list[str]]:
            prompts = [[self.tok_encode(request.args[0]) for request in part] for part in parts]
            for prompt in (prompt for some in prompts for prompt in some):
                self._check_fits(len(prompt) + 1)
            for part, some in zip(parts, prompts, strict=True):
                yield [self._write(request, prompt) for request, prompt in zip(part, some, strict=True)]

        return self._answered(GENERATE, requests, ask)

    def _write(self, request: Any, prompt: list[int]) -> str:
        sampling, stop = _generation(request.args[1])
        text = complete(self.llm, prompt, sampling, stop=stop).text
        self._step(1)
        return text

    def _check_fits(self, n: int) -> None:
        if n > self.llm.n_ctx():
            raise GgufloopError(
                f"a question has {n} tokens, and the context holds {self.llm.n_ctx()}.",
                "give a larger context with -c, or fewer examples in the prompt.",
            )

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's own template writes it; without `add_generation_prompt` it ends in the middle
        of the assistant's last message. Raises UsageError if the model has no template."""
        if self._template is None:
            self._template = ChatTemplate.needed(self.llm).having(self._arguments)
        return self._template.render(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The source of the model's template, for lm-eval's records."""
        return str(self.llm.metadata.get("tokenizer.chat_template", ""))

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer and template in lm-eval's records."""
        return str(self.llm.metadata.get("general.name", self.llm.model_path))


class ListenLM(LM):  # type: ignore[misc]  # lm-eval is untyped here
    """Notes what is asked, and answers nothing. asked: by task and question."""

    def __init__(self, llm: LoopedLlama | None = None, arguments: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.asked: dict[str, dict[int, list[Any]]] = {}
        self._template = llm and LoopedLM(llm, arguments=arguments)

    def _note(self, requests: Sequence[Any], answer: Any) -> list[Any]:
        for request in requests:
            self.asked.setdefault(request.task_name, {}).setdefault(request.doc_id, []).append(request)
        return [answer] * len(requests)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """All alike."""
        return self._note(requests, (0.0, False))

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """All alike."""
        return self._note(requests, 0.0)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Nothing."""
        return self._note(requests, "")

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """The model's, if there is one."""
        if self._template is not None:
            return self._template.apply_chat_template(chat_history, add_generation_prompt)
        return "".join(message["content"] for message in chat_history)

    @property
    def tokenizer_name(self) -> str:
        """Nothing is tokenised."""
        return ""


class KeptLM(LM):  # type: ignore[misc]  # lm-eval is untyped here
    """What was answered already, asked again: lm-eval makes the same of it, and no model is loaded."""

    def __init__(self, sliced: Sliced) -> None:
        super().__init__()
        self._sliced = sliced

    def _kept(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        def lacking(parts: list[list[Any]]) -> Iterable[list[Any]]:
            first = parts[0][0]
            raise GgufloopError(f"{len(parts)} slices are not answered, of {first.task_name} the first.",
                                "run its shard again; it goes on where it was.")  # fmt: skip

        return self._sliced.answer(kind, requests, lacking)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Of each continuation, as it was."""
        return self._kept(LOGLIKELIHOOD, requests)

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Of each text, as it was."""
        return self._kept(ROLLING, requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What was written."""
        return self._kept(GENERATE, requests)

    def apply_chat_template(self, chat_history: list[Message], add_generation_prompt: bool = True) -> str:
        """Nobody reads it: the prompts were answered."""
        return "".join(message["content"] for message in chat_history)

    @property
    def tokenizer_name(self) -> str:
        """Nothing is tokenised."""
        return ""


def _generation(settings: dict[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """A task's generation settings, as lm-eval and Hugging Face spell them. Raises UsageError for one out of range."""
    until = settings.get("until") or []
    stop = (until,) if isinstance(until, str) else tuple(until)
    n = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or DEFAULT_TOKENS)
    if not settings.get("do_sample", False):
        return Sampling(temp=0.0, seed=0, n=n), stop
    return Sampling(
        temp=float(settings.get("temperature", 1.0)),
        top_k=int(settings.get("top_k", 0)),
        top_p=float(settings.get("top_p", 1.0)),
        min_p=float(settings.get("min_p", 0.0)),
        seed=0,
        n=n,
    ), stop
