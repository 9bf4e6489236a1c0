"""Tables in Markdown and pictures of what compare_optimizers.py measured, from its runs.jsonl alone."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

Record = dict[str, Any]

# Colours that colour-blind readers can tell apart (Okabe and Ito), with line styles and markers for print.
STYLES: dict[str, dict[str, Any]] = {
    "mfac": {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    "mfac-default": {"color": "#56B4E9", "linestyle": "-", "marker": "D"},
    "mfac-published-tuned": {"color": "#7F7F7F", "linestyle": "--", "marker": "P"},
    "mfac-published": {"color": "#7F7F7F", "linestyle": ":", "marker": "x"},
    "sgd": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "adamw": {"color": "#009E73", "linestyle": "-.", "marker": "^"},
    "nadamw": {"color": "#CC79A7", "linestyle": ":", "marker": "v"},
    "muon": {"color": "#000000", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "marker": "<"},
    "kfac": {"color": "#E69F00", "linestyle": "--", "marker": ">"},
    "soap": {"color": "#8C564B", "linestyle": "-.", "marker": "*"},
}
PEERS = ("sgd", "adamw", "nadamw")  # the best of these, tuned, sets the loss that all have to reach
NEAR_ZERO = 0.1  # a loss that falls below this part of the initial one counts as going to zero


class Summary(NamedTuple):
    """The figures of an optimizer on a problem.

    Attributes:
      scan: final training loss for each rate with seed 0, rates rising, infinite where a run diverged.
      best_rate: the one with the lowest loss in the scan.
      runs: those at the best rate, one a seed; empty where every rate diverged.
    """

    scan: dict[float, float]
    best_rate: float
    runs: list[Record]


# ------------------------------------------------------------------------------------------ figures


def final_loss(record: Record) -> float:
    """The last training loss, infinite where the run diverged."""
    loss = record["evaluations"][-1]["train_loss"]
    return math.inf if loss is None else loss


def scan_of(records: list[Record]) -> dict[float, float]:
    """Final training loss for each rate, rates rising."""
    return dict(sorted((record["rate"], final_loss(record)) for record in records))


def summarize(records: list[Record]) -> dict[str, Summary]:
    """A summary for each optimizer in the tuning runs of one problem."""
    summaries = {}
    for name in STYLES:
        own = [record for record in records if record["optimizer"] == name]
        scan = scan_of([record for record in own if record["seed"] == 0])
        if scan:
            best = min(scan, key=lambda rate: scan[rate])
            runs = [r for r in own if r["rate"] == best] if scan[best] < math.inf else []
            summaries[name] = Summary(scan, best, sorted(runs, key=lambda record: record["seed"]))
    return summaries


def width(scan: dict[float, float], factor: float) -> tuple[float, bool]:
    """Decades of rates around the best one whose loss is at most `factor` times the best loss.

    Between two rates log(loss) is taken as linear in log(rate); towards a rate that
    diverged it rises at once.

    Returns:
      The width, and whether it reaches an end of the grid, so that it may be larger.
    """
    rates, losses = np.log10(list(scan)), np.array(list(scan.values()))
    best = int(np.argmin(losses))
    if not np.isfinite(losses[best]):
        return math.nan, False
    logs = np.log(np.maximum(losses, np.finfo(float).tiny))
    limit = logs[best] + math.log(factor)
    ends, is_open = [], False
    for direction in (-1, 1):
        at = best
        while 0 <= at + direction < len(rates) and logs[at + direction] <= limit:
            at += direction
        beyond, end = at + direction, rates[at]
        if 0 <= beyond < len(rates):
            end += (limit - logs[at]) / (logs[beyond] - logs[at]) * (rates[beyond] - rates[at])
        else:
            is_open = True
        ends.append(end)
    return float(ends[1] - ends[0]), is_open


def first_at(record: Record, target: float, axis: str) -> float:
    """Where on the axis log(loss), linear between evaluations, reaches the target; infinite for never."""
    previous = None
    for evaluation in record["evaluations"]:
        loss = evaluation["train_loss"]
        if loss is None:
            return math.inf
        if loss <= target:
            if previous is None or loss <= 0:
                return evaluation[axis]
            share = math.log(previous["train_loss"] / target) / math.log(previous["train_loss"] / loss)
            return previous[axis] + share * (evaluation[axis] - previous[axis])
        previous = evaluation
    return math.inf


def target_loss(summaries: dict[str, Summary]) -> tuple[float, str | None]:
    """The loss that every seed of the best tuned peer reaches, and which peer that is."""
    peers = [name for name in PEERS if name in summaries]
    losses = {name: max(map(final_loss, summaries[name].runs), default=math.inf) for name in peers}
    losses = {name: loss for name, loss in losses.items() if loss < math.inf}
    best = min(losses, key=lambda name: losses[name], default=None)
    return (losses[best], best) if best else (math.nan, None)


# ------------------------------------------------------------------------------------------- tables


def spread(values: Sequence[float | None]) -> str:
    """Mean ± sample standard deviation."""
    numbers = np.array(values, float)  # None, JSON's NaN, becomes one
    if not np.isfinite(numbers).all():
        return "diverged"
    return f"{numbers.mean():.4g}" + (f" ± {numbers.std(ddof=1):.2g}" if len(numbers) > 1 else "")


def markdown(header: Sequence[str], rows: list[list[str]]) -> str:
    """A table."""
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, ["---"] * len(header), *rows))


def rate_cell(summary: Summary) -> str:
    """The best rate, with a mark where a wider grid might have a better one."""
    rates = list(summary.scan)
    at_end = len(rates) > 1 and summary.best_rate in (rates[0], rates[-1])
    return f"{summary.best_rate:g}" + (" (end of grid)" if at_end else "")


def results_table(summaries: dict[str, Summary]) -> str:
    """The optimizers side by side at their best rates."""
    target, whose = target_loss(summaries)
    metrics = next((s.runs[0]["evaluations"][0] for s in summaries.values() if s.runs), {})
    columns = ["train_loss", "valid_loss", *(["valid_accuracy"] if "valid_accuracy" in metrics else [])]
    header = ["", "best rate", *(column.replace("_", " ") for column in columns), "seeds", "ms a step"]
    header += [f"{axis} to {target:.4g}" for axis in ("steps", "seconds")] if whose else []
    rows = []
    for name, summary in summaries.items():
        if not summary.runs:
            rows.append([name, "every rate diverged"] + [""] * (len(header) - 2))
            continue
        row = [name, rate_cell(summary)]
        row += [spread([run["evaluations"][-1][column] for run in summary.runs]) for column in columns]
        row += [str(len(summary.runs)), f"{np.mean([run['step_ms'] for run in summary.runs]):.3g}"]
        for axis in ("step", "seconds") if whose else ():
            mean = float(np.mean([first_at(run, target, axis) for run in summary.runs]))
            row.append("not by every seed" if math.isinf(mean) else f"{mean:.3g}")
        rows.append(row)
    note = (
        f"\nThe fixed loss is what every seed of the best of tuned {', '.join(PEERS)} reaches: {whose}.\n"
    )
    return markdown(header, rows) + (note if whose else "")


def width_table(scans: dict[str, dict[float, float]], to_zero: bool) -> str:
    """How wide each optimizer's range of good rates is."""
    factors = {"within 10 %": 1.1} | ({"within a factor of 2": 2.0} if to_zero else {})
    rows = []
    for name, scan in scans.items():
        grid = f"{min(scan):g} to {max(scan):g}, {len(scan)} rates"
        widths = [width(scan, factor) for factor in factors.values()]
        rows.append([name, *(f"{'≥ ' * is_open}{decades:.2f}" for decades, is_open in widths), grid])
    return markdown(["", *(f"decades {name}" for name in factors), "grid"], rows)


