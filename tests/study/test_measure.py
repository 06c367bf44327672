"""`ggufloop compare`: every cell against perplexity one by one, lockstep, resuming, and the command with its files.

The model is a tiny random one, quantised here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.cli import Cli

from ggufloop.backend.settings import ContextSettings
from ggufloop.engine import LoopedLlama
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import PLAIN, LoopSpec
from ggufloop.measure import corpus
from ggufloop.measure.perplexity import Other, perplexity
from ggufloop.progress import Step
from ggufloop.study import analysis, ladder_files, measure, report
from ggufloop.study import file as study
from ggufloop.study.file import Study, StudyHeader
from ggufloop.study.ladder_files import LadderFile
from ggufloop.study.run import StudyPlan, run_study

N_CTX = 64
LOOPS = [None, LoopSpec.parse("2:5 k=2"), LoopSpec.parse("2:5 k=3 solver=naive")]
SETTINGS = {"n_ctx": N_CTX, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
TYPES = ("Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def text() -> str:
    return corpus.local("pydoc").text[:4000]


@pytest.fixture(scope="module")
def ladder(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[LadderFile]:
    """The reference, Q8_0 and Q4_0."""
    folder, source = tmp_path_factory.mktemp("ladder"), tiny_model("llama")
    ref = ladder_files.reference(source, folder, "F16")
    return [ref, *(ladder_files.make(ref, word, source, folder, (2, 5)) for word in TYPES)]


@pytest.fixture(scope="module")
def models(ladder: list[LadderFile]) -> Iterator[dict[str, LoopedLlama]]:
    found = {entry.file.type: LoopedLlama(entry.path, **SETTINGS) for entry in ladder}
    yield found
    for llm in found.values():
        llm.close()


def begun(path: Path, ladder: list[LadderFile]) -> Study:
    header = StudyHeader("m", "a", "F32", "llama", 7, 1, 1, "F16", (2, 5), "pydoc", "b", N_CTX, {}, "0", "p")
    s = study.create(path, header)
    for entry in ladder:
        s = study.add_file(path, s, entry.file)
    return s


def measured(path: Path, ladder: list[LadderFile], models: dict[str, LoopedLlama], text: str, **more: object) -> Study:
    tokens = measure.shared_tokens(models, text)
    arguments = {"study": begun(path, ladder), "models": models, "loops": LOOPS, "chunks": range(2)} | more
    return measure.measure(path, tokens=tokens, n_ctx=N_CTX, **arguments)  # type: ignore[arg-type]


def test_cells_are_those_of_perplexity(
    ladder: list[LadderFile], models: dict[str, LoopedLlama], text: str, tmp_path: Path
) -> None:
    """Against the same numbers measured one model and one loop at a time, reference and file under the same loop."""
    s = measured(tmp_path / "s.jsonl", ladder, models, text)
    tokens = measure.shared_tokens(models, text)
    reference = models["F32"]
    for loop in LOOPS:
        name = measure.loop_name(loop)
        for type_, llm in models.items():
            llm.set_loop(loop)
            alone = perplexity(llm, tokens, N_CTX, 2)
            cell = s.cell(type_, name)
            assert cell.ppl == pytest.approx((alone.model.ppl, alone.model.error), rel=1e-12)
            assert cell.bits_per_byte == pytest.approx(alone.model.bits_per_byte, rel=1e-12)
            assert (cell.n, [c.n_bytes for c in cell.chunks]) == (alone.n, [31, 31])  # a byte a token
            if type_ != "F32":
                record = _looped_divergence(reference, llm, loop, tokens)
                assert cell.mean("kl") == pytest.approx(record, rel=1e-9)
        assert s.cell("F32", name).mean("kl") == 0
        assert s.cell("F32", name).mean("same_top") == 1
    reference.set_loop(None)
    plain = perplexity(models["Q4_0"], tokens, N_CTX, 2, base=_Kept(reference, LOOPS[2])).against
    assert plain is not None
    assert s.cell("Q4_0", str(LOOPS[2])).mean("same_top") == plain.kl.same_top.mean
    assert s.cell("Q4_0", PLAIN).mean("kl") > 10 * s.cell("Q8_0", PLAIN).mean("kl") > 0.001


class _Kept(Other):
    """perplexity's base, under a loop of its own."""

    def __init__(self, model: LoopedLlama, loop: LoopSpec | None) -> None:
        object.__setattr__(self, "model", _Looped(model, loop))


