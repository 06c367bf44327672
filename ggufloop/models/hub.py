"""Files from Hugging Face repositories, models above all, through huggingface-hub and into its own cache.

    path = fetch(Reference("Qwen/Qwen3-4B-GGUF", quant="Q4_K_M"))     # what -hf Qwen/Qwen3-4B-GGUF:Q4_K_M means
    path = fetch(Reference("Qwen/Qwen3-4B-GGUF", file="Qwen3-4B-Q4_K_M.gguf"))

huggingface-hub resumes transfers, knows tokens, mirrors (HF_ENDPOINT), HF_HOME and HF_HUB_OFFLINE; added here are the
choice of a file (hubfiles.py), split files, the check of the sha256 the hub states, and errors in one line.
"""

from __future__ import annotations

import difflib
import errno
import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ggufloop import files
from ggufloop.errors import GgufloopError
from ggufloop.models import elsewhere, hubfiles
from ggufloop.progress import Progress, Step, silent


def endpoint() -> str:
    """The hub's address, which HF_ENDPOINT may change."""
    return os.environ.get("HF_ENDPOINT", "")


def cached(repo: str, file: str) -> Path | None:
    """The file (its first part) if it is in huggingface-hub's cache with all its parts; asks nobody."""
    from huggingface_hub import try_to_load_from_cache

    paths = [try_to_load_from_cache(repo, part) for part in hubfiles.part_paths(file)]
    return Path(paths[0]) if isinstance(paths[0], str) and all(isinstance(p, str) for p in paths) else None


def fetch(
    wanted: hubfiles.Reference, offline: bool = False, progress: Progress = silent, known: Iterable[str] = ()
) -> Path:
    """Download a model of a repository, or find it in the cache, and return its (first) file.

    offline: use the cache only. known: repository names to suggest when this one does not exist. Raises
    GgufloopError: no such repository, gated, no such quantisation or file, several that could be meant, parts
    missing, no network, not cached while offline, disk full, a wrong sha256.
    """
    try:
        with switched_off(offline):
            return _fetch(wanted, offline, progress)
    except GgufloopError:
        raise
    except Exception as e:  # the transport's errors have no base class common to the releases of huggingface-hub
        raise _hub_error(e, wanted.repo, wanted.file, known) from e


def fetch_dataset(repo: str, file: str, offline: bool = False, progress: Progress = silent) -> Path:
    """Download one file of a data set, or find it in the cache. Raises GgufloopError as `fetch`."""
    from huggingface_hub import errors, hf_hub_download

    try:
        with switched_off(offline):
            bar = _bar(file, progress)
            return Path(hf_hub_download(repo, file, repo_type="dataset", local_files_only=offline, tqdm_class=bar))
    except Exception as e:
        if isinstance(e, errors.EntryNotFoundError) and not isinstance(e, errors.LocalEntryNotFoundError):
            raise GgufloopError(f"Hugging Face data set {repo} has no file {file}.", "look it up on the hub.") from e
        raise _hub_error(e, repo, file, ()) from e


@contextmanager
def switched_off(offline: bool) -> Iterator[None]:
    """huggingface-hub's own offline switch: told for single calls only, it still asks the hub about itself."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _fetch(wanted: hubfiles.Reference, offline: bool, progress: Progress) -> Path:
    repo, revision = wanted.repo, wanted.revision
    files, offline = _list(repo, revision, offline, progress)
    what = f"what is downloaded of {repo}" if offline else repo
    try:
        if wanted.file is not None:
            file = hubfiles.find_file(files, wanted.file)
        else:
            file = hubfiles.choose(files, wanted.quant)
            labels, label = list(hubfiles.models_in(files)), hubfiles.label_of(file)
            if wanted.quant is None and label != hubfiles.DEFAULT_QUANT and len(labels) > 1:
                progress(Step(f"{repo} has no {hubfiles.DEFAULT_QUANT}; taking {label} of {', '.join(labels)}"))
    except GgufloopError as e:
        raise GgufloopError(f"cannot use {what}: {e.message}", e.hint) from None
    try:
        hubfiles.check_parts(files, file)
    except GgufloopError as e:
        hint = "run it once without --offline and HF_HUB_OFFLINE." if offline else e.hint
        raise GgufloopError(f"cannot use {what}: {e.message}", hint) from None
    if not offline and (same := _elsewhere(repo, next(f for f in files if f.path == file), revision, progress)):
        return same
    stated = {f.path: f.sha256 for f in files}
    paths = [_download(repo, part, revision, stated.get(part), offline, progress) for part in hubfiles.part_paths(file)]
    return paths[0]


def _elsewhere(repo: str, wanted: hubfiles.HubFile, revision: str | None, progress: Progress) -> Path | None:
    """Another program's file of the very bytes that would be downloaded; None for a model in parts."""
    from huggingface_hub import try_to_load_from_cache

    if wanted.sha256 is None or wanted.bytes is None or len(hubfiles.part_paths(wanted.path)) > 1:
        return None
    if isinstance(try_to_load_from_cache(repo, wanted.path, revision=revision), str):
        return None
    found = elsewhere.holding(wanted.sha256, wanted.bytes)
    if found is None:
        return None
    progress(Step(f"{found.program} has {wanted.path} already; nothing is downloaded"))
    return found.file()