def variants_table(records: list[Record]) -> str:
    """M-FAC with one setting changed: the loss at every rate."""
    names = dict.fromkeys(record["optimizer"] for record in sorted(records, key=lambda r: r["optimizer"]))
    scans = {name: scan_of([r for r in records if r["optimizer"] == name]) for name in names}
    rates = sorted({record["rate"] for record in records})
    rows = []
    for name, scan in scans.items():
        cells = [f"{scan[rate]:.4g}" if rate in scan else "" for rate in rates]
        rows.append([f"`{name}`", f"{min(scan.values()):.4g}", *cells])
    return markdown(["", "best", *(f"rate {rate:g}" for rate in rates)], rows)


def goes_to_zero(records: list[Record]) -> bool:
    """Whether the best final loss is a small part of the initial one."""
    return min(map(final_loss, records)) < NEAR_ZERO * records[0]["evaluations"][0]["train_loss"]


def grid_scans(records: list[Record]) -> dict[str, dict[float, float]]:
    """The scans of --grid on one problem: M-FAC at each damping, AdamW."""
    settings = sorted({(r["optimizer"], r["damping"]) for r in records}, key=lambda s: (s[0], s[1] or 0.0))
    return {
        name if damping is None else f"{name}, damping {damping:g}": scan_of(
            [r for r in records if (r["optimizer"], r["damping"]) == (name, damping)]
        )
        for name, damping in settings
    }


