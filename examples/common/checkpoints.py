"""Checkpoints by Orbax: a state, and beside it a record in JSON."""

import json
import os
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

CURE = "pass another --checkpoint-dir"


class CheckpointError(Exception):
    """Checkpoints that do not belong to this run. The message says what to do."""


def absolute(folder: str | os.PathLike) -> epath.Path:
    """Make a path absolute, as Orbax wants it; the URL of a bucket, gs://BUCKET/RUN, stays as it is."""
    return epath.Path(folder) if "://" in str(folder) else epath.Path(folder).absolute()


def open_folder(folder: str | os.PathLike, **options: Any) -> ocp.CheckpointManager:
    """Open the checkpoints in a folder; use the result as a context. The last two are kept.

    Args:
      folder: a path or the URL of a bucket.
      **options: more options of `ocp.CheckpointManagerOptions`.
    """
    settings = ocp.CheckpointManagerOptions(max_to_keep=2, **options)
    return ocp.CheckpointManager(absolute(folder), options=settings)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any, record: dict[str, Any]) -> None:
    """Save a state, any pytree, and a record that JSON can hold."""
    items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    checkpoints.save(step, args=ocp.args.Composite(**items))


def restore_record(checkpoints: ocp.CheckpointManager) -> dict[str, Any]:
    """Read the record of the last checkpoint."""
    return _restore(checkpoints, "record", ocp.args.JsonRestore())


def restore_state(checkpoints: ocp.CheckpointManager, like: Any) -> Any:
    """Read the state of the last checkpoint, with the shapes, dtypes and shardings of `like`."""
    return _restore(checkpoints, "state", ocp.args.StandardRestore(like))


def _restore(checkpoints: ocp.CheckpointManager, name: str, how: ocp.args.CheckpointArgs) -> Any:
    try:
        return checkpoints.restore(checkpoints.latest_step(), args=ocp.args.Composite(**{name: how}))[name]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise CheckpointError(
            f"cannot restore {checkpoints.directory}, perhaps from another version: {error}. {CURE}"
        ) from error


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
    with open_folder(folder) as checkpoints:
        has_checkpoint = checkpoints.latest_step() is not None
    if not has_checkpoint:
        path.write_text(json.dumps(settings, indent=2) + "\n")
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
