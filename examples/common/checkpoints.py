"""Checkpoints by Orbax: a state, and beside it a record in JSON.

A checkpoint that was damaged is found by reading it: Orbax refuses most damage, and the sum of all bits of
the state, which stands in the record, shows the rest. Then the newest whole one is taken, on all hosts.
"""

import contextlib
import gc
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import absl.logging
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from tqdm import tqdm

from examples.common.files import FULL, DiskFullError
from examples.common.run_folders import CURE, CheckpointError

KEPT = 2  # checkpoints
LISTED = 16  # newest checkpoints that are looked at

# Orbax prints the traceback of each error that it raises.
absl.logging.set_verbosity(absl.logging.FATAL)


class Checkpoint(NamedTuple):
    """What was saved: a state, any pytree, and a record that JSON can hold."""

    state: Any
    record: dict[str, Any]


def absolute(folder: str | os.PathLike) -> epath.Path:
    """Make a path absolute, as Orbax wants it; the URL of a bucket, gs://BUCKET/RUN, stays as it is."""
    return epath.Path(folder) if "://" in str(folder) else epath.Path(folder).absolute()


@contextlib.contextmanager
def open_folder(folder: str | os.PathLike, **options: Any) -> Iterator[ocp.CheckpointManager]:
    """Open the checkpoints in a folder. The last two are kept; what is left of cut-off saves is removed.

    Args:
      folder: a path or the URL of a bucket.
      **options: more options of `ocp.CheckpointManagerOptions`.

    Raises:
      DiskFullError: a checkpoint does not fit, perhaps one that was saved in the background.
    """
    settings = ocp.CheckpointManagerOptions(max_to_keep=KEPT, cleanup_tmp_directories=True, **options)
    try:
        with ocp.CheckpointManager(absolute(folder), options=settings) as checkpoints:
            yield checkpoints
    except Exception as error:
        code = _system_error(error)
        if code in FULL:
            raise DiskFullError(folder, os.strerror(code)) from error
        raise


def _system_error(error: BaseException) -> int | None:
    """The number of the system's error behind one of Orbax or TensorStore."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    return int(found[1]) if found else getattr(error, "errno", None)


def save(checkpoints: ocp.CheckpointManager, step: int, state: Any, record: dict[str, Any]) -> None:
    """Save a state, any pytree, and a record that JSON can hold."""
    record = record | {"bits": _sum_of_bits(state)}
    items = {"state": ocp.args.StandardSave(state), "record": ocp.args.JsonSave(record)}
    checkpoints.save(step, args=ocp.args.Composite(**items))


def restore_newest(
    checkpoints: ocp.CheckpointManager,
    like: Any,
    check: Callable[[dict[str, Any]], object] = lambda record: None,
) -> Checkpoint | None:
    """Restore the newest checkpoint that is whole; None if there are none at all.

    All hosts take the same one. Newer ones, which are damaged, are renamed: their steps are saved again.

    Args:
      checkpoints: of the folder.
      like: the shapes, dtypes and shardings of the state.
      check: raises an error if the record is of another run.

    Raises:
      CheckpointError: there are checkpoints, and none is whole.
    """
    faults: dict[int, str] = {}
    for step in _steps(checkpoints):
        found = _read(checkpoints.directory / str(step), like, check)
        if isinstance(found, Checkpoint):
            for damaged, fault in faults.items():
                name = _put_aside(checkpoints, damaged)
                _tell(f"The checkpoint of step {damaged} is damaged, and now called {name}: {fault}")
            _tell(f"{checkpoints.directory}: continues after step {step}.")
            return found
        faults[step] = found
    if faults:
        raise CheckpointError(
            f"cannot restore {checkpoints.directory}, perhaps from another version; no checkpoint of "
            f"{', '.join(map(str, faults))} is whole: {next(iter(faults.values()))}. {CURE}"
        )
    return None


def _steps(checkpoints: ocp.CheckpointManager) -> list[int]:
    """The steps in the folder as the first host sees them, newest first."""
    own = sorted(checkpoints.all_steps(), reverse=True)[:LISTED]
    padded = np.array(own + [-1] * (LISTED - len(own)), np.int32)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(padded) if step >= 0]


def _read(folder: epath.Path, like: Any, check: Callable[[dict[str, Any]], object]) -> Checkpoint | str:
    """Read a checkpoint, or say what is wrong with it on any host.

    Each host reads by itself: in `CheckpointManager.restore` those that can would wait for the others.
    """

    def read(handler: Any, name: str, how: ocp.args.CheckpointArgs) -> Any:
        with contextlib.closing(handler):
            return handler.restore(folder / name, args=how)

    def read_record() -> dict[str, Any]:
        record = read(ocp.JsonCheckpointHandler(), "record", ocp.args.JsonRestore())
        if not isinstance(record, dict):
            raise ValueError("the record is no JSON object")
        return record

    record, fault = _attempt(read_record)
    if fault:
        return fault
    check(record)
    state, fault = _attempt(
        lambda: read(ocp.StandardCheckpointHandler(), "state", ocp.args.StandardRestore(like))
    )
    bits = record.pop("bits", None)  # older checkpoints have none
    if not fault and bits is not None and bits != _sum_of_bits(state):
        fault = "the sum of the state's bits is not the one that was saved"
    return fault or Checkpoint(state, record)


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """Read on every host; return what was read, and what is wrong on any host, '' where nothing is."""
    found, fault = None, ""
    with _without_echoes():
        try:
            found = read()
        except Exception as error:  # Orbax raises its own, and bare ones
            fault = " ".join(str(error).split())[:200] or type(error).__name__
    if np.any(multihost_utils.process_allgather(np.bool_(fault))):
        return None, fault or "another host cannot read it"
    return found, ""


@contextlib.contextmanager
def _without_echoes() -> Iterator[None]:
    """Keep Python from printing the errors of other reads that go on after the first has failed."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if unraisable.exc_type is KeyboardInterrupt:
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        gc.collect()
        sys.unraisablehook = before


def _sum_of_bits(state: Any) -> int:
    """Add up the bits of a state, read as whole numbers, modulo 2**32; on any devices the same."""
    total = 0
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                data = np.asarray(shard.data)
                total += int(data.view(f"u{data.dtype.itemsize}").sum(dtype=np.uint64))
    sums = multihost_utils.process_allgather(np.uint32(total % 2**32))
    return int(np.sum(sums, dtype=np.uint64) % 2**32)


def _put_aside(checkpoints: ocp.CheckpointManager, step: int) -> str:
    """Rename a checkpoint, so that its step can be saved again; return its new name."""
    folder, name = checkpoints.directory, f"damaged-{step}"
    if jax.process_index() == 0:
        if (folder / name).exists():
            (folder / name).rmtree()
        (folder / str(step)).rename(folder / name)
    multihost_utils.sync_global_devices(name)
    checkpoints.reload()
    return name


def _tell(line: str) -> None:
    """Print a line on the first host, above a progress bar if there is one."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stderr)
