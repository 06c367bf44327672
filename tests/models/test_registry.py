"""Names, paths and repositories to files: models.toml, wheels through the real pip, and a stand-in for the hub.

Wheels come from a folder (pip's find-links), the hub is a server on 127.0.0.1 met by the command in its own process;
only the tests marked `model` use the package index.
"""

from __future__ import annotations

import hashlib
import re
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support import tiny
from support.own_models import OWN

from ggufloop import files
from ggufloop.errors import GgufloopError, UsageError
from ggufloop.loop import LoopSpec
from ggufloop.models import registry, wheels
from ggufloop.models.gguf import check_model_file
from ggufloop.progress import Step

PUBLISHED = {
    "qwen3-4b": (15, 19), "qwen3-1.7b": (12, 16), "llama-3.2-3b": (12, 16), "qwen3-30b-a3b": (22, 26),
    "moonlight-16b-a3b": (8, 12), "qwen1.5-moe-a2.7b": (13, 17), "deepseek-v2-lite": (13, 17),
}  # fmt: skip


# the list


def test_shipped_models() -> None:
    models = {m.name: m for m in registry.models()}
    assert {name: models[name].window for name in PUBLISHED} == PUBLISHED
    assert {n for n, m in models.items() if m.window} == {*PUBLISHED, "smollm2-135m"}  # nothing else was measured
    for model in models.values():
        (a, b), origin = model.suggested_window()
        LoopSpec((a, b), k=2).check(model.layers)
        assert origin
        assert model.sources
        for source in model.sources:
            assert bool(source.wheels) != bool(source.hf)
            if source.wheels:
                assert sum(part.bytes for part in source.wheels) == model.bytes
                assert all(re.fullmatch("[0-9a-f]{64}", part.sha256) for part in source.wheels)
                assert re.fullmatch("[0-9a-f]{64}", model.sha256 or "")


def test_rule_of_thumb() -> None:
    for n in range(3, 513):
        a, b = registry.rule_of_thumb(n)
        LoopSpec((a, b), k=2).check(n)
        assert b - a == max(1, min(4, n // 3))
        assert abs((a + b) / 2 - 0.48 * n) <= 0.5 or n < 5
    assert [registry.rule_of_thumb(n) for n in (18, 30, 36)] == [(7, 11), (12, 16), (15, 19)]


def test_own_models(own_models: Callable[[str], None]) -> None:
    before = [m.name for m in registry.models()]
    own_models(OWN)
    assert [m.name for m in registry.models()] == [*before, "mine"]
    assert registry.find("MINE").suggested_window() == ((3, 5), "my sweep")
    assert registry.find("qwen3-4b").suggested_window() == ((15, 19), registry.RULE_OF_THUMB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("[mine]", "[mine"),
            "cannot read {path}: Expected ']' at the end of a table declaration (at line 2, column 6).",
        ),
        (
            ("layers = 12", "layers = '12'"),
            "model mine in {path} cannot be understood: layers is '12', not of type int.",
        ),
        (('file = "mine.gguf"', ""), "model mine in {path} cannot be understood: 'file' is missing."),
        (('"3:5"', '"3-4"'), "model mine in {path} cannot be understood: window 3-4 is not of the form first:end."),
        (
            ('"3:5"', '"3:12"'),
            "model mine in {path} cannot be understood: window 3:12 touches layer 11, the last one, which cannot be"
            " looped.",
        ),
        (('origin = "my sweep"', ""), "model mine in {path} cannot be understood: 'origin' is missing."),
        (
            ("origin", "orign"),
            "model mine in {path} cannot be understood: orign is no setting; did you mean origin? Known: architecture,"
            " bytes, file, layers, loop, loop_file, loop_origin, origin, sha256, sources, window.",
        ),
        (("hf =", "hub ="), "model mine in {path} cannot be understood: hub is no setting; known: hf, wheels."),
    ],
)
def test_own_models_that_cannot_be_read(
    own_models: Callable[[str], None], change: tuple[str, str], message: str
) -> None:
    own_models(OWN.replace(*change, 1))
    with pytest.raises(GgufloopError) as e:
        registry.models()
    assert e.value.message == message.format(path=registry.user_models_path())
    assert e.value.hint