def provenance(records: list[Record], runs: list[Record]) -> str:
    """With what, on what and how the runs were done."""

    def values(name: str) -> str:
        found = {json.dumps(record[name], sort_keys=True) for record in runs}
        return "; ".join(sorted(text.strip('{}"').replace('"', "") for text in found))

    lines = [f"{name}: {values(name)}" for name in ("revision", "versions", "machine", "device")]
    lines.append(f"processes side by side while times were taken, one thread each: {values('jobs')}")
    lines.append("± is the standard deviation over the seeds (n - 1); steps and seconds are means")
    for record in {(r["missing"], r["problem"]): r for r in records if "missing" in r}.values():
        name, problem = record["missing"], record["problem"]
        if not any((r["optimizer"], r["problem"]) == (name, problem) for r in runs):
            lines.append(f"left out: {name} on {problem}: {record['reason']}")
    failed = {identity(record): record for record in records if "error" in record}
    for key in failed.keys() - {identity(run) for run in runs}:
        lines.append(f"failed: {key}: {failed[key]['error'][:200]}")
    return "".join(f"- {line}\n" for line in lines)


def identity(record: Record) -> tuple:
    """What two records of the same run have in common."""
    study = (record[name] for name in ("study", "problem", "data", "limit"))
    return (*study, record["optimizer"], record["rate"], record["damping"], record["seed"])


# ----------------------------------------------------------------------------------------- pictures


def panels(rows: int, columns: int):
    """A figure and its axes `(rows, columns)`."""
    size = (5 * columns + 2, 3.4 * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)


def finish(figure, grid, path: Path) -> None:
    """One legend beside all panels, and a file of 256 colours: a third of the size."""
    entries = {}
    for axes in grid.flat:
        entries |= dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right upper")
    figure.set_dpi(80)
    figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path, optimize=True)
    plt.close(figure)


def log_if_wide(axes) -> None:
    """A logarithmic y axis where the lines span more than a factor of 20."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in axes.lines])
    values = values[np.isfinite(values) & (values > 0)]
    if len(values) and values.max() > 20 * values.min():
        axes.set_yscale("log")


def plot_curves(problems: dict[str, dict[str, Summary]], path: Path) -> None:
    """Training loss against steps and seconds at the best rates: mean and range over the seeds."""
    figure, grid = panels(len(problems), 2)
    for row, (problem, summaries) in zip(grid, problems.items(), strict=True):
        runs = [run for summary in summaries.values() for run in summary.runs]
        top = 1.5 * max(
            (run["evaluations"][0]["train_loss"] for run in runs), default=1
        )  # what rises above it leaves
        for axes, axis in zip(row, ("step", "seconds"), strict=True):
            for name, summary in summaries.items():
                length = min((len(run["evaluations"]) for run in summary.runs), default=0)
                evaluations = [run["evaluations"][:length] for run in summary.runs]
                if not length:
                    continue
                x = np.array([[e[axis] for e in run] for run in evaluations]).mean(axis=0)
                y = np.array([[e["train_loss"] for e in run] for run in evaluations], float)
                axes.plot(x, y.mean(axis=0), label=name, linewidth=1.6, **STYLES[name] | {"marker": None})
                color = STYLES[name]["color"]
                axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.12, lw=0)
            log_if_wide(axes)
            axes.set_ylim(top=min(axes.get_ylim()[1], top))
            axes.set(xlabel=axis, ylabel="training loss", title=problem)
            if axis == "seconds":
                axes.set_xscale("log")
            axes.grid(alpha=0.25)
    finish(figure, grid, path)


def plot_scans(problems: dict[str, dict[str, dict[float, float]]], path: Path) -> None:
    """Final training loss against the peak rate, a panel a problem."""
    figure, grid = panels(1, len(problems))
    for axes, (problem, scans) in zip(grid.flat, problems.items(), strict=True):
        draw_scans(axes, {name: (scan, STYLES[name]) for name, scan in scans.items()})
        axes.set(title=f"{problem}, seed 0")
    finish(figure, grid, path)


def draw_scans(axes, scans: dict[str, tuple[dict[float, float], dict]]) -> None:
    """Loss against rate; runs that diverged or ended above 10 times the best stay off the picture."""
    best = min(min(scan.values()) for scan, _ in scans.values())
    for name, (scan, style) in scans.items():
        shown = [loss if math.isfinite(loss) else math.nan for loss in scan.values()]
        axes.plot(list(scan), shown, label=name, linewidth=1.6, markersize=5, **style)
    axes.set(xscale="log", xlabel="peak learning rate", ylabel="final training loss")
    log_if_wide(axes)
    if math.isfinite(best):
        axes.set_ylim(top=min(axes.get_ylim()[1], 300 * best if axes.get_yscale() == "log" else 3 * best))
    axes.grid(alpha=0.25)


def plot_grids(problems: dict[str, list[Record]], path: Path) -> None:
    """Rate times damping, and beside it the same as lines with AdamW's."""
    figure, grid = panels(len(problems), 2)
    for (left, right), (problem, records) in zip(grid, problems.items(), strict=True):
        draw_heat_map(figure, left, [r for r in records if r["damping"] is not None])
        left.set_title(f"{problem}: final training loss of mfac")
        shades = iter(plt.get_cmap("cividis")(np.linspace(0, 0.85, 5)))
        scans = grid_scans(records)
        styles = {name: {"color": next(shades), "marker": "o"} for name in scans} | {
            "adamw": STYLES["adamw"]
        }
        draw_scans(right, {name: (scan, styles[name]) for name, scan in scans.items()})
        right.set_title(f"{problem}, seed 0")
    finish(figure, grid, path)


