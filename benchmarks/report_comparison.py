"""Tables in Markdown and pictures of what `compare_optimizers` measured, from its files alone."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
import tyro

from benchmarks import comparison_plots as plots
from benchmarks import comparison_results as results
from benchmarks.comparison_plots import STYLES, Record, Scan
from benchmarks.comparison_results import Summary, final_loss, scan_of
from benchmarks.optimizers import PUBLISHED_NUM_GRADS, TUNING_SEED
from examples.common import json_lines, markdown, over_seeds
from examples.common.command_line import Folder, parse, refuse

# Two, since no file of the repository is over 1 MB.
RESULTS = tuple(Path("benchmarks", "results", name) for name in ("runs.jsonl", "runs-others.jsonl"))


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional] = RESULTS
    """files of `compare_optimizers`; those of the repository if none is given"""
    out: Folder = Path("docs")
    """folder to draw in"""


# ------------------------------------------------------------------------------------------- tables


def bullets(lines: Sequence[str]) -> str:
    """Write a list."""
    return "".join(f"- {line}\n" for line in lines)


def summary_table(problems: Mapping[str, Mapping[str, Summary]]) -> str:
    """Write the final loss of every optimizer on every problem, the lowest of a problem in bold."""
    names = [name for name in STYLES if any(name in own for own in problems.values())]
    rows = {name: [STYLES[name]["label"]] for name in names}
    for own in problems.values():
        losses = {name: [final_loss(run) for run in summary.runs] for name, summary in own.items()}
        most = max((len(values) for values in losses.values()), default=0)
        means = {  # of several seeds, where others have them: the luck of one is no result
            name: float(np.mean(values)) if len(values) > (most > 1) else math.inf
            for name, values in losses.items()
        }
        lowest = min(means.values())
        for name in names:
            text = over_seeds.text(losses[name]) if losses.get(name) else why_empty(own.get(name))
            is_best = name in own and math.isfinite(lowest) and means[name] == lowest
            rows[name].append(f"**{text}**" if is_best else text)
    return markdown.table(["", *problems], list(rows.values()))


def why_empty(summary: Summary | None) -> str:
    """What stands in place of a loss that there is none of."""
    if summary is None:
        return "-"
    return "diverged" if math.isinf(min(summary.scan.values())) else "other seeds are missing"


def rate_cell(summary: Summary) -> str:
    """The best rate, with a mark where a wider grid might have a better one."""
    rates = list(summary.scan)
    at_end = len(rates) > 1 and summary.best_rate in (rates[0], rates[-1])
    return f"{summary.best_rate:g}" + (" (end of grid)" if at_end else "")


def results_table(summaries: Mapping[str, Summary]) -> str:
    """The optimizers side by side at their best rates."""
    target, whose = results.target_loss(summaries)
    metrics = next((s.runs[0]["evaluations"][0] for s in summaries.values() if s.runs), {})
    columns = ["train_loss", "valid_loss", *(["valid_accuracy"] if "valid_accuracy" in metrics else [])]
    header = ["", "rates tried", "best rate", *(column.replace("_", " ") for column in columns)]
    header += ["seeds", "ms a step"]
    header += [f"{axis} to {target:.4g}" for axis in ("steps", "seconds")] if whose else []
    rows = []
    for name, summary in summaries.items():
        row = [f"{STYLES[name]['label']} (`{name}`)", str(len(summary.scan))]
        rows.append(row)
        if not summary.runs:
            row += [why_empty(summary)] + [""] * (len(header) - 3)
            continue
        row.append(rate_cell(summary))
        row += [
            over_seeds.text([run["evaluations"][-1][column] for run in summary.runs]) for column in columns
        ]
        row += [str(len(summary.runs)), f"{summary.step_ms:.3g}"]
        for axis in ("step", "seconds") if whose else ():
            mean = float(np.mean([results.first_at(run, target, axis) for run in summary.runs]))
            row.append("not by every seed" if math.isinf(mean) else f"{mean:.3g}")
    return markdown.table(header, rows)


def standings_table(problems: Mapping[str, Mapping[str, Summary]]) -> str:
    """M-FAC untuned beside the best of the tuned rivals, and on how many problems it is no worse."""
    rows, ratios = [], {column: [] for column in ("train_loss", "valid_loss")}
    for title, own in problems.items():
        row = [title]
        for column, found in ratios.items():
            standing = results.standing(own, column)
            if standing is None:
                continue
            found.append(standing.ratio)
            theirs = f"{standing.theirs:.3g} ({STYLES[standing.whose]['label']})"
            row += [f"{standing.ours:.3g}", theirs, f"{standing.ratio:.3g}"]
        if len(row) > 1:
            rows.append(row)
    header = [
        "",
        "training loss",
        "best rival",
        "difference",
        "validation loss",
        "best rival",
        "difference",
    ]
    names = ", ".join(STYLES[name]["label"] for name in results.RIVALS)
    counts = "; ".join(
        f"{column.replace('_', ' ')} no worse on {sum(ratio <= 1 for ratio in found)} of {len(found)} "
        f"problems, within 2 % on {sum(1 < ratio <= 1.02 for ratio in found)} more"
        for column, found in ratios.items()
    )
    text = (
        f"M-FAC untuned beside the best of {names}, each tuned by its training loss. Losses below "
        f"{results.ROUNDING:g} count as equal. {counts}.\n"
    )
    return text + "\n" + markdown.table(header, rows) if rows else ""


def seconds_table(problems: Mapping[str, Mapping[str, Summary]]) -> str:
    """How long M-FAC untuned takes to the loss at which a tuned rival ends."""
    rivals, rows = ("nadamw", "muon"), []
    for title, own in problems.items():
        found = [results.seconds_to_loss_of(own, name) for name in rivals]
        cells = [("-", "-") if pair is None else (f"{pair[0]:.3g}", f"{pair[1]:.3g}") for pair in found]
        if any(found):
            rows.append([title, *(cell.replace("inf", "never") for pair in cells for cell in pair)])
    labels = [STYLES[name]["label"] for name in rivals]
    header = [
        "",
        *(text for label in labels for text in (f"{label}, whole run", f"M-FAC to {label}'s loss")),
    ]
    text = (
        "Seconds of training, means over the seeds (never: not by every seed). Of runs made at different "
        "times, beside different other work, they do not compare:\n\n"
    )
    return text + markdown.table(header, rows) if rows else ""


def width_table(scans: Mapping[str, Scan], to_zero: bool) -> str:
    """How wide each optimizer's range of good rates is."""
    best_adamw = min(scans["adamw"].values()) if "adamw" in scans else math.nan
    rows = []
    for name, scan in scans.items():
        limits = [1.1 * min(scan.values()), *([2 * min(scan.values())] if to_zero else []), best_adamw]
        found = [results.width(scan, limit) for limit in limits]
        cells = [
            "-" if math.isnan(decades) else f"{'≥ ' * is_open}{decades:.2f}" for decades, is_open in found
        ]
        rows.append([STYLES[name]["label"], *cells, f"{min(scan):g} to {max(scan):g}, {len(scan)} rates"])
    text = (
        "Decades of learning rates around the best one with nearly its final training loss, and with a "
        "loss as low as AdamW's best, on all rates tried with seed "
        f"{TUNING_SEED} (between two rates log(loss) is taken as linear in log(rate); "
        "≥: the range reaches an end of the rates):\n\n"
    )
    factors = ["within 10 %", *(["within a factor of 2"] if to_zero else []), "as low as AdamW's best"]
    return text + markdown.table(["", *(f"decades {name}" for name in factors), "rates"], rows)


