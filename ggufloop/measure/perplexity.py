"""Perplexity by llama-perplexity's protocol, of a model or of two on the same tokens.

    tokens = tokenize(llm, text)
    result = perplexity(llm, tokens, n_ctx=512)                       # the loop in force
    result = perplexity(llm, tokens, n_ctx=512, base=Other(llm))      # against the plain model
    result = perplexity(llm, tokens, n_ctx=512, base=Other(other))    # against another model of the same tokenizer
    stored = KLBase.open(path)                                        # against a --kl-divergence-base file
    result = perplexity(llm, stored.tokens, stored.n_ctx, base=stored)
    result = perplexity(llm, tokens, n_ctx=512, save=file)            # and write such a file

The protocol: the tokens are cut into chunks of n_ctx; each is evaluated on an empty cache, its first token replaced by
BOS where the model's tokenizer adds one, and the tokens after its middle are scored. One chunk is evaluated at a time
(llama-perplexity does with -b equal to -c; by default it puts several into a batch). Base and model take turns chunk by
chunk, and only one chunk of the base's distributions exists at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.logits import Logits, Normalisers, log_probabilities
from ggufloop.loop import LoopSpec
from ggufloop.measure import stats
from ggufloop.measure.dependence import chunk_mean
from ggufloop.measure.divergence import ChunkValues, KLStatistics, Packed, Record
from ggufloop.measure.score import Engine, each_target
from ggufloop.progress import Progress, Step, silent

MAGIC = b"_logits_"
_HEAD = len(MAGIC) + 12
LOWEST = -100.0  # nats: a file keeps 16 below the likeliest token, which has 1 of n_vocab at least
LEAST_CONTEXT = 4  # tokens of a chunk: one to be scored, and the one before it

Targets = NDArray[np.intp]
Nll = NDArray[np.float64]


class TextModel(Engine, Protocol):
    """What perplexity asks of a LoopedLlama."""

    def adds_tokens(self) -> tuple[bool, bool]: ...
    def token_bos(self) -> int: ...
    def n_vocab(self) -> int: ...
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...
    def detokenize(self, tokens: list[int]) -> bytes: ...


class Base(Protocol):
    """What the model is compared with: for chunk i, put its distributions into `packed` and return the NLL in nats."""

    @property
    def n_vocab(self) -> int: ...
    def chunk(self, i: int, tokens: Sequence[int], first: int, packed: Packed) -> Nll: ...


@dataclass(frozen=True)
class Other:
    """A model without a loop as the base: the one measured itself, or another."""

    model: TextModel

    @property
    def n_vocab(self) -> int:
        """Tokens of its vocabulary."""
        return self.model.n_vocab()

    def chunk(self, i: int, tokens: Sequence[int], first: int, packed: Packed) -> Nll:
        """Evaluate the chunk without a loop."""
        nll = np.empty(len(packed.scale), dtype=np.float64)

        def take(part: slice, rows: Logits, targets: Targets) -> None:
            norms = Normalisers.of(rows)
            nll[part] = log_probabilities(rows, targets, norms).nll
            packed.put(part, rows, norms)

        loop = self.model.loop
        self.model.set_loop(None)
        try:
            each_target(self.model, tokens, first, take)
        finally:
            self.model.set_loop(loop)
        return nll


@dataclass(frozen=True)
class KLBase:
    """A file that llama-perplexity wrote with --kl-divergence-base: tokens, and distributions in 16 bits."""

    path: Path
    n_ctx: int
    n_vocab: int
    tokens: list[int]
    offset: int  # of the first chunk's distributions

    @staticmethod
    def is_one(path: Path) -> bool:
        """Whether the file begins like one."""
        if not path.is_file():  # opening a named pipe would wait for ever
            return False
        try:
            with path.open("rb") as f:
                return f.read(len(MAGIC)) == MAGIC
        except OSError:
            return False

    @classmethod
    def open(cls, path: Path, chunks: int | None = None) -> KLBase:
        """Read the header and the tokens. Raises GgufloopError unless its numbers are those of a file of its size.

        chunks: how many will be asked for, all if None; a file cut short may be good for that.
        Nothing is read before that is known, so that a damaged header asks for no memory; and a token outside the
        vocabulary would end the process in llama.cpp.
        """
        again = "write it again, with its -c and -f."
        try:
            size = path.stat().st_size
            with path.open("rb") as f:
                head = f.read(_HEAD)
                if len(head) < _HEAD:
                    raise GgufloopError(f"{path} is cut short: {size} bytes, and its header has {_HEAD}.", again)
                n_ctx, n_vocab, n_chunk = struct.unpack("<Iii", head[len(MAGIC) :])
                for name, value, least in (
                    ("-c", n_ctx, LEAST_CONTEXT), ("vocabulary", n_vocab, 1), ("number of chunks", n_chunk, 1)
                ):  # fmt: skip
                    if value < least:
                        raise GgufloopError(f"{path} is damaged: its {name} is {value}, not {least} or more.", again)
                whole = stored_bytes(n_ctx, n_vocab, n_chunk)
                row = (stored_bytes(n_ctx, n_vocab, 2) - stored_bytes(n_ctx, n_vocab, 1)) - 4 * n_ctx  # of a chunk
                lacking = -(-max(0, whole - size) // row)
                if size > whole or lacking > n_chunk - min(chunks or n_chunk, n_chunk):
                    how = "cut short" if size < whole else "damaged"
                    left = n_chunk - lacking
                    raise GgufloopError(
                        f"{path} is {how}: {size} bytes of {whole} for {n_chunk} chunks of {n_ctx} tokens out of "
                        f"{n_vocab}.",
                        f"{again[:-1]}; or give --chunks {left}: they are there." if 0 < left < n_chunk else again,
                    )
                tokens = np.frombuffer(f.read(4 * n_ctx * n_chunk), dtype="<i4")
        except OSError as e:
            raise GgufloopError(f"cannot read {path}: {e.strerror or e}.", "check the path.") from e
        bad = np.flatnonzero((tokens < 0) | (tokens >= n_vocab))
        if bad.size:
            raise GgufloopError(
                f"{path} is damaged: token {bad[0]}, at byte {_HEAD + 4 * bad[0]}, is {tokens[bad[0]]}, not in 0 to "
                f"{n_vocab - 1}.", again
            )  # fmt: skip
        return cls(path, n_ctx, n_vocab, tokens.tolist(), _HEAD + 4 * n_ctx * n_chunk)

    def chunk(self, i: int, tokens: Sequence[int], first: int, packed: Packed) -> Nll:
        """Read the chunk's distributions. Raises GgufloopError if they are none."""
        scored, width = len(packed.scale), _width(self.n_vocab)
        at = self.offset + 2 * scored * width * i
        data = np.fromfile(self.path, dtype="<u2", count=scored * width, offset=at)
        if data.size < scored * width:
            raise GgufloopError(f"{self.path} ended while it was read.", "was it changed? Run it again.")
        rows = data.reshape(scored, width)
        numbers = rows[:, :4].copy().view("<f4")
        scale, lowest = numbers.T.astype(np.float64)
        good = (scale >= 0) & (lowest >= LOWEST) & (lowest + 65535 * scale <= 1e-3)  # its largest is a log-probability
        if not good.all():
            row = int(np.argmin(good))
            raise GgufloopError(
                f"{self.path} is damaged: what is at byte {at + 2 * width * row} are no probabilities (chunk {i + 1}).",
                "write it again, with its -c and -f"
                + (f"; or give --chunks {i}: what is before is good." if i else "."),
            )
        packed.scale[:], packed.lowest[:] = numbers[:, 0], numbers[:, 1]
        packed.steps[:] = rows[:, 4 : 4 + self.n_vocab]
        return packed.nll(np.asarray(tokens[first + 1 :], dtype=np.intp)).astype(np.float64)


