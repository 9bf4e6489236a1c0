"""Weak scaling on simulated CPU devices: the model grows with the devices, each holds the same share.

The bytes that a device accesses, holds and sends are those of the compiled update, and must not grow. All
devices share the cores of this machine: the time of a step over the number of devices is what one device's
share takes. Times are medians, everything interleaved in one process.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

import mfac_jax
from benchmarks import compiled_update, timing
from benchmarks.timing import Timed
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, OptionalPath, parse

DEVICES = (1, 2, 4, 8)
MODES = ("jit", "shard_map")
LEAVES, WIDTH = 4, 256  # of each leaf; its rows grow with the devices


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    num_grads: Count = 256
    """rows of the window"""
    rows: Count = 128
    """of each of the 4 leaves, on each device"""
    repeats: Count = 21
    """steps timed, after one to warm up"""
    out: OptionalPath = None
    """file to add a line of JSON to for each row of the table"""


class Run(NamedTuple):
    """A compiled update, its state, and how to draw a gradient."""

    update: Callable[..., Any]
    draw: Callable[[jax.Array], Any]
    params: Any
    state: Any
    row: dict[str, Any]


def prepare(mode: str, devices: int, num_grads: int, rows: int) -> Run:
    """Compile M-FAC's update for leaves sharded over all devices, `rows` of each leaf on each."""
    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    axis_name = "data" if mode == "shard_map" else None
    tx = mfac_jax.mfac(3e-3, num_grads, metric="diagonal", storage=None, axis_name=axis_name)

    @functools.partial(jax.jit, out_shardings=sharding)
    def draw(key):
        keys = jax.random.split(key, LEAVES)
        return [jax.random.normal(k, (rows * devices, WIDTH)) for k in keys]

    params = draw(jax.random.key(0))
    shardings = mfac_jax.state_shardings(tx, params, sharding)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    update = tx.update
    if mode == "shard_map":
        specs = (PartitionSpec("data"), jax.tree.map(lambda s: s.spec, shardings))
        update = jax.shard_map(update, mesh=mesh, in_specs=(*specs, specs[0]), out_specs=specs)
    jitted = jax.jit(update, donate_argnums=1, out_shardings=(sharding, shardings))
    compiled = jitted.lower(params, state, params).compile()
    size = {"mode": mode, "devices": devices, "parameters": LEAVES * rows * devices * WIDTH}
    row = size | {"num_grads": num_grads} | compiled_update.figures(compiled, params, state)
    return Run(compiled, draw, params, state, row)


def stepping(run: Run, index: int) -> Timed:
    """Make a function that takes a step of the run, on its gradient among those of all runs."""
    state = run.state

    def advance(gradients):
        nonlocal state
        updates, state = run.update(gradients[index], state, run.params)
        return updates, state

    return advance


def time_steps(runs: Sequence[Run], repeats: int) -> list[float]:
    """Median seconds of a step of each run; every gradient is new, as repeated ones are slower."""
    functions = {str(index): stepping(run, index) for index, run in enumerate(runs)}
    numbers = tqdm(range(repeats + 1), "timing", unit="round")
    gradients = ([run.draw(jax.random.key(number + 1)) for run in runs] for number in numbers)
    return [float(np.median(seconds)) for seconds in timing.in_turn(functions, gradients).values()]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write the table in Markdown; memory and traffic are those of one device."""
    header = ["", "devices", "parameters", "window, MiB", "accessed, windows", "temporaries, KiB"]
    header += ["collectives", "bytes", "ms a step", "ms a device's share"]
    lines = []
    for row in rows:
        collectives = row["update_collectives"]
        lines.append(
            [
                row["mode"],
                str(row["devices"]),
                f"{row['parameters']:,}",
                f"{row['window_bytes'] / 2**20:.1f}",
                f"{row['update_traffic'] / row['window_bytes']:.2f}",
                f"{row['update_temporaries'] / 1024:,.0f}",
                "; ".join(f"{count} {name}" for name, (count, _) in collectives.items()) or "-",
                f"{sum(size for _, size in collectives.values()):,}",
                f"{row['seconds'] * 1e3:.1f}",
                f"{row['seconds'] / row['devices'] * 1e3:.1f}",
            ]
        )
    return markdown.table(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    runs = [prepare(mode, n, options.num_grads, options.rows) for mode in MODES for n in DEVICES]
    made_with = provenance.record(("mfac_jax", "jax", "jaxlib", "optax"))
    made_with |= {"repeats": options.repeats, "cores": timing.cores()}
    rows = [
        run.row | {"seconds": seconds} | made_with
        for run, seconds in zip(runs, time_steps(runs, options.repeats), strict=True)
    ]
    if options.out is not None:
        json_lines.append(options.out, *rows)
    print(f"on {timing.cores()} core(s) of {made_with['machine']}, {made_with['versions']}\n{table(rows)}")


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES[-1])
    main()
