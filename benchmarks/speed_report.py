"""The tables and pictures of speed, from stored results: steps, their growth, shares of training.

    python -m benchmarks.speed_report

reads benchmarks/results/steps.jsonl and training.jsonl and draws docs/speed_*.png. Where a case was
measured more than once, the last line counts. `scaling_law.py` fits the growth.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from benchmarks import scaling_law, step_time, training_share
from examples.common import json_lines
from examples.common.command_line import parse

RESULTS, PICTURES = Path(__file__).parent / "results", Path(__file__).parents[1] / "docs"
Line = dict[str, Any]
BARS = {
    "read": ("two readings of the window", "#BBBBBB"),
    "auto": ("mfac_jax", "#009E73"),
    "inverse": ("mfac_jax, solver='inverse'", "#0072B2"),
    "cholesky": ("mfac_jax, solver='cholesky'", "#56B4E9"),
    "original, CUDA": ("original, its CUDA extension", "#E69F00"),
    "original, triangular solves": ("original, triangular solves", "#E69F00"),
    "original": ("original", "#D55E00"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    results: Path = RESULTS
    """folder of steps.jsonl and training.jsonl"""
    pictures: Path = PICTURES
    """folder to draw in"""


def read(path: Path, *keys: str) -> list[Line]:
    """Read the lines; of several with equal keys the last counts."""
    lines = json_lines.read(path) if path.exists() else ()
    return list({tuple(line[key] for key in keys): line for line in lines}.values())


def draw_steps(lines: Sequence[Line], path: Path) -> None:
    """Draw a group of bars for each window: the floor, each solver, the original, in ms."""
    groups: dict[str, dict[str, float]] = {}
    for line in lines:
        name = f"{line['case']}\nm = {line['num_grads']:,}, d = {line['parameters']:,}"
        median = {key: 1e3 * values["median"] for key, values in line["seconds"].items()}
        bars = groups.setdefault(name, {})
        bars |= {key: value for key, value in median.items() if key in BARS}
        bars |= {"read": 2 * median["read"], line["solver"]: median[step_time.OURS]}
    kinds = [kind for kind in BARS if any(kind in bars for bars in groups.values())]
    figure, axes = plt.subplots(figsize=(8, 1.5 + 0.2 * len(kinds) * len(groups)), layout="constrained")
    for index, kind in enumerate(kinds):
        values = np.array([bars.get(kind, np.nan) for bars in groups.values()])
        places = np.arange(len(groups)) + 0.8 * (index + 0.5) / len(kinds) - 0.4
        drawn = axes.barh(places, values, 0.8 / len(kinds), label=BARS[kind][0], color=BARS[kind][1])
        axes.bar_label(drawn, [f"{v:,.0f}" if v == v else "" for v in values], padding=3, fontsize=8)
    axes.set_yticks(np.arange(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.set(xlabel="milliseconds for a step")
    axes.margins(x=0.08)
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def draw_training(lines: Sequence[Line], path: Path) -> None:
    """Draw the milliseconds of each optimizer alone, with its share of the whole step."""
    figure, axes = plt.subplots(1, len(lines), figsize=(5 * len(lines), 3.4), layout="constrained")
    for panel, line in zip(np.atleast_1d(axes), lines, strict=True):
        median = {name: 1e3 * values["median"] for name, values in line["seconds"].items()}
        alone = {
            name: median[name + training_share.ALONE]
            for name in median
            if name + training_share.ALONE in median
        }
        ours = ["#0072B2" if name.startswith("mfac") else "#E69F00" for name in alone]
        drawn = panel.barh(list(alone), list(alone.values()), color=ours)
        panel.bar_label(
            drawn, [f"{v / median[name]:.1%}" for name, v in alone.items()], padding=3, fontsize=8
        )
        panel.invert_yaxis()
        panel.margins(x=0.15)
        title = f"{line['workload']}, d = {line['parameters']:,}, batch {line['batch']}"
        panel.set(xlabel="ms of the optimizer; share of the whole step", title=title)
    figure.savefig(path, dpi=90)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Print and draw; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    steps = read(options.results / "steps.jsonl", "case", "num_grads", "parameters", "solver", "grid")
    training = read(options.results / "training.jsonl", "workload")
    of_cases = [line for line in steps if not line["grid"]]
    if of_cases:
        print(f"{step_time.table(of_cases)}\n")
        draw_steps(of_cases, options.pictures / "speed_steps.png")
    of_grid: dict[str, list[Line]] = {}
    for line in steps:
        if line["grid"]:
            of_grid.setdefault(line["solver"], []).append(line)
    for solver, lines in of_grid.items():
        print(f"{scaling_law.report(solver, lines)}\n")
    if of_grid:
        scaling_law.draw(of_grid, options.pictures / "speed_scaling.png")
    if training:
        print(training_share.table(training))
        draw_training(training, options.pictures / "speed_training.png")
    print(f"\nPictures: {options.pictures}/speed_*.png")


if __name__ == "__main__":
    main()
