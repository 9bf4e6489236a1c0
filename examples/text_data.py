"""The text to train on. Imports no JAX."""

import sysconfig
from pathlib import Path
from typing import NamedTuple

import numpy as np

from examples.common.data import DataError

LIBRARY_BYTES = 1_000_000  # about what Tiny Shakespeare has


class Parts(NamedTuple):
    """Characters as numbers from 0 on, int32, for training and for validation.

    Attributes:
      train: the first nine tenths.
      valid: the rest.
      vocabulary: how many different characters there are.
      source: where the text is from, in words.
    """

    train: np.ndarray
    valid: np.ndarray
    vocabulary: int
    source: str


def read_parts(context: int, data_dir: Path | None = None, text: Path | None = None) -> Parts:
    """Read a text as `read_text` does, and split it; refuse one that is too short for the context."""
    content, source = read_text(data_dir, text)
    vocabulary, ids = np.unique(np.frombuffer(content, np.uint8), return_inverse=True)
    train, valid = np.split(ids.astype(np.int32), [int(0.9 * len(ids))])
    if len(valid) <= context + 1:
        raise DataError(
            f"a tenth of the text must exceed --context {context}, it has {len(valid)} characters: "
            "pass a longer text or a smaller --context"
        )
    found = f"{source}: {len(ids):,} characters, {len(vocabulary)} different ones"
    return Parts(train, valid, len(vocabulary), found)


def read_text(data_dir: Path | None = None, text: Path | None = None) -> tuple[bytes, str]:
    """Read the text of the file, the folder, or else Python's library; return also where it is from."""
    if text is not None:
        paths, source = [text], str(text)
    elif data_dir is not None:
        shakespeare = data_dir / "tinyshakespeare.txt"
        paths = [shakespeare] if shakespeare.exists() else sorted(data_dir.glob("*.txt"))
        source = ", ".join(str(path) for path in paths)
        if not paths:
            raise DataError(f"--data-dir: neither {shakespeare} nor another *.txt in that folder")
    else:
        library = Path(sysconfig.get_paths()["stdlib"])
        paths, source = sorted(library.glob("*.py")), f"Python's standard library, {library}/*.py"
        if not paths:
            raise DataError(f"no *.py in Python's library {library}: pass --text or --data-dir")
    try:
        content = b"".join(path.read_bytes() for path in paths)
    except OSError as error:
        raise DataError(f"cannot read the text: {error}") from error
    return (content[:LIBRARY_BYTES] if text is None and data_dir is None else content), source