class _Looped:
    """A model that loops when it is told to be plain."""

    def __init__(self, model: LoopedLlama, loop: LoopSpec | None) -> None:
        self._model, self._loop = model, loop

    def set_loop(self, loop: LoopSpec | None) -> None:
        self._model.set_loop(self._loop)

    def __getattr__(self, name: str) -> object:
        return getattr(self._model, name)


def _looped_divergence(reference: LoopedLlama, llm: LoopedLlama, loop: LoopSpec | None, tokens: list[int]) -> float:
    llm.set_loop(loop)
    against = perplexity(llm, tokens, N_CTX, 2, base=_Kept(reference, loop)).against
    assert against is not None
    return against.kl.kl.mean


def test_a_file_compared_with_itself(
    ladder: list[LadderFile], models: dict[str, LoopedLlama], text: str, tmp_path: Path
) -> None:
    """KLD 0 but for the 16-bit rounding, the same likeliest token everywhere, no A_K; and A_1 is 1 exactly."""
    twin = LadderFile(ladder[0].path, dataclasses.replace(ladder[0].file, type="twin"))
    twins = {"F32": models["F32"], "twin": models["F32"], "Q4_0": models["Q4_0"]}
    s = measured(tmp_path / "s.jsonl", [ladder[0], twin, ladder[2]], twins, text)
    for loop in s.loops:
        cell, reference = s.cell("twin", loop), s.cell("F32", loop)
        assert abs(cell.mean("kl")) < 5e-6
        assert cell.mean("same_top") == 1
        assert (cell.values("nll") == reference.values("nll")).all()
        assert analysis.amplification(s, "twin", loop) is None
    one = analysis.amplification(s, "Q4_0", PLAIN)
    assert one is not None
    assert (one.mean, one.low, one.high) == (1, 1, 1)
    assert measure.loop_name(LoopSpec.parse("2:5 k=1 solver=naive")) == PLAIN


