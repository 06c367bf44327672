"""llama.cpp's own tests pass against the library that is built: once for each, scripts/llama_tests.py remembers."""

from __future__ import annotations

import subprocess
import sys

from support import ROOT

SCRIPT = ROOT / "scripts" / "llama_tests.py"


def test_llama_cpps_own_tests_pass() -> None:
    """Fails if they do not compile in the patched tree, and if the patch changes what llama.cpp does by itself."""
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    assert done.stdout.count(" ok ") > 10
