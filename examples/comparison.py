"""The command line that the examples share: train with several optimizers and seeds, and report."""

import argparse
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import mfac_jax
from examples import workload as wl

# Colours that colour-blind readers can tell apart (Okabe and Ito), and line styles for print.
STYLES = {
    "mfac": {"color": "#0072B2", "linestyle": "-"},
    "cgfac": {"color": "#E69F00", "linestyle": (0, (3, 1))},
    "sgd": {"color": "#D55E00", "linestyle": "--"},
    "adamw": {"color": "#009E73", "linestyle": "-."},
    "nadamw": {"color": "#CC79A7", "linestyle": ":"},
    "muon": {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
}
METRICS = {"train_loss": "train loss", "valid_loss": "valid loss", "valid_accuracy": "valid accuracy"}
# What may differ when a run is resumed; rates are compared for each run by itself.
FREE_SETTINGS = ("out", "checkpoint_dir", "resume", "seeds", "optimizers", "rates")

Histories = dict[str, list[wl.History]]  # optimizer -> one history a seed


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
    if name not in wl.OPTIMIZERS:
        raise argparse.ArgumentTypeError(
            f"unknown optimizer {name!r}: write NAME=RATE with a NAME of {', '.join(wl.OPTIMIZERS)}"
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
    add, known = parser.add_argument, list(wl.RATES[name])
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
        default=list(wl.RATES[name].items()),
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
    make_workload: Callable[[int], wl.Workload],
    callback: Callable[[str, int, wl.TrainState], object] = lambda name, seed, state: None,
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
    plt.switch_backend("Agg")  # pictures go to files; no window is opened
    rates = {name: dict(args.rates)[name] for name in args.optimizers}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        workload = make_workload(0)

        def observe(name: str, seed: int, state: wl.TrainState) -> dict[str, Any] | None:
            callback(name, seed, state)
            return diagnose(state) if (name, seed) == ("mfac", 0) else None

        histories = train_all(args, rates, workload, make_workload, observe)
    except (wl.DataError, wl.CheckpointError, OSError) as error:
        parser.error(str(error))
    summaries = {name: summarize(histories[name]) for name in histories}
    print_table(rates, summaries, args.seeds)
    plot_curves(workload.name, histories, args.out / "curves.png")
    records = histories["mfac"][0].records if "mfac" in histories else []
    if records:
        mfac_jax.DiagnosticsLog(records=records).plot(args.out / "diagnostics.png")
    write_results(args, workload, rates, summaries, histories)
    print(f"\nPictures and results.json are in {args.out}")
    return records


def diagnose(state: wl.TrainState) -> dict[str, Any]:
    """A record of M-FAC's diagnostics, to be kept in the checkpoints."""
    log = mfac_jax.DiagnosticsLog(every=1)
    log(state.step, state.opt_state)
    return log.records[0]


def train_all(args, rates: dict[str, float], workload: wl.Workload, make_workload, callback) -> Histories:
    """Train with every optimizer and seed; `workload` is that of the first seed."""
    steps = len(workload.batches)
    folders = prepare_checkpoints(args, workload.name, rates)
    parameters = sum(x.size for x in jax.tree.leaves(workload.params))
    print(f"{workload.name}: {parameters:,} parameters, {steps} steps; data: {workload.source}")
    optimizers = {name: wl.make_optimizer(name, rates[name], steps) for name in rates}
    histories: Histories = {name: [] for name in rates}
    with tqdm(total=args.seeds * len(rates) * steps, unit="step") as bar:
        for seed in range(args.seeds):
            workload = make_workload(seed) if seed else workload
            for name, tx in optimizers.items():
                bar.set_description(f"{name}, seed {seed}")
                history = wl.train(
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
            raise wl.CheckpointError("--resume needs the --checkpoint-dir of the runs to continue")
        return {}
    shared = {key: value for key, value in vars(args).items() if key not in FREE_SETTINGS}
    shared = json.loads(json.dumps(shared, default=str)) | {"workload": workload_name}
    folders = {}
    for name in rates:
        for seed in range(args.seeds):
            folder = args.checkpoint_dir / f"{name}-seed{seed}"
            settings = shared | {"optimizer": name, "rate": rates[name], "seed": seed}
            wl.prepare_checkpoint_dir(folder, settings, args.resume)
            folders[name, seed] = folder
    return folders


def summarize(histories: list[wl.History]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over the seeds of what the last evaluation of each run measured."""
    last = [history.evaluations[-1] for history in histories]
    columns = {metric: np.array([evaluation[metric] for evaluation in last]) for metric in last[0]}
    return {metric: {"mean": float(x.mean()), "std": float(x.std())} for metric, x in columns.items()}


def print_table(rates: dict[str, float], summaries: dict[str, dict], seeds: int) -> None:
    """The optimizers side by side; a NaN shows a run that diverged."""
    has_accuracy = all("valid_accuracy" in summary for summary in summaries.values())
    columns = ["train_loss", "valid_loss", *(["valid_accuracy"] if has_accuracy else []), "seconds"]
    print(f"\nAt the end, mean ± standard deviation over {seeds} seed{'s' * (seeds > 1)}:")
    print(f"{'':10}{'rate':>8}" + "".join(f"{METRICS.get(c, c):>20}" for c in columns) + f"{'steps':>8}")
    for name, summary in summaries.items():
        cells = [f"{summary[c]['mean']:.4g} ± {summary[c]['std']:.2g}" for c in columns[:-1]]
        cells.append(f"{summary['seconds']['mean']:.2f} ± {summary['seconds']['std']:.2f}")
        steps = f"{summary['step']['mean']:8.0f}"
        print(f"{name:10}{rates[name]:8g}" + "".join(f"{cell:>20}" for cell in cells) + steps)
    print("The rate is the largest of the schedule; seconds are those of training steps alone.")
    diverged = [name for name in summaries if not math.isfinite(summaries[name]["train_loss"]["mean"])]
    if diverged:
        print(f"{', '.join(diverged)}: a run diverged; pass --rates NAME=RATE with a lower rate.")


def plot_curves(title: str, histories: Histories, path: Path) -> None:
    """Training loss against steps and against seconds, validation loss against steps."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    kinds = [("step", "train_loss"), ("seconds", "train_loss"), ("step", "valid_loss")]
    for axes, (x_name, metric) in zip(panels, kinds, strict=True):
        for name, runs in histories.items():
            x, y = curves(runs, x_name).mean(axis=0), curves(runs, metric)
            axes.plot(x, y.mean(axis=0), label=name, linewidth=2, **STYLES[name])
            axes.fill_between(
                x, y.min(axis=0), y.max(axis=0), color=STYLES[name]["color"], alpha=0.15, lw=0
            )
        finite = [y for line in axes.lines for y in line.get_ydata() if np.isfinite(y)]
        wide = finite and 0 < min(finite) < max(finite) / 20
        axes.set(xlabel=x_name, ylabel=METRICS[metric], yscale="log" if wide else "linear")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(alpha=0.25)
    panels[0].legend()
    seeds = max(len(runs) for runs in histories.values())
    figure.suptitle(f"{title}: mean and range over {seeds} seed{'s' * (seeds > 1)}")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def curves(histories: list[wl.History], metric: str) -> np.ndarray:
    """What was measured, `(seeds, evaluations)`, NaN after the end of a run that diverged."""
    values = np.full((len(histories), max(len(h.evaluations) for h in histories)), np.nan)
    for row, history in zip(values, histories, strict=True):
        row[: len(history.evaluations)] = [evaluation[metric] for evaluation in history.evaluations]
    return values


def write_results(args, workload: wl.Workload, rates, summaries, histories: Histories) -> None:
    """results.json: settings, figures of every evaluation, and what they were measured with."""
    packages = ("mfac_jax", "jax", "jaxlib", "flax", "optax", "numpy")
    results = {
        "workload": workload.name,
        "source": workload.source,
        "settings": vars(args) | {"rates": rates},
        "revision": git_revision(),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()},
        "machine": {
            "platform": platform.platform(),
            "cpus": os.cpu_count(),
            "device": jax.devices()[0].device_kind,
        },
        "optimizers": {
            name: {
                "rate": rates[name],
                "final": summaries[name],
                "evaluations": [history.evaluations for history in histories[name]],
            }
            for name in histories
        },
    }
    text = json.dumps(without_nan(json.loads(json.dumps(results, default=str))), indent=1, allow_nan=False)
    (args.out / "results.json").write_text(text + "\n")


def without_nan(value: Any) -> Any:
    """The same with null for what is not finite: JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(x) for key, x in value.items()}
    if isinstance(value, list):
        return [without_nan(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def git_revision() -> str | None:
    """The commit of this file's repository, with -dirty after changes; None outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
