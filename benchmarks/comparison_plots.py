"""The pictures of `report_comparison`: curves, sensitivity to the rate, rate times damping."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib import ticker
from PIL import Image

Record = dict[str, Any]
# Final training loss for each rate, rates rising, infinite where a run diverged.
Scan = Mapping[float, float]

# Colours that colour-blind readers can tell apart (Okabe and Ito), with line styles and markers for print.
STYLES: dict[str, dict[str, Any]] = {
    "mfac-default": {"label": "M-FAC, untuned", "color": "#56B4E9", "linestyle": "-", "marker": "D"},
    "mfac": {"label": "M-FAC, tuned", "color": "#0072B2", "linestyle": "-", "marker": "o"},
    "mfac-metric": {"label": "M-FAC without window", "color": "#56B4E9", "linestyle": ":", "marker": "D"},
    "sgd": {"label": "SGD, Nesterov momentum", "color": "#D55E00", "linestyle": "--", "marker": "s"},
    "adamw": {"label": "AdamW", "color": "#009E73", "linestyle": "-.", "marker": "^"},
    "nadamw": {"label": "NAdamW", "color": "#CC79A7", "linestyle": (0, (1, 1)), "marker": "v"},
    "muon": {"label": "Muon", "color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "<"},
    "soap": {"label": "SOAP", "color": "#8C564B", "linestyle": "-.", "marker": "*"},
    "normuon": {"label": "NorMuon", "color": "#000000", "linestyle": (0, (1, 1)), "marker": "h"},
    "kron": {"label": "PSGD-Kron", "color": "#B2912F", "linestyle": (0, (5, 1)), "marker": "d"},
    "kfac": {"label": "K-FAC", "color": "#E69F00", "linestyle": "--", "marker": ">"},
    "prodigy": {"label": "Prodigy, untuned", "color": "#332288", "linestyle": "-.", "marker": "p"},
    "dadapt-adamw": {
        "label": "D-Adapt AdamW, untuned",
        "color": "#44AA99",
        "linestyle": ":",
        "marker": "X",
    },
    "schedule-free-adamw": {
        "label": "Schedule-free AdamW, untuned",
        "color": "#117733",
        "linestyle": "--",
        "marker": "8",
    },
    "dog": {"label": "DoG, untuned", "color": "#882255", "linestyle": ":", "marker": "H"},
    "mfac-published": {
        "label": "M-FAC as published",
        "color": "#7F7F7F",
        "linestyle": (0, (1, 1)),
        "marker": "x",
    },
    "mfac-published-tuned": {
        "label": "M-FAC as published, tuned rate",
        "color": "#7F7F7F",
        "linestyle": "--",
        "marker": "P",
    },
}


def panels(count: int) -> tuple[Any, list[Any]]:
    """Make a figure with so many axes, two in a row."""
    rows = math.ceil(count / 2)
    figure, grid = plt.subplots(rows, 2, figsize=(10, 3 * rows + 0.8), layout="constrained", squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return figure, list(grid.flat[:count])


def finish(figure, path: Path) -> None:
    """Put one legend above all panels, and write a file of 256 colours: a third of the size."""
    entries = {}
    for axes in figure.axes:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside upper center", ncols=4, fontsize=9)
    figure.set_dpi(90)
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    plt.close(figure)


def log_if_wide(axes) -> None:
    """Make the y axis logarithmic if the lines span more than a factor of 100."""
    values = np.array([value for line in axes.lines for value in line.get_ydata()], float)
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 100 * values.min():
        axes.set_yscale("log")


# ------------------------------------------------------------------------------------------- curves


def plot_curves(problems: Mapping[str, Mapping[str, Sequence[Record]]], path: Path) -> None:
    """Draw training loss over steps and over seconds: mean and range over each optimizer's seeds."""
    figure, grid = panels(2 * len(problems))
    pairs = zip(grid[::2], grid[1::2], strict=True)
    for (left, right), (problem, own) in zip(pairs, problems.items(), strict=True):
        # The recipe at its own rate is left out where its tuned form is there: one grey line is enough.
        hidden = {"mfac-published"} if "mfac-published-tuned" in own else set()
        shown = {name: runs for name, runs in own.items() if runs and name not in hidden}
        for axes, axis in ((left, "step"), (right, "seconds")):
            for name, runs in shown.items():
                draw_curve(axes, name, runs, axis)
            log_if_wide(axes)
            # Where the loss starts far above, as with batch norm, the picture begins later.
            seen_from = 0 if axes.get_yscale() == "log" else 1 / 3
            limits = [loss_at(run, seen_from) for runs in shown.values() for run in runs]
            axes.set_ylim(top=min(axes.get_ylim()[1], 1.3 * max(limits, default=1.0)))
            if seen_from and shown:
                axes.set_ylim(bottom=0.95 * min(loss_at(run, 1) for runs in shown.values() for run in runs))
            axes.set(xlabel=axis, title=problem)
            axes.grid(alpha=0.25)
        left.set_ylabel("training loss")
        right.set_xscale("log")
        right.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        right.xaxis.set_major_formatter("{x:g}")
        right.xaxis.set_minor_formatter(ticker.NullFormatter())
    finish(figure, path)