def test_entry_of_a_file(tmp_path: Path, own_cache: Path, own_models: Callable[[str], None]) -> None:
    data = b"some model"
    own_models(OWN + f'[sized]\nfile="s.gguf"\narchitecture="llama"\nlayers=9\nsources=[]\nbytes={len(data)}\n'
               f'sha256="{hashlib.sha256(data).hexdigest()}"')  # fmt: skip
    renamed, other = tmp_path / "renamed.bin", tmp_path / "other.bin"
    renamed.write_bytes(data)
    other.write_bytes(b"SOME MODEL")
    entry = registry.entry_for
    assert entry(renamed).name == "sized"
    assert entry(other) is None
    assert entry(Path("Qwen3-1.7B-Q4_K_M.gguf")).name == "qwen3-1.7b"  # another quantisation of it
    assert entry(Path("qwen3-30b-a3b-UD-IQ2_XXS.gguf")).name == "qwen3-30b-a3b"
    assert entry(Path("Qwen3-1.7B-Base-Q8_0.gguf")) is None


def test_suggested_window_of_a_file(tmp_path: Path, own_models: Callable[[str], None]) -> None:
    own_models(OWN)
    model = tiny.write(tmp_path / "mine-Q8_0.gguf", tiny.FAMILIES["qwen3"])  # 6 layers, so not the one of the list
    assert registry.suggest_window(model) == ((2, 4), registry.RULE_OF_THUMB)
    own_models(OWN.replace("layers = 12", "layers = 6"))
    assert registry.suggest_window(model) == ((3, 5), "my sweep")


def test_an_entry_that_cannot_be_changed_is_left_alone(tmp_path: Path, own_models: Callable[[str], None]) -> None:
    model = tiny.write(tmp_path / "m.gguf", tiny.FAMILIES["llama"])
    text = 'm = {file = "m.gguf", architecture = "llama", layers = 7, sources = []}\n'
    own_models(text)
    with pytest.raises(GgufloopError):
        registry.save_loop(model, LoopSpec((2, 3), k=2), "s")
    assert registry.user_models_path().read_text() == text


# what a name means


def test_paths_win_over_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("smollm2-135m").write_bytes(b"x")
    assert registry.resolve("smollm2-135m") == Path("smollm2-135m")
    for text in ("missing.gguf", "./a", "a/b/c", "user/model.GGUF"):
        assert registry.resolve(text) == Path(text)  # not there: the file check says so, in its words


