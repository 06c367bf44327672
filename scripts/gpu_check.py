#!/usr/bin/env python3
"""Check the loop on a GPU: one command, some minutes, no network; a table on stdout and, with --json, a file of it.

    python scripts/gpu_check.py --json table.json               # the library ggufloop uses, the device it chooses
    python scripts/gpu_check.py --lib DIR --device CUDA0        # a library that was built elsewhere
    python scripts/gpu_check.py --size tiny --only repeated     # a small model for the speeds; some checks

It makes all its models: tiny random ones in the families of tests/support/tiny.py, and one in the shape of an 8B model
(4.5 GB, in --folder). Each check runs in a process of its own, so that one that crashes or hangs is a row. What
does not fit into --budget is listed. Status 1 if a row failed, 3 if nothing could be checked.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from gpu_checks.device import Row  # noqa: E402  # found once the path is set

from ggufloop.backend import library as backend  # noqa: E402  # found once the path is set
from ggufloop.backend import probe  # noqa: E402  # found once the path is set
from ggufloop.errors import GgufloopError  # noqa: E402  # found once the path is set

UNFUSED = {"GGML_CUDA_DISABLE_FUSION": "1", "GGML_VK_DISABLE_FUSION": "1", "GGML_METAL_FUSION_DISABLE": "1"}


@dataclass(frozen=True)
class Check:
    """A function of gpu_checks, its own environment, and the seconds after which it is given up."""

    name: str
    function: str
    seconds: float
    case: str = ""
    env: dict[str, str] = field(default_factory=dict)
    sized: bool = False  # whether it takes --size


CHECKS = [
    Check("window K/V", "numbers.window_kv", 60),
    Check("window K/V unfused", "numbers.window_kv", 60, ", unfused", UNFUSED),
    Check("repeated", "numbers.repeated", 60),
    Check("repeated unfused", "numbers.repeated", 60, ", unfused", UNFUSED),
    Check("recurrent", "numbers.recurrent", 60),
    Check("experts", "numbers.experts", 60),
    Check("families", "numbers.families", 120),
    Check("splits", "cost.splits", 60),
    Check("speed", "cost.layers", 240, sized=True),
    Check("compute buffers", "cost.memory", 120, sized=True),
    Check("CUDA graphs", "cost.graphs", 60, ", with graphs", sized=True),
    Check("CUDA graphs off", "cost.graphs", 60, ", without", {"GGML_CUDA_DISABLE_GRAPHS": "1"}, sized=True),
]


def run(check: Check, folder: Path, size: str, seconds: float) -> list[Row]:
    """The rows of a check, one more if its process does not end well."""
    words = [sys.executable, __file__, "--child", check.function, str(folder), check.case, size if check.sized else ""]
    with tempfile.TemporaryFile() as answers, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, stdout=answers, stderr=log, env={**os.environ, **check.env}, cwd=ROOT)
        ended = ""
        try:
            code = process.wait(seconds)
            if code:
                ended = f"ended with {code}"
        except subprocess.TimeoutExpired:
            ended = f"no end within {seconds:.0f} s"
        finally:
            process.kill()
            process.wait()
        answers.seek(0)
        rows = [Row(**json.loads(line)) for line in answers.read().splitlines()]
        if ended:
            log.seek(0)
            told = [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]
            marked = [line for line in told if "ASSERT" in line or "rror" in line or "free()" in line]
            rows.append(Row(check.name, ended, ok=False, note=(marked or told or [""])[-1].strip()[:200]))
        if not rows:
            rows.append(Row(check.name, "no answer", ok=False))
    return rows


def child(function: str, folder: str, case: str, size: str) -> None:
    """One check, in its own process."""
    from gpu_checks import device

    device.keep_stdout()
    module, name = function.split(".")
    checks = getattr(__import__(f"gpu_checks.{module}"), module)
    getattr(checks, name)(Path(folder), case, *([size] if size else []))


def show(row: Row) -> None:
    """One line of the table."""
    mark = {True: "ok", False: "FAILED", None: ""}[row.ok]
    value = "" if row.value is None else f"{row.value:.3g}" if row.bound is not None else f"{row.value:.2f}"
    figure = value + (f" <= {row.bound:.2g}" if row.bound is not None else "") + (f" {row.unit}" if row.unit else "")
    print(f"{row.check:16} {row.case:58} {figure:22} {mark:6} {row.note}".rstrip(), flush=True)


def devices(args: argparse.Namespace) -> tuple[str, str]:
    """The library's folder and the names of its devices. Raises GgufloopError if there is nothing to check."""
    if args.lib:
        os.environ["GGUFLOOP_LIB_DIR"] = str(args.lib.absolute())
    directory = backend.locate().directory
    found = probe.probe(directory)
    if found.patch_id != backend.patch_id():
        raise GgufloopError(
            f"the library in {directory} carries patch {found.patch_id}, this checkout is {backend.patch_id()}.",
            "run: ggufloop build",
        )
    names = [f"{d.name} ({d.description})" for d in found.devices]
    others = [d for d in found.devices if d.name != "CPU"]
    if not others and args.device != "none" and not args.preload:
        raise GgufloopError(
            f"the library in {directory} sees no GPU, only: {', '.join(names) or 'nothing'}.",
            "build one for the GPU (ggufloop build --backend cuda), or rehearse on the CPU with --device none.",
        )
    return directory.name, ", ".join(names)


