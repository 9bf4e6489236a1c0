"""Tables of what compile_for_tpu.py measured: memory and traffic as compiled, predicted times of a step.

    python -m benchmarks.tpu_tables benchmarks/results/tpu.jsonl

prints them from stored results, without a TPU or its compiler.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro

from examples.common import json_lines, markdown
from examples.common.command_line import parse


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    results: Annotated[Path, tyro.conf.Positional]
    """what `compile_for_tpu --out` wrote"""


class Chip(NamedTuple):
    """What Google publishes for one chip, as devices to JAX: HBM in GiB, the rest in GB/s and TFLOP/s."""

    devices: int
    hbm: float
    hbm_bandwidth: float
    network: float  # all links to other chips, both directions
    flops: float  # bfloat16


# https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, read in November 2026. A TPU7x chip is
# two devices, with half of these figures each; the two cores of a v5p chip are one device.
CHIPS = {
    "v5e": Chip(1, 16, 819, 400, 197),
    "v5p": Chip(1, 95, 2765, 1200, 459),
    "v6e": Chip(1, 32, 1638, 800, 918),
    "tpu7x": Chip(2, 192, 7380, 1200, 2307),
}
UTILISATION = 0.4  # assumed; PaLM reports 0.58 on TPU v4, recomputation counted (arXiv:2204.02311)
HOP = 1e-6  # seconds from chip to chip, the estimate of https://jax-ml.github.io/scaling-book/tpus
FLOAT32 = 6  # passes in bfloat16 that a float32 product with Precision.HIGHEST takes

ASSUMPTIONS = f"""\
Predicted, not measured. M-FAC: the bytes that its compiled update accesses at the full bandwidth of HBM;
the bytes of each collective twice over half of the published network bandwidth, and {HOP * 1e6:.0f} us a
chip along each axis of the torus; m^3 / 3 operations of the Cholesky decomposition at the full rate of
float32 products. That rate is out of reach: columns follow one another, and at 1 us each they would take
m us more. The model: the operations of its forward and backward pass, with layers computed anew, at
{UTILISATION:.0%} of the peak rate. Nothing overlaps.
"""


def chip(topology: str) -> Chip:
    """The chip of a topology such as v5p:4x4x4."""
    return CHIPS[topology.split(":")[0]]


class Prediction(NamedTuple):
    """Seconds of a training step."""

    model: float
    passes: float
    network: float
    solve: float

    @property
    def update(self) -> float:
        """M-FAC's time."""
        return self.passes + self.network + self.solve

    @property
    def share(self) -> float:
        """M-FAC's part of the step."""
        return self.update / (self.model + self.update)


def model_flops(size: dict[str, int], tokens: int) -> float:
    """Count the operations of forward and backward pass; XLA's count takes a loop over layers once.

    A product takes 2 for each of its parameters and token forward and 4 backward. `jax.checkpoint` runs
    layers forward again, all but the last product, whose result no derivative needs. Attention's two
    products are computed in full, also above the diagonal.
    """
    width = size["width"]
    layer = (8 * 12 - 2 * 4) * width**2 + 8 * 2 * size["context"] * width
    return float(tokens * (size["layers"] * layer + 6 * width * size["vocabulary"]))


def tokens(row: dict[str, Any]) -> int:
    """The tokens of one step, on all devices."""
    return row["sequences"] * row["size"]["context"]


def predict(row: dict[str, Any]) -> Prediction:
    """Predict the time of a step from the compiled programs; `ASSUMPTIONS` says how."""
    hardware = chip(row["topology"])
    hops = sum(int(n) for n in row["topology"].split(":")[1].split("x"))
    one_way = hardware.network * 1e9 / 2 / hardware.devices
    peak = hardware.flops * 1e12 / hardware.devices
    count, sent = (sum(figures) for figures in zip(*row["update_collectives"].values(), strict=True))
    return Prediction(
        model=model_flops(row["size"], tokens(row)) / row["devices"] / (UTILISATION * peak),
        passes=row["update_traffic"] / (hardware.hbm_bandwidth * 1e9 / hardware.devices),
        network=2 * sent / one_way + count * hops * HOP,
        solve=row["num_grads"] ** 3 / 3 * FLOAT32 / peak,
    )


def tokens_for(row: dict[str, Any], share: float) -> float:
    """How many tokens a step needs so that M-FAC is predicted to take this share of the time."""
    predicted = predict(row)
    return tokens(row) * predicted.update * (1 - share) / share / predicted.model


def hbm(row: dict[str, Any]) -> float:
    """The bytes of memory of one device."""
    hardware = chip(row["topology"])
    return hardware.hbm * 2**30 / hardware.devices


def allowed(row: dict[str, Any]) -> int:
    """Bytes that M-FAC may send: sums of products and a norm for each leaf, and updates that were split."""
    return row["leaves"] * (row["num_grads"] + 1) * 4 + row["split_updates"]


def measured_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write what was compiled; memory in MiB on each device."""
    header = [
        "topology (fsdp x tensor)",
        "chips",
        "devices",
        "parameters, billions",
        "m",
        "window",
        "state",
    ]
    header += ["temporaries of the step", "its peak", "HBM", "temporaries of M-FAC", "its traffic / window"]
    header += ["its collectives", "allowed", "compile, s"]
    lines = []
    for row in rows:
        collectives = [
            f"{count} {name}, {math.ceil(size / 1024)} KiB"
            for name, (count, size) in row["update_collectives"].items()
        ]
        in_mebibytes = [
            row[name] for name in ("window_bytes", "state_bytes", "step_temporaries", "step_peak")
        ]
        lines.append(
            [
                f"{row['topology']} ({row['mesh']['fsdp']} x {row['mesh']['tensor']})",
                *(f"{row[name]:,}" for name in ("chips", "devices")),
                f"{row['parameters'] / 1e9:.3g}",
                str(row["num_grads"]),
                *(f"{size / 2**20:,.0f}" for size in in_mebibytes),
                f"{hbm(row) / 2**20:,.0f}" + ("" if row["step_peak"] < hbm(row) else ", too little"),
                f"{row['update_temporaries'] / 2**20:,.0f}",
                f"{row['update_traffic'] / row['window_bytes']:.2f}",
                "; ".join(collectives),
                f"{math.ceil(allowed(row) / 1024)} KiB",
                f"{row['compile_seconds']:.0f}",
            ]
        )
    return markdown.table(header, lines)


def predicted_table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the predicted times of a step, in ms."""
    header = ["predicted, ms", "tokens a step", "model", "M-FAC: passes", "network", "Cholesky"]
    header += ["its share of the step", "a tenth at, tokens"]
    lines = []
    for row in rows:
        predicted = predict(row)
        lines.append(
            [
                f"{row['topology']}, {row['parameters'] / 1e9:.3g} billion, m = {row['num_grads']}",
                f"{tokens(row):,}",
                f"{predicted.model * 1e3:,.1f}",
                f"{predicted.passes * 1e3:,.1f}",
                f"{predicted.network * 1e3:.2g}",
                f"{predicted.solve * 1e3:.2g}",
                f"{predicted.share:.0%}",
                f"{tokens_for(row, 0.1) / 1e6:.2g} million",
            ]
        )
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
