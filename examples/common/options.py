"""Options that several scripts have, and the learning rates that they start with. Imports no JAX."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

from examples.common import command_line
from examples.common.command_line import (
    Count,
    Flag,
    Folder,
    OptionalFolder,
    OptionalPath,
    RefusedError,
    Seed,
)
from examples.common.files import alone_in
from examples.common.process import orderly
from examples.common.run_folders import checkpoint_folders

# Default peak learning rates of the examples.
RATES = {
    "digits": {"mfac": 1e-2, "cgfac": 0.1, "sgd": 0.2, "adamw": 0.05, "nadamw": 0.05, "muon": 0.05},
    "cifar10": {"mfac": 1e-2, "sgd": 0.2, "adamw": 5e-3, "nadamw": 5e-3, "muon": 0.02},
    "finetune": {"mfac": 1e-3, "sgd": 0.05, "adamw": 1e-4, "nadamw": 1e-4, "muon": 1e-3},
    "text": {"mfac": 1e-2, "cgfac": 0.1, "sgd": 0.5, "adamw": 5e-3, "nadamw": 5e-3, "muon": 0.02},
}
OPTIMIZERS = tuple(RATES["digits"])  # all of them

# What may differ when a run is resumed. Each run compares its own rate.
FREE_SETTINGS = ("out", "checkpoint_dir", "resume", "seeds", "optimizers", "rates")

Rate = tuple[str, float]  # an optimizer and its peak learning rate


def read_rate(text: str) -> Rate:
    """Read NAME=RATE."""
    name, _, value = text.partition("=")
    if name not in OPTIMIZERS:
        raise ValueError(
            f"unknown optimizer {name!r}: write NAME=RATE with a NAME of {', '.join(OPTIMIZERS)}"
        )
    try:
        return name, command_line.positive(value)
    except ValueError as error:
        raise ValueError(f"the rate of {name} {error}: write e.g. {name}=0.01") from error


def names(problem: str) -> Any:
    """Describe the option of the optimizers that have a rate for the problem."""
    return command_line.choices(RATES[problem])


Rates = Annotated[
    tuple[Rate, ...],
    command_line.option(read_rate, "NAME=RATE", many=True, show=lambda rate: f"{rate[0]}={rate[1]:g}"),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The options that all training examples have. Each names its problem, a key of `RATES`."""

    problem: ClassVar[str]

    optimizers: tuple[str, ...] = ("mfac", "sgd", "adamw")
    """which to compare"""
    rates: Rates = ()
    """learning rates at the end of the warm-up; an optimizer that is not named keeps its default"""
    seeds: Count = 1
    """runs of each optimizer, with the seeds 0, 1, 2, ..."""
    evaluations: Count = 1
    """times that losses are measured in a run"""
    out: Folder = Path("out")
    """folder for results.json, curves.png and, with mfac, diagnostics.png of its first seed"""
    checkpoint_dir: OptionalFolder = None
    """folder where each evaluation saves its run; nothing is saved without it"""
    resume: Flag = False
    """continue the runs saved in --checkpoint-dir"""

    def chosen_rates(self) -> dict[str, float]:
        """The peak learning rate of each optimizer to compare."""
        rates = RATES[self.problem] | dict(self.rates)
        return {name: rates[name] for name in self.optimizers}

    @contextlib.contextmanager
    def working(self) -> Iterator[dict[tuple[str, int], Path]]:
        """Do the work of the script inside; gives the folder of each run's checkpoints."""
        if self.checkpoint_dir is None:
            cure = "nothing was saved. Pass --checkpoint-dir FOLDER, and a run can be continued by --resume"
        else:
            cure = f"pass --resume to continue from the last checkpoints in {self.checkpoint_dir}"
        with orderly(f"Interrupted: {cure}."):
            if self.resume and self.checkpoint_dir is None:
                raise RefusedError("--resume needs the --checkpoint-dir of the runs to continue")
            with alone_in(*filter(None, (self.out, self.checkpoint_dir))):
                folders = self._checkpoint_folders()
                print(self.plan(), flush=True)
                yield folders

    def plan(self) -> str:
        """What to tell the user before JAX starts, which takes seconds."""
        runs = "one run" if self.seeds == 1 else f"{self.seeds} runs"
        return (
            f"{self.problem}: {runs} of each of {', '.join(self.optimizers)}; results go to {self.out}.\n"
            "JAX starts, and compiles each optimizer before its first step."
        )

    def _checkpoint_folders(self) -> dict[tuple[str, int], Path]:
        if self.checkpoint_dir is None:
            return {}
        settings = {k: v for k, v in dataclasses.asdict(self).items() if k not in FREE_SETTINGS}
        settings["problem"] = self.problem
        return checkpoint_folders(
            self.checkpoint_dir, self.chosen_rates(), self.seeds, settings, self.resume
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Text:
    """The options of a text to train on."""

    data_dir: OptionalPath = None
    """folder of the text: its tinyshakespeare.txt, or else all its *.txt"""
    text: OptionalPath = None
    """text file, in place of --data-dir"""


def read_share(text: str) -> float:
    """Read a number in [0, 1)."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise ValueError(f"must be a number from 0 to below 1, got {text!r}: write e.g. 0.9")


Shares = Annotated[tuple[float, ...], command_line.option(read_share, "SHARE", many=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning:
    """The options that all examples of pruning have."""

    sparsity: Shares = (0.5, 0.75, 0.875, 0.9)
    """shares of the weights to prune"""
    num_grads: Count = 512
    """gradients that a step of M-FAC sees"""
    seed: Seed = 0
    """of all that is drawn at random"""
    out: Folder = Path("out")
    """folder for the picture"""

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Do the work of the script inside."""
        cure = "Interrupted: nothing was written. There is no --resume here: start again."
        with orderly(cure), alone_in(self.out):
            yield


# The names of two networks for the digits.
DigitsModel = Annotated[str, command_line.choices(("mlp", "cnn"), many=False)]
