"""What the training examples do: train with several optimizers and seeds, and report."""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar

from tqdm import tqdm

import mfac_jax
from examples.common import command_line, reporting
from examples.common.checkpoints import CheckpointError, prepare_folder
from examples.common.command_line import Count, Flag, Folder, OptionalFolder
from examples.common.diagnostics_plot import plot_diagnostics
from examples.common.optimizers import OPTIMIZERS, RATES, make_optimizer
from examples.common.training import TrainState, train
from examples.common.workload import DataError, Workload

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
class Options:
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


def run(
    options: Options,
    make_workload: Callable[[int], Workload],
    callback: Callable[[str, int, TrainState], object] = lambda name, seed, state: None,
) -> list[dict[str, Any]]:
    """Train the workload of every seed with every optimizer, and write the report.

    Args:
      options: what the user asked for.
      make_workload: makes the workload of a seed.
      callback: called with optimizer, seed and state after every evaluation.

    Returns:
      The diagnostics of M-FAC's first run at every evaluation; nothing without M-FAC.
    """
    rates = options.chosen_rates()

    def observe(name: str, seed: int, state: TrainState) -> dict[str, Any] | None:
        callback(name, seed, state)
        return diagnose(state) if (name, seed) == ("mfac", 0) else None

    try:  # what can be refused without the data comes first
        options.out.mkdir(parents=True, exist_ok=True)
        folders = checkpoint_folders(options, rates)
        workload = make_workload(0)
        histories = train_all(options, rates, folders, workload, make_workload, observe)
    except (DataError, CheckpointError, OSError) as error:
        command_line.refuse(error)
    reporting.print_summaries(rates, histories)
    reporting.plot_curves(workload.name, histories, options.out / "curves.png")
    records = histories["mfac"][0].records if "mfac" in histories else []
    if records:
        plot_diagnostics(records, options.out / "diagnostics.png")
    settings = dataclasses.asdict(options)
    reporting.write_results(options.out / "results.json", workload, settings, rates, histories)
    print(f"\nPictures and results.json are in {options.out}")
    return records


def diagnose(state: TrainState) -> dict[str, Any]:
    """Measure M-FAC's diagnostics as a record that JSON can hold."""
    log = mfac_jax.DiagnosticsLog(every=1)
    log(state.step, state.opt_state)
    return log.records[0]


def train_all(
    options: Options,
    rates: Mapping[str, float],
    folders: Mapping[tuple[str, int], Path],
    workload: Workload,
    make_workload: Callable[[int], Workload],
    callback: Callable[[str, int, TrainState], object],
) -> reporting.Histories:
    """Train with every optimizer and seed; `workload` is that of the first seed."""
    steps = len(workload.batches)
    print(f"{workload.name}: {workload.parameters:,} parameters, {steps} steps; data: {workload.source}")
    optimizers = {name: make_optimizer(name, rates[name], steps) for name in rates}
    histories: reporting.Histories = {name: [] for name in rates}
    with tqdm(total=options.seeds * len(rates) * steps, unit="step") as bar:
        for seed in range(options.seeds):
            workload = make_workload(seed) if seed else workload
            for name, tx in optimizers.items():
                bar.set_description(f"{name}, seed {seed}")
                history = train(
                    workload,
                    tx,
                    seed,
                    evaluate_every=math.ceil(steps / options.evaluations),
                    checkpoint_dir=folders.get((name, seed)),
                    progress=bar.update,
                    callback=lambda state, _, run=(name, seed): callback(*run, state),
                )
                histories[name].append(history)
    return histories


def checkpoint_folders(options: Options, rates: Mapping[str, float]) -> dict[tuple[str, int], Path]:
    """Prepare a folder for the checkpoints of every run; all are checked before the first run starts."""
    if options.checkpoint_dir is None:
        if options.resume:
            raise CheckpointError("--resume needs the --checkpoint-dir of the runs to continue")
        return {}
    shared = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in FREE_SETTINGS
    }
    shared = json.loads(json.dumps(shared, default=str)) | {"problem": options.problem}
    folders = {}
    for name in rates:
        for seed in range(options.seeds):
            folder = options.checkpoint_dir / f"{name}-seed{seed}"
            settings = shared | {"optimizer": name, "rate": rates[name], "seed": seed}
            prepare_folder(folder, settings, options.resume)
            folders[name, seed] = folder
    return folders