def test_a_stopped_study_goes_on(
    ladder: list[LadderFile], models: dict[str, LoopedLlama], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after 7 of 18 measurements, it has 7, goes on with the eighth, and ends as if it had not been stopped.
    The reference runs once for all files of a chunk and loop."""
    whole = measured(tmp_path / "whole.jsonl", ladder, models, text)
    told: list[Step] = []

    def stop_at_seven(step: Step) -> None:
        told.append(step)
        if len(told) == 7:
            raise KeyboardInterrupt

    path = tmp_path / "s.jsonl"
    with pytest.raises(KeyboardInterrupt):
        measured(path, ladder, models, text, progress=stop_at_seven)
    part = study.read(path)
    assert sum(len(cell.chunks) for cell in part.cells.values()) == 7
    assert measure.missing(part, [r.file.type for r in ladder], LOOPS, range(2)) == 11
    evaluated = []
    original = LoopedLlama.each_logits
    monkeypatch.setattr(
        LoopedLlama, "each_logits", lambda llm, *a, **k: (evaluated.append(llm), original(llm, *a, **k))[1]
    )
    rest = measured(path, ladder, models, text, study=part, progress=stop_at_seven)
    assert len(told) == 18
    assert len({step.text for step in told}) == 18
    assert [(step.done, step.total) for step in told] == [
        *((i, 18) for i in range(1, 8)),
        *((i, 11) for i in range(1, 12)),
    ]
    assert evaluated.count(models["F32"]) == 4  # 3 loops of the second chunk, and the loop it was stopped in

    def without_seconds(s: Study) -> dict[object, object]:
        return {key: [dataclasses.replace(c, seconds=0) for c in cell.chunks] for key, cell in sorted(s.cells.items())}

    assert without_seconds(rest) == without_seconds(whole)


def test_what_cannot_be_compared(
    ladder: list[LadderFile],
    models: dict[str, LoopedLlama],
    tiny_model: Callable[[str], Path],
    text: str,
    tmp_path: Path,
) -> None:
    s = begun(tmp_path / "s.jsonl", ladder)
    with pytest.raises(GgufloopError, match=r"the text has 100 tokens, 1 chunks of 64"):
        measure.measure(tmp_path / "s.jsonl", s, models, LOOPS, [5] * 100, range(2), N_CTX)
    with pytest.raises(UsageError, match="chunks of 3 tokens have none to score"):
        measure.check_text([5] * 100, 3, 1)

    class Short:
        """The same model with another tokenizer."""

        def __getattr__(self, name: str) -> object:
            return getattr(models["F32"], name)

        def tokenize(self, text: bytes, **more: object) -> list[int]:
            return models["F32"].tokenize(text[:-1])

    with pytest.raises(GgufloopError, match="Q4_0 cuts the text into other tokens than F32"):
        measure.shared_tokens({"F32": models["F32"], "Q4_0": Short()}, text)  # type: ignore[dict-item]
    with pytest.raises(GgufloopError, match="is no reference of"):
        ladder_files.make(ladder[0], str(tiny_model("qwen3")), tiny_model("qwen3"), tmp_path, (2, 5))


def test_the_files_of_a_ladder(ladder: list[LadderFile], tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    reference, eight, four = (entry.file for entry in ladder)
    assert (reference.type, reference.note, reference.window_snr) == ("F32", "the model itself", math.inf)
    assert ladder[0].path == tiny_model("llama")
    assert eight.window_snr == pytest.approx(45.4, abs=0.5)
    assert four.window_snr == pytest.approx(21.3, abs=0.5)
    assert four.bits_per_weight < eight.bits_per_weight < 9
    quantised = next(entry.path for entry in ladder if entry.file.type == "Q8_0")
    again = ladder_files.reference(quantised, tmp_path, "F32")
    assert again.file.note == f"{quantised.name} dequantised"
    source = ladder_files.make(again, "source", quantised, tmp_path, (2, 5))
    assert (source.file.type, source.path, source.file.window_snr) == ("source", quantised, math.inf)
    fallen = ladder_files.make(again, "Q2_K", quantised, tmp_path, (2, 5)).file
    assert re.fullmatch(r"\d+ of 51 matrices as .*: their rows do not fill blocks", fallen.note)
    with pytest.raises(UsageError, match="a reference of type Q8_0 would be quantised"):
        ladder_files.reference(quantised, tmp_path, "Q8_0")


# The command

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    tiny_model: Callable[[str], Path], tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch,
    cli: Cli,
) -> Run:  # fmt: skip
    """run("--types", ...) in an empty folder with text.txt; exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)
    model = str(tiny_model("llama"))

    def call(*args: object, name: str | None = model) -> tuple[int, str, str]:
        return cli("compare", *([name] if name else []), *args)

    return call


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a run on a tiny model."""
    monkeypatch.setattr("ggufloop.figures.study.figures", lambda study: {})


ASKED = ("--text", "text.txt", "-c", 64, "--chunks", 2, "--window", "2:5", "--types", "Q4_0", "-t", 1)


def test_the_command(run: Run) -> None:
    code, out, err = run(*ASKED, "--K", "1,2", "--solver", "euler,naive")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "llama.gguf"
    assert [line.split("|")[5].strip() for line in lines[4:10]] == 2 * [PLAIN, "2:5 k=2", "2:5 k=2 solver=naive"]
    assert "reference: F32, the model itself." in lines
    assert "2 chunks of 64 tokens of text.txt, their second halves scored; " in out
    assert "2 chunks cannot tell a loop from plain, whatever it does: measure 8 at least, better 64.\n" in out
    assert "0 helps, 0 hurts, 0 no effect larger than 0.01, 4 cannot tell" in out
    folder = Path("studies/llama")
    assert f"\nreport: {folder / 'report.html'}\n" in out
    assert {p.name for p in folder.iterdir()} == {
        ".lock", ".study.jsonl.lock", "study.jsonl", "study.toml", "table.md", "table.csv", "report.html",
        "ppl-size.png", "amplification-snr.png", "kld-snr.png", "across.csv",
    }  # fmt: skip
    assert re.search(r"note: \d+ MB of quantised files are made in studies/llama/models, and deleted when all is", err)
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in folder.glob("*.png"))
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(?:src|href)\s*=\s*[\"'](?!#)|url\((?!#)|@import|<script", page)
    assert "prefers-color-scheme: dark" in page

    before = (folder / "study.jsonl").read_text()
    code, again, err = run("--study", folder / "study.toml", name=None)
    assert (code, again) == (0, out)
    assert "are made in" not in err  # nothing is left to be measured
    assert (folder / "study.jsonl").read_text() == before
    code, out, _ = run("--study", folder / "study.toml", "--types", "Q4_0,Q8_0", "--chunks", 3, "-o", "json", name=None)
    rows = json.loads(out)
    assert (code, len(rows)) == (0, 9)
    assert (folder / "study.jsonl").read_text().startswith(before)
    assert {row["chunks"] for row in rows} == {3}
    assert [row["type"] for row in rows[::3]] == ["F32", "Q4_0", "Q8_0"]
    assert [rows[4][name] is None for name in ("verdict", "a_k", "kld", "gain")] == [False] * 4
    assert rows[3]["a_k"] is None


def test_files_stay_until_all_is_measured(
    run: Run, ladder: list[LadderFile], without_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a quantised model: what was made stays when it is stopped, goes at the end, and stays with --keep; a file that
    --types names stays where it is."""
    source, other = (next(e.path for e in ladder if e.file.type == t) for t in ("Q8_0", "Q4_0"))
    models = Path("studies") / source.stem / "models"
    models.mkdir(parents=True)
    mine = models / "mine.gguf"
    mine.write_bytes(other.read_bytes())

    def there() -> set[str]:
        return {path.name for path in models.glob("*.gguf")} - {mine.name}

    asked = ("--text", "text.txt", "-c", 64, "--chunks", 2, "--window", "2:5", "--K", 2, "-t", 1, "--types",
             f"Q4_0,{mine}")  # fmt: skip
    original = measure.measure
    monkeypatch.setattr(measure, "measure", interrupted)
    assert run(*asked, name=str(source))[0] == 130
    made = there()
    assert len(made) == 2
    monkeypatch.setattr(measure, "measure", original)
    code, _, err = run(*asked, name=str(source))
    assert code == 0, err
    assert "are made in" not in err
    assert there() == set()
    assert mine.exists()
    assert run(*asked, "--keep", "--chunks", 3, name=str(source))[0] == 0
    assert there() == made
    assert run(*asked, "--chunks", 4, name=str(source))[0] == 0
    assert there() == made  # they were asked for


