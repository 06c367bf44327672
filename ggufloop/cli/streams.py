"""Standard output and error that may be closed, full, left by their reader, or of an encoding that lacks letters.

    with guarded():
        ...                              # click.echo, print and sys.stdout.write as always

A character the encoding cannot take is written as its escape (U+2019 in latin-1: backslash, u2019), as Python does on
standard error: nothing is lost, and a "?" would pass for the model's own. Undecodable bytes of file names come out as
they were. click writes UTF-8 to a stream that says ASCII; here ASCII is ASCII.

Standard output is what was asked for: where it cannot be written, OutputLost ends the program, past every handler of
errors, and main() says so in a line. Notes on standard error are not worth an answer: they are dropped, the program
goes on, and `errors_lost` tells of it at the end. A standard error that was closed from the start is nobody's loss.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

_HANDLER = "ggufloop.escape"
_ASCII = "ggufloop-ascii"


class OutputLost(SystemExit):
    """Standard output cannot be written. str() is the reason; a SystemExit, so that no `except Exception` takes it."""

    def __init__(self, e: OSError) -> None:
        reasons = {errno.EBADF: "it is closed", errno.EPIPE: "its reader left"}
        self.reason = reasons.get(e.errno or 0, e.strerror or str(e))
        super().__init__(1)


class _Raw(io.RawIOBase):
    """A stream's bytes. Once a write has failed, later ones do nothing, so that nobody trips over it a second time."""

    def __init__(self, raw: Any, is_output: bool) -> None:
        self._raw, self._is_output = raw, is_output
        self._gone = self.lost = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return int(self._raw.fileno())

    def isatty(self) -> bool:
        return bool(self._raw.isatty())

    def write(self, data: Any) -> int:
        try:
            while not self._gone:
                n = self._raw.write(data)
                if n is not None:
                    return int(n)
                select.select([], [self.fileno()], [])  # another program made it non-blocking, and it is full
        except OSError as e:
            self._gone, self.lost = True, e.errno != errno.EBADF
            if self._is_output:
                raise OutputLost(e) from None
        return len(data)


def _escape(e: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(e, UnicodeEncodeError):
        raise e
    letter = e.object[e.start]
    if "\udc80" <= letter <= "\udcff":
        return letter.encode("ascii", "surrogateescape"), e.start + 1
    return letter.encode("ascii", "backslashreplace").decode(), e.start + 1


def _ascii_by_another_name(name: str) -> codecs.CodecInfo | None:
    """ASCII that click does not take for a mistake."""
    if name.replace("_", "-") != _ASCII:
        return None
    a = codecs.lookup("ascii")
    return codecs.CodecInfo(
        a.encode, a.decode, a.streamreader, a.streamwriter, a.incrementalencoder, a.incrementaldecoder, _ASCII
    )


codecs.register_error(_HANDLER, _escape)
codecs.register(_ascii_by_another_name)


def _stand_in(fd: int) -> io.FileIO:
    """What a closed stream is replaced by: writing fails to standard output, and is free to standard error.

    It takes the stream's number, or the next file opened, a model or a journal, would be written to in its place.
    """
    found = os.open(os.devnull, os.O_RDONLY if fd == 1 else os.O_WRONLY)
    try:
        os.fstat(fd)  # if this is another file, that has taken the number already
    except OSError:
        os.dup2(found, fd)
    if found == fd or not os.path.sameopenfile(found, fd):
        return io.FileIO(found, "w", closefd=False)
    os.close(found)
    return io.FileIO(fd, "w", closefd=False)


def _wrap(stream: TextIO | None, fd: int) -> tuple[TextIO, _Raw]:
    if stream is None:
        raw = _Raw(_stand_in(fd), fd == 1)
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", _HANDLER, line_buffering=True), raw
    stream.flush()
    buffer: Any = stream.buffer
    raw = _Raw(getattr(buffer, "raw", buffer), fd == 1)
    ascii = codecs.lookup(stream.encoding).name == "ascii"
    text = io.TextIOWrapper(
        io.BufferedWriter(raw), _ASCII if ascii else stream.encoding, _HANDLER,
        line_buffering=bool(stream.line_buffering), write_through=getattr(stream, "write_through", False),
    )  # fmt: skip
    return text, raw


class Guard:
    """What became of the streams."""

    def __init__(self, errors: _Raw | None = None) -> None:
        self._errors = errors

    @property
    def errors_lost(self) -> bool:
        """Whether something could not be written to standard error."""
        return self._errors is not None and self._errors.lost


@contextlib.contextmanager
def guarded() -> Iterator[Guard]:
    """Guard the process's own streams while the block runs; those a caller put in their place are left alone."""
    before = sys.stdout, sys.stderr
    guard = Guard()
    if sys.stdin is None and sys.__stdin__ is None:
        _stand_in(0)
    if sys.stderr is sys.__stderr__:
        sys.stderr, raw = _wrap(sys.stderr, 2)
        guard = Guard(raw)
    if sys.stdout is sys.__stdout__:
        sys.stdout, _ = _wrap(sys.stdout, 1)
    try:
        yield guard
    finally:
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
