"""What windows of several sizes and storages cost in bytes, and what they end at: a table and two pictures.

`mfac()` with each combination of rows, storage and metric, at the metric's own rate and damping, trains the
problems of `compare_optimizers`. Runs are kept in frontier.jsonl, and are not repeated. Runs cut by --steps
have tables and places in the pictures of their own.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import optimizers as opt
from benchmarks.comparison_pool import Runner, Store, read_records
from benchmarks.comparison_run import Run, Setting
from benchmarks.peers import OptionalExistingFolder
from benchmarks.problems import PROBLEMS
from benchmarks.storages import ALL
from examples.common import markdown, over_seeds
from examples.common.command_line import Count, Folder, OptionalCount, choices, parse

STUDY = "frontier"
COLUMNS = 3  # of panels in the picture of the frontier
# What whole runs are compared with, by label.
WINDOWS = {
    f"{storage}, {num_grads} rows": opt.frontier_name("rotated", num_grads, storage)
    for storage, num_grads in (
        ("float32", 64),
        ("int8", 64),
        ("int8", 32),
        ("int8", 16),
        ("low rank", 64),
    )
}
# Whose courses are drawn, with which marker.
CURVES = {"float32, 64 rows": "o", "int8, 32 rows": "s", "low rank, 64 rows": "^"}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose; every combination is run."""

    problems: Annotated[tuple[str, ...], choices(PROBLEMS)] = (
        "digits-mlp",
        "digits-cnn",
        "text",
        "cifar10",
    )
    """which problems to run"""
    storages: Annotated[tuple[str, ...], choices(ALL)] = tuple(ALL)
    """of the window's rows"""
    num_grads: tuple[int, ...] = opt.FRONTIER_NUM_GRADS
    """rows of the window"""
    metrics: Annotated[tuple[str, ...], choices(opt.FRONTIER_RATES)] = ("rotated",)
    """in which the window works"""
    seeds: Count = 3
    """runs of each, with seeds from 1 on"""
    steps: OptionalCount = None
    """cut every run to so many steps, for a quick trial"""
    jobs: Count = 1
    """processes side by side, one thread each"""
    data_dir: OptionalExistingFolder = None
    """folder with data for cifar10 and text, as in examples/"""
    out: Folder = Path("out", "frontier")
    """folder of frontier.jsonl and the pictures"""


def runs_of(options: Options, problem: str) -> list[Run]:
    """List the runs on a problem."""
    data = "given" if options.data_dir and PROBLEMS[problem].reads_data_dir else "default"
    return [
        Run(STUDY, problem, name, opt.FRONTIER_RATES[metric], None, seed, data, options.steps)
        for metric in options.metrics
        for num_grads in options.num_grads
        for storage in options.storages
        for name in [opt.frontier_name(metric, num_grads, storage)]
        for seed in range(1, 1 + options.seeds)
    ]


class Panel(NamedTuple):
    """A problem, and the steps that its runs are cut to."""

    problem: str
    steps: int | None

    def title(self) -> str:
        """As it is written."""
        return self.problem if self.steps is None else f"{self.problem}, {self.steps} steps"


def panels(records: Sequence[dict[str, Any]], problems: Sequence[str]) -> list[Panel]:
    """What there are runs of: in the order of the problems, whole ones first."""
    found = {Panel(record["problem"], record["limit"]) for record in records if _is_run(record)}
    return [
        panel
        for problem in problems
        for panel in sorted(found, key=lambda panel: panel.steps or 0)
        if panel.problem == problem
    ]


def _is_run(record: dict[str, Any]) -> bool:
    return record.get("study") == STUDY and "evaluations" in record


