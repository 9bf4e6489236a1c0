"""How far updates from a smaller window are from those of a float32 one, on real gradients, and their time.

A transformer and a ResNet-20 are trained by `mfac()` with a float32 window. Windows in the other storages
get the same gradients. At every step all updates are timed in turn; the last ones are compared.

    python -m benchmarks.storage_accuracy --data-dir DIR --out benchmarks/results/storages.jsonl
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

import mfac_jax
from benchmarks import timing
from benchmarks.comparison_run import without_folder
from benchmarks.peers import OptionalExistingFolder
from benchmarks.storages import ALL
from benchmarks.training_share import start
from examples import cifar10, text
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import Count, OptionalPath, parse
from examples.common.workload import Workload

REFERENCE = "float32"
RATE = 1e-2


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    num_grads: Count = 64
    """rows of the windows"""
    steps: Count = 100
    """of training before the comparison"""
    data_dir: OptionalExistingFolder = None
    """folder with data, as in examples/"""
    out: OptionalPath = None
    """file to add lines of JSON to"""


def transforms(num_grads: int) -> dict[str, optax.GradientTransformation]:
    """`mfac` with each storage; without the step factor, which would differ for reasons of its own."""
    make = functools.partial(mfac_jax.mfac, RATE, num_grads, step_adaptation=0.0)
    return {name: make(storage=storage) for name, storage in ALL.items()}


def measure(workload: Workload, num_grads: int) -> dict[str, Any]:
    """Train, and return the distances of the last updates and the seconds of each."""
    found = transforms(num_grads)
    states = {name: start(workload, tx).opt_state for name, tx in found.items()}
    compiled = {name: jax.jit(tx.update, donate_argnums=1) for name, tx in found.items()}
    gradient = jax.jit(jax.grad(workload.loss, has_aux=True))
    # On the device as the states are: else the second step would be compiled once more.
    params, model_state = jax.device_put((workload.params, workload.model_state), jax.devices()[0])
    updates: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for indices in tqdm(workload.batches, workload.name, unit="step", leave=False):
        grads, model_state = gradient(params, model_state, workload.data, indices, jax.random.key(0))
        jax.block_until_ready(grads)
        for name, update in compiled.items():
            stepped, spent = timing.stopwatch(update, grads, states[name], params)
            updates[name], states[name] = stepped
            seconds[name].append(spent)
        params = optax.apply_updates(params, updates[REFERENCE])
    return {
        "problem": workload.name,
        "source": workload.source,
        "num_grads": num_grads,
        "steps": len(workload.batches),
        "distance": {name: distance(updates[name], updates[REFERENCE]) for name in found},
        "seconds": {name: timing.spread(seconds[name][1:]) for name in found},
        "window_bytes": {name: window_bytes(state) for name, state in states.items()},
        "parameters": workload.parameters,
    }


def distance(tree: Any, other: Any) -> float:
    """Compare the norm of the difference with that of the other."""
    flat, reference = (np.concatenate([np.ravel(x) for x in jax.tree.leaves(t)]) for t in (tree, other))
    return float(np.linalg.norm(flat - reference) / np.linalg.norm(reference))


def window_bytes(state: Any) -> int:
    """Count the bytes of the window."""
    return sum(x.nbytes for x in jax.tree.leaves(optax.tree.get(state, "window")))


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Write bytes an entry, distances and milliseconds in Markdown."""
    rows = []
    for name in ALL:
        row = [name]
        for line in lines:
            entries = line["num_grads"] * line["parameters"]
            row += [
                f"{line['window_bytes'][name] / entries:.2f}",
                f"{line['distance'][name]:.1%}",
                f"{1e3 * line['seconds'][name]['median']:.3g}",
            ]
        rows.append(row)
    header = ["storage"]
    for line in lines:
        header += [f"{line['problem']}: bytes an entry", "distance", "update, ms"]
    return markdown.table(header, rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    shared: dict[str, Any] = {"seed": 0, "data_dir": options.data_dir}
    workloads = (
        text.make_workload(steps=options.steps, **shared),
        cifar10.make_workload(epochs=1, batch_size=64, samples=10_000, **shared),
    )
    lines = [
        measure(
            workload._replace(
                batches=workload.batches[: options.steps],
                source=without_folder(workload.source, options.data_dir),
            ),
            options.num_grads,
        )
        for workload in workloads
    ]
    if options.out is not None:
        made_with = provenance.record(("mfac_jax", "jax", "jaxlib", "optax", "flax"))
        json_lines.append(options.out, *(line | made_with for line in lines))
    print(timing.conditions(options.steps - 1))
    print(table(lines))


if __name__ == "__main__":
    main()
