"""Tables of what compile_for_gpu.py measured: memory, traffic and launches as compiled, predicted times.

    python -m benchmarks.gpu_tables benchmarks/results/gpu.jsonl

prints them from stored results, without a GPU or its compiler.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from benchmarks.gpu_targets import GPUS
from examples.common import json_lines, markdown
from examples.common.command_line import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    results: Annotated[Path, tyro.conf.Positional]
    """what `compile_for_gpu --out` wrote"""


BANDWIDTH = 0.9  # of the published one
KERNEL, WAIT = 2e-6, 15e-6  # seconds for a small kernel, and for the host to read a number and go on
COLUMN = 1.5e-6  # seconds a column of the Cholesky decomposition with its triangular solves
LINK, COLLECTIVE = 450e9, 10e-6  # bytes a second of NVLink one way on Hopper, and seconds to start one

ASSUMPTIONS = f"""\
Predicted, not measured: nothing here ran on a GPU. Nothing overlaps. Assumed are

- {BANDWIDTH:.0%} of the published bandwidth for the operands and results of all kernels;
- {KERNEL * 1e6:.0f} us for each kernel, and {WAIT * 1e6:.0f} us for each wait of the host;
- {COLUMN * 1e6:.1f} us for each row of the window for the Cholesky decomposition and its triangular solves,
  none for a kept inverse, whose loops count once in the traffic;
- {COLLECTIVE * 1e6:.0f} us for each collective, and {LINK / 1e9:.0f} GB/s for twice its bytes.
"""


class Prediction(NamedTuple):
    """Seconds of an update."""

    traffic: float
    kernels: float
    solve: float
    network: float

    @property
    def total(self) -> float:
        """Of the whole update."""
        return sum(self)


def predict(row: dict[str, Any]) -> Prediction:
    """Predict the time of an update from its compiled program; `ASSUMPTIONS` says how."""
    counted = row["launches"]
    return Prediction(
        traffic=sum(row["traffic"].values()) / (BANDWIDTH * GPUS[row["target"]].bandwidth),
        kernels=counted["kernels"] * KERNEL + counted["waits"] * WAIT,
        solve=0.0 if row["transform"].endswith("inverse") else row["num_grads"] * COLUMN,
        network=sum(count * COLLECTIVE + 2 * size / LINK for count, size in row["collectives"].values()),
    )


def beside(row: dict[str, Any]) -> list[str]:
    """How often gradients are read and written beside the two readings of the window.

    Not told where m x m matrices, which count too, are no small part of a gradient.
    """
    if 4 * row["num_grads"] ** 2 > 0.02 * row["gradient_bytes"]:
        return ["", ""]
    read = row["traffic"]["read"] - 2 * row["window_bytes"]
    return [f"{size / row['gradient_bytes']:.1f}" for size in (read, row["traffic"]["written"])]


def program(row: dict[str, Any]) -> str:
    """What was compiled, in words."""
    where = row["target"].upper() if row["devices"] == 1 else f"{row['devices']} {row['target'].upper()}"
    mode = "" if row["devices"] == 1 else f", {row['mode']}"
    return f"{row['tree']}, m = {row['num_grads']}, {row['transform']}, {row['storage']}, {where}{mode}"


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write what was compiled; memory in MiB on each device."""
    header = ["program", "window", "temporaries", "windows read", "written", "copied"]
    header += [
        "gradients read",
        "written",
        "kernels",
        "for each leaf",
        "graphs",
        "waits",
        "collectives",
    ]
    lines = []
    for row in rows:
        window, counted = row["window_bytes"], row["launches"]
        sent = [f"{n} {name}, {-(-size // 1024)} KiB" for name, (n, size) in row["collectives"].items()]
        lines.append(
            [
                program(row),
                f"{window / 2**20:,.0f}",
                f"{row['temporaries'] / 2**20:,.0f}",
                *(f"{size / window:.2f}" for size in (*row["traffic"].values(), row["copied"])),
                *beside(row),
                str(counted["kernels"]),
                f"{counted['kernels'] / row['leaves']:.1f}",
                str(counted["graphs"]),
                str(counted["waits"]),
                "; ".join(sent) or "none",
            ]
        )
    return markdown.table(header, lines)


def predicted_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the predicted times of an update, in ms."""
    header = ["predicted, ms", "traffic", "kernels and waits", "solve", "network", "update"]
    lines = []
    for row in rows:
        predicted = predict(row)
        times = (*predicted, predicted.total)
        lines.append([program(row), *(f"{seconds * 1e3:.2f}" for seconds in times)])
    return markdown.table(header, lines)


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Write both tables, and the assumptions between them."""
    return f"{measured_table(rows)}\n{ASSUMPTIONS}\n{predicted_table(rows)}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the tables of stored results; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    print(report(json_lines.read(options.results)))


if __name__ == "__main__":
    main()