def scans_table(scans: Mapping[str, Scan]) -> str:
    """The loss of each row at every rate."""
    rates = sorted({rate for scan in scans.values() for rate in scan})
    rows = []
    for name, scan in scans.items():
        best = min(scan, key=lambda rate: scan[rate])
        mark = " (end of grid)" if len(scan) > 1 and best in (min(scan), max(scan)) else ""
        cells = [f"{scan[rate]:.4g}" if rate in scan else "" for rate in rates]
        rows.append([name, f"{scan[best]:.4g}{mark}", *cells])
    return markdown.table(["", "best", *(f"rate {rate:g}" for rate in rates)], rows)


def variant_scans(records: list[Record]) -> dict[str, Scan]:
    """The losses of M-FAC with one setting changed, for each of the changes."""
    names = sorted({record["optimizer"] for record in records})
    return {f"`{name}`": scan_of([r for r in records if r["optimizer"] == name]) for name in names}


# -------------------------------------------------------------------------------------------- notes


def notes(tuning: Mapping[str, list[Record]], problems: Mapping[str, Mapping[str, Summary]]) -> list[str]:
    """What a reader of the results of these problems has to know."""
    summaries = [(name, summary) for own in problems.values() for name, summary in own.items()]
    names = {name for name, _ in summaries}
    lines = []
    if any(len(summary.scan) > 1 for _, summary in summaries):
        lines.append(
            "The rate of an optimizer is the one with the lowest final training loss on "
            f"seed {TUNING_SEED}, which is not among the seeds reported. Each has a grid of five rates, "
            "on finetune of three, and up to two more beyond an end where the lowest loss is at that end."
        )
    fixed = [
        STYLES[n]["label"]
        for n in STYLES
        if n in names and all(len(s.scan) < 2 for m, s in summaries if m == n)
    ]
    if fixed:
        lines.append(f"Run at one rate alone, not tuned: {'; '.join(fixed)}.")
    short = {
        title: min(run["steps"] for run in tuning[title])
        for title, own in problems.items()
        if any(name.startswith("mfac-published") for name in own)
    }
    short = [f"{steps} steps of {title}" for title, steps in short.items() if steps < PUBLISHED_NUM_GRADS]
    if short:
        text = f"The window of M-FAC as published, {PUBLISHED_NUM_GRADS} gradients, does not fill"
        lines.append(f"{text} in the {', the '.join(short)}.")
    if "muon" in names:
        text = (
            "Muon treats every array of 2 or more dimensions as a matrix, embeddings and output layer too"
        )
        lines.append(f"{text}.")
    for title in problems:
        if tuning[title][0]["problem"] == "noisy-digits":
            text = "the training loss is that of partly random labels; validation accuracy is what counts"
            lines.append(f"{title}: {text}.")
    return lines


