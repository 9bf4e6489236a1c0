"""What the state of M-FAC takes for models of 124 million and 1.3 billion parameters.

The table is from `memory_estimate`, with nothing allocated: on one H100, and on each device of a TPU pod of
64 chips, with parameters sharded over `fsdp` and `tensor`. `--check h100` and `--check v5p` compile the
updates, and add what the programs hold; they take the packages of compile_for_gpu.py, compile_for_tpu.py.

    python -m benchmarks.memory_table
    python -m benchmarks.memory_table --check h100 --storages int8 --out benchmarks/results/memory.jsonl
"""

import dataclasses
import functools
import itertools
import os
from collections.abc import Sequence
from typing import Annotated, Any

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, SingleDeviceSharding

import mfac_jax
from benchmarks import compile_for_tpu, gpu_cases, gpu_targets
from benchmarks.compiled_update import bytes_on_device
from examples import pod_transformer as pod
from examples.common import json_lines, markdown, provenance
from examples.common.command_line import NO_DEFAULT, Count, OptionalPath, choices, parse
from mfac_jax.components import rotated_metric

SIZES = {"124 million": pod.Size(25_600, 1024, 768, 12, 12), "1.3 billion": compile_for_tpu.SIZES["1b"]}
METRICS: dict[str, Any] = {
    "diagonal": "diagonal",
    "rotated": "rotated",
    "rotated, blocks of 128": rotated_metric(128),
}
TARGETS = ("h100", "v5p")
POD, CHIPS, TENSOR = "v5p:4x4x4", 64, 4


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose; every combination is a row."""

    sizes: Annotated[tuple[str, ...], choices(SIZES)] = tuple(SIZES)
    """of the transformer, in parameters"""
    metrics: Annotated[tuple[str, ...], choices(METRICS)] = tuple(METRICS)
    """in which the window works"""
    storages: Annotated[tuple[str, ...], choices(gpu_cases.STORAGES)] = tuple(gpu_cases.STORAGES)
    """of the window's rows; parameters are bfloat16"""
    num_grads: Count = 16
    """rows of the window"""
    check: Annotated[str | None, choices(TARGETS, many=False), NO_DEFAULT] = None
    """compile for this, and compare"""
    out: OptionalPath = None
    """file to add a line of JSON to for each program"""


@functools.cache
def model(size: str) -> Any:
    """The shapes of a model's parameters."""
    return pod.abstract(SIZES[size], jnp.dtype(jnp.bfloat16))[1]


def estimates(size: str, metric: str, storage: str, num_grads: int) -> dict[str, Any]:
    """Ask for the bytes on one device and on each of the pod; return a line of the table."""
    mesh: Any = AbstractMesh((CHIPS // TENSOR, TENSOR), pod.AXES)
    shapes = model(size)
    kinds: dict[str, Any] = {"metric": METRICS[metric], "storage": gpu_cases.STORAGES[storage]}
    estimate = functools.partial(mfac_jax.memory_estimate, shapes, num_grads, **kinds)
    of_pod = estimate(param_shardings=nnx.get_named_sharding(shapes, mesh))
    return {
        "size": size,
        "metric": metric,
        "storage": storage,
        "num_grads": num_grads,
        "parameters": SIZES[size].parameters,
        "h100": estimate().device,
        "v5p": of_pod.device,
    }


def compiled(target: str, size: str, metric: str, storage: str, num_grads: int) -> dict[str, Any]:
    """Compile the update for the target; return the bytes that the program holds of the state, and more."""
    shapes = model(size)
    kinds: dict[str, Any] = {"metric": METRICS[metric], "storage": gpu_cases.STORAGES[storage]}
    tx = mfac_jax.mfac(1e-2, num_grads, **kinds)
    state = jax.eval_shape(tx.init, shapes)
    if target == "h100":
        sharding = SingleDeviceSharding(gpu_targets.devices(target)[0])
        shardings, places = (jax.tree.map(lambda _: sharding, tree) for tree in (shapes, state))
    else:
        shardings = nnx.get_named_sharding(shapes, compile_for_tpu.make_mesh(POD, TENSOR))
        places = mfac_jax.state_shardings(tx, shapes, shardings)
    # Without weight decay parameters are not read: XLA leaves them out of the program.
    lowered = gpu_cases.lower_jit(tx.update, shapes, state, shardings, places)
    memory: Any = lowered.update.compile().memory_analysis()
    return {
        "target": target,
        "program": memory.argument_size_in_bytes - bytes_on_device(lowered.params),
        "temporaries": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
    }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Write gigabytes in Markdown; copies are those of the parameters in float32."""
    header = [
        "parameters",
        "metric",
        "storage",
        "rows",
        "one H100, GB",
        "copies in float32",
        f"{POD}, GB each",
    ]
    checked = [line for line in lines if "target" in line]
    if checked:
        header += [f"held by the program for {checked[0]['target']}, GB", "its temporaries, GB"]
    rows = []
    for line in lines:
        row = [line["size"], line["metric"], line["storage"], str(line["num_grads"])]
        row += [
            _gigabytes(line["h100"]),
            f"{line['h100'] / 4 / line['parameters']:.1f}",
            _gigabytes(line["v5p"]),
        ]
        if checked:
            row += [_gigabytes(line["program"]), _gigabytes(line["temporaries"])]
        rows.append(row)
    return markdown.table(header, rows)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g}"


def main(argv: Sequence[str] | None = None) -> None:
    """Estimate, compile and print; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    lines = []
    for choice in itertools.product(options.sizes, options.metrics, options.storages):
        line = estimates(*choice, options.num_grads)
        if options.check is not None:
            line |= compiled(options.check, *choice, options.num_grads)
        if options.out is not None:
            packages = ("mfac_jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "optax")
            json_lines.append(options.out, line | provenance.record(packages))
        lines.append(line)
    print(table(lines))


if __name__ == "__main__":
    main()
