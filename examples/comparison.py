"""What the training examples do: train with several optimizers and seeds, and report."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

import mfac_jax
from examples.common import reporting
from examples.common.diagnostics_plot import plot_diagnostics
from examples.common.files import replacing
from examples.common.optimizers import make_optimizer
from examples.common.options import Comparison
from examples.common.training import TrainState, train
from examples.common.workload import Workload


def run(
    options: Comparison,
    folders: Mapping[tuple[str, int], Path],
    make_workload: Callable[[int], Workload],
    callback: Callable[[str, int, TrainState], object] = lambda name, seed, state: None,
    draw: Callable[[Sequence[dict[str, Any]]], object] = lambda records: None,
) -> None:
    """Train the workload of every seed with every optimizer, and write the report.

    Args:
      options: what the user asked for.
      folders: for the checkpoints of each optimizer and seed, if they are wanted.
      make_workload: makes the workload of a seed.
      callback: called with optimizer, seed and state after every evaluation.
      draw: called with the diagnostics of M-FAC's first run at every evaluation; not without M-FAC.
    """
    rates = options.chosen_rates()

    def observe(name: str, seed: int, state: TrainState) -> dict[str, Any] | None:
        callback(name, seed, state)
        return diagnose(state) if (name, seed) == ("mfac", 0) else None

    workload = make_workload(0)
    histories = train_all(options, rates, folders, workload, make_workload, observe)
    # Files come before words: nobody may be there to read those.
    with replacing(options.out / "results.json") as path:
        reporting.write_results(path, workload, dataclasses.asdict(options), rates, histories)
    with replacing(options.out / "curves.png") as path:
        reporting.plot_curves(workload.name, histories, path)
    records = histories["mfac"][0].records if "mfac" in histories else []
    if records:
        with replacing(options.out / "diagnostics.png") as path:
            plot_diagnostics(records, path)
        draw(records)
    reporting.print_summaries(rates, histories)
    print(f"\nPictures and results.json are in {options.out}")


def diagnose(state: TrainState) -> dict[str, Any]:
    """Measure M-FAC's diagnostics as a record that JSON can hold."""
    log = mfac_jax.DiagnosticsLog(every=1)
    log(state.step, state.opt_state)
    return log.records[0]


def train_all(
    options: Comparison,
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