def target_note(summaries: Mapping[str, Summary]) -> list[str]:
    """Where the loss comes from that steps and seconds are counted to."""
    whose, peers = results.target_loss(summaries)[1], [name for name in results.PEERS if name in summaries]
    text = f"The fixed loss is what every seed of the best of tuned {', '.join(peers)} reaches: {whose}."
    return [text] if whose else []


def description(records: list[Record]) -> str:
    """Describe model, length and data of a section's runs; several if they changed meanwhile."""
    sizes = " and ".join(f"{size:,}" for size in sorted({record["parameters"] for record in records}))
    steps = " and ".join(str(count) for count in sorted({record["steps"] for record in records}))
    cut = "" if records[0]["limit"] is None else " (cut)"
    sources = "; ".join(sorted({record["source"] for record in records}))
    return f"{sizes} parameters, {steps} steps{cut}; {sources}\n"


def revision_lines(sections: Mapping[str, list[Record]]) -> list[str]:
    """The M-FAC entries with runs of several revisions; peers do not depend on the revision."""
    found: dict[tuple[str, str, str], dict[str, None]] = {}
    for title, own in sections.items():
        for run in own:
            if run["optimizer"].startswith("mfac"):
                commit, _, dirty = run["revision"].partition("-")
                revisions = found.setdefault((title, run["study"], run["optimizer"]), {})
                revisions[commit[:8] + (dirty and f"-{dirty}")] = None
    return [
        f"runs of several revisions: {name} on {title}, {study}: {', '.join(revisions)}"
        for (title, study, name), revisions in found.items()
        if len(revisions) > 1
    ]


def provenance(records: list[Record], runs: list[Record], sections: Mapping[str, list[Record]]) -> str:
    """List with what, on what and how the runs were done."""

    def values(name: str) -> str:
        found = {json.dumps(record[name], sort_keys=True) for record in runs}
        return "; ".join(sorted(text.strip('{}"').replace('"', "") for text in found))

    lines = [f"{name}: {values(name)}" for name in ("revision", "versions", "machine", "device")]
    lines += revision_lines(sections)
    lines.append(f"processes side by side while times were taken, one thread each: {values('jobs')}")
    lines.append("± is the standard deviation over the seeds (n - 1); steps and seconds are means")
    for record in {(r["missing"], r["problem"]): r for r in records if "missing" in r}.values():
        name, problem = record["missing"], record["problem"]
        if not any((r["optimizer"], r["problem"]) == (name, problem) for r in runs):
            lines.append(f"left out: {name} on {problem}: {record['reason']}")
    failed = {results.identity(record): record for record in records if "error" in record}
    for key in failed.keys() - {results.identity(run) for run in runs}:
        lines.append(f"failed: {key}: {failed[key]['error'][:200]}")
    return bullets(lines)


