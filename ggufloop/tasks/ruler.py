"""RULER's synthetic tasks of long contexts, those that need no download, in the model's own tokens.

    for sample in samples("niah_single_1", count, length=2048, n=50):         # count(text): its tokens
        sample.prompt, sample.prefix, sample.references, sample.new_tokens
    score("niah_single_1", answer, sample.references)                         # 0 to 1

Prompts, counts and scoring are those of NVIDIA/RULER (commit c3f5e3b; Hsieh et al., arXiv 2404.06654): niah_single_1,
niah_multikey_2, niah_multikey_3, vt, cwe and fwe. Where RULER hides needles in essays it downloads, `ruler_*_prose`
hides them in other prose. A sample is as long as fits: the number of its sentences, words or noises is found by
bisection so that prompt and answer are at most `length` tokens; RULER steps, and may stay some per cent below. Sample i
of a task and length is the same everywhere. Words come from the package wonderwords (in the extra `eval`).
"""

from __future__ import annotations

import re
import string
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import resources
from itertools import pairwise
from random import Random

from ggufloop.errors import UsageError, nearest

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = [round(i * 100 / 39) for i in range(40)]
"""Per cent of the prose before a needle."""

Count = Callable[[str], int]
Make = Callable[[Random, int], "tuple[str, str, list[str]]"]


@dataclass(frozen=True)
class Sample:
    """A prompt, what the answer begins with, what it should hold, and how many tokens it may have."""

    prompt: str
    prefix: str
    references: tuple[str, ...]
    new_tokens: int


@dataclass(frozen=True)
class RulerTask:
    """make(random, size): prompt, answer prefix and references; size: of what there is more of in longer contexts."""

    make: Make
    new_tokens: int
    least: int  # size of the smallest sample


@lru_cache(maxsize=1)
def _words() -> dict[str, list[str]]:
    """Nouns, adjectives and verbs of wonderwords. Raises UsageError."""
    try:
        folder = resources.files("wonderwords") / "assets"
    except ImportError:
        raise UsageError(
            "RULER's words need wonderwords, which is not installed.", "pip install 'ggufloop[eval]'"
        ) from None
    kinds = ("noun", "adjective", "verb")
    return {kind: (folder / f"{kind}list.txt").read_text(encoding="utf-8").split() for kind in kinds}


# needles in a haystack


def _needle_key(random: Random, kind: str) -> str:
    if kind == "numbers":
        return str(random.randint(10**6, 10**7 - 1))
    if kind == "uuids":
        return str(uuid.UUID(int=random.getrandbits(128), version=4))
    words = _words()
    return f"{random.choice(words['adjective'])}-{random.choice(words['noun'])}"


def _niah(
    random: Random, size: int, *, haystack: str, key: str, value: str, needles: int = 1, prose: tuple[str, ...] = ()
) -> tuple[str, str, list[str]]:
    """haystack: noise, needle (others like the one that is asked for) or prose."""

    def needle(k: str, v: str) -> str:
        return f"One of the special magic {value} for {k} is: {v}."

    pairs = [(_needle_key(random, key), _needle_key(random, value)) for _ in range(needles)]
    hidden = [needle(*pair) for pair in pairs]
    random.shuffle(hidden)
    if haystack == "prose":
        sentences = [prose[i % len(prose)] for i in range(size)]
        places = sorted(size * depth // 100 for depth in random.sample(DEPTHS, needles))
        for place, text in reversed(list(zip(places, hidden, strict=True))):
            sentences.insert(place, text)
        context = " ".join(sentences)
    else:
        sentences = [NOISE] * size
        if haystack == "needle":
            sentences = [needle(_needle_key(random, key), _needle_key(random, value)) for _ in range(size)]
        places = sorted(random.sample(range(size), needles), reverse=True)
        for place, text in zip(places, hidden, strict=True):
            sentences.insert(place, text)
        context = "\n".join(sentences)
    asked, answer = random.choice(pairs)
    kind = value[:-1]  # RULER's wording for one query with one value
    prompt = (
        f"A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about "
        f"the {kind} afterwards.\n{context}\n"
        f"What is the special magic {kind} for {asked} mentioned in the provided text?"
    )
    return prompt, f" The special magic {kind} for {asked} mentioned in the provided text is", [answer]


# a chain of variables


def _chain(random: Random, noises: int, hops: int, letters: int) -> tuple[str, str, list[str]]:
    """The text, the value, and the variables that have it."""
    names: list[str] = []
    while len(names) < hops + 1:
        name = "".join(random.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(random.randint(10000, 99998))
    links = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a} " for a, b in pairwise(names))]
    sentences = [NOISE + "\n"] * noises
    for i, place in enumerate(sorted(random.sample(range(noises), len(links)))):
        sentences.insert(place + i, links[i])
    return " ".join(sentences).replace(". \n", ".\n"), value, names


def _vt(random: Random, size: int, hops: int = 4) -> tuple[str, str, list[str]]:
    """One chain of four hops, after one worked example with shorter names."""

    def question(text: str, value: str) -> str:
        return (
            f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}\n"
            f"Question: Find all variables that are assigned the value {value} in the text above."
        )

    def prefix(value: str) -> str:
        return (
            " Answer: According to the chain(s) of variable assignment in the text above, "
            f"{hops + 1} variables are assgined the value {value}, they are: "  # spelled as RULER does
        )

    example, shown, found = _chain(random, 5, hops, 3)
    text, value, names = _chain(random, size, hops, 5)
    worked = question(example, shown) + prefix(shown) + " " + " ".join(found) + "\n\n\n\n"
    return worked + question(text, value), prefix(value), names