@pytest.mark.parametrize(
    ("text", "hf", "message", "hint"),
    [
        ("", None, "the model's name is empty.", "`ggufloop list` shows the models known by name."),
        ("qwen3-4", None, "model 'qwen3-4' is neither a file nor a known name.", "did you mean qwen3-4b? Known: "),
        (None, "qwen3-4b", "'qwen3-4b' is not of the form user/repo[:quant].", "write it like Qwen/Qwen3-4B-GGUF:"),
    ],
)  # fmt: skip
def test_names_that_mean_nothing(text: str | None, hf: str | None, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        registry.resolve(text, hf)
    assert e.value.message == message
    assert e.value.hint.startswith(hint)


def test_offline_without_the_file(own_cache: Path) -> None:
    with pytest.raises(GgufloopError) as e:
        registry.resolve("smollm2-135m", offline=True)
    assert e.value.message == "smollm2-135m is not downloaded, and downloads are off."
    assert e.value.hint == "run `ggufloop pull smollm2-135m` once without --offline."


# wheels, through the real pip


class Index:
    """A folder pip takes packages from, and a model of two parts in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.contents = {"part-one": b"one" * 1000, "part-two": b"two" * 999}
        self.sha256 = hashlib.sha256(b"".join(self.contents.values())).hexdigest()
        self.parts = [
            wheels.WheelPart(f"{n}==1.0", f"{n}/data.bin", len(d), hashlib.sha256(d).hexdigest(), 4000)
            for n, d in self.contents.items()
        ]
        folder.mkdir()
        for name in self.contents:
            self.put(name)

    def path(self, name: str) -> Path:
        return self.folder / f"{name.replace('-', '_')}-1.0-py3-none-any.whl"

    def put(self, name: str, data: bytes | None = None) -> None:
        info = f"{name.replace('-', '_')}-1.0.dist-info"
        with zipfile.ZipFile(self.path(name), "w") as z:
            z.writestr(f"{name}/data.bin", self.contents[name] if data is None else data)
            z.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
            z.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            z.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return Index(tmp_path / "index")


def left_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


def test_wheels_are_joined_checked_and_fetched_once(index: Index, tmp_path: Path) -> None:
    target, said = tmp_path / "models" / "m.gguf", []
    results = [
        threading.Thread(target=wheels.fetch, args=(index.parts, target, index.sha256, said.append)) for _ in range(2)
    ]
    for thread in results:
        thread.start()
    for thread in results:
        thread.join()
    assert target.read_bytes() == b"".join(index.contents.values())
    assert left_in(target.parent) == ["m.gguf"]
    assert files.recall(target) == index.sha256
    words = [step.text for step in said if step.done == step.total]
    assert sorted(words) == ["downloading part-one==1.0", "downloading part-two==1.0",
                             "waiting for another download of m.gguf"]  # fmt: skip


def test_a_download_goes_forward(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip copies a wheel and drops the first: its folder shrinks, and what is shown would begin anew."""
    sizes = iter([3500, 4000, 500])
    monkeypatch.setattr(wheels, "_bytes_in", lambda folder: next(sizes, 0))
    said: list[float] = []
    wheels.fetch(index.parts[:1], tmp_path / "m.gguf", index.parts[0].sha256, lambda step: said.append(step.done))
    assert len(said) > 3
    assert said == sorted(said)


def test_an_interrupted_download_keeps_its_whole_parts(index: Index, tmp_path: Path) -> None:
    target = tmp_path / "models" / "m.gguf"

    def interrupt(step: Step) -> None:
        if step.text.endswith("part-two==1.0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wheels.fetch(index.parts, target, index.sha256, interrupt)
    assert left_in(target.parent) == [".m.gguf.partial"]
    partial = target.with_name(".m.gguf.partial")
    assert partial.read_bytes() == index.contents["part-one"]
    with partial.open("ab") as f:
        f.write(b"half of the second")  # as a killed process leaves it
    index.path("part-one").unlink()  # so it cannot be fetched again
    wheels.fetch(index.parts, target, index.sha256)
    assert hashlib.sha256(target.read_bytes()).hexdigest() == index.sha256
    assert left_in(target.parent) == ["m.gguf"]


def fail(index: Index, target: Path) -> tuple[str, str]:
    with pytest.raises(GgufloopError) as e:
        wheels.fetch(index.parts[:1], target, index.parts[0].sha256)
    assert left_in(target.parent) == []
    assert e.value.hint
    return e.value.message, e.value.hint


def test_downloads_that_fail(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "models" / "m.gguf"
    sha256 = index.parts[0].sha256
    index.put("part-one", b"something else")
    assert fail(index, target) == (
        f"part-one/data.bin of part-one==1.0 is not what was asked for: its sha256 is not {sha256}.",
        "nothing was kept; run it again, and check the package index if it happens twice.",
    )
    index.path("part-one").write_bytes(b"no zip")
    assert fail(index, target)[0].startswith("cannot download part-one==1.0: ")
    index.path("part-one").unlink()
    assert fail(index, target)[0] == "cannot download part-one==1.0: No matching distribution found for part-one==1.0."
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert fail(index, target)[0] == "cannot download part-one==1.0: the package index cannot be reached."


def test_a_full_disk(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", replace)
    target = tmp_path / "models" / "m.gguf"
    with pytest.raises(GgufloopError) as e:
        wheels.fetch(index.parts, target, index.sha256)
    assert e.value.message == f"the disk is full: cannot write {target}."
    assert not target.exists()


def test_atomic_path(tmp_path: Path) -> None:
    target = tmp_path / "new" / "f"

    def fail_halfway() -> None:
        with files.atomic_path(target) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_halfway()
    assert list(target.parent.iterdir()) == []
    with files.atomic_path(target) as partial:
        partial.write_text("whole")
        assert not target.exists()
    assert target.read_text() == "whole"
    (tmp_path / "file").write_text("")
    inside = files.atomic_path(tmp_path / "file" / "f")
    with pytest.raises(GgufloopError, match=r"^cannot write .*file/f: File exists\.$"):
        inside.__enter__()


def test_sha256_is_computed_again_when_a_file_changes(tmp_path: Path, own_cache: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a")
    assert files.recall(path) is None
    first = files.file_sha256(path)
    assert files.recall(path) == first == hashlib.sha256(b"a").hexdigest()
    path.write_bytes(b"ab")
    assert files.recall(path) is None
    (own_cache / "sha256.json").write_text("{damaged")
    assert files.file_sha256(path) == hashlib.sha256(b"ab").hexdigest()


@pytest.mark.model
def test_the_real_wheels(smollm2: Path, gemma: Path) -> None:
    for path in (smollm2, gemma):
        model = registry.entry_for(path)
        assert hashlib.sha256(path.read_bytes()).hexdigest() == model.sha256
        assert registry.downloaded(model) == path
        check_model_file(path)
