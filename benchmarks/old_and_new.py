"""Step time of this checkout beside that of another revision, in turn in one run.

Each revision has a process of its own, which `step_worker.py` runs. Only one of them works at a time, and
the order changes every round, so that both meet the same machine.

    git worktree add OLD REVISION
    python -m benchmarks.old_and_new --old OLD
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks import timing
from benchmarks.parameter_trees import RESNET20, RESNET20_SIZE, count
from benchmarks.peers import ExistingFolder
from examples.common import json_lines, provenance, reporting
from examples.common.command_line import Count, OptionalPath, parse

NEW = Path(__file__).parents[1]
TREES = {"one leaf": ((RESNET20_SIZE,),), "ResNet-20": RESNET20}
OPTIMIZERS = ("cholesky", "inverse", "mfac")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    old: ExistingFolder
    """checkout of the revision to compare with"""
    num_grads: Count = 1024
    """rows of the window"""
    rounds: Count = 15
    """timed, after one to warm up"""
    steps: Count = 2
    """in each round, on gradients that are drawn before the clock starts"""
    out: OptionalPath = None
    """file to add lines of JSON to"""


class Case(NamedTuple):
    """A tree of parameters, and `mfac` or the solver of `scale_by_mfac`."""

    tree: str
    optimizer: str


class Worker:
    """A process that takes steps with the `mfac_jax` of a checkout."""

    def __init__(self, checkout: Path) -> None:
        # -P: the folder of the script, which is this one, does not come before the checkout.
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("step_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(checkout.absolute())},
        )

    def ask(self, **request: Any) -> str:
        """Send a request; return the answer."""
        assert self.process.stdin is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self) -> str:
        """Wait for the next line that the process prints."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"step_worker.py ended with code {self.process.wait()}; its message is above."
            )
        return line.strip()

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def workers(**checkouts: Path) -> Iterator[dict[str, Worker]]:
    """Start a worker for each checkout; all of them end with the context."""
    with contextlib.ExitStack() as stack:
        found = {}
        for name, checkout in checkouts.items():
            found[name] = Worker(checkout)
            stack.callback(found[name].close)
            imported = found[name].answer()
            if not Path(imported).is_relative_to(checkout.absolute()):
                raise RuntimeError(f"{checkout} has no mfac_jax: {imported} was imported. Pass a checkout.")
        yield found


def measure(case: Case, options: Options, found: dict[str, Worker]) -> dict[str, list[float]]:
    """Measure the seconds of a step of each worker in each round."""
    for worker in found.values():
        worker.ask(num_grads=options.num_grads, optimizer=case.optimizer, shapes=TREES[case.tree])
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in tqdm(range(options.rounds + 1), ", ".join(case), unit="round", leave=False):
        for name in list(found)[:: 1 if number % 2 else -1]:
            spent = float(found[name].ask(steps=options.steps))
            seconds[name].append(spent / options.steps)
    return {name: rounds[1:] for name, rounds in seconds.items()}


def row(case: Case, seconds: dict[str, list[float]]) -> list[str]:
    """Write medians with quartiles in ms, the ratio of the medians, and the quartiles of the ratios."""
    cells = [case.tree, case.optimizer]
    for name in ("old", "new"):
        low, middle, high = np.quantile(seconds[name], (0.25, 0.5, 0.75)) * 1e3
        cells.append(f"{middle:.4g} ({low:.4g} to {high:.4g})")
    low, high = np.quantile(np.divide(seconds["new"], seconds["old"]), (0.25, 0.75))
    ratio = np.median(seconds["new"]) / np.median(seconds["old"])
    return [*cells, f"{ratio:.3f} ({low:.3f} to {high:.3f})"]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every case and print the table; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    rows = []
    with workers(old=options.old, new=NEW) as found:
        for case in (Case(tree, optimizer) for tree in TREES for optimizer in OPTIMIZERS):
            seconds = measure(case, options, found)
            rows.append(row(case, seconds))
            if options.out is not None:
                line = {"case": case.tree, "optimizer": case.optimizer, "num_grads": options.num_grads}
                line |= {"parameters": count(TREES[case.tree]), "seconds": seconds}
                line |= {"old_revision": provenance.revision(options.old)}
                json_lines.append(options.out, line | provenance.record())
    print(timing.conditions(options.rounds))
    header = ["parameters", "optimizer", "old, ms (quartiles)", "new, ms (quartiles)"]
    title = f"A step with {options.num_grads:,} gradients"
    reporting.print_table(title, [*header, "new / old (quartiles)"], rows)


if __name__ == "__main__":
    main()