# words that are common, and codes that are frequent


def _word_list(random: Random, size: int, often: int, seldom: int) -> tuple[str, list[str]]:
    known = sorted({word for words in _words().values() for word in words})
    chosen = random.sample(known, min(size, len(known)))
    common = chosen[:10]
    listed = common * often + chosen[10:] * seldom
    random.shuffle(listed)
    return " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1)), common


def _cwe(random: Random, size: int, length: int) -> tuple[str, str, list[str]]:
    """Ten words that come 30 times among others that come three times; below 4,096 tokens six times and once."""
    prefix = " Answer: The top 10 words that appear most often in the list are:"

    def question(context: str) -> str:
        return (
            "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones "
            f"that appear most often.\n{context}\nQuestion: What are the 10 most common words in the above list?"
        )

    short = length < 4096
    example, found = _word_list(random, 20, 3, 1) if short else _word_list(random, 40, 10, 3)
    context, common = _word_list(random, size, *((6, 1) if short else (30, 3)))
    worked = question(example) + prefix + " " + " ".join(f"{i}. {word}" for i, word in enumerate(found, 1))
    return worked + "\n" + question(context), prefix, common


def _fwe(random: Random, size: int, length: int) -> tuple[str, str, list[str]]:
    """Codes whose frequencies fall as 1 / rank^2 (a zeta distribution); the first is dots, the next three are asked."""
    codes: list[str] = []
    while len(codes) < max(length // 50, 4):
        code = "".join(random.choices(string.ascii_lowercase, k=6))
        if code not in codes:
            codes.append(code)
    codes[0] = "..."
    zeta = 1.6449340668482264  # of 2
    listed = [code for rank, code in enumerate(codes, 1) for _ in range(int(size * rank**-2 / zeta))]
    random.shuffle(listed)
    prompt = (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(listed)}\nQuestion: Do not provide any explanation. Please ignore the dots "
        "'....'. What are the three most frequently appeared words in the above coded text?"
    )
    prefix = " Answer: According to the coded text above, the three most frequently appeared words are:"
    return prompt, prefix, codes[1:4]


_NIAH = {
    "niah_single_1": partial(_niah, haystack="noise", key="words", value="numbers"),
    "niah_multikey_2": partial(_niah, haystack="needle", key="words", value="numbers"),
    "niah_multikey_3": partial(_niah, haystack="needle", key="uuids", value="uuids"),
}
_PROSE = {"ruler_niah_single_2_prose": 1, "ruler_niah_multikey_1_prose": 4}
TASKS = (*_NIAH, "vt", "cwe", "fwe")
"""RULER's own names."""
PROSE_TASKS = tuple(_PROSE)


def ruler_task(name: str, length: int, prose: str = "") -> RulerTask:
    """A task for a length in tokens. prose: a text for the tasks of PROSE_TASKS. Raises UsageError."""
    if name in _NIAH:
        return RulerTask(_NIAH[name], 128, 1)
    if name == "vt":
        return RulerTask(_vt, 30, 6)
    if name == "cwe":
        return RulerTask(partial(_cwe, length=length), 120, 11)
    if name == "fwe":
        return RulerTask(partial(_fwe, length=length), 50, 28)
    if name in _PROSE:
        sentences = tuple(" ".join(s.split()) for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", prose) if s.strip())
        if len(sentences) < 10:
            raise UsageError(f"{name} needs prose to hide needles in.", "name a text of some thousand words.")
        made = partial(_niah, haystack="prose", key="words", value="numbers", needles=_PROSE[name], prose=sentences)
        return RulerTask(made, 128, 1)
    raise UsageError(f"task {name!r} is not one of RULER's that are here.", nearest(name, (*TASKS, *PROSE_TASKS)))


def samples(name: str, count: Count, length: int, n: int, seed: int = 42, prose: str = "") -> Iterator[Sample]:
    """Yield n samples that are at most `length` tokens with their answer, as long as they can be.

    count: tokens of a text. Raises UsageError for an unknown task, or a length that holds none of it.
    """
    task = ruler_task(name, length, prose)

    def made(i: int, size: int) -> Sample:
        prompt, prefix, references = task.make(Random(f"{name} {length} {seed} {i}"), size)
        return Sample(prompt, prefix, tuple(references), task.new_tokens)

    def fits(sample: Sample) -> bool:
        return count(sample.prompt + sample.prefix) + sample.new_tokens <= length

    for i in range(n):
        best, low, high = made(i, task.least), task.least, length
        if not fits(best):
            raise UsageError(f"{length} tokens do not hold a sample of {name}.", "take a longer context.")
        while low < high:
            middle = (low + high + 1) // 2
            sample = made(i, middle)
            if fits(sample):
                best, low = sample, middle
            else:
                high = middle - 1
        yield best


def score(name: str, answer: str, references: tuple[str, ...]) -> float:
    """The share of the references that an answer holds, whatever the case; for qa 1 if it holds any."""
    text = re.sub(r"[\x00-\x1f]", "\n", answer.strip()).strip().lower()
    held = [reference.lower() in text for reference in references]
    return float(max(held)) if "qa" in name else sum(held) / len(held)
