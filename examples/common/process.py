"""How a script ends: one line for what goes wrong, and files that do not depend on who reads the output."""

import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

from examples.common.command_line import RefusedError, refuse
from examples.common.files import FULL, DiskFullError

FAILED = 1
INTERRUPTED = 128 + signal.SIGINT  # as shells report it


@contextlib.contextmanager
def orderly(interrupted: str) -> Iterator[None]:
    """Do the work of a script inside.

    What users can do something about, and Ctrl-C, end the script with one line. Printing ends it never: if
    nobody reads the output, as after `| head -1`, the work goes on and its files are written.

    Args:
      interrupted: what to tell the user after Ctrl-C.
    """
    with _lasting_outputs(), _no_lost_interrupt(interrupted):
        try:
            yield
        except RefusedError as error:
            refuse(error)
        except DiskFullError as error:
            fail(error)
        except OSError as error:
            fail(DiskFullError(error.filename, error.strerror) if error.errno in FULL else error)
        except BaseException as error:
            if not _is_interrupt(error):
                raise
            _end(interrupted)


def fail(message: object) -> NoReturn:
    """Print an error that is not about the command line, and exit with status 1."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(FAILED)


def _end(interrupted: str) -> NoReturn:
    """End at once after Ctrl-C: Python's own way out may wait for threads of XLA, or crash."""
    print(f"\n{interrupted}", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(INTERRUPTED)


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C caused the error; C++ code makes other exceptions of it."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


@contextlib.contextmanager
def _no_lost_interrupt(interrupted: str) -> Iterator[None]:
    """End also after a Ctrl-C in a destructor or a callback, where Python prints it and goes on.

    What is printed there after a failed save, by the other writes of that save, is left out.
    """
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is not KeyboardInterrupt:
            if str(unraisable.exc_value) != "Event loop is closed":
                before(unraisable)
            return
        _end(interrupted)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class _Output(io.FileIO):
    """Where to print. What cannot be printed is dropped.

    Attributes:
      error: what the first failed write raised; None if the reader has only gone.
    """

    error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            return len(data)
        except OSError as error:
            self.error = self.error or error
            return len(data)


@contextlib.contextmanager
def _lasting_outputs() -> Iterator[None]:
    """Print to where sys.stdout and sys.stderr do, without errors; the first is told at the end."""
    for number in range(3):  # one that is closed, as by >&-, would go to the next file that is opened
        try:
            os.fstat(number)
        except OSError as error:
            if error.errno == errno.EBADF:
                os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before, (1, 2))
    outputs = sys.stdout, sys.stderr
    try:
        yield
    finally:
        for stream in outputs:
            stream.flush()
        sys.stdout, sys.stderr = before
    raw = getattr(getattr(outputs[0], "buffer", None), "raw", None)
    if isinstance(raw, _Output) and raw.error:
        fail(f"not all of the output could be printed: {raw.error.strerror}")


def _lasting(stream: Any, number: int) -> Any:
    """The stream without errors; one that belongs to no open file is returned as it is."""
    if stream is None:  # Python found it closed
        stream = os.fdopen(number, "w", closefd=False)
    try:
        raw = _Output(stream.fileno(), "w", closefd=False)
    except OSError:  # in memory, as in tests
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,  # a terminal, or python -u
    )