def draw_heat_map(figure, axes, records: list[Record]) -> None:
    """The logarithm of the loss as colour, the loss as text; an x where a run diverged."""
    rates = sorted({record["rate"] for record in records})
    dampings = sorted({record["damping"] for record in records})
    losses = np.full((len(dampings), len(rates)), np.nan)
    for record in records:
        at = dampings.index(record["damping"]), rates.index(record["rate"])
        losses[at] = final_loss(record)
    logs = np.log10(np.where(np.isfinite(losses) & (losses > 0), losses, np.nan))
    image = axes.imshow(logs, plt.get_cmap("cividis_r"), aspect="auto", origin="lower")
    for (row, column), loss in np.ndenumerate(losses):
        text = "x" if math.isinf(loss) else "" if math.isnan(loss) else f"{loss:.2g}"
        color = "w" if image.norm(logs[row, column]) > 0.5 else "k"
        axes.text(column, row, text, ha="center", va="center", fontsize=7, color=color)
    axes.set_xticks(range(len(rates)), [f"{rate:g}" for rate in rates], fontsize=8)
    axes.set_yticks(range(len(dampings)), [f"{damping:g}" for damping in dampings])
    axes.set(xlabel="peak learning rate", ylabel="damping")
    figure.colorbar(image, ax=axes, label="log10 of the loss")


def by_problem(records: list[Record], study: str) -> dict[str, list[Record]]:
    """The runs of a study, grouped."""
    chosen = [record for record in records if record["study"] == study]
    names = dict.fromkeys(record["problem"] for record in chosen)
    return {name: [record for record in chosen if record["problem"] == name] for name in names}


def report(records: list[Record], out: Path) -> str:
    """Draw the pictures; the text of the report."""
    runs = list({identity(r): r for r in records if "evaluations" in r}.values())
    tuning, grids = by_problem(runs, "tuning"), by_problem(runs, "grid")
    summaries = {problem: summarize(own) for problem, own in tuning.items()}
    scans = {problem: {n: s.scan for n, s in own.items()} for problem, own in summaries.items()}
    parts = ["# Comparison of optimizers\n", provenance(records, runs)]
    for problem, own in summaries.items():
        steps, size = tuning[problem][0]["steps"], tuning[problem][0]["parameters"]
        parts.append(
            f"## {problem}\n\n{size:,} parameters, {steps} steps; {tuning[problem][0]['source']}\n"
        )
        parts.append(results_table(own))
        widths = {name: scan for name, scan in scans[problem].items() if len(scan) > 1}
        parts.append("Rates that do nearly as well as the best, seed 0:\n")
        parts.append(width_table(widths, goes_to_zero(tuning[problem])))
    for problem, own in grids.items():
        parts.append(f"## {problem}: rate and damping, seed 0\n")
        parts.append(width_table(grid_scans(own), goes_to_zero(own)))
    for problem, own in by_problem(runs, "variants").items():
        parts.append(f"## {problem}: one setting changed, seed 0, final training loss\n")
        parts.append(variants_table(own))
    if summaries:
        plot_curves(summaries, out / "comparison_curves.png")
        plot_scans(scans, out / "comparison_sensitivity.png")
    if grids:
        plot_grids(grids, out / "comparison_grid.png")
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, draw the pictures; `argv` is the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="runs.jsonl of compare_optimizers.py")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder to write to (default: docs)")
    args = parser.parse_args(argv)
    plt.switch_backend("Agg")  # pictures go to files; no window is opened
    try:
        records = [json.loads(line) for line in args.runs.read_text().splitlines()]
        args.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(f"cannot read {args.runs}: {error}; it is written by compare_optimizers.py")
    if not any("evaluations" in record for record in records):
        parser.error(f"{args.runs} holds no finished run: run compare_optimizers.py first")
    text = report(records, args.out)
    (args.out / "comparison.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