def interrupted(*args: object, **more: object) -> None:
    raise KeyboardInterrupt


def test_from_python_as_from_the_command_line(run: Run, tiny_model: Callable[[str], Path]) -> None:
    assert run(*ASKED, "--K", "2,3")[0] == 0
    loops = [LoopSpec((2, 5), 2), LoopSpec((2, 5), 3)]
    plan = StudyPlan(corpus.local("text.txt"), ("Q4_0",), chunk=64, chunks=2)
    mine = run_study(tiny_model("llama"), loops, plan, Path("mine"), ContextSettings(n_threads=1))
    theirs = study.read(Path("studies/llama/study.jsonl"))
    assert mine.header == theirs.header
    assert (mine.types, mine.loops) == (theirs.types, theirs.loops)
    for type_ in mine.types:
        for loop in mine.loops:
            assert list(mine.cell(type_, loop).values("nll")) == list(theirs.cell(type_, loop).values("nll"))


def test_a_quantised_model_is_compared_with_itself_dequantised(
    run: Run, ladder: list[LadderFile], without_figures: None
) -> None:
    source = next(entry.path for entry in ladder if entry.file.type == "Q8_0")
    asked = ("--text", "text.txt", "-c", 64, "--chunks", 2, "--window", "2:5", "--K", 2, "-t", 1)
    code, out, err = run(*asked, "--types", "source,Q4_0", "--reference", "F32", name=str(source))
    assert code == 0, err
    assert f"reference: F32, {source.name} dequantised. What its quantisation lost before" in out
    assert f"source: {source.name} as it is; its weights are the reference's" in out
    assert [line.split("|")[1].strip() for line in out.splitlines()[4:10]] == ["F32"] * 2 + ["source"] * 2 + [
        "Q4_0"
    ] * 2


