"""How much memory is free: Linux hands out what it has not, and ends the process that uses it."""

from __future__ import annotations

import re
from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def free_bytes() -> int | None:
    """Bytes a process can still use without swapping; None where the system does not say."""
    found = re.search(r"MemAvailable:\s*(\d+) kB", MEMINFO.read_text()) if MEMINFO.is_file() else None
    return None if found is None else 1024 * int(found[1])
