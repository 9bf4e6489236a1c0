"""What an example shows at its end: tables, learning curves, results.json."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table

from examples.common import json_lines, over_seeds, provenance
from examples.common.training import History
from examples.common.workload import Workload

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
MIN_WIDTH = 200  # characters a line; in fewer, rich would cut off what does not fit

Histories = dict[str, list[History]]  # optimizer -> one history a seed
Summary = dict[str, dict[str, float]]  # metric -> its mean and standard deviation


def print_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table. The first column is on the left, the others are on the right."""
    console = Console()
    console.width = max(console.width, MIN_WIDTH)
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print()
    console.print(table)


def summarize(histories: Sequence[History]) -> Summary:
    """Mean and standard deviation over the seeds of the last evaluation of each run."""
    last = [history.evaluations[-1] for history in histories]
    columns = {metric: np.array([evaluation[metric] for evaluation in last]) for metric in last[0]}
    return {
        metric: {"mean": float(x.mean()), "std": over_seeds.deviation(x)} for metric, x in columns.items()
    }


def print_summaries(rates: Mapping[str, float], histories: Histories) -> None:
    """Print the optimizers side by side. NaN means that a run diverged."""
    summaries = {name: summarize(runs) for name, runs in histories.items()}
    has_accuracy = all("valid_accuracy" in summary for summary in summaries.values())
    metrics = [metric for metric in METRICS if has_accuracy or metric != "valid_accuracy"]

    def row(name: str, summary: Summary) -> list[str]:
        cells = [f"{summary[metric]['mean']:.4g} ± {summary[metric]['std']:.2g}" for metric in metrics]
        seconds = f"{summary['seconds']['mean']:.2f} ± {summary['seconds']['std']:.2f}"
        return [name, f"{rates[name]:g}", *cells, seconds, f"{summary['step']['mean']:.0f}"]

    print_table(
        f"At the end, mean ± standard deviation over {_seeds(histories)}",
        ["", "rate", *(METRICS[metric] for metric in metrics), "seconds", "steps"],
        [row(name, summary) for name, summary in summaries.items()],
    )
    print("The rate is the largest of the schedule. The seconds are those of training steps alone.")
    diverged = [name for name in summaries if not math.isfinite(summaries[name]["train_loss"]["mean"])]
    if diverged:
        print(f"{', '.join(diverged)}: a run diverged; pass --rates NAME=RATE with a lower rate.")


def plot_curves(title: str, histories: Histories, path: Path) -> None:
    """Draw the training loss over steps and over seconds, and the validation loss over steps."""
    figure = Figure(figsize=(13, 4), layout="constrained")
    panels = figure.subplots(1, 3)
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
    figure.suptitle(f"{title}: mean and range over {_seeds(histories)}")
    figure.savefig(path, dpi=100)


def _seeds(histories: Histories) -> str:
    number = max(map(len, histories.values()))
    return f"{number} seed{'s' * (number > 1)}"


def curves(histories: Sequence[History], metric: str) -> np.ndarray:
    """What was measured, `(seeds, evaluations)`; NaN after the end of a run that diverged."""
    values = np.full((len(histories), max(len(h.evaluations) for h in histories)), np.nan)
    for row, history in zip(values, histories, strict=True):
        row[: len(history.evaluations)] = [evaluation[metric] for evaluation in history.evaluations]
    return values


def write_results(
    path: Path,
    workload: Workload,
    settings: Mapping[str, Any],
    rates: Mapping[str, float],
    histories: Histories,
) -> None:
    """Write results.json: settings, figures of every evaluation, and what they were measured with."""
    results = {
        "workload": workload.name,
        "source": workload.source,
        "settings": dict(settings) | {"rates": dict(rates)},
        **provenance.record(),
        "device": jax.devices()[0].device_kind,
        "optimizers": {
            name: {
                "rate": rates[name],
                "final": summarize(runs),
                "evaluations": [history.evaluations for history in runs],
            }
            for name, runs in histories.items()
        },
    }
    text = json.dumps(json_lines.without_nan(results), indent=1, allow_nan=False, default=str)
    path.write_text(text + "\n")
