"""Several hosts that run one script: they find each other, and must agree on what they do."""

import contextlib
import functools
import ipaddress
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import jaxlib._jax
import numpy as np
from jax.experimental import multihost_utils

from examples.common.checkpoints import absolute
from examples.common.command_line import RefusedError, refuse
from examples.common.files import DiskFullError, alone_in
from examples.train_pod import Connection

MESSAGE_BYTES = 8192  # of what hosts tell each other


def connect(options: Connection, others: Sequence[str]) -> None:
    """Find the other hosts, and refuse command lines that differ between them.

    Args:
      options: how this host is reached; they may differ.
      others: the other words of the command line.
    """
    if options.coordinator is None:
        return
    if options.coordinator == "auto":
        jax.distributed.initialize()
    else:
        loopback = loopback_address(options.coordinator)
        if loopback is not None:
            keep_to_loopback(loopback)
        jax.distributed.initialize(
            options.coordinator,
            options.num_processes,
            options.process_id,
            # All addresses by default: a host may be known to others by a name that is not its own.
            coordinator_bind_address=None if loopback is None else options.coordinator,
        )
    check_agreement("flags", " ".join(others))


def loopback_address(coordinator: str) -> str | None:
    """The address of HOST:PORT if all processes are on this machine, else None."""
    host = coordinator.rpartition(":")[0].strip("[]")
    with contextlib.suppress(OSError, ValueError):
        address = socket.getaddrinfo(host, None)[0][4][0]
        return str(address) if ipaddress.ip_address(address).is_loopback else None
    return None


def keep_to_loopback(address: str) -> None:
    """Let gloo, which moves data between CPU devices, listen on this address only.

    It would take the address of the machine's own name. JAX has no option for it.
    """
    make = jaxlib._jax.make_gloo_tcp_collectives
    jaxlib._jax.make_gloo_tcp_collectives = functools.partial(make, hostname=address)


def check_agreement(name: str, own: str) -> None:
    """Refuse hosts that say different things."""
    gathered = np.reshape(multihost_utils.process_allgather(_padded(own)), (-1, MESSAGE_BYTES))
    hosts: dict[str, list[int]] = {}
    for host, message in enumerate(gathered):
        hosts.setdefault(_text(message), []).append(host)
    if len(hosts) > 1:
        said = "; ".join(f"hosts {', '.join(map(str, who[:8]))}: {what!r}" for what, who in hosts.items())
        refuse(f"all hosts must have the same {name}, got {said}. Start them with the same.")


def _padded(message: str) -> np.ndarray:
    return np.frombuffer(message.encode()[:MESSAGE_BYTES].ljust(MESSAGE_BYTES), np.uint8)


def _text(padded: np.ndarray) -> str:
    return bytes(padded).decode(errors="replace").strip()


@contextlib.contextmanager
def shared(name: str) -> Iterator[None]:
    """Keep other runs out of the folder; refuse one that is not the same on all hosts.

    They would wait for each other's files. A bucket cannot be kept.
    """
    folder = absolute(name)
    number = multihost_utils.broadcast_one_to_all(np.int32(time.time_ns() % 2**31))
    proof = folder / f"first-host-{number}"
    with contextlib.ExitStack() as stack:
        problem = ""
        if jax.process_index() == 0:
            try:
                if "://" not in name:
                    stack.enter_context(alone_in(Path(name)))
                folder.mkdir(parents=True, exist_ok=True)
                proof.touch()
            except (OSError, RefusedError, DiskFullError) as error:
                problem = f"--checkpoint-dir: {error}"
        problem = _text(multihost_utils.broadcast_one_to_all(_padded(problem)))
        if problem:
            refuse(problem)
        found = "with" if proof.exists() else "without"
        check_agreement("--checkpoint-dir", f"{folder}, {found} the first host's files")
        if jax.process_index() == 0:
            proof.unlink()
        yield
