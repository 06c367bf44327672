"""The results folder as the page gets it: what is listed, and what is put into the folder llama-server answers from."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from support.studies import written

from ggufloop.errors import GgufloopError
from ggufloop.server import results, serve
from ggufloop.server.serve import Site


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


def offered(site: Site) -> dict[str, str]:
    """What the site has of the results: name -> content."""
    return {
        str(path.relative_to(site.folder / "results")): path.read_text()
        for path in (site.folder / "results").rglob("*")
        if not path.is_dir()
    }


def listed(site: Site) -> list[str]:
    return sorted(result["name"] for result in json.loads((site.folder / "results.json").read_text())["results"])


# the list


def test_the_list_holds_what_can_be_shown(folder: Path) -> None:
    found = results.list_results(folder)
    assert sorted(r.name for r in found) == ["a/b/three.PNG", "a/two.jsonl", "one.md"]
    assert found[-1] == results.ResultFile("one.md", "md", 6, 1.0)  # the oldest comes last
    assert results.listing(folder)["folder"] == "results"
    assert results.listing(folder)["results"][-1] == {
        "name": "one.md", "kind": "md", "size": 6, "modified": 1.0, "headline": "",
    }  # fmt: skip
    assert results.listing(None) == {"folder": None, "results": []}


def test_what_is_too_large_or_gone_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "MOST_BYTES", 6)
    assert [r.name for r in results.list_results(folder)] == ["one.md"]
    monkeypatch.setattr(results, "MOST_FILES", 0)
    assert results.list_results(folder) == []
    assert results.list_results(folder / "nowhere") == []


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


def test_a_result_is_listed_with_what_it_says(tmp_path: Path) -> None:
    """What a sweep printed last, a study's first sentence; nothing of a file that is broken or of something else."""
    sweep = tmp_path / "m" / "sweep.jsonl"
    written(tmp_path / "m" / "study.jsonl")
    lines = [{"measures": []}, {"said": "a", "words": "first"}, {"said": "a", "words": "last"}]
    sweep.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "broken.jsonl").write_text('{"source_sha256": 1}\n[')
    (tmp_path / "other.jsonl").write_text("[1]\n")
    (tmp_path / "a").mkdir()
    answer = "It helps m.Q4 on t. `1:2 k=2` gains 0.1."
    (tmp_path / "a" / "answer.md").write_text(f"# Does it?\n\n{answer} It costs.\n\n## More\n")

    def told() -> dict[str, str]:
        return {result["name"]: result["headline"] for result in results.listing(tmp_path)["results"]}

    assert told() == {
        "a/answer.md": answer.replace("`", ""),
        "m/study.jsonl": "Looping helps in 2 of 4 cells, most F32 under 2:5 k=2, by +0.1000 [+0.1000, +0.1000] nats "
        "per token.",
        "m/sweep.jsonl": "Last", "broken.jsonl": "", "other.jsonl": "",
    }  # fmt: skip
    with sweep.open("a") as file:
        file.write(json.dumps({"said": "b", "words": "more"}) + "\n")
    assert told()["m/sweep.jsonl"] == "A: last b: more"  # it has changed, and is read again


# the site


def refuse_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*paths: object, **how: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", link)


@pytest.mark.parametrize("linked", [True, False], ids=["links", "copies"])
def test_the_site_has_the_page_and_the_results(folder: Path, linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linked:
        refuse_links(monkeypatch)
    (folder / "Report.HTML").write_text("<script>")
    with Site(folder) as site:
        files = [path for path in (*serve.PAGE.iterdir(), *serve.VENDORED.glob("*.js")) if path.is_file()]
        assert {path.name for path in files} <= {path.name for path in site.folder.iterdir()}
        names = ["Report.HTML.txt", "a/b/three.PNG", "a/two.jsonl", "one.md"]  # a report is no page there
        assert sorted(offered(site)) == names
        assert not any(path.is_symlink() for path in site.folder.rglob("*"))  # llama-server follows none
        assert listed(site) == ["Report.HTML", *names[1:]]
        kept = site.folder
        assert kept.stat().st_mode & 0o077 == 0  # nobody else's
    assert not kept.exists()
    assert (folder / "one.md").read_text() == "one.md"


@pytest.mark.parametrize("linked", [True, False], ids=["links", "copies"])
def test_the_site_follows_the_folder(folder: Path, linked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not linked:
        refuse_links(monkeypatch)
    with Site(folder) as site:
        with (folder / "one.md").open("a") as file:  # it grows
            file.write(" and more")
        (folder / "new.csv").write_text("a,b")
        partial = folder / "partial"
        partial.write_text("another file of that name")  # as a writer replaces it whole
        os.replace(partial, folder / "a" / "two.jsonl")
        site.refresh()
        assert offered(site)["one.md"] == "one.md and more"
        assert offered(site)["new.csv"] == "a,b"
        assert offered(site)["a/two.jsonl"] == "another file of that name"
        (folder / "one.md").unlink()
        (folder / "one.md").symlink_to(folder.parent / "secret.md")
        (folder / "new.csv").unlink()
        site.refresh()
        assert sorted(offered(site)) == ["a/b/three.PNG", "a/two.jsonl"] == listed(site)
        shutil.rmtree(folder)
        site.refresh()
        assert offered(site) == {}
        assert listed(site) == []


def test_copies_have_a_limit_and_a_full_disk_is_survived(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch)
    monkeypatch.setattr(serve, "MOST_COPIED", 20)
    os.utime(folder / "a" / "two.jsonl", (9, 9))
    with Site(folder) as site:  # the newest come first
        assert listed(site) == ["a/b/three.PNG", "one.md"] == sorted(offered(site))

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        site.refresh()
        monkeypatch.undo()
        assert listed(site) == ["a/b/three.PNG", "one.md"]


def test_a_file_that_becomes_a_link_after_it_was_listed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = results.listing(folder)
    (folder / "one.md").unlink()
    (folder / "one.md").symlink_to(folder.parent / "secret.md")
    monkeypatch.setattr(serve, "listing", lambda _: json.loads(json.dumps(found)))
    for copies in (False, True):
        if copies:
            refuse_links(monkeypatch)
        with Site(folder) as site:
            assert "one.md" not in offered(site)
            assert "one.md" not in listed(site)


def test_a_site_without_results(tmp_path: Path) -> None:
    with Site(None) as site:
        assert json.loads((site.folder / "results.json").read_text()) == {"folder": None, "results": []}
