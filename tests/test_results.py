"""The results folder: what the page is shown of it, and what can never be reached."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from ggufloop.errors import GgufloopError
from ggufloop.server import results
from ggufloop.server.serve import PAGE, Site


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results with everything around it that must stay out of reach."""
    (tmp_path / "secret.md").write_text("secret")
    folder = tmp_path / "results"
    (folder / "a" / "b" / "c").mkdir(parents=True)
    for name in (
        "one.md",
        "a/two.jsonl",
        "a/b/three.PNG",
        "a/b/c/four.md",
        ".hidden.md",
        "a/.five.json",
        "six.txt",
        "seven",
    ):
        (folder / name).write_text(name)
    (folder / "link.md").symlink_to(tmp_path / "secret.md")
    (folder / "up").symlink_to(tmp_path, target_is_directory=True)
    (folder / "folder.md").mkdir()
    os.mkfifo(folder / "pipe.md")
    os.utime(folder / "one.md", (1, 1))
    return folder


def test_the_list_holds_what_can_be_shown(folder: Path) -> None:
    found = results.list_results(folder)
    assert sorted(r.name for r in found) == ["a/b/three.PNG", "a/two.jsonl", "one.md"]
    assert found[-1] == results.Result("one.md", "md", 6, 1.0)  # the oldest comes last
    assert results.listing(folder)["folder"] == "results"
    assert results.listing(folder)["results"][-1] == {"name": "one.md", "kind": "md", "size": 6, "modified": 1.0}
    assert results.listing(None) == {"folder": None, "results": []}


def test_the_site_holds_the_page_and_what_the_list_has_and_nothing_else(folder: Path) -> None:
    (folder / "report.html").write_text("<script>")
    with Site(folder) as site:
        found = sorted(str(path.relative_to(site.folder)) for path in site.folder.rglob("*") if path.is_file())
        page = sorted(path.name for path in PAGE.iterdir())
        shown = ["a/b/three.PNG", "a/two.jsonl", "index.json", "one.md", "report.html.txt"]
        assert found == sorted([*page, *(f"results/{name}" for name in shown)])
        assert not any(path.is_symlink() for path in site.folder.rglob("*"))
        assert json.loads((site.folder / "results" / "index.json").read_text()) == results.listing(folder)
    assert not site.folder.exists()
    with Site(None) as site:
        assert json.loads((site.folder / "results" / "index.json").read_text()) == {"folder": None, "results": []}


def test_the_site_follows_the_folder(folder: Path) -> None:
    with Site(folder) as site:
        shown = site.folder / "results"
        (folder / "one.md").write_text("one, longer")
        (folder / "a" / "two.jsonl").unlink()
        (folder / "eight.md").write_text("eight")
        site.refresh()
        assert (shown / "one.md").read_text() == "one, longer"
        assert (shown / "eight.md").read_text() == "eight"
        assert not (shown / "a" / "two.jsonl").exists()
        (folder / "one.md").unlink()
        (folder / "one.md").symlink_to(folder.parent / "secret.md")
        site.refresh()
        assert not (shown / "one.md").exists()


def test_what_is_too_large_or_gone_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MOST_BYTES", 6)
    assert [r.name for r in results.list_results(folder)] == ["one.md"]
    monkeypatch.setattr(results, "MOST_FILES", 0)
    assert results.list_results(folder) == []
    assert results.list_results(folder / "nowhere") == []


def test_a_file_that_grows_or_becomes_a_link_after_it_was_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert results.read(folder / "a" / "two.jsonl") == b"a/two.jsonl"
    assert results.read(folder / "link.md") is None
    monkeypatch.setattr(results, "MOST_BYTES", 3)
    assert results.read(folder / "a" / "two.jsonl") is None


def test_a_name_that_is_no_text_is_left_out(folder: Path) -> None:
    try:
        Path(os.fsdecode(os.fsencode(folder) + b"/\xff.md")).write_text("x")
    except OSError:
        pytest.skip("this file system has no such names")
    assert len(results.list_results(folder)) == 3


def test_a_folder_is_checked_at_start(folder: Path) -> None:
    results.check_folder(folder)
    for wrong, reason in (
        (folder / "nowhere", "No such file"),
        (folder / "one.md", "Not a directory"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(GgufloopError, match=f"cannot read the results folder .*{reason}"):
            results.check_folder(wrong)