# ------------------------------------------------------------------------------------------- report


class Studies(NamedTuple):
    """What stored runs are about.

    Attributes:
      records: all lines of the files.
      runs: finished runs; of equal ones the last counts.
      sections: runs by title.
      tuning: those of them that look for the best rate.
      grids: those over rate and damping.
      summaries: of the tuning runs, by title and optimizer.
      whole: of those that no --steps cut; of all, if there are no others.
    """

    records: list[Record]
    runs: list[Record]
    sections: Mapping[str, list[Record]]
    tuning: Mapping[str, list[Record]]
    grids: Mapping[str, list[Record]]
    summaries: Mapping[str, Mapping[str, Summary]]
    whole: Mapping[str, Mapping[str, Summary]]


def studies(records: list[Record]) -> Studies:
    """Sort the lines."""
    runs = list({results.identity(r): r for r in records if "evaluations" in r}.values())
    sections = results.by_section(runs)
    tuning, grids = results.select(sections, "tuning"), results.select(sections, "grid")
    summaries = {title: results.summarize(own) for title, own in tuning.items()}
    whole = {title: own for title, own in summaries.items() if tuning[title][0]["limit"] is None}
    return Studies(records, runs, sections, tuning, grids, summaries, whole or summaries)


def report(found: Studies) -> str:
    """Write the text of the report."""
    parts = ["# Comparison of optimizers\n"]
    if found.summaries:
        seeds = sorted({len(s.runs) for own in found.summaries.values() for s in own.values() if s.runs})
        over = " to ".join(str(count) for count in (seeds[:1] + seeds[-1:] if len(seeds) > 1 else seeds))
        parts.append(
            f"Final training loss, mean ± standard deviation over {over} seeds, the best in bold:\n"
        )
        parts += [summary_table(found.whole), bullets(notes(found.tuning, found.summaries))]
        parts += [standings_table(found.summaries), seconds_table(found.summaries)]
    parts += ["## How it was measured\n", provenance(found.records, found.runs, found.sections)]
    for title, own in found.summaries.items():
        tuning = found.tuning[title]
        parts += [f"## {title}\n", description(tuning), results_table(own)]
        parts.append(bullets(target_note(own) + notes(found.tuning, {title: own})))
        several = results.full_scans(tuning, found.grids.get(title, []))
        if several:
            parts.append(width_table(several, results.goes_to_zero(tuning)))
    for title, own in found.grids.items():
        parts.append(f"## {title}: rate and damping, seed {TUNING_SEED}, final training loss\n")
        parts.append(
            scans_table(
                {
                    "AdamW" if d is None else f"M-FAC, damping {d:g}": s
                    for d, s in results.grid_scans(own).items()
                }
            )
        )
    for title, own in results.select(found.sections, "variants").items():
        parts.append(f"## {title}: one setting changed, seed {TUNING_SEED}, final training loss\n")
        parts.append(scans_table(variant_scans(own)))
    return "\n".join(parts)


def draw(found: Studies, out: Path) -> None:
    """Draw the pictures of the report."""
    starts = {title: results.initial_loss(own) for title, own in found.sections.items()}
    if found.summaries:
        curves = {title: {n: s.runs for n, s in own.items()} for title, own in found.whole.items()}
        curves = {title: own for title, own in curves.items() if any(own.values())}
        if curves:  # runs of the tuning seed alone have none
            plots.plot_curves(curves, out / "comparison_curves.png")
        scans = {title: {n: s.scan for n, s in own.items()} for title, own in found.whole.items()}
        plots.plot_scans(scans, starts, out / "comparison_sensitivity.png")
    if found.grids:
        grid_lines = {title: results.grid_scans(own) for title, own in found.grids.items()}
        plots.plot_grids(grid_lines, starts, out / "comparison_grid.png")


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables, draw the pictures; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    plt.switch_backend("Agg")  # pictures go to files; no window is opened
    names = ", ".join(map(str, options.runs))
    try:
        records = [record for path in options.runs for record in json_lines.read(path)]
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        refuse(f"cannot read {names}: {error}; `compare_optimizers` writes such files")
    if not any("evaluations" in record for record in records):
        refuse(f"no finished run in {names}: run `compare_optimizers` first")
    found = studies(records)
    draw(found, options.out)
    print(report(found))


if __name__ == "__main__":
    main()
