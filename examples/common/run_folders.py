"""The folder of a run's checkpoints: whose they are, and whether to continue them. Imports no JAX."""

import json
import os
from pathlib import Path
from typing import Any

from examples.common.command_line import RefusedError
from examples.common.files import replacing

CURE = "pass another --checkpoint-dir"


class CheckpointError(RefusedError):
    """Checkpoints that do not belong to this run. The message says what to do."""


def checkpoint_folders(
    folder: Path, rates: dict[str, float], seeds: int, settings: dict[str, Any], resume: bool
) -> dict[tuple[str, int], Path]:
    """Prepare a folder for the checkpoints of every run; all are checked before the first run starts.

    Args:
      folder: of all runs.
      rates: the learning rate of each optimizer.
      seeds: runs of each optimizer.
      settings: what all runs depend on.
      resume: whether to continue checkpoints in the folders.
    """
    shared = json.loads(json.dumps(settings, default=str))
    folders = {}
    for name, rate in rates.items():
        for seed in range(seeds):
            folders[name, seed] = folder / f"{name}-seed{seed}"
            own = shared | {"optimizer": name, "rate": rate, "seed": seed}
            prepare_folder(folders[name, seed], own, resume)
    return folders


def prepare_folder(folder: Path, settings: dict[str, Any], resume: bool) -> None:
    """Write the settings of a new run, or refuse checkpoints that this run must not continue.

    Args:
      folder: the checkpoints of one run.
      settings: what the run depends on, representable in JSON.
      resume: whether to continue checkpoints in the folder.

    Raises:
      CheckpointError: there are checkpoints and `resume` is False, or their settings differ.
    """
    path = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(entry.name.isdigit() for entry in folder.iterdir()):
        with replacing(path) as draft:
            draft.write_text(json.dumps(settings, indent=2) + "\n")
        return
    if not resume:
        raise CheckpointError(f"{folder} holds checkpoints: pass --resume to continue them, or {CURE}")
    try:
        saved = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {CURE}") from error
    check_settings(saved, settings, folder)


def check_settings(saved: dict[str, Any], settings: dict[str, Any], folder: os.PathLike) -> None:
    """Refuse checkpoints in the folder that were made with other settings."""
    names = [name for name in saved | settings if saved.get(name) != settings.get(name)]
    if names:
        differences = ", ".join(
            f"{name} was {saved.get(name)!r}, is {settings.get(name)!r}" for name in names
        )
        raise CheckpointError(
            f"the checkpoints in {folder} are of another configuration: {differences}. Pass the same "
            f"settings, or {CURE}"
        )
