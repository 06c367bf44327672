"""The results folder and the page's files: what a request can reach, and what it cannot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ggufloop.errors import GgufloopError, UsageError
from ggufloop.server import assets, results


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


def test_a_result_is_read_with_headers_that_disarm_it(folder: Path) -> None:
    content, headers = results.read_result(folder, "a/two.jsonl")
    assert content == b"a/two.jsonl"
    assert headers["Content-Type"] == "application/jsonl; charset=utf-8"
    assert headers["Content-Security-Policy"].startswith("sandbox; default-src 'none';")
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert results.read_result(folder, "a/b/three.PNG")[1]["Content-Type"] == "image/png"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.md", "up/secret.md", "a/../one.md", "./one.md", "/one.md", "a//two.jsonl", "link.md", "folder.md",
        "folder.md/", "pipe.md", ".hidden.md", "a/.five.json", "six.txt", "seven", "a/b/c/four.md", "one.md\0", "",
        "ONE.MD", "a\\two.jsonl", "%2e%2e/secret.md", "one.md/", "x" * 5000,
    ],
)  # fmt: skip
def test_nothing_else_is_reached(folder: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"there is no result"):
        results.read_result(folder, name)
    with pytest.raises(UsageError, match=r"there is no result"):
        results.read_result(folder, str(folder / "one.md"))


def test_what_is_too_large_or_gone_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MOST_BYTES", 6)
    assert [r.name for r in results.list_results(folder)] == ["one.md"]
    monkeypatch.setattr(results, "MOST_FILES", 0)
    assert results.list_results(folder) == []
    assert results.list_results(folder / "nowhere") == []


def test_a_file_that_grows_or_becomes_a_link_after_it_was_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = results.list_results(folder)
    monkeypatch.setattr(results, "list_results", lambda _: listed)
    (folder / "one.md").unlink()
    (folder / "one.md").symlink_to(folder.parent / "secret.md")
    with pytest.raises(UsageError):
        results.read_result(folder, "one.md")
    monkeypatch.setattr(results, "MOST_BYTES", 3)
    with pytest.raises(UsageError):
        results.read_result(folder, "a/two.jsonl")


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


def test_the_page_is_made_of_its_own_files_only() -> None:
    names = assets.asset_names()
    assert {"main.js", "style.css", "theme.js", "icon.svg"} <= set(names)
    page = assets.read_asset("")
    assert page is not None
    assert page.headers["Content-Type"] == "text/html; charset=utf-8"
    for name in names:
        asset = assets.read_asset(name)
        assert asset is not None
        assert asset.headers["X-Content-Type-Options"] == "nosniff"
    for name in ("index.html", "../assets.py", "nothing.js", "main.js/", "/main.js"):
        assert assets.read_asset(name) is None
