"""Addresses of Hugging Face, which file of a repository they mean, and `pull` against a stand-in for the hub.

The stand-in is a server on 127.0.0.1, met by the command in its own process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import tiny
from support.hub_server import COMMIT, OTHER, HubServer

from ggufloop.errors import UsageError
from ggufloop.models import hubfiles, registry
from ggufloop.models.hubfiles import HubFile, Reference

# which file


@pytest.mark.parametrize(
    ("files", "found"),
    [
        (["a-Q4_K_M.gguf", "a-q8_0.gguf", "README.md"], {"Q4_K_M": "a-Q4_K_M.gguf", "Q8_0": "a-q8_0.gguf"}),
        (["m-fp16.gguf"], {"F16": "m-fp16.gguf"}),
        (["m-Q8_0.gguf", "m-draft-Q4_0.gguf", "m-assistant-Q4_0.gguf", "draft/x-Q4_1.gguf"], {"Q8_0": "m-Q8_0.gguf"}),
        (["m-draft-Q4_0.gguf"], {"Q4_0": "m-draft-Q4_0.gguf"}),
        (["m-BF16-00002-of-00002.gguf"], {"BF16": "m-BF16-00001-of-00002.gguf"}),
        (["m.Q5_K_S.gguf", "mmproj-m-F16.gguf", "imatrix.gguf"], {"Q5_K_S": "m.Q5_K_S.gguf"}),
        (["m-BF16-00002-of-00002.gguf", "m-BF16-00001-of-00002.gguf"], {"BF16": "m-BF16-00001-of-00002.gguf"}),
        (["UD-IQ1_S/m-00001-of-00003.gguf"], {"UD-IQ1_S": "UD-IQ1_S/m-00001-of-00003.gguf"}),
        (["m-UD-Q4_K_XL.gguf"], {"UD-Q4_K_XL": "m-UD-Q4_K_XL.gguf"}),
        (["m-MXFP4_MOE.gguf"], {"MXFP4_MOE": "m-MXFP4_MOE.gguf"}),
        (["model.gguf"], {"model": "model.gguf"}),
    ],
)  # fmt: skip
def test_models_of_a_repository(files: list[str], found: dict[str, str]) -> None:
    models = hubfiles.models_in(HubFile(f, None) for f in files)
    assert models == {label: [path] for label, path in found.items()}


@pytest.mark.parametrize(
    ("labels", "quant", "chosen"),
    [
        ("Q8_0 Q4_K_M F16", None, "Q4_K_M"),
        ("Q8_0 Q4_K_M F16", "q8_0", "Q8_0"),
        ("Q8_0 Q4_K_M F16", "fp16", "F16"),
        ("Q8_0 fp16", "f16", "fp16"),
        ("UD-Q4_K_XL Q8_0", "ud-q4_k_xl", "UD-Q4_K_XL"),
        ("BF16 Q8_0 Q2_K", None, "Q2_K"),
        ("F16 Q8_0 IQ4_XS Q4_K_S", None, "Q4_K_S"),
    ],
)
def test_choice_of_a_quantisation(labels: str, quant: str | None, chosen: str) -> None:
    files = [HubFile(f"m-{label}.gguf", None) for label in labels.split()]
    assert hubfiles.choose(files, quant) == f"m-{chosen}.gguf"


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("user/Repo-GGUF", Reference("user/Repo-GGUF")),
        ("user/repo:Q8_0", Reference("user/repo", "Q8_0")),
        ("hf.co/user/repo:Q8_0", Reference("user/repo", "Q8_0")),
        ("huggingface.co/user/repo", Reference("user/repo")),
        ("HTTPS://HuggingFace.co/user/repo/", Reference("user/repo")),
        ("hf://user/repo:fp16", Reference("user/repo", "fp16")),
        ("user/repo/m-Q4_0.gguf", Reference("user/repo", None, "m-Q4_0.gguf")),
        ("hf.co/user/repo/sub/m.GGUF", Reference("user/repo", None, "sub/m.GGUF")),
        ("https://huggingface.co/user/repo/blob/main/a/m%20x.gguf", Reference("user/repo", None, "a/m x.gguf")),
        ("https://hf.co/user/repo/resolve/main/m.gguf?download=true", Reference("user/repo", None, "m.gguf")),
        ("https://huggingface.co/user/repo/resolve/v2/m.gguf", Reference("user/repo", None, "m.gguf", "v2")),
        ("https://huggingface.co/user/repo/tree/v2/sub", Reference("user/repo", None, None, "v2")),
        ("https://huggingface.co/user/repo/tree/main", Reference("user/repo")),
        ("http://127.0.0.1:9/user/repo", Reference("user/repo")),  # what HF_ENDPOINT says
        *((text, None) for text in ("name", "./a", "/a/b", "a/b/c", "../a/b.gguf",
                                    "hf.co/user", "user/", "user/repo/README.md")),
    ],
)  # fmt: skip
def test_addresses(text: str, found: Reference | None) -> None:
    assert hubfiles.parse(text, "http://127.0.0.1:9") == found


def test_an_address_of_another_host(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as e:
        registry.resolve("https://example.org/user/repo/m.gguf")
    assert e.value.message == "https://example.org/user/repo/m.gguf is no address of Hugging Face."


def test_an_address_without_a_repository() -> None:
    with pytest.raises(UsageError, match=r"https://huggingface\.co/user names no repository"):
        registry.resolve("https://huggingface.co/user")


def test_parts_of_a_split_file() -> None:
    assert hubfiles.part_paths("a/m-Q4_0-00001-of-00003.gguf") == [f"a/m-Q4_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert hubfiles.part_paths("a-00002-of-00002.gguf") == ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"]
    assert hubfiles.part_paths("a/m-Q4_0.gguf") == ["a/m-Q4_0.gguf"]


class Hub:
    """A hub to run `ggufloop pull` against, and what that printed."""

    def __init__(self, server: HubServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.code, self.out, self.err = 0, "", ""

    def pull(self, *args: str, **env: str) -> str:
        """Exit code 0: the path below the snapshot; else the two lines of the error."""
        self.server.requests.clear()
        env = {
            **os.environ, "HF_ENDPOINT": self.server.url, "HF_HOME": str(self.folder / "hf"), "HF_TOKEN": "",
            "GGUFLOOP_CACHE": str(self.folder / "cache"), **env,
        }  # fmt: skip
        program = "from ggufloop.cli import main; main()"
        run = subprocess.run([sys.executable, "-c", program, "pull", *args], capture_output=True, text=True, env=env)
        self.code, self.out, self.err = run.returncode, run.stdout, run.stderr
        assert "Traceback" not in run.stderr
        return self.out.partition(f"snapshots/{COMMIT}/")[2].strip() if self.code == 0 else run.stderr

    def asked(self) -> list[str]:
        """Requests about repositories (newer huggingface-hubs ask about themselves too)."""
        return [r.partition("/resolve/main")[2] for r in self.server.requests if "/resolve/" in r and r[:3] == "GET"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny.write(tmp_path_factory.mktemp("hub") / "m.gguf", tiny.FAMILIES["qwen3"]).read_bytes()


@pytest.fixture
def a_hub(tmp_path: Path, weights: bytes) -> Iterator[Hub]:
    repos = {
        "user/Tiny-GGUF": {"README.md": b"x", "Tiny-Q4_K_M.gguf": weights, "Tiny-Q8_0.gguf": weights + bytes(32)},
        "user/Only-GGUF": {"Only-F16.gguf": weights},
        "user/Two-GGUF": {"Two-F16.gguf": weights, "Two-Q8_0.gguf": weights},
        "Qwen/Qwen3-4B-GGUF": {"Qwen3-4B-Q4_K_M.gguf": weights},
    }
    with HubServer(repos, gated=("user/Gated-GGUF",)) as server:
        yield Hub(server, tmp_path)


def test_pull_chooses_downloads_once_and_works_offline(a_hub: Hub) -> None:
    assert a_hub.pull("user/Tiny-GGUF") == "Tiny-Q4_K_M.gguf"
    assert a_hub.asked() == ["/Tiny-Q4_K_M.gguf"]
    assert a_hub.err.splitlines() == [
        "downloading Tiny-Q4_K_M.gguf, 1 MiB", "checking Tiny-Q4_K_M.gguf"
    ]  # fmt: skip
    assert a_hub.pull("-hf", "user/Tiny-GGUF:q8_0") == "Tiny-Q8_0.gguf"
    assert a_hub.pull("user/Tiny-GGUF") == "Tiny-Q4_K_M.gguf"
    assert a_hub.asked() == []
    assert a_hub.pull("user/Two-GGUF") == "Two-Q8_0.gguf"
    assert a_hub.err.splitlines()[0] == "user/Two-GGUF has no Q4_K_M; taking Q8_0 of F16, Q8_0"
    assert a_hub.pull("user/Only-GGUF") == "Only-F16.gguf"

    assert a_hub.pull("user/Tiny-GGUF", "--offline") == "Tiny-Q4_K_M.gguf"
    assert a_hub.server.requests == []
    assert a_hub.pull("user/Tiny-GGUF:Q8_0", HF_HUB_OFFLINE="1") == "Tiny-Q8_0.gguf"
    assert a_hub.server.requests == []
    assert a_hub.pull("user/Tiny-GGUF", HF_ENDPOINT="http://127.0.0.1:9") == "Tiny-Q4_K_M.gguf"
    assert a_hub.err == "the hub cannot be reached; using what is downloaded of user/Tiny-GGUF\n"


def test_pull_a_known_name(a_hub: Hub) -> None:
    assert a_hub.pull("qwen3-4b") == "Qwen3-4B-Q4_K_M.gguf"
    assert a_hub.pull("Qwen3-4B") == "Qwen3-4B-Q4_K_M.gguf"
    assert a_hub.server.requests == []  # it is there, so nobody is asked


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (
            ["user/Tiny-GGUF:Q4_K_X"],
            "error: cannot use user/Tiny-GGUF: it has no Q4_K_X.\n  did you mean Q4_K_M? It has: Q4_K_M, Q8_0.\n",
        ),
        (
            ["Qwen/Qwen3-4B-GUFF"],
            "error: Hugging Face has no repository Qwen/Qwen3-4B-GUFF, or it is private.\n"
            "  did you mean Qwen/Qwen3-4B-GGUF?\n",
        ),
        (
            ["user/nothing-like-it"],
            "error: Hugging Face has no repository user/nothing-like-it, or it is private.\n"
            "  check its name; for a private one set HF_TOKEN.\n",
        ),
        (
            ["user/Gated-GGUF"],
            "error: Hugging Face repository user/Gated-GGUF is gated.\n"
            "  accept the licence at {url}/user/Gated-GGUF, then set HF_TOKEN to your access token.\n",
        ),
        (
            ["user/Tiny-GGUF", "--offline"],
            "error: user/Tiny-GGUF is not downloaded, and downloads are off.\n"
            "  run it once without --offline and HF_HUB_OFFLINE.\n",
        ),
    ],
)
def test_pull_that_cannot_work(a_hub: Hub, args: list[str], error: str) -> None:
    assert a_hub.pull(*args) == error.format(url=a_hub.server.url)
    assert (a_hub.code, a_hub.out) == (1, "")


def test_a_broken_connection_goes_on_where_it_stopped(a_hub: Hub, weights: bytes) -> None:
    big = weights + bytes(24 << 20)  # huggingface-hub keeps what it has in steps of 10 MiB
    a_hub.server.repos["user/Big-GGUF"] = {"Big-Q4_K_M.gguf": big}
    a_hub.server.broken = 1
    assert a_hub.pull("user/Big-GGUF") == "Big-Q4_K_M.gguf"
    assert [r.partition("bytes=")[2] for r in a_hub.server.requests if r.startswith("GET /user/Big")] == [
        "",
        "10485760-",
    ]
    assert Path(a_hub.out.strip()).read_bytes() == big


def test_a_damaged_download_is_not_kept(a_hub: Hub) -> None:
    a_hub.server.lie = True
    error = a_hub.pull("user/Tiny-GGUF")
    assert error.splitlines()[-2:] == [
        f"error: Tiny-Q4_K_M.gguf of user/Tiny-GGUF was damaged on the way: its sha256 is not {'0' * 64}.",
        "  it was deleted; run it again.",
    ]
    assert [p for p in (a_hub.folder / "hf").rglob("*") if p.is_file() and p.stat().st_size > 1000] == []


def test_split_files_are_fetched_whole(a_hub: Hub) -> None:
    parts = {f"Split-Q4_K_M-0000{i}-of-00003.gguf": b"GGUF" + bytes(i) for i in (1, 2, 3)}
    a_hub.server.repos["user/Split-GGUF"] = parts
    assert a_hub.pull("user/Split-GGUF") .endswith("its header is incomplete after 5 bytes.\n"
        "  it was damaged on the way or on disk: download or copy it again.\n")  # fmt: skip
    assert a_hub.asked() == [f"/{name}" for name in parts]


def test_several_that_could_be_meant(a_hub: Hub, weights: bytes) -> None:
    """None is taken by its place in the alphabet, and -hff gets each."""
    files = [
        "A-Q4_K_M.gguf",
        "sub/B-Q4_K_M.gguf",
        "A-draft-Q4_0.gguf",
        "mmproj-A-F16.gguf",
        "A-Q8_0.gguf",
        "imatrix.gguf",
    ]
    a_hub.server.repos["user/Many-GGUF"] = {name: weights + name.encode() for name in files}
    for words in (["user/Many-GGUF"], ["-hf", "user/Many-GGUF:q4_k_m"], ["hf.co/user/Many-GGUF:Q4_K_M"]):
        assert a_hub.pull(*words) == (
            "error: cannot use user/Many-GGUF: it has 2 models of Q4_K_M: A-Q4_K_M.gguf, sub/B-Q4_K_M.gguf.\n"
            "  say which with -hff FILE.\n"
        )
        assert (a_hub.code, a_hub.asked()) == (1, [])
    for file, found in (("A-Q4_K_M.gguf", files[0]), ("B-Q4_K_M.gguf", files[1]), (files[1], files[1]),
                        (files[2], files[2])):  # fmt: skip
        assert a_hub.pull("-hf", "user/Many-GGUF", "-hff", file) == found
        assert a_hub.asked() == [f"/{found}"] or file == files[1]
    assert a_hub.pull("user/Many-GGUF:Q2_K", "--hf-file", files[1]) == files[1]  # as llama.cpp: the file counts
    assert a_hub.pull("user/Many-GGUF:Q8_0") == "A-Q8_0.gguf"
    assert a_hub.pull("user/Many-GGUF:Q4_0").startswith("error: cannot use user/Many-GGUF: it has no Q4_0.\n")


@pytest.mark.parametrize(
    ("args", "error"),
    [
        (["user/Tiny-GGUF", "-hff", "Tiny-Q8.gguf"],
         "error: cannot use user/Tiny-GGUF: it has no file Tiny-Q8.gguf.\n"
         "  did you mean Tiny-Q8_0.gguf? It has: Tiny-Q4_K_M.gguf, Tiny-Q8_0.gguf.\n"),
        (["user/Tiny-GGUF", "-hff", "README.md"],
         "error: cannot use user/Tiny-GGUF: README.md is no GGUF file.\n  it has: Tiny-Q4_K_M.gguf, Tiny-Q8_0.gguf.\n"),
        (["smollm2-135m", "-hff", "x.gguf"],
         "error: 'smollm2-135m' is not of the form user/repo[:quant], and -hff names a file of one.\n"
         "  write it like Qwen/Qwen3-4B-GGUF:Q4_K_M.\n"),
        (["-hff", "x.gguf"],
         "error: no model is given.\n  name one: a GGUF file, a name of `ggufloop list`, or user/repo[:quant].\n"),
        (["{url}/user/Tiny-GGUF/resolve/v3/Tiny-Q8_0.gguf"],
         "error: Hugging Face has no repository user/Tiny-GGUF, or it is private.\n"
         "  check its name; for a private one set HF_TOKEN.\n"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_had(a_hub: Hub, args: list[str], error: str) -> None:
    assert a_hub.pull(*(arg.format(url=a_hub.server.url) for arg in args)) == error


def test_addresses_are_pulled(a_hub: Hub, weights: bytes) -> None:
    a_hub.server.repos["user/Tiny-GGUF@v2"] = {"Tiny-Q8_0.gguf": weights + bytes(64)}
    for text in ("hf.co/user/Tiny-GGUF:q8_0", "user/Tiny-GGUF/Tiny-Q8_0.gguf",
                 f"{a_hub.server.url}/user/Tiny-GGUF/blob/main/Tiny-Q8_0.gguf"):  # fmt: skip
        assert a_hub.pull(text) == "Tiny-Q8_0.gguf"
        assert Path(a_hub.out.strip()).stat().st_size == len(weights) + 32
    assert a_hub.pull("https://huggingface.co/user/Only-GGUF:fp16") == "Only-F16.gguf"
    assert a_hub.pull(f"{a_hub.server.url}/user/Tiny-GGUF/resolve/v2/Tiny-Q8_0.gguf") == ""
    assert f"/{OTHER}/" in a_hub.out
    assert "/user/Tiny-GGUF/resolve/v2/" in "".join(a_hub.server.requests)
    assert Path(a_hub.out.strip()).stat().st_size == len(weights) + 64


def test_a_path_that_exists_wins(a_hub: Hub, weights: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hf.co/user/repo").mkdir(parents=True)
    (tmp_path / "user/Tiny-GGUF").mkdir(parents=True)
    for text in ("hf.co/user/repo/m.gguf", "user/Tiny-GGUF/Tiny-Q8_0.gguf", "user/Tiny-GGUF:Q8_0"):
        Path(text).write_bytes(weights)
        assert a_hub.pull(text) == ""
        assert a_hub.out == f"{text}\n"
        assert a_hub.server.requests == []
    error = "error: model file user/Tiny-GGUF/other.gguf does not exist."  # its folder is here, so a file is meant
    assert a_hub.pull("user/Tiny-GGUF/other.gguf").startswith(error)


def test_an_incomplete_split_is_refused_before_the_download(a_hub: Hub, weights: bytes) -> None:
    parts = [f"Split-Q4_K_M-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    for missing, named in ((0, "1 of them is not there: " + parts[0]), (2, "1 of them is not there: " + parts[2])):
        a_hub.server.repos["user/Split-GGUF"] = {name: weights for i, name in enumerate(parts) if i != missing}
        for more in ([], ["-hff", parts[1]]):
            assert a_hub.pull("user/Split-GGUF", *more) == (
                f"error: cannot use user/Split-GGUF: {parts[0]} is one of 3 parts, and {named}.\n"
                "  choose another quantisation, or another repository.\n"
            )
            assert a_hub.asked() == []


def test_every_command_with_hf_takes_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    import click

    from ggufloop.cli import cli

    ctx = click.Context(cli)
    with_hf = []
    for name in cli.list_commands(ctx):
        command = cli.get_command(ctx, name)
        assert command is not None
        flags = {opt for param in command.params for opt in param.opts}
        if "-hf" in flags:
            with_hf.append(name)
            assert {"-hff", "--hf-file"} <= flags, name
    assert len(with_hf) > 10
