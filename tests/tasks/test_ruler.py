"""RULER's tasks: what samples hold against its rules, their wording against lm-eval's copy, lengths, scores."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from ggufloop.errors import UsageError
from ggufloop.tasks import ruler
from ggufloop.tasks.ruler import NOISE, PROSE_TASKS, TASKS, Sample, samples, score

PROSE = " ".join(f"Sentence number {i} says little." for i in range(900))


def count(text: str) -> int:
    """A tokenizer of words and marks."""
    return len(re.findall(r"\w+|[^\w\s]", text))


def some(name: str, length: int = 1024, n: int = 3) -> list[Sample]:
    return list(samples(name, count, length, n, prose=PROSE))


def strings(module: str) -> list[str]:
    """The string constants of a module of lm-eval's ruler, which wants a network to be imported."""
    folder = importlib.util.find_spec("lm_eval").submodule_search_locations[0]
    tree = ast.parse(Path(folder, "tasks", "ruler", f"{module}.py").read_text())
    return [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def template(module: str, beginning: str) -> str:
    return next(text for text in strings(module) if text.startswith(beginning))


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", [*TASKS, *PROSE_TASKS])
@pytest.mark.parametrize("length", [600, 1024, 5000])
def test_samples_are_as_long_as_fits(name: str, length: int) -> None:
    for sample in some(name, length):
        assert (
            length * (0.85 if name != "cwe" else 0.7)
            < count(sample.prompt + sample.prefix) + sample.new_tokens
            <= length
        )
    assert some(name, length) == some(name, length)
    assert len({sample.prompt for sample in some(name, length)}) == 3


def test_one_needle_in_noise() -> None:
    for sample in some("niah_single_1"):
        lines = sample.prompt.split("\n")
        (place,) = [i for i, line in enumerate(lines) if line.startswith("One of the special")]
        key, value = re.fullmatch(r"One of the special magic numbers for (\S+) is: (\d{7})\.", lines[place]).groups()
        assert sample.references == (value,)
        assert set(lines[1:-1]) - {lines[place]} == {NOISE}
        asked = template("niah_utils", "Some special magic")
        asked = (
            asked.replace("Some", "A").replace("are", "is").replace("is all", "is").replace("{type_needle_v}", "number")
        )
        told = asked.replace("is all the", "is the").format(context="\n".join(lines[1:-1]), query=key)
        assert one_line(sample.prompt) == one_line(told)
        assert sample.prefix == f" The special magic number for {key} mentioned in the provided text is"
        words = ruler._words()
        adjective, noun = next((a, n) for i in range(len(key)) if (a := key[:i]) in set(words["adjective"])
                               and (n := key[i + 1 :]) in set(words["noun"]))  # fmt: skip
        assert f"{adjective}-{noun}" == key
    assert (
        len(
            {
                s.prompt.split("\n").index(next(x for x in s.prompt.split("\n") if "One of" in x))
                for s in some("niah_single_1", n=20)
            }
        )
        > 8
    )


@pytest.mark.parametrize(("name", "key"), [("niah_multikey_2", r"[\w-]+"), ("niah_multikey_3", r"[0-9a-f-]{36}")])
def test_a_needle_among_needles(name: str, key: str) -> None:
    kind, value = ("numbers", r"\d{7}") if name.endswith("2") else ("uuids", r"[0-9a-f-]{36}")
    for sample in some(name):
        lines = sample.prompt.split("\n")[1:-1]
        pairs = [
            re.fullmatch(rf"One of the special magic {kind} for ({key}) is: ({value})\.", x).groups() for x in lines
        ]
        asked = re.search(rf"for ({key}) mentioned", sample.prompt.split("\n")[-1])[1]
        assert sample.references == tuple(v for k, v in pairs if k == asked)


def test_needles_in_prose() -> None:
    for sample in some("ruler_niah_multikey_1_prose"):
        context = sample.prompt.split("\n")[1]
        needles = re.findall(r"One of the special magic numbers for (\S+) is: (\d{7})\.", context)
        assert len(needles) == 4
        rest = re.sub(r"One of the special magic numbers for \S+ is: \d{7}\. ?", "", context).strip()
        assert PROSE.startswith(rest)
        total = rest.count(".")
        depths = {total * d // 100 for d in ruler.DEPTHS}
        before = [context[: context.index(k)].count("says little") for k, _ in needles]
        assert set(before) <= depths
        asked = re.search(r"for (\S+) mentioned", sample.prompt.split("\n")[-1])[1]
        assert sample.references == (dict(needles)[asked],)


def test_a_chain_of_variables() -> None:
    told, prefix = (template("vt_utils", x) for x in ("Memorize and track", " Answer: According to the chain"))
    for sample in some("vt"):
        example, text = sample.prompt.split("\n\n\n\n")
        for part, letters in ((example, 3), (text, 5)):
            first = re.search(rf"VAR ([A-Z]{{{letters}}}) = (\d{{5}})", part)
            chain = [first[1]]
            while following := re.search(rf"VAR ([A-Z]+) = VAR {chain[-1]} ", part):
                assert following.start() > first.start()
                chain.append(following[1])
            assert len(chain) == 5
            assert f"assigned the value {first[2]} in" in part
        assert sample.references == tuple(chain)
        body = text[text.index("\n\n") + 2 : text.index("\nQuestion")]
        assert text == told.format(context=body, query=first[2])
        assert sample.prefix == prefix.format(num_v=5, query=first[2])
        noise = re.sub(r"VAR [A-Z]+ = (VAR [A-Z]+|\d+)\s*", "", body)
        assert one_line(noise) == " ".join([NOISE] * noise.count("The grass"))


@pytest.mark.parametrize(("length", "often", "seldom"), [(1024, 6, 1), (5000, 30, 3)])
def test_common_words(length: int, often: int, seldom: int) -> None:
    told, prefix = (template("cwe_utils", x) for x in ("Below is a numbered", " Answer: The top 10"))
    for sample in some("cwe", length):
        example, question = sample.prompt.split("\nBelow is", 1)
        listed = re.findall(r"(\d+)\. (\S+)", question)
        assert [int(i) for i, _ in listed] == list(range(1, len(listed) + 1))
        counts = Counter(word for _, word in listed)
        assert {word for word, n in counts.items() if n == often} == set(sample.references)
        assert {n for word, n in counts.items() if word not in sample.references} <= {seldom}
        context = " ".join(f"{i}. {word}" for i, word in listed)
        assert "Below is" + question == told.format(context=context)
        assert sample.prefix == prefix
        assert len(re.findall(r"\d+\. ", example.split(prefix)[1])) == 10


def test_frequent_codes() -> None:
    told, prefix = (template("fwe_utils", x) for x in ("Read the following coded", " Answer: According to the coded"))
    for sample in some("fwe", 2000):
        context = re.search(r"coded words\. (.*)\nQuestion", sample.prompt, re.DOTALL)[1]
        counts = Counter(context.split()).most_common()
        assert counts[0][0] == "..."
        assert tuple(word for word, _ in counts[1:4]) == sample.references
        for rank, (_, n) in enumerate(counts[:4], 1):
            assert n == pytest.approx(counts[0][1] / rank**2, abs=1)
        assert sample.prompt == told.format(context=context)
        assert sample.prefix == prefix


def test_scores() -> None:
    assert score("niah_single_1", " 1234567.", ("1234567",)) == 1
    assert score("niah_single_1", "It is 123456", ("1234567",)) == 0
    assert score("vt", "ABCDE and fghij", ("ABCDE", "FGHIJ", "KLMNO", "PQRST")) == 0.5
    assert score("cwe", "1. Apple\x002. pear", ("apple", "PEAR")) == 1
    assert score("qa_1", "in Paris", ("paris", "Lutetia")) == 1


def test_what_is_refused() -> None:
    with pytest.raises(UsageError, match="task 'niah_single' is not one of RULER's"):
        some("niah_single")
    with pytest.raises(UsageError, match="200 tokens do not hold a sample of niah_single_1"):
        some("niah_single_1", 200)
    with pytest.raises(UsageError, match="needs prose"):
        list(samples(PROSE_TASKS[0], count, 1024, 1))
