"""Models in the folders of other programs: found, named, used, told of by the hub's sha256, and left as they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from support.cli import Cli
from support.hub_server import HubServer
from support.own_models import OWN

from ggufloop.cli import cli as commands
from ggufloop.errors import UsageError
from ggufloop.models import elsewhere, registry
from ggufloop.progress import Step

MODEL_LAYER = "application/vnd.ollama.image.model"


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def pulled(ollama: Path, name: str, data: bytes, layer: str = MODEL_LAYER) -> Path:
    """A model as `ollama pull` leaves it."""
    digest = hashlib.sha256(data).hexdigest()
    layers = [{"mediaType": "application/vnd.ollama.image.template", "digest": f"sha256:{'0' * 64}", "size": 1},
              {"mediaType": layer, "digest": f"sha256:{digest}", "size": len(data)}]  # fmt: skip
    put(ollama / "manifests" / name, json.dumps({"schemaVersion": 2, "layers": layers}).encode())
    return put(ollama / "blobs" / f"sha256-{digest}", data)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of this test's own, without the folders that the real environment names."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGINGFACE", "XDG_", "OLLAMA_", "LLAMA_")):
            monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("GGUFLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.platform", "linux")
    return tmp_path / "home"


@pytest.fixture
def full(home: Path, tiny_model: Callable[[str], Path]) -> Path:
    """Every program has something, and something that is none."""
    data = tiny_model("llama").read_bytes()
    ollama = home / ".ollama" / "models"
    pulled(ollama, "registry.ollama.ai/library/qwen2.5/0.5b", data)
    pulled(ollama, "registry.ollama.ai/library/phi/latest", data + b"\0")
    pulled(ollama, "registry.ollama.ai/me/mine/q8", data + b"\0\0")
    pulled(ollama, "hf.co/user/repo/Q4_K_M", data + b"\0\0\0")
    pulled(ollama, "registry.ollama.ai/library/tensors/latest", b"not a GGUF")
    pulled(ollama, "registry.ollama.ai/library/adapter/latest", data + b"\1", "application/vnd.ollama.image.adapter")
    pulled(ollama, "registry.ollama.ai/library/gone/latest", data + b"\2").unlink()
    put(ollama / "manifests/registry.ollama.ai/library/damaged/latest", b"{")
    put(ollama / "manifests/registry.ollama.ai/library/odd/latest", b'{"layers": [1]}')
    studio = home / ".lmstudio" / "models"
    put(studio / "lab/Small-GGUF/Small-1.5B-Q8_0.gguf", data)
    put(studio / "lab/Small-GGUF/mmproj-Small-F16.gguf", data)
    for user in ("a", "b"):
        put(studio / user / "Twin-GGUF/Twin-Q4_0.gguf", data)
    for i in (1, 2):
        put(studio / f"lab/Split-GGUF/Split-Q4_0-0000{i}-of-00002.gguf", data)
    put(studio / "lab/Part-GGUF/Part-Q4_0-00001-of-00002.gguf", data)
    put(home / ".cache/llama.cpp/user_repo_m-Q4_K_M.gguf", data)
    hub = home / ".cache/huggingface/hub/models--user--my--repo"
    put(hub / "snapshots/c0ffee/m-Q4_K_M.gguf", data)
    put(hub / "snapshots/c0ffee/a/one-Q8_0.gguf", data)
    put(hub / "snapshots/c0ffee/b/two-Q8_0.gguf", data)
    put(hub / "snapshots/older/m-Q2_K.gguf", data)
    put(hub / "refs/main", b"c0ffee")
    return home


NAMES = {
    "ollama:hf.co/user/repo:Q4_K_M", "ollama:me/mine:q8", "ollama:phi:latest", "ollama:qwen2.5:0.5b",
    "lmstudio:a/Twin-GGUF/Twin-Q4_0", "lmstudio:b/Twin-GGUF/Twin-Q4_0", "lmstudio:Small-1.5B-Q8_0",
    "lmstudio:Split-Q4_0-00001-of-00002", "llama.cpp:user_repo_m-Q4_K_M", "user/my--repo:Q4_K_M",
    "user/my--repo/a/one-Q8_0.gguf", "user/my--repo/b/two-Q8_0.gguf",
}  # fmt: skip


def test_what_is_found_and_that_its_names_mean_it(full: Path, tiny_model: Callable[[str], Path]) -> None:
    before = contents(full)
    found = {each.name: each for each in elsewhere.found()}
    assert set(found) == NAMES
    data = tiny_model("llama").read_bytes()
    assert found["lmstudio:Split-Q4_0-00001-of-00002"].bytes == 2 * len(data)
    for name in NAMES - {name for name in NAMES if name.startswith("user/")}:
        path = registry.resolve(name.upper() if name == "ollama:phi:latest" else name)
        assert path.read_bytes().startswith(data)
        assert path.samefile(found[name].path)
    assert registry.resolve("ollama:phi").name == "phi-latest.gguf", "a name that says what it is, in our cache"
    assert registry.resolve("ollama:phi").is_relative_to(full.parent / "cache")
    assert contents(full) == before


def test_a_link_follows_its_model(home: Path) -> None:
    ollama = home / ".ollama" / "models"
    for data in (b"GGUF1", b"GGUF2"):
        pulled(ollama, "registry.ollama.ai/library/m/latest", data)
        assert registry.resolve("ollama:m").read_bytes() == data


def test_other_folders_are_named_by_the_environment(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pulled(home / "o", "registry.ollama.ai/library/m/1b", b"GGUF")
    put(home / "l" / "x.gguf", b"GGUF")
    put(home / "l" / "models--u--r" / "snapshots/c/m-Q8_0.gguf", b"GGUF")
    assert elsewhere.found() == []
    monkeypatch.setenv("OLLAMA_MODELS", str(home / "o"))
    monkeypatch.setenv("LLAMA_CACHE", str(home / "l"))
    assert [each.name for each in elsewhere.found()] == ["ollama:m:1b", "llama.cpp:x", "llama.cpp:u/r:Q8_0"]
    assert registry.resolve("llama.cpp:u/r:Q8_0").name == "m-Q8_0.gguf"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("ollama:qwen2.5", "Ollama has no model 'qwen2.5' here.", "did you mean ollama:qwen2.5:0.5b? Known: "),
        ("qwen2.5:0.5b", "model 'qwen2.5:0.5b' is neither a file nor a known name.",
         "did you mean ollama:qwen2.5:0.5b?"),
        ("lmstudio:Smal-1.5B-Q8_0", "LM Studio has no model 'Smal-1.5B-Q8_0' here.",
         "did you mean lmstudio:Small-1.5B"),
    ],
)  # fmt: skip
def test_a_name_that_is_not_there(full: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError) as e:
        registry.resolve(text)
    assert e.value.message == message
    assert e.value.hint is not None
    assert e.value.hint.startswith(hint)


def test_a_program_that_is_not_there(home: Path) -> None:
    with pytest.raises(UsageError) as e:
        registry.resolve("ollama:m")
    assert (e.value.message, e.value.hint) == (
        "Ollama has no models here.",
        f"it is looked for in {home}/.ollama/models and /usr/share/ollama/.ollama/models.",
    )


def test_list_and_completion_show_them(full: Path, cli: Cli) -> None:
    code, out, err = cli("list")
    assert (code, err) == (0, "")
    _, _, group = out.partition("\nOther programs have these here; the name is what to type:\n\n")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in group.splitlines()]
    assert rows[0] == ["model", "MiB", "found in"]
    assert {row[0] for row in rows[2:]} == NAMES
    assert ["ollama:phi:latest", "Ollama"] in [[row[0], row[2]] for row in rows]
    records = json.loads(cli("list", "-o", "json").out)
    assert {r["model"] for r in records if r["found in"]} == NAMES
    items = BashComplete(commands, {}, "ggufloop", "_GGUFLOOP_COMPLETE").get_completions(["answer"], "lmstudio:S")
    assert [item.value for item in items if item.type == "plain"] == [
        "lmstudio:Small-1.5B-Q8_0", "lmstudio:Split-Q4_0-00001-of-00002",
    ]  # fmt: skip


def test_without_other_programs_list_has_no_group(home: Path, cli: Cli) -> None:
    assert "Other programs" not in cli("list").out


def test_what_another_program_has_is_not_downloaded(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sha256 that the hub states: a file of the same name and size is not enough."""
    good, bad = b"GGUF" + b"a" * 60, b"GGUF" + b"b" * 60
    put(home / ".lmstudio/models/user/repo/m-Q8_0.gguf", bad)
    with HubServer({"user/repo": {"m-Q4_K_M.gguf": good, "m-Q8_0.gguf": b"GGUF" + b"c" * 60}}) as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(home / "hub"), raising=False)
        blob = pulled(home / ".ollama/models", "registry.ollama.ai/library/m/latest", good)
        steps: list[Step] = []
        path = registry.resolve(None, hf="user/repo:Q4_K_M", progress=steps.append)
        assert path.samefile(blob)
        assert [s.text for s in steps] == ["Ollama has m-Q4_K_M.gguf already; nothing is downloaded"]
        assert not any("/resolve/" in request for request in hub.requests)
        assert elsewhere.holding(hashlib.sha256(b"GGUF" + b"c" * 60).hexdigest(), 64) is None


def test_a_known_model_is_found_by_its_sum(
    home: Path, own_models: Callable[[str], None], tiny_model: Callable[[str], Path]
) -> None:
    data = tiny_model("llama").read_bytes()
    own_models(OWN.replace('window = "3:5"', f'window = "3:5"\nbytes = {len(data)}\n'
                                             f'sha256 = "{hashlib.sha256(data).hexdigest()}"'))  # fmt: skip
    mine = registry.find("mine")
    assert mine is not None
    assert registry.downloaded(mine) is None
    path = put(home / ".lmstudio/models/x/y/other.gguf", data)
    assert registry.downloaded(mine) == path
    assert registry.resolve("mine") == path