def loss_at(run: Record, part: float) -> float:
    """The training loss after this part of the steps; if it diverged, the loss before the first."""
    evaluations = run["evaluations"]
    loss = evaluations[min(int(part * len(evaluations)), len(evaluations) - 1)]["train_loss"]
    return evaluations[0]["train_loss"] if loss is None else loss


def draw_curve(axes, name: str, runs: Sequence[Record], axis: str) -> None:
    """Draw one optimizer's line and band."""
    first = int(axis == "seconds")  # at zero seconds there is no logarithm
    length = min(len(run["evaluations"]) for run in runs)
    evaluations = [run["evaluations"][first:length] for run in runs]
    x = np.array([[e[axis] for e in run] for run in evaluations]).mean(axis=0)
    y = np.array([[e["train_loss"] for e in run] for run in evaluations], float)
    width = 2.2 if name in ("mfac", "mfac-default") else 1.3
    style = STYLES[name] | {"marker": None, "linewidth": width, "zorder": 2 + width}
    axes.plot(x, y.mean(axis=0), **style)
    axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=style["color"], alpha=0.1, lw=0)


# ------------------------------------------------------------------------------------- rate, damping


def plot_scans(problems: Mapping[str, Mapping[str, Scan]], starts: Mapping[str, float], path: Path) -> None:
    """Draw final loss over peak rate, one panel per problem; `starts` are losses before training."""
    figure, grid = panels(len(problems))
    for axes, (problem, scans) in zip(grid, problems.items(), strict=True):
        draw_scans(axes, {name: (scan, STYLES[name]) for name, scan in scans.items()}, starts[problem])
        axes.set_title(f"{problem}, seed 0")
    figure.supxlabel("at the upper edge: diverged, or no better than before training", fontsize=9)
    finish(figure, path)


def draw_scans(axes, scans: Mapping[str, tuple[Scan, dict]], start: float) -> None:
    """Draw loss over rate. What diverged or ended above the start stands at the start's loss."""
    for scan, style in scans.values():
        axes.plot(list(scan), [min(loss, start) for loss in scan.values()], lw=1.4, ms=5, **style)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="final training loss")
    log_if_wide(axes)
    axes.grid(alpha=0.25)


def plot_grids(
    problems: Mapping[str, Mapping[float | None, Scan]], starts: Mapping[str, float], path: Path
) -> None:
    """Draw M-FAC's loss over rate and damping, and beside it as lines with AdamW's."""
    figure, grid = panels(2 * len(problems))
    pairs = zip(grid[::2], grid[1::2], strict=True)
    for (left, right), (problem, scans) in zip(pairs, problems.items(), strict=True):
        mfac = {damping: scan for damping, scan in scans.items() if damping is not None}
        if mfac:
            draw_heat_map(figure, left, mfac)
        left.set_title(f"{problem}, seed 0: final training loss of M-FAC")
        shades = plt.get_cmap("cividis")(np.linspace(0, 0.85, max(1, len(mfac))))
        lines = {
            str(damping): (scan, {"label": f"M-FAC, damping {damping:g}", "color": shade, "marker": "o"})
            for (damping, scan), shade in zip(mfac.items(), shades, strict=False)
        }
        if None in scans:
            lines["adamw"] = (scans[None], STYLES["adamw"])
        draw_scans(right, lines, starts[problem])
        right.set_title(f"{problem}, seed 0")
    finish(figure, path)


def draw_heat_map(figure, axes, scans: Mapping[float, Scan]) -> None:
    """Draw the logarithm of the loss as colour and the loss as text; x for a run that diverged."""
    rates = sorted({rate for scan in scans.values() for rate in scan})
    losses = np.array([[scan.get(rate, math.nan) for rate in rates] for scan in scans.values()])
    logs = np.log10(np.where(np.isfinite(losses) & (losses > 0), losses, np.nan))
    image = axes.imshow(logs, plt.get_cmap("cividis_r"), aspect="auto", origin="lower")
    for (row, column), loss in np.ndenumerate(losses):
        text = "x" if math.isinf(loss) else "" if math.isnan(loss) else f"{loss:.2g}"
        color = "w" if image.norm(logs[row, column]) > 0.5 else "k"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=8)
    axes.set_yticks(range(len(scans)), [f"{damping:g}" for damping in scans])
    axes.set(xlabel="peak learning rate", ylabel="damping")
    figure.colorbar(image, ax=axes, label="log10 of the loss")
