"""Time of M-FAC's update on the GPU that is here, beside the time that its compiled program predicts.

Each program is compiled for this GPU, with tuned kernels, and read as `compile_for_gpu` reads it. Its
update and `optax.adam`'s on the same parameters are timed in turn, with a new gradient at every round, and
so is a copy of a large array, the rate that a kernel can reach.

    python -m benchmarks.gpu_step_time --out benchmarks/results/gpu_measured.jsonl

The original's CUDA path is timed by `python -m benchmarks.step_time --original DIR`.
"""

import dataclasses
import itertools
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import gpu_tables, timing
from benchmarks.gpu_cases import STORAGES, TRANSFORMS, TREES, Case, Tree, compile_case, make
from benchmarks.gpu_targets import GPUS
from benchmarks.timing import Timed
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, OptionalPath, choices, parse

COPIED = 2**28  # float32 numbers
OURS, ADAM, COPY = "mfac_jax", "optax.adam", "copy"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose; every combination that fits is timed."""

    trees: Annotated[tuple[str, ...], choices(TREES)] = tuple(TREES)
    """parameters, each with its own number of gradients"""
    transforms: Annotated[tuple[str, ...], choices(TRANSFORMS)] = tuple(TRANSFORMS)
    """what to time the update of"""
    storages: Annotated[tuple[str, ...], choices(STORAGES)] = tuple(STORAGES)
    """of the window; parameters are float32"""
    rounds: Count = 20
    """timed, after one to warm up"""
    out: OptionalPath = None
    """file to add a line of JSON to for each program"""


def target_of(device_kind: str) -> str | None:
    """The name of a GPU in `gpu_targets`, from what JAX calls it; None for others."""
    return next((name for name in GPUS if name.upper() in device_kind.upper()), None)


class Update:
    """A compiled update with its state, which is donated to it at each step."""

    def __init__(self, tx: optax.GradientTransformationExtraArgs, params: Any, update: Any):
        self.params, self.update = params, update
        self.state = jax.jit(tx.init)(params)

    def step(self, gradient: Any) -> Any:
        """Take a step; return the update."""
        updates, self.state = self.update(gradient, self.state, self.params)
        return updates


def seconds_of(
    tree: Tree, tx: optax.GradientTransformationExtraArgs, update: Any, copied: int, rounds: int
) -> dict[str, list[float]]:
    """Time the compiled update, Adam's, and a copy of so many numbers, in turn."""

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, len(tree.shapes))
        return [jax.random.normal(k, shape) for k, shape in zip(keys, tree.shapes, strict=True)]

    params, adam = draw(jax.random.key(0)), optax.adam(1e-3)
    ours = Update(tx, params, update)
    others = Update(adam, params, jax.jit(adam.update, donate_argnums=1))
    numbers, copy = jnp.ones(copied), jax.jit(jnp.negative)
    functions: dict[str, Timed] = {OURS: ours.step, ADAM: others.step, COPY: lambda _: copy(numbers)}
    return timing.in_turn(functions, map(draw, jax.random.split(jax.random.key(1), rounds + 1)))


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Compile and time one program; return a line of results."""
    update, row = compile_case(case, jax.devices()[:1], {})
    seconds = seconds_of(TREES[case.tree], make(case), update, COPIED, rounds)
    return row | {
        "device": jax.devices()[0].device_kind,
        "copy_bytes": 2 * 4 * COPIED,
        "seconds": {name: timing.spread(values) for name, values in seconds.items()},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Write predicted and measured milliseconds, and the rate of the update over that of a copy."""
    header = ["program", "predicted, ms", "measured, ms", "fastest and slowest", "of the rate of a copy"]
    cells = []
    for row in rows:
        ours, adam, copy = (row["seconds"][name] for name in (OURS, ADAM, COPY))
        rate = sum(row["traffic"].values()) / ours["median"]
        cells.append(
            [
                gpu_tables.program(row),
                f"{gpu_tables.predict(row).total * 1e3:.2f}",
                f"{ours['median'] * 1e3:.2f}",
                f"{ours['min'] * 1e3:.2f} to {ours['max'] * 1e3:.2f}",
                f"{rate * copy['median'] / row['copy_bytes']:.0%}",
                f"{adam['median'] * 1e3:.2f}",
            ]
        )
    return markdown.table([*header, "optax.adam, ms"], cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    device = jax.devices()[0]
    target = target_of(device.device_kind)
    if target is None:
        known = ", ".join(gpu.name for gpu in GPUS.values())
        print(f"Left out: {device.device_kind} is none of {known}.", file=sys.stderr)
        return
    rows = []
    for tree, transform, storage in itertools.product(options.trees, options.transforms, options.storages):
        rows.append(measure(Case(target, "one GPU", tree, transform, storage), options.rounds))
        if options.out is not None:
            json_lines.append(options.out, rows[-1] | provenance.record(("jax", "jaxlib", "optax")))
        print(f"{gpu_tables.program(rows[-1])}: done", file=sys.stderr)
    print(timing.conditions(options.rounds))
    print(table(rows))


if __name__ == "__main__":
    main()
