"""The example scripts as a user runs them."""

import os
from pathlib import Path

import pytest

from examples import (
    launch_local,
    prune_digits,
    prune_resnet20,
    train_cifar10,
    train_digits,
    train_finetune,
    train_pod,
    train_text,
)

SCRIPTS = {
    "train_digits": train_digits,
    "train_cifar10": train_cifar10,
    "train_finetune": train_finetune,
    "train_text": train_text,
    "train_pod": train_pod,
    "prune_digits": prune_digits,
    "prune_resnet20": prune_resnet20,
    "launch_local": launch_local,
}
ROOT = Path(__file__).parents[2]
# For scripts that start in another folder: the examples beside these tests, not those that are installed.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
REAL_DATA = ROOT.parent / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL_DATA.exists(), reason=f"there is no {REAL_DATA}")


def error_of(name: str, capsys, *arguments: object) -> str:
    """The one line that the script prints when it refuses its arguments."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        SCRIPTS[name].main([str(argument) for argument in arguments])
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
