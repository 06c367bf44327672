"""The text a small family is trained on, its byte-pair tokenizer, and the part no training batch sees.

    documents = collect()                                   # public texts every machine can have
    train, held_out = split(documents, seed=1)              # whole documents are held out
    merges = learn_merges(train, 255)                       # the tokenizer: 256 bytes, the merges, end of text

Sources: the help of Python's topics and llama.cpp's markdown (ggufloop.corpus), the docstrings of Python's standard
library (PSF licence) and WordNet's definitions (WordNet licence). Documents are cut into pieces of a few thousand
characters and the pieces shuffled.
"""

from __future__ import annotations

import ast
import random
import re
import sys
import sysconfig
import tarfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
from support import tiny

from ggufloop.measure import corpus
from ggufloop.tasks.questions import wordnet_archive

PIECE = 4096  # characters
BYTES: list[str] = tiny.vocabulary()[0][:256]  # GPT-2's spelling of each byte
END = "<|endoftext|>"

# Close to GPT-2's pattern, which llama.cpp cuts by; without its letter classes a word is cut elsewhere now and then,
# which changes what is counted here and not how a text is tokenized.
_WORD = re.compile(r" ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+")


@dataclass(frozen=True)
class Document:
    """A text of one source; documents are held out whole."""

    source: str
    text: str


def collect() -> list[Document]:
    """All documents, each text once, in an order that depends on nothing but the texts' places."""
    found = [*topics(), *_markdown(), *_docstrings(Path(sysconfig.get_path("stdlib"))), *_definitions()]
    return list({document.text: document for document in reversed(found)}.values())[::-1]


def topics() -> list[Document]:
    from pydoc_data.topics import topics as texts

    return [Document("pydoc", texts[key]) for key in sorted(texts)]


def _markdown() -> list[Document]:
    return [Document("sdist-docs", text) for text in corpus.markdown()]


def _docstrings(folder: Path) -> list[Document]:
    """The docstrings of each module of the standard library, without its tests."""
    found = []
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"} & set(path.relative_to(folder).parts):
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # escapes that a later Python will refuse
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # kept broken on purpose, for tools that must cope
            continue
        nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
        found.append(Document("docstrings", "\n\n".join(text for text in texts if text)))
    return [document for document in found if len(document.text) > 200]


def _definitions() -> list[Document]:
    """WordNet's senses as 'word, word: definition; "example"', forty of a file in a document."""
    found = []
    with tarfile.open(wordnet_archive()) as archive:
        for part in ("noun", "verb", "adj", "adv"):
            member = archive.extractfile(f"package/dict/data.{part}")
            assert member is not None
            senses = [line for line in member.read().decode().splitlines() if not line.startswith(" ")]
            lines = [_sense(line) for line in senses]
            found += [Document("wordnet", "\n".join(lines[i : i + 40])) for i in range(0, len(lines), 40)]
    return found


def _sense(line: str) -> str:
    fields, _, gloss = line.partition(" | ")
    words = fields.split()
    names = words[4 : 4 + 2 * int(words[3], 16) : 2]
    plain = ", ".join(re.sub(r"\(\w+\)$", "", name).replace("_", " ") for name in names)
    return f"{plain}: {gloss.strip()}"


def split(documents: Sequence[Document], seed: int, share: float = 0.03) -> tuple[list[Document], list[Document]]:
    """Pieces to train on, and pieces of a random `share` of the documents of each source; both shuffled."""
    rng = random.Random(seed)
    train: list[Document] = []
    held_out: list[Document] = []
    for source in sorted({document.source for document in documents}):
        own = [document for document in documents if document.source == source]
        rng.shuffle(own)
        n = max(1, round(share * len(own)))
        held_out += (piece for document in own[:n] for piece in _pieces(document))
        train += (piece for document in own[n:] for piece in _pieces(document))
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _pieces(document: Document) -> list[Document]:
    """The document cut at line ends into pieces of about PIECE characters."""
    pieces, lines, length = [], [], 0
    for line in document.text.splitlines(keepends=True):
        lines.append(line)
        length += len(line)
        if length >= PIECE:
            pieces.append(Document(document.source, "".join(lines)))
            lines, length = [], 0
    return [*pieces, Document(document.source, "".join(lines))] if lines else pieces


def learn_merges(pieces: Sequence[Document], n: int, words: int = 30_000) -> list[tuple[str, str]]:
    """The n most frequent merges, one after the other (byte-pair encoding), counted on the most frequent words.

    Ties go to the pair that is larger as text, so the result is a function of the pieces. Fewer than n if the text has
    no more pairs.
    """
    counts: Counter[str] = Counter()
    for piece in pieces:
        counts.update(_WORD.findall(piece.text))
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:words]
    spelt = [[BYTES[byte] for byte in word.encode()] for word, _ in common]
    times = [count for _, count in common]
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)

    def count(i: int, sign: int) -> None:
        for pair in zip(spelt[i], spelt[i][1:], strict=False):
            pairs[pair] += sign * times[i]
            places[pair].add(i)

    for i in range(len(spelt)):
        count(i, 1)
    merges: list[tuple[str, str]] = []
    while len(merges) < n and (best := max(pairs, key=lambda p: (pairs[p], p), default=None)) and pairs[best] > 0:
        merges.append(best)
        for i in places.pop(best):
            count(i, -1)
            spelt[i] = _merged(spelt[i], best)
            count(i, 1)
    return merges


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    i = 0
    while i < len(symbols):
        both = tuple(symbols[i : i + 2]) == pair
        out.append(symbols[i] + symbols[i + 1] if both else symbols[i])
        i += 2 if both else 1
    return out