class _Save:
    """Writes the file that `KLBase` reads, chunk after chunk, as llama-perplexity does."""

    def __init__(self, file: BinaryIO, tokens: Sequence[int], n_ctx: int, n_vocab: int, n_chunk: int) -> None:
        self._file = file
        self._packed = Packed.empty(halves(n_ctx)[1], n_vocab)
        file.write(MAGIC + struct.pack("<Iii", n_ctx, n_vocab, n_chunk))
        file.write(np.asarray(tokens[: n_ctx * n_chunk], dtype="<i4").tobytes())

    def put(self, part: slice, rows: Logits, norms: Normalisers) -> None:
        """Keep these distributions of the chunk."""
        self._packed.put(part, rows, norms)

    def write(self) -> None:
        """The chunk is complete."""
        scored, n_vocab = self._packed.steps.shape
        rows = np.zeros((scored, _width(n_vocab)), dtype="<u2")
        rows[:, :2] = self._packed.scale.astype("<f4").view("<u2").reshape(scored, 2)
        rows[:, 2:4] = self._packed.lowest.astype("<f4").view("<u2").reshape(scored, 2)
        rows[:, 4 : 4 + n_vocab] = self._packed.steps
        self._file.write(rows.data)


def stored_bytes(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """Size of the file that `perplexity(..., save=...)` writes of so many chunks."""
    return _HEAD + n_chunk * (4 * n_ctx + 2 * halves(n_ctx)[1] * _width(n_vocab))


def _width(n_vocab: int) -> int:
    return 2 * ((n_vocab + 1) // 2) + 4  # 16-bit numbers of one distribution, its scale and lowest in front


@dataclass(frozen=True)
class Figure:
    """One model's score of the text. error: standard error of ppl, llama-perplexity's; nll: nats per token."""

    ppl: float
    error: float
    nll: float
    bits_per_byte: float


@dataclass(frozen=True)
class Divergence:
    """Model against base on the same tokens.

    over_tokens  mean gain over the base in nats per token, above 0 better, with its 95 % interval, tokens taken as
                 independent.
    over_chunks  the same with chunks as the items, neighbours of one text (`dependence.chunk_mean`), which allows for
                 what the tokens of a text have in common; None for a single chunk.
    chunked      the KL block's means with errors over chunks, to be printed after it; None for a single chunk.
    """

    base: Figure
    over_tokens: stats.Estimate
    over_chunks: stats.Estimate | None
    kl: KLStatistics
    chunked: ChunkValues | None

    @property
    def gain(self) -> stats.Estimate:
        """The interval to conclude from: over chunks if there are two at least."""
        return self.over_chunks or self.over_tokens


@dataclass(frozen=True)
class TextScore:
    """n: tokens scored, in `chunks` chunks of n_ctx; n_bytes: of text that these tokens are."""

    loop: LoopSpec | None
    n_ctx: int
    chunks: int
    n: int
    n_bytes: int
    model: Figure
    against: Divergence | None


def tokenize(llm: TextModel, text: str) -> list[int]:
    """The text as llama-perplexity tokenizes it: BOS first where the model adds it, no special tokens in the text.

    Raises UsageError for a model whose tokenizer ends texts with EOS, which this protocol is not for.
    """
    add_bos, add_eos = llm.adds_tokens()
    if add_eos:
        raise UsageError("this model's tokenizer ends texts with EOS.", "perplexity is for models that continue text.")
    return llm.tokenize(text.encode(), add_bos=add_bos, special=False)


def count_chunks(tokens: Sequence[int], n_ctx: int) -> int:
    """How many whole chunks a text has. Raises UsageError for too small a chunk, GgufloopError if it has none."""
    if n_ctx < LEAST_CONTEXT:
        raise UsageError(f"chunks of {n_ctx} tokens have none to score.", f"give -c {LEAST_CONTEXT} or more.")
    if len(tokens) < n_ctx:
        raise GgufloopError(
            f"the text has {len(tokens)} tokens, and a chunk is {n_ctx}.", "give a longer text, or a smaller -c."
        )
    return len(tokens) // n_ctx


def halves(n_ctx: int) -> tuple[int, int]:
    """The token of a chunk whose logits are the first that count, and how many tokens are scored: those behind it."""
    return n_ctx // 2, n_ctx - 1 - n_ctx // 2


def chunk_at(llm: TextModel, tokens: Sequence[int], n_ctx: int, i: int) -> list[int]:
    """Chunk i as it is evaluated: BOS in place of its first token where the model's tokenizer adds one."""
    chunk = list(tokens[i * n_ctx : (i + 1) * n_ctx])
    if llm.adds_tokens()[0]:
        chunk[0] = llm.token_bos()
    return chunk


def perplexity(
    llm: TextModel,
    tokens: Sequence[int],
    n_ctx: int,
    chunks: int | None = None,
    base: Base | None = None,
    progress: Progress = silent,
    save: BinaryIO | None = None,
) -> TextScore:
    """Score the text under the loop in force, and against `base` if there is one.

    chunks: how many to score, from the start; all if None. The model's context must hold n_ctx tokens.
    save: an open file to write the distributions under the loop in force to, for `KLBase`.
    Raises UsageError for a chunk that is too small, GgufloopError for a text shorter than one chunk or another
    vocabulary.
    """
    n_chunk = min(count_chunks(tokens, n_ctx), chunks or len(tokens))
    if base is not None and base.n_vocab != llm.n_vocab():
        raise GgufloopError(
            f"the base has a vocabulary of {base.n_vocab} tokens, the model one of {llm.n_vocab()}.",
            "compare models of one family, such as quantisations of the same model.",
        )
    first, scored = halves(n_ctx)
    nll, base_nll, n_bytes = np.empty((n_chunk, scored)), np.empty((n_chunk, scored)), 0
    record = Record.empty(n_chunk * scored if base else 0)
    packed = Packed.empty(scored if base else 0, llm.n_vocab())
    saved = None if save is None else _Save(save, tokens, n_ctx, llm.n_vocab(), n_chunk)
    progress(Step("scoring", 0, n_chunk, "chunk"))  # from here on the time left is known
    for i in range(n_chunk):
        chunk = chunk_at(llm, tokens, n_ctx, i)
        n_bytes += len(llm.detokenize(chunk[first + 1 :]))
        if base is not None:
            base_nll[i] = base.chunk(i, chunk, first, packed)

        def take(part: slice, rows: Logits, targets: Targets, i: int = i) -> None:
            norms = Normalisers.of(rows)
            nll[i, part] = log_probabilities(rows, targets, norms).nll
            if base is not None:
                place = slice(i * scored + part.start, i * scored + part.stop)
                record.put(place, rows, norms, targets, packed.part(part))
            if saved is not None:
                saved.put(part, rows, norms)

        each_target(llm, chunk, first, take)
        if saved is not None:
            saved.write()
        progress(Step(f"PPL {math.exp(nll[: i + 1].mean()):.4f}", i + 1, n_chunk, "chunk"))
    against = None
    if base is not None:
        gain = base_nll - nll
        against = Divergence(
            _figure(base_nll, n_bytes),
            stats.mean_interval(gain.ravel()),
            chunk_mean(gain.mean(axis=1)) if n_chunk > 1 else None,
            KLStatistics.of(record),
            ChunkValues.of(record, n_chunk) if n_chunk > 1 else None,
        )
    return TextScore(llm.loop, n_ctx, n_chunk, nll.size, n_bytes, _figure(nll, n_bytes), against)


def _figure(nll: Nll, n_bytes: int) -> Figure:
    ppl, error = stats.perplexity(nll.ravel())
    return Figure(ppl, error, float(nll.mean()), float(nll.sum()) / math.log(2) / n_bytes if n_bytes else math.nan)
