"""Start a script in several processes of this machine, as the hosts of a pod would: CPU devices, gloo.

Every process gets `--coordinator`, `--num-processes` and `--process-id` after its own arguments. When one
fails the others are killed, as they would wait for it; `--restarts` then starts all of them again.

    python examples/launch_local.py --processes 2 --devices 2 examples/train_pod.py --steps 100
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

from examples import comparison

USAGE_ERROR = 2  # what argparse exits with: to start again would not help


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def start(command: Sequence[str], processes: int, devices: int) -> list[subprocess.Popen]:
    """The script, once for each process."""
    settings = {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
    }
    shared = [sys.executable, *command, "--coordinator", f"127.0.0.1:{free_port()}"]
    shared += ["--num-processes", str(processes)]
    return [
        subprocess.Popen([*shared, "--process-id", str(i)], env=os.environ | settings)
        for i in range(processes)
    ]


def wait(children: Sequence[subprocess.Popen]) -> int:
    """The exit code of all, or the first that is not zero; the others are then killed."""
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


def main(argv: Sequence[str] | None = None) -> None:
    """Start and watch the processes; `argv` is the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--processes", type=comparison.count, default=2, help="processes to start (default: %(default)s)")
    add("--devices", type=comparison.count, default=1, help="of each process (default: %(default)s)")
    add(
        "--restarts",
        type=int,
        default=0,
        help="times to start again after a failure; -1: always (default: 0)",
    )
    add("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    args = parser.parse_args(argv)
    if not args.command:
        parser.error("name a script to start, e.g. examples/train_pod.py")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that `wait` cleans up
    left = args.restarts
    while (code := wait(start(args.command, args.processes, args.devices))) not in (
        0,
        USAGE_ERROR,
    ) and left:
        left -= 1
        print(f"A process ended with {code}: all start again.", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