def runs_of_entries(records: Sequence[dict[str, Any]], panel: Panel) -> dict[str, list[dict[str, Any]]]:
    """The runs of every entry, one for each seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for record in records:
        if _is_run(record) and panel == (record["problem"], record["limit"]):
            found.setdefault(record["optimizer"], {})[record["seed"]] = record
    return {name: list(runs.values()) for name, runs in found.items()}


def points(records: Sequence[dict[str, Any]], panel: Panel) -> dict[str, dict[str, Any]]:
    """Bytes a parameter, and the losses of all seeds, of every entry."""
    return {
        name: {
            "bytes": np.mean([run["state_bytes"] / run["parameters"] for run in runs]),
            "train": np.array([run["evaluations"][-1]["train_loss"] for run in runs], float),
            "valid": np.array([run["evaluations"][-1]["valid_loss"] for run in runs], float),
        }
        for name, runs in runs_of_entries(records, panel).items()
    }


def table(records: Sequence[dict[str, Any]], panel: Panel) -> str:
    """Write the losses beside the bytes, in Markdown."""
    rows = [
        [
            name.removeprefix("mfac, "),
            f"{found['bytes']:.1f}",
            *(over_seeds.text(found[loss]) for loss in ("train", "valid")),
            str(len(found["train"])),
        ]
        for name, found in sorted(points(records, panel).items(), key=lambda item: item[1]["bytes"])
    ]
    return markdown.table(["", "bytes a parameter", "training loss", "validation loss", "seeds"], rows)


def long_table(records: Sequence[dict[str, Any]]) -> str:
    """Write the training losses of whole runs, a column for each of `WINDOWS`, in Markdown."""
    whole = {
        panel.problem: points(records, panel)
        for panel in panels(records, list(PROBLEMS))
        if panel.steps is None
    }
    in_bytes = [f"{whole['text'][name]['bytes']:.0f}" for name in WINDOWS.values()]
    rows = [["bytes a parameter, text", *in_bytes]]
    for problem, found in whole.items():
        cells = [
            over_seeds.text(found[name]["train"]) if name in found else "" for name in WINDOWS.values()
        ]
        rows.append([problem, *cells])
    return markdown.table(["", *WINDOWS], rows)


def short_table(records: Sequence[dict[str, Any]], panel: Panel) -> str:
    """Write training loss and bytes a parameter, a column for each number of rows, in Markdown."""
    lines: dict[str, dict[int, str]] = {}
    for name, found in points(records, panel).items():
        size = opt.FRONTIER[name]["num_grads"]
        cell = f"{over_seeds.text(found['train'])} ({found['bytes']:.0f})"
        lines.setdefault(opt.frontier_line(name), {})[size] = cell
    sizes = sorted({size for cells in lines.values() for size in cells})
    rows = [[name, *(cells.get(size, "") for size in sizes)] for name, cells in sorted(lines.items())]
    return markdown.table(["", *(f"{size} rows" for size in sizes)], rows)


def draw(records: Sequence[dict[str, Any]], shown: Sequence[Panel], path: Path) -> None:
    """Draw the training loss over the bytes of the state; dashes are the diagonal metric."""
    rows = -(-len(shown) // COLUMNS)
    figure, grid = plt.subplots(rows, COLUMNS, figsize=(4 * COLUMNS, 3.4 * rows), layout="constrained")
    drawn: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, shown, strict=False):
        lines: dict[str, list[Any]] = {}
        for name, found in points(records, panel).items():
            line = lines.setdefault(opt.frontier_line(name), [])
            line.append((found["bytes"], found["train"].mean(), over_seeds.deviation(found["train"])))
        for label, line in sorted(lines.items()):
            x, y, error = np.array(sorted(line)).T
            drawn[label] = axes.errorbar(x, y, error, marker="o", markersize=4, capsize=3, **_style(label))
        losses = [y for line in lines.values() for _, y, _ in line]
        axes.set(title=panel.title(), xscale="log", xlabel="bytes of the state a parameter")
        axes.set(yscale="log" if max(losses) > 2 * min(losses) else "linear", ylabel="final training loss")
        axes.xaxis.set_major_locator(LogLocator(2))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in grid.flat[len(shown) :]:
        axes.set_axis_off()
    if drawn:
        figure.legend(drawn.values(), drawn, loc="outside lower center", ncols=4, fontsize="small")
    _save(figure, path)


def _style(label: str) -> dict[str, Any]:
    metric, storage = label.removeprefix("mfac, ").split(", ")
    return {"color": f"C{list(ALL).index(storage)}", "linestyle": "--" if metric == "diagonal" else "-"}


def draw_curves(records: Sequence[dict[str, Any]], shown: Sequence[Panel], path: Path) -> None:
    """Draw the training losses along the runs, all seeds of each storage in one color."""
    figure, row = plt.subplots(
        1, len(shown), figsize=(4 * len(shown), 4), squeeze=False, layout="constrained"
    )
    for axes, panel in zip(row[0], shown, strict=True):
        entries = runs_of_entries(records, panel)
        for color, (label, marker) in enumerate(CURVES.items()):
            for run in entries.get(WINDOWS[label], []):
                x = [evaluation["step"] for evaluation in run["evaluations"]]
                y = [evaluation["train_loss"] for evaluation in run["evaluations"]]
                axes.plot(x, y, color=f"C{color}", marker=marker, markersize=4, linewidth=1, label=label)
                label = None  # one for all seeds
        axes.set(title=panel.title(), yscale="log", xlabel="step")
    row[0][0].set_ylabel("training loss")
    if row[0][0].lines:
        row[0][0].legend(fontsize="small")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"Picture: {path}")


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then make table and picture; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    store = Store(options.out / "frontier.jsonl")
    runner = Runner(Setting(options.data_dir, options.jobs), store)
    try:
        for problem in options.problems:
            runner.run(runs_of(options, problem), problem)
    finally:
        runner.pool.shutdown(cancel_futures=True)
    records = read_records(store.path)
    shown = panels(records, options.problems)
    for panel in shown:
        print(f"{panel.title()}\n\n{table(records, panel)}")
    draw(records, shown, options.out / "frontier.png")
    draw_curves(
        records, [panel for panel in shown if panel.steps is None] or shown, options.out / "curves.png"
    )


if __name__ == "__main__":
    main()
