"""What the rotated metric takes of a training step: one block of a transformer at several widths.

Whole steps with the rotated and with the diagonal metric are timed in turn; the difference is the rotated
metric's. Its bases turn at every tenth step, so means over twenty steps count, not medians.

    python -m benchmarks.metric_share --out benchmarks/results/metric.jsonl
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import mfac_jax
from benchmarks import timing
from benchmarks.training_share import start, training
from examples import text
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, OptionalPath, parse
from examples.common.training import bind_step

WIDTHS = (64, 128, 256, 512, 1024)
METRICS = ("rotated", "diagonal")
FIRST = 10  # steps at which bases turn at each gradient; they do not count
COUNTED = 20


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    widths: tuple[int, ...] = WIDTHS
    """of the transformer"""
    num_grads: Count = 8
    """rows of the window: at a width of 1,024 one takes 51 MB"""
    out: OptionalPath = None
    """file to add lines of JSON to"""


def measure(width: int, num_grads: int) -> dict[str, Any]:
    """Time steps of one block of this width, on 32 windows of 64 characters."""
    workload = text.make_workload(width=width, layers=1, steps=FIRST + COUNTED + 1, seed=0)
    steps = {}
    for metric in METRICS:
        tx = mfac_jax.mfac(num_grads=num_grads, metric=metric, storage=None)
        steps[metric] = training(start(workload, tx), bind_step(workload, tx, 0))
    batches = tqdm(workload.batches, f"width {width}", unit="round", leave=False)
    seconds = timing.in_turn(steps, batches)
    return {
        "width": width,
        "parameters": sum(x.size for x in jax.tree.leaves(workload.params)),
        "num_grads": num_grads,
        "seconds": {metric: float(np.mean(values[FIRST:])) for metric, values in seconds.items()},
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Write milliseconds and shares in Markdown."""
    rows = []
    for line in lines:
        rotated, diagonal = (line["seconds"][metric] for metric in METRICS)
        numbers = (f"{line['width']:,}", f"{line['parameters']:,}")
        rows.append(
            [*numbers, f"{1e3 * rotated:,.3g}", f"{1e3 * diagonal:,.3g}", f"{1 - diagonal / rotated:.0%}"]
        )
    header = [
        "width",
        "parameters",
        "step, ms",
        "with the diagonal metric, ms",
        "share of the rotated metric",
    ]
    return markdown.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    lines = [measure(width, options.num_grads) for width in options.widths]
    if options.out is not None:
        made_with = provenance.record(("mfac_jax", "jax", "jaxlib", "optax", "flax"))
        json_lines.append(options.out, *(line | made_with for line in lines))
    print(timing.conditions(COUNTED).replace("medians", "means"))
    print(table(lines))


if __name__ == "__main__":
    main()
