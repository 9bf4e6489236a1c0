"""The tables of README.md and of the site, from the stored results alone.

    python -m benchmarks.stored_tables

writes each into a file of its own, for the pages to include, and brings those in README.md up to date.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import (
    compare_pruning,
    gpu_tables,
    kronecker_cost,
    metric_share,
    report_comparison,
    scaling_law,
    speed_report,
    static_algorithm,
    step_time,
    steps_to_accuracy,
    storage_accuracy,
    storage_frontier,
    tpu_tables,
    training_share,
    weak_scaling,
)
from benchmarks.comparison_plots import STYLES
from benchmarks.comparison_results import Summary, standing
from benchmarks.problems import PROBLEMS
from examples.common import json_lines, markdown, over_seeds
from examples.common.command_line import Folder, parse

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# What the README shows of the comparison.
TITLES = {
    "digits-mlp": "digits, MLP",
    "digits-cnn": "digits, CNN",
    "cifar10": "CIFAR-10, ResNet-20",
    "text": "text, transformer",
}
LOSSES = ("train_loss", "valid_loss")
OPTIMIZERS = ("mfac-default", "muon", "soap", "nadamw", "adamw", "sgd")
Tables = dict[str, Callable[[], str]]


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    out: Folder = ROOT / "out" / "tables"
    """folder to write to"""


def _read(name: str) -> list[dict[str, Any]]:
    return json_lines.read(RESULTS / f"{name}.jsonl")


def _comparison() -> Tables:
    records = [record for path in report_comparison.RESULTS for record in json_lines.read(ROOT / path)]
    found = report_comparison.studies(records)

    def training() -> str:
        shown = {
            title: {name: found.whole[problem][name] for name in OPTIMIZERS}
            for problem, title in TITLES.items()
        }
        return report_comparison.summary_table(shown)

    def standings() -> str:
        counts = []
        for column in LOSSES:
            places = [standing(own, column) for own in found.summaries.values()]
            ratios = [place.ratio for place in places if place is not None]
            counts.append(f"{sum(ratio <= 1 for ratio in ratios)} of {len(ratios)}")
        return (
            "Beside the best of tuned Muon, SOAP and NAdamW, untuned M-FAC has a training loss that is no\n"
            f"worse on {counts[0]} problems, and a validation loss that is no worse on {counts[1]}.\n"
        )

    def beside(rival: str) -> str:
        """Training and validation losses of M-FAC, untuned, beside those of a rival."""
        rows = []
        for problem, own in found.whole.items():
            if all(name in own and own[name].runs for name in (OPTIMIZERS[0], rival)):
                rows.append(
                    [problem, *(_loss(own[name], c) for c in LOSSES for name in (rival, OPTIMIZERS[0]))]
                )
        label = STYLES[rival]["label"]
        header = [f"{kind}: {name}" for kind in ("training", "validation") for name in (label, "M-FAC")]
        return markdown.table(["", *header], rows)

    def comparison() -> str:
        return report_comparison.report(found).split("\n", 1)[1]

    return {
        "training": training,
        "standings": standings,
        "beside_adamw": lambda: beside("adamw"),
        "beside_published": lambda: beside("mfac-published-tuned"),
        "comparison": comparison,
    }


def _loss(summary: Summary, column: str) -> str:
    return over_seeds.text([run["evaluations"][-1][column] for run in summary.runs])


def _storage() -> Tables:
    records = _read("frontier")
    cut = [panel for panel in storage_frontier.panels(records, list(PROBLEMS)) if panel.steps]
    short = {
        f"storage_{panel.problem}": lambda panel=panel: storage_frontier.short_table(records, panel)
        for panel in cut
    }
    return {
        "storage": lambda: storage_frontier.long_table(records),
        "storage_accuracy": lambda: storage_accuracy.table(_read("storages")),
        **short,
    }


def _speed() -> Tables:
    steps = speed_report.read(RESULTS / "steps.jsonl", "case", "num_grads", "parameters", "solver", "grid")
    training = speed_report.read(RESULTS / "training.jsonl", "workload")
    static = _read("static")[-1]

    def laws() -> str:
        solvers = dict.fromkeys(line["solver"] for line in steps if line["grid"])
        of_solvers = {s: [line for line in steps if line["grid"] and line["solver"] == s] for s in solvers}
        return "\n\n".join(scaling_law.report(solver, lines) for solver, lines in of_solvers.items())

    return {
        "steps": lambda: step_time.table([line for line in steps if not line["grid"]]),
        "scaling_law": laws,
        "training_share": lambda: training_share.table(training),
        "metric_share": lambda: metric_share.table(_read("metric_share")),
        "static": lambda: static_algorithm.table(static["one_block"]),
    }


def _others() -> Tables:
    pruning = _read("pruning")
    return {
        "pruning_kept": lambda: compare_pruning.table(pruning, "kept"),
        "pruning_estimated": lambda: compare_pruning.table(pruning, "estimated"),
        "kronecker": lambda: kronecker_cost.table(_read("kronecker")),
        "steps_to_accuracy": lambda: steps_to_accuracy.table(_read("accuracy")),
        "gpu": lambda: gpu_tables.report(_read("gpu")),
        "tpu": lambda: tpu_tables.report(_read("tpu")),
        "weak_scaling": lambda: weak_scaling.table(_read("weak_scaling")),
    }


def tables() -> dict[str, str]:
    """Make all of them, in Markdown, by name."""
    makers = _comparison() | _storage() | _speed() | _others()
    return {name: make() for name, make in makers.items()}


def filled(text: str, made: dict[str, str]) -> str:
    """Put tables between the lines <!-- table NAME --> and <!-- end of table --> of a text."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{made[found[2]].strip()}\n{found[3]}"

    return re.sub(r"(<!-- table (\w+) -->)\n.*?(<!-- end of table -->)", fill, text, flags=re.DOTALL)


def write(out: Path) -> dict[str, str]:
    """Write each table into a file of its own."""
    out.mkdir(parents=True, exist_ok=True)
    made = tables()
    for name, table in made.items():
        (out / f"{name}.md").write_text(table)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    """Write the files and the README; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text(), write(options.out)))
    print(f"Tables: {options.out}, {readme}")


if __name__ == "__main__":
    main()
