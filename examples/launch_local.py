"""Start a script in several processes of this machine, as the hosts of a pod would: CPU devices, gloo.

    python -m examples.launch_local --processes 2 --devices 2 examples.train_pod --steps 100

The first word that is no option is the script's module; what follows are the script's own arguments. Every
process also gets --coordinator, --num-processes and --process-id. If one process fails, the others would
wait for it, so they are killed. --restarts then starts all of them again. They listen on the loopback
address only, so that no other machine can reach them.
"""

import contextlib
import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Annotated, NoReturn

from examples.common import command_line
from examples.common.command_line import USAGE_ERROR, Count
from examples.common.process import orderly

SAME_FLAGS = "EXAMPLES_SAME_FLAGS"  # in the environment of processes that need not compare their flags


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the user can choose."""

    processes: Count = 2
    """processes to start"""
    devices: Count = 1
    """devices of each process"""
    restarts: Annotated[int, command_line.option(command_line.number(-1), "N")] = 0
    """times to start again after a failure; -1 sets no limit"""


def free_port() -> int:
    """Find a port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command: Sequence[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """Start the module with its arguments, once for each process."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        SAME_FLAGS: "1",
    }
    shared = [sys.executable, "-m", *command, "--coordinator", f"127.0.0.1:{free_port()}"]
    shared += ["--num-processes", str(processes)]
    # Ctrl-C reaches the launcher alone, which ends the others: they inherit that it is ignored.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        return [
            subprocess.Popen([*shared, "--process-id", str(i)], env=os.environ | settings)
            for i in range(processes)
        ]
    finally:
        signal.signal(signal.SIGINT, before)


def wait(children: Sequence[subprocess.Popen]) -> int:
    """Return the exit code of all, or the first that is not zero; the others are then killed."""
    try:
        while True:
            codes = [child.poll() for child in children]
            failed = [code for code in codes if code]
            if USAGE_ERROR in failed:
                time.sleep(2)  # every host has something to say
            if failed or None not in codes:
                return failed[0] if failed else 0
            time.sleep(0.1)
    finally:
        for child in children:
            child.kill()
            child.wait()


def split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words into own options and the command, the module and its arguments."""
    at = 0
    while at < len(argv) and argv[at].startswith("-"):
        has_value = "=" not in argv[at] and argv[at] not in ("-h", "--help")
        at += 2 if has_value else 1
    return list(argv[:at]), list(argv[at:])


def is_module(name: str) -> bool:
    """Whether Python finds the module."""
    with contextlib.suppress(ImportError, ValueError):
        return importlib.util.find_spec(name) is not None
    return False


def main(argv: Sequence[str] | None = None) -> None:
    """Start and watch the processes; `argv` is the command line."""
    own, command = split(sys.argv[1:] if argv is None else argv)
    options = command_line.parse(Options, own, __doc__)
    if not command:
        command_line.refuse("name a module to start, e.g. examples.train_pod")
    if not is_module(command[0]):
        command_line.refuse(f"there is no module {command[0]!r}: name one, e.g. examples.train_pod")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `wait` cleans up
    with orderly("Interrupted: all processes were ended. The same command starts them again."):
        watch(options, command)


def watch(options: Options, command: Sequence[str]) -> NoReturn:
    """Start the processes, again after a failure, and end as they do."""
    left = options.restarts
    while True:
        code = wait(start(command, options.processes, options.devices))
        if code in (0, USAGE_ERROR) or not left:  # a wrong command line stays wrong
            sys.exit(code)
        left -= 1
        print(f"A process ended with {code}: all start again.", file=sys.stderr)


if __name__ == "__main__":
    main()
