"""Lists of windows and numbers on the command line."""

from __future__ import annotations

import pytest

from ggufloop.cli.options import number_ranges
from ggufloop.cli.windows import grid
from ggufloop.errors import UsageError


def test_grid_of_windows() -> None:
    assert grid("8:12:2", "2,4", 30) == "8:10,10:12,8:12,10:14"
    assert grid("26:40", "2:4", 30) == "26:28,27:29,26:29"  # the others do not fit
    assert grid(None, None, 7) == "1:5,2:6"
    for start, width, message in (("40", None, "no window"), ("0", "1", "--start 0"), ("3", "0:2", "--width 0")):
        with pytest.raises(UsageError, match=message):
            grid(start, width, 30)


def test_ranges() -> None:
    assert number_ranges("1,4:10:2", "--K") == [1, 4, 6, 8]
    for text in ("", "1,,2", "a", "1:2:3:4", "2:5:0", "-1", "5:5", "1e3"):
        with pytest.raises(UsageError):
            number_ranges(text, "--K")
