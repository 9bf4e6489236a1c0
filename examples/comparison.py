"""The command line that the examples share: train with several optimizers and seeds, and report."""

import argparse
import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import mfac_jax
from examples.common import reporting
from examples.common.checkpoints import CheckpointError, prepare_folder
from examples.common.diagnostics_plot import plot_diagnostics
from examples.common.optimizers import OPTIMIZERS, RATES, make_optimizer
from examples.common.training import TrainState, train
from examples.common.workload import DataError, Workload

# What may differ when a run is resumed; rates are compared for each run by itself.
FREE_SETTINGS = ("out", "checkpoint_dir", "resume", "seeds", "optimizers", "rates")


def count(text: str) -> int:
    """For argparse: an int >= 1."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")


def output_folder(text: str) -> Path:
    """For argparse: a folder, which need not exist."""
    for path in (Path(text), *Path(text).parents):
        if os.path.exists(path) and not os.path.isdir(path):
            raise argparse.ArgumentTypeError(f"must be a folder, but {path} is a file: pass another path")
    return Path(text)


def rate(text: str) -> tuple[str, float]:
    """For argparse: an optimizer and its peak learning rate, NAME=RATE."""
    name, _, value = text.partition("=")
    if name not in OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"unknown optimizer {name!r}: write NAME=RATE with a NAME of {', '.join(OPTIMIZERS)}"
        )
    with contextlib.suppress(ValueError):
        if 0 < float(value) < math.inf:
            return name, float(value)
    raise argparse.ArgumentTypeError(
        f"the rate of {name} must be a number above 0, got {value!r}: write e.g. {name}=0.01"
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults as they are typed, and none where there is none."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        values = action.default if isinstance(action.default, list) else [action.default]
        shown = " ".join("=".join(map(str, x)) if isinstance(x, tuple) else str(x) for x in values)
        return f"{action.help} (default: {shown})"


def make_parser(
    name: str, description: str | None, *, optimizers: list[str], seeds: int, evaluations: int
) -> argparse.ArgumentParser:
    """The options that all examples have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    add, known = parser.add_argument, list(RATES[name])
    add(
        "--optimizers",
        nargs="+",
        choices=known,
        default=optimizers,
        metavar="NAME",
        help=f"which to compare, of {', '.join(known)}",
    )
    add(
        "--rates",
        nargs="+",
        action="extend",
        type=rate,
        default=list(RATES[name].items()),
        metavar="NAME=RATE",
        help="learning rates at the end of the warm-up; an optimizer that is not named keeps its default",
    )
    add("--seeds", type=count, default=seeds, help="runs of each optimizer, with the seeds 0, 1, 2, ...")
    add("--evaluations", type=count, default=evaluations, help="times that losses are measured in a run")
    add(
        "--out",
        type=output_folder,
        default=f"out/{name}",  # a str, which argparse checks as it checks what is typed
        help="folder for results.json, curves.png and, with mfac, diagnostics.png of its first seed",
    )
    add(
        "--checkpoint-dir",
        type=output_folder,
        help="folder where every run is saved at each evaluation; without it nothing is",
    )
    add("--resume", action="store_true", help="continue the runs saved in --checkpoint-dir")
    return parser


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    make_workload: Callable[[int], Workload],
    callback: Callable[[str, int, TrainState], object] = lambda name, seed, state: None,
) -> list[dict[str, Any]]:
    """Train the workload of every seed with every optimizer, and write the report.

    Args:
      parser: for errors in what the user gave.
      args: parsed options of `make_parser` and of the example.
      make_workload: the workload of a seed.
      callback: called with optimizer, seed and state after every evaluation.

    Returns:
      The diagnostics of M-FAC's first run at every evaluation, none where it was not among the optimizers.
    """
    rates = {name: dict(args.rates)[name] for name in args.optimizers}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        workload = make_workload(0)

        def observe(name: str, seed: int, state: TrainState) -> dict[str, Any] | None:
            callback(name, seed, state)
            return diagnose(state) if (name, seed) == ("mfac", 0) else None

        histories = train_all(args, rates, workload, make_workload, observe)
    except (DataError, CheckpointError, OSError) as error:
        parser.error(str(error))
    summaries = {name: reporting.summarize(runs) for name, runs in histories.items()}
    reporting.print_summaries(rates, summaries, args.seeds)
    reporting.plot_curves(workload.name, histories, args.out / "curves.png")
    records = histories["mfac"][0].records if "mfac" in histories else []
    if records:
        plot_diagnostics(records, args.out / "diagnostics.png")
    reporting.write_results(args.out / "results.json", workload, vars(args), rates, histories)
    print(f"\nPictures and results.json are in {args.out}")
    return records


def diagnose(state: TrainState) -> dict[str, Any]:
    """A record of M-FAC's diagnostics, to be kept in the checkpoints."""
    log = mfac_jax.DiagnosticsLog(every=1)
    log(state.step, state.opt_state)
    return log.records[0]


def train_all(
    args, rates: dict[str, float], workload: Workload, make_workload, callback
) -> reporting.Histories:
    """Train with every optimizer and seed; `workload` is that of the first seed."""
    steps = len(workload.batches)
    folders = prepare_checkpoints(args, workload.name, rates)
    parameters = sum(x.size for x in jax.tree.leaves(workload.params))
    print(f"{workload.name}: {parameters:,} parameters, {steps} steps; data: {workload.source}")
    optimizers = {name: make_optimizer(name, rates[name], steps) for name in rates}
    histories: reporting.Histories = {name: [] for name in rates}
    with tqdm(total=args.seeds * len(rates) * steps, unit="step") as bar:
        for seed in range(args.seeds):
            workload = make_workload(seed) if seed else workload
            for name, tx in optimizers.items():
                bar.set_description(f"{name}, seed {seed}")
                history = train(
                    workload,
                    tx,
                    seed,
                    evaluate_every=math.ceil(steps / args.evaluations),
                    checkpoint_dir=folders.get((name, seed)),
                    progress=bar.update,
                    callback=lambda state, _, run=(name, seed): callback(*run, state),
                )
                histories[name].append(history)
    return histories


def prepare_checkpoints(args, workload_name: str, rates: dict[str, float]) -> dict[tuple[str, int], Path]:
    """A folder for the checkpoints of every run, all of them checked before the first run starts."""
    if args.checkpoint_dir is None:
        if args.resume:
            raise CheckpointError("--resume needs the --checkpoint-dir of the runs to continue")
        return {}
    shared = {key: value for key, value in vars(args).items() if key not in FREE_SETTINGS}
    shared = json.loads(json.dumps(shared, default=str)) | {"workload": workload_name}
    folders = {}
    for name in rates:
        for seed in range(args.seeds):
            folder = args.checkpoint_dir / f"{name}-seed{seed}"
            settings = shared | {"optimizer": name, "rate": rates[name], "seed": seed}
            prepare_folder(folder, settings, args.resume)
            folders[name, seed] = folder
    return folders
