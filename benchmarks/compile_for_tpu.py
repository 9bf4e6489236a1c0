"""Compile a training step for TPU pods, with no TPU, and say what it would take on each device.

The step is that of a transformer (forward, backward, M-FAC, the new parameters), sharded over `fsdp` and
`tensor`. libtpu compiles for a topology that is only named; it has to be installed: `pip install '.[tpu]'`.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

# libtpu looks for a TPU's metadata when it starts.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mfac_jax
from benchmarks import timing, tpu_tables
from benchmarks.compiled_update import collectives, figures, placed
from examples import pod_transformer as pod
from examples.common import json_lines, provenance
from examples.common.command_line import NO_DEFAULT, OptionalCount, OptionalPath, choices, parse

SIZES = {
    "tiny": pod.Size(512, 128, 256, 2, 4),
    "1b": pod.Size(32_768, 1024, 2048, 24, 16),
    "65b": pod.Size(32_768, 1024, 8192, 80, 64),
    "206b": pod.Size(32_768, 1024, 16_384, 64, 128),
    "533b": pod.Size(294_912, 1024, 18_432, 128, 144),
}


class Case(NamedTuple):
    """What to compile for a topology: `tensor` devices along that axis, all others along fsdp."""

    size: str = "1b"
    num_grads: int = 1024
    tensor: int = 4
    batch: int = 4  # sequences for each step of fsdp


# Widths and vocabularies are multiples of the devices, over which rows are split, and layers of 16: else,
# with one row on each device, XLA copies leaves of the window. m is what the memory of few chips holds.
CASES = {
    "v5e:2x4": Case(num_grads=32),
    "v6e:2x4": Case(num_grads=64),
    "v5p:2x2x2": Case(num_grads=256),
    "tpu7x:2x2x2": Case(num_grads=512),
    "v5p:4x4x4": Case(),
    "tpu7x:4x4x4": Case(),
    "v5e:16x16": Case(),
    "v6e:16x16": Case(),
    "tpu7x:8x8x8": Case(),
    "v5p:8x8x16": Case(),
    "v5p:16x16x16": Case("65b", tensor=8),
    "v5p:16x16x32": Case("65b", tensor=8),
    "tpu7x:16x16x16": Case("65b", tensor=8),
    "tpu7x:16x16x32": Case("206b", tensor=8),
    "tpu7x:16x24x24": Case("533b", tensor=8),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    topologies: tuple[str, ...] = tuple(CASES)
    """what to compile for"""
    size: Annotated[str | None, choices(SIZES, many=False), NO_DEFAULT] = None
    """of the transformer, in place of that of the topology in CASES"""
    num_grads: OptionalCount = None
    """gradients in the window, in place of those in CASES"""
    tensor: OptionalCount = None
    """devices along the tensor axis, in place of those in CASES"""
    batch: OptionalCount = None
    """sequences for each step of fsdp, in place of those in CASES"""
    out: OptionalPath = None
    """file to add a line of JSON to for each topology"""


def make_mesh(topology: str, tensor: int) -> Mesh:
    """Make the mesh of all devices of the topology, `tensor` of them along that axis."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = (len(devices) // tensor, tensor)
    grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, pod.AXES, axis_types=(AxisType.Auto,) * 2)


def train_step(graph, tx, activations, params, state, tokens):
    """Take one step; return the loss too."""
    loss = functools.partial(pod.loss, graph, activations=activations)
    value, gradients = jax.value_and_grad(loss)(params, tokens)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


def measure_update(tx: optax.GradientTransformation, params: Any, shardings: Any) -> dict[str, Any]:
    """Compile the update alone; return the figures of one device."""
    state_shardings = mfac_jax.state_shardings(tx, params, shardings)
    state = placed(jax.eval_shape(tx.init, params), state_shardings)
    params = placed(params, shardings)
    update = jax.jit(tx.update, donate_argnums=1, out_shardings=(shardings, state_shardings))
    return figures(update.lower(params, state, params).compile(), params, state)


def transformer(topology: str, size: pod.Size, tensor: int):
    """Make a topology's mesh, and the model's graph, parameter shapes and shardings."""
    mesh = make_mesh(topology, tensor)
    graph, shapes = pod.abstract(size, jnp.dtype(jnp.bfloat16))
    return mesh, graph, shapes, nnx.get_named_sharding(shapes, mesh)


def measure(topology: str, size: pod.Size, num_grads: int, tensor: int, batch: int) -> dict[str, Any]:
    """Compile the whole step and M-FAC's alone; return a line of the table."""
    mesh, graph, shapes, shardings = transformer(topology, size, tensor)
    tx = mfac_jax.mfac(3e-3, num_grads, metric="diagonal", storage=None)
    state_shardings = mfac_jax.state_shardings(tx, shapes, shardings)
    sequences = batch * mesh.shape["fsdp"]
    by_sequence = pod.batch_sharding(mesh)
    tokens = jax.ShapeDtypeStruct((sequences, size.context + 1), jnp.int32, sharding=by_sequence)
    replicated = NamedSharding(mesh, PartitionSpec())
    step = jax.jit(
        functools.partial(train_step, graph, tx, by_sequence),
        donate_argnums=(0, 1),
        out_shardings=(shardings, state_shardings, replicated),
    )
    state = placed(jax.eval_shape(tx.init, shapes), state_shardings)
    params = placed(shapes, shardings)
    compiled, seconds = timing.stopwatch(lambda: step.lower(params, state, tokens).compile())
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "topology": topology,
        "chips": mesh.size // tpu_tables.chip(topology).devices,
        "devices": mesh.size,
        "mesh": dict(mesh.shape),
        "size": size._asdict(),
        "parameters": size.parameters,
        "num_grads": num_grads,
        "sequences": sequences,
        "step_temporaries": memory.temp_size_in_bytes,
        "step_peak": held + memory.temp_size_in_bytes,
        "step_collectives": collectives(compiled.as_text()),
        "compile_seconds": round(seconds, 1),
    } | measure_update(tx, shapes, shardings)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile for each topology; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    given = {name: getattr(options, name) for name in Case._fields if getattr(options, name) is not None}
    rows = []
    for topology in options.topologies:
        case = CASES.get(topology, Case())._replace(**given)
        try:
            row = measure(topology, SIZES[case.size], case.num_grads, case.tensor, case.batch)
        except Exception as error:  # a topology that does not compile is a result too
            print(f"{topology}: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
            continue
        rows.append(row | provenance.record(("jax", "jaxlib", "libtpu", "flax", "optax")))
        if options.out is not None:
            json_lines.append(options.out, rows[-1])
        print(f"{topology}: compiled in {row['compile_seconds']} s", file=sys.stderr)
    if not rows:
        sys.exit("Nothing compiled: see above. libtpu comes with pip install '.[tpu]'")
    print(tpu_tables.report(rows))


if __name__ == "__main__":
    main()
