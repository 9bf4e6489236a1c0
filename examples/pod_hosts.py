"""Several hosts that run one script: they find each other, and must agree on what they do."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from examples.common import command_line
from examples.common.command_line import OptionalCount, OptionalSeed, OptionalText, refuse

MESSAGE_BYTES = 8192  # of what hosts tell each other about their command lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Connection:
    """The options that differ between hosts."""

    coordinator: OptionalText = None
    """HOST:PORT of the first process, or auto on TPU pods and under Slurm"""
    num_processes: OptionalCount = None
    """processes in all; not with auto"""
    process_id: OptionalSeed = None
    """number of this process, from 0; not with auto"""


def connect(argv: Sequence[str] | None) -> None:
    """Find the other hosts. Refuse command lines that differ between hosts, before they are read."""
    options, others = command_line.parse_known(Connection, argv)
    coordinator, processes, own = options.coordinator, options.num_processes, options.process_id
    if coordinator in (None, "auto") and (processes, own) != (None, None):
        refuse(f"--num-processes and --process-id need --coordinator HOST:PORT, got {coordinator}")
    if coordinator is None:
        return
    if coordinator == "auto":
        jax.distributed.initialize()
    elif processes is None or own is None:
        refuse("--coordinator HOST:PORT needs --num-processes and --process-id too")
    else:
        jax.distributed.initialize(coordinator, processes, own)
    check_agreement("flags", " ".join(others))


def check_agreement(name: str, own: str) -> None:
    """Refuse hosts that say different things."""
    padded = np.frombuffer(own.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES), np.uint8)
    gathered = np.reshape(multihost_utils.process_allgather(padded), (-1, MESSAGE_BYTES))
    hosts: dict[str, list[int]] = {}
    for host, message in enumerate(gathered):
        hosts.setdefault(bytes(message).decode(errors="replace").strip(), []).append(host)
    if len(hosts) > 1:
        said = "; ".join(f"hosts {', '.join(map(str, who[:8]))}: {what!r}" for what, who in hosts.items())
        refuse(f"all hosts must have the same {name}, got {said}. Start them with the same.")


def check_shared(folder: epath.Path) -> None:
    """Refuse a folder that is not the same on all hosts: they would wait for each other's files."""
    number = multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31))
    proof = folder / f"first-host-{number}"
    if jax.process_index() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            proof.touch()
        except OSError as error:
            refuse(f"--checkpoint-dir: {error}")
    multihost_utils.sync_global_devices(proof.name)
    found = "with" if proof.exists() else "without"
    check_agreement("--checkpoint-dir", f"{folder}, {found} the first host's files")
    if jax.process_index() == 0:
        proof.unlink()