def test_studies_of_other_texts_are_refused(run: Run, without_figures: None) -> None:
    assert run(*ASKED, "--K", 2)[0] == 0
    Path("text.txt").write_text(Path("text.txt").read_text() + "x")
    code, _, err = run(*ASKED, "--K", 2)
    assert code == 1
    assert re.match(
        r"error: studies/llama/study\.jsonl holds another study: text_sha256 \w{12}\.\.\. and \w{12}\.\.\.\.\n"
        r"  choose another --out, or repeat it as it was\.\n",
        err,
    )


def test_bad_input(run: Run) -> None:
    Path("bad.toml").write_text("type = ['Q4_0']")
    Path("nested.toml").write_text("types = [['Q4_0']]")
    Path("broken.toml").write_text("types =")
    known = (
        "give --text a file or one of pydoc, sdist-docs, brown, wiki, c4, code, multilingual, technical; "
        "or --hf-dataset."
    )
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((), 2, f"error: no text is given.\n  {known}"),
        ((*ASKED, "--types", "Q4_0,Q5KM"), 2, "error: type 'Q5KM' is not known.\n  did you mean"),
        ((*ASKED, "--types", "Q4_0,,"), 2, "error: --types 'Q4_0,,' has an empty entry."),
        ((*ASKED, "--types", "none.gguf"), 2, "error: there is no file none.gguf."),
        (
            (*ASKED, "--reference", "Q8_0"),
            2,
            "error: reference 'Q8_0' is not known.\n  known: F32, F16, BF16.",
        ),
        ((*ASKED, "--chunks", 1), 2, "error: --chunks 1 gives no interval"),
        ((*ASKED, "-c", 3), 2, "error: -c 3 leaves nothing to score.\n  give 4 or more."),
        ((*ASKED, "--chunks", 500), 1, "error: the text has "),
        ((*ASKED, "--window", "2:9"), 2, "error: window 2:9 is out of range: this model has 7 layers"),
        ((*ASKED, "--window", "2:5,3:5"), 2, "error: --window 2:5,3:5 is several windows, and a study is of one."),
        ((*ASKED, "--solver", "euler,nave"), 2, "error: solver 'nave' is not known.\n  did you mean naive?"),
        ((*ASKED, "-o", "xml"), 2, "error: output form 'xml' is not known."),
        (("--study", "none.toml"), 1, "error: cannot read none.toml: No such file or directory."),
        (("--study", "bad.toml"), 2, "error: bad.toml: 'type' is no option of compare.\n  did you mean types?"),
        (("--study", "nested.toml"), 2, "error: nested.toml: types is not a word, a number, or a list of them."),
        (("--study", "broken.toml"), 1, "error: broken.toml is not TOML: "),
    ]
    for args, code, message in cases:
        found = run(*args)
        assert found[:2] == (code, ""), (args, found)
        assert found[2].startswith(message), found[2]
    assert run(*ASKED, name=None)[2].startswith("error: no model is given.")


def test_tasks_are_paired(run: Run, without_figures: None) -> None:
    pytest.importorskip("lm_eval")
    code, out, err = run(*ASKED, "--K", 2, "--tasks", "brackets", "--limit", 3, "-o", "json")
    assert code == 0, err
    rows = json.loads(out)
    assert [row["brackets_n"] for row in rows] == [3] * 4
    assert [row["brackets_gain"] is None for row in rows] == [True, False, True, False]
    lines = Path("studies/llama/study.jsonl").read_text()
    assert run(*ASKED, "--K", 2, "--tasks", "brackets", "--limit", 3, "-o", "json")[1] == out
    assert Path("studies/llama/study.jsonl").read_text() == lines


def test_one_chunk_says_nothing_yet(
    ladder: list[LadderFile], models: dict[str, LoopedLlama], text: str, tmp_path: Path
) -> None:
    s = measured(tmp_path / "s.jsonl", ladder, models, text, chunks=range(1))
    assert analysis.rows(s) == []
    assert report.summary(s) == [
        "no cell has two chunks yet, and one says nothing about other texts: run it again to go on."
    ]