def main() -> int:
    """Run the checks; an exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lib", type=Path, help="folder of a built library (default: the one ggufloop uses)")
    parser.add_argument("--device", help="such as CUDA0; none: the CPU (default: what llama.cpp chooses)")
    parser.add_argument(
        "--preload", metavar="FILE:FUNCTION", help="a shared object with a device, and what registers it"
    )
    parser.add_argument("--size", choices=("tiny", "8b"), default="8b", help="model of the speeds (default 8b)")
    parser.add_argument("--budget", type=float, default=480, help="seconds for everything (default 480)")
    parser.add_argument("--limit", type=float, help="seconds for one check (default: its own, for a GPU)")
    parser.add_argument("--only", action="append", default=[], help="checks whose name begins so; may be repeated")
    parser.add_argument("--folder", type=Path, help="where models go and stay (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    args = parser.parse_args()
    unknown = [word for word in args.only if not any(check.name.startswith(word) for check in CHECKS)]
    if unknown:
        parser.error(f"no check begins with {unknown[0]!r}: {', '.join(check.name for check in CHECKS)}")
    start = time.monotonic()
    try:
        library, found = devices(args)
    except GgufloopError as e:
        print(f"gpu_check: {e.message}\n  {e.hint}", file=sys.stderr)
        return 3
    for variable, value in (("GPU_CHECK_DEVICE", args.device), ("GPU_CHECK_PRELOAD", args.preload)):
        if value:
            os.environ[variable] = value
    print(f"{library}: {found}", flush=True)

    rows: list[Row] = []
    left_out: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for check in CHECKS:
            if args.only and not any(check.name.startswith(word) for word in args.only):
                continue
            left = args.budget - (time.monotonic() - start)
            if left < 5:
                left_out.append(check.name)
                continue
            for row in run(check, folder, args.size, min(args.limit or check.seconds, left)):
                rows.append(row)
                show(row)
    failed = sum(row.ok is False for row in rows)
    seconds = time.monotonic() - start
    for name in left_out:
        print(f"{name:16} left out: the budget of {args.budget:.0f} s is spent")
    print(f"{len(rows)} rows, {failed} failed, {seconds:.0f} s", flush=True)
    if args.json:
        told = {
            "library": library, "devices": found, "patch": backend.patch_id(), "size": args.size,
            "seconds": round(seconds), "rows": [asdict(row) for row in rows], "left_out": left_out,
        }  # fmt: skip
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 1 if failed or (not rows and left_out) else 0 if rows else 3


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:])
        sys.exit(0)
    sys.exit(main())