def _list(repo: str, revision: str | None, offline: bool, progress: Progress) -> tuple[list[hubfiles.HubFile], bool]:
    """The repository's files, and whether they are the cache's because there is no other way to know."""
    from huggingface_hub import HfApi, constants, errors

    if offline or constants.HF_HUB_OFFLINE:
        cache = _list_cache(repo, revision)
        if not cache:
            raise _not_downloaded(repo)
        return cache, True
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except errors.HfHubHTTPError as e:
        if e.response is not None and e.response.status_code < 500:
            raise
        failure: Exception = e
    except errors.HFValidationError:
        raise
    except Exception as e:
        failure = e
    else:
        return [
            hubfiles.HubFile(s.rfilename, s.lfs.sha256 if s.lfs else None, s.size) for s in info.siblings or []
        ], False
    if not _list_cache(repo, revision):
        raise failure
    progress(Step(f"the hub cannot be reached; using what is downloaded of {repo}"))
    return _list_cache(repo, revision), True


def _list_cache(repo: str, revision: str | None) -> list[hubfiles.HubFile]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = [r for r in scan_cache_dir().repos if r.repo_id == repo and r.repo_type == "model"]
    except CacheNotFound:
        return []
    kept = [v for r in repos for v in r.revisions]
    if revision is not None:
        kept = [v for v in kept if revision in v.refs or v.commit_hash.startswith(revision)]
    revisions = sorted(kept, key=lambda v: ("main" in v.refs, v.last_modified), reverse=True)
    return [
        hubfiles.HubFile(f.file_path.relative_to(revision.snapshot_path).as_posix(), None)
        for revision in revisions[:1]
        for f in revision.files
    ]


def _download(
    repo: str, file: str, revision: str | None, sha256: str | None, offline: bool, progress: Progress
) -> Path:
    """One file into huggingface-hub's cache, and its sha256 checked the first time."""
    from huggingface_hub import hf_hub_download

    bar = _bar(file, progress)
    path = Path(hf_hub_download(repo, file, revision=revision, local_files_only=offline, tqdm_class=bar))
    if sha256 is not None and files.recall(path) != sha256:
        progress(Step(f"checking {file}"))
        if files.file_sha256(path) != sha256:
            for damaged in (path.resolve(), path):  # the blob and the name of it
                damaged.unlink(missing_ok=True)
            raise GgufloopError(
                f"{file} of {repo} was damaged on the way: its sha256 is not {sha256}.", "it was deleted; run it again."
            )
    return path


def _bar(file: str, progress: Progress) -> Any:
    """A tqdm class, which is what hf_hub_download reports to, that calls `progress` and draws nothing."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": False, "file": io.StringIO()})

        def display(self, *args: Any, **kwargs: Any) -> None:
            if self.total:
                progress(Step(f"downloading {file}", int(self.n), int(self.total), "B"))

    return Bar


def _not_downloaded(what: str) -> GgufloopError:
    return GgufloopError(
        f"{what} is not downloaded, and downloads are off.", "run it once without --offline and HF_HUB_OFFLINE."
    )


def _hub_error(error: Exception, repo: str, file: str | None, known: Iterable[str]) -> GgufloopError:
    from huggingface_hub import constants, errors

    what = f"{file} of {repo}" if file else repo
    if isinstance(error, errors.GatedRepoError):
        return GgufloopError(
            f"Hugging Face repository {repo} is gated.",
            f"accept the licence at {constants.ENDPOINT}/{repo}, then set HF_TOKEN to your access token.",
        )
    if isinstance(error, (errors.RepositoryNotFoundError, errors.HFValidationError)):
        close = difflib.get_close_matches(repo, list(known), n=1)
        return GgufloopError(
            f"Hugging Face has no repository {repo}, or it is private.",
            f"did you mean {close[0]}?" if close else "check its name; for a private one set HF_TOKEN.",
        )
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is None:
        return _not_downloaded(what)
    if isinstance(error, errors.RevisionNotFoundError):
        return GgufloopError(f"Hugging Face repository {repo} has no such revision.", f"try -hf {repo}.")
    if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
        return GgufloopError(f"Hugging Face repository {repo} has no file {file}.", f"try -hf {repo}.")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return GgufloopError(
            f"the disk is full: cannot write {what} to {constants.HF_HUB_CACHE}.",
            "free some space, or set HF_HOME to another folder.",
        )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return GgufloopError(
        f"cannot download {what}: {lines[0].rstrip('.:')}.",
        "check the network and run it again: it goes on where it stopped.",
    )
