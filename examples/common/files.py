"""Files that are written whole or not at all, and folders that one run has for itself."""

import contextlib
import errno
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from examples.common.command_line import RefusedError

# No space, no quota, and the limit of `ulimit -f`.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(Exception):
    """A file does not fit. The message names the folder and says what to do."""

    def __init__(self, folder: object, reason: object):
        super().__init__(
            f"cannot write into {folder}: {reason}. Free some space there, or pass another folder. "
            "Files that were there before are whole"
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path beside the file to write to; at the end it takes the place of the file.

    Raises:
      DiskFullError: the file does not fit. The old one, if any, is left as it was.
    """
    draft = path.with_name(f".new-{path.name}")
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        if error.errno in FULL:
            raise DiskFullError(path.parent, error.strerror) from error
        raise
    finally:
        draft.unlink(missing_ok=True)


@contextlib.contextmanager
def alone_in(*folders: Path) -> Iterator[None]:
    """Make the folders, and keep every other run out of them until the end.

    The operating system holds the locks, so they end with the process, however it ends.

    Raises:
      RefusedError: another run writes into one of the folders, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        for folder in sorted({Path(os.path.realpath(folder)) for folder in folders}):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file = stack.enter_context((folder / ".lock").open("a"))
            except OSError as error:
                if error.errno in FULL:
                    raise DiskFullError(folder, error.strerror) from error
                raise RefusedError(f"cannot write into a folder: {error}. Pass another one") from error
            _lock(file.fileno(), folder)
        yield


def _lock(file: int, folder: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RefusedError(
            f"another run writes into {folder}: wait for its end, or pass another folder"
        ) from error
    except OSError as error:  # some network file systems have none
        print(f"{folder} cannot be locked ({error.strerror}): start no second run in it.", file=sys.stderr)
