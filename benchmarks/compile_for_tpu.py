"""Compile a training step for TPU pods, with no TPU, and say what it would take on each chip.

The step is that of a transformer (forward, backward, M-FAC, the new parameters), sharded over `fsdp` and
`tensor`. libtpu compiles for a topology that is only named; it has to be installed: `pip install '.[tpu]'`.
"""

import argparse
import collections
import functools
import json
import math
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import pod_transformer as pod

import mfac_jax

TOPOLOGIES = ("v5p:4x4x4", "v5e:16x16", "v6e:16x16", "tpu7x:4x4x4", "tpu7x:8x8x8")
SIZES = {
    "tiny": pod.Size(512, 128, 256, 2, 4),
    "1b": pod.Size(32_768, 1024, 2048, 24, 16),
    "7b": pod.Size(32_768, 1024, 8192, 8, 64),
}
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2}
COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(text: str) -> dict[str, list[int]]:
    """The number of each collective operation in a compiled program, and the bytes of their results."""
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for shapes, operation in COLLECTIVE.findall(text):
        size = 0
        for dtype, dimensions in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            size += BYTES.get(dtype, 4) * math.prod(int(n) for n in dimensions.split(",") if n)
        found[operation][0] += 1
        found[operation][1] += size
    return dict(found)


def make_mesh(topology: str, tensor: int) -> Mesh:
    """All chips of the topology, `tensor` of them along that axis."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    shape = (len(devices) // tensor, tensor)
    grid = mesh_utils.create_device_mesh(shape, devices=devices, allow_split_physical_axes=True)
    return Mesh(grid, pod.AXES, axis_types=(AxisType.Auto,) * 2)


def train_step(graph, tx, params, state, tokens):
    """One step; the loss too."""
    value, gradients = jax.value_and_grad(functools.partial(pod.loss, graph))(params, tokens)
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, value


def bytes_on_chip(tree: Any) -> int:
    """The bytes that one chip holds of arrays that are sharded so."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def measure_update(tx: optax.GradientTransformation, params: Any, shardings: Any) -> dict[str, Any]:
    """Compile the update alone; figures of one chip."""
    state_shardings = mfac_jax.state_shardings(tx, params, shardings)
    state = placed(jax.eval_shape(tx.init, params), state_shardings)
    params = placed(params, shardings)
    update = jax.jit(tx.update, donate_argnums=1, out_shardings=(shardings, state_shardings))
    compiled: Any = update.lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    return {
        "leaves": len(jax.tree.leaves(params)),
        "window_bytes": bytes_on_chip(optax.tree.get(state, "window")),
        "state_bytes": bytes_on_chip(state),
        "update_temporaries": memory.temp_size_in_bytes,
        "update_traffic": compiled.cost_analysis()["bytes accessed"],
        "update_alias": memory.alias_size_in_bytes,
        "update_collectives": collectives(compiled.as_text()),
    }


def measure(topology: str, size: pod.Size, num_grads: int, tensor: int, batch: int) -> dict[str, Any]:
    """Compile the whole step, and M-FAC's alone; a line of the table."""
    mesh = make_mesh(topology, tensor)
    graph, shapes = pod.abstract(size, jnp.dtype(jnp.bfloat16))
    shardings = nnx.get_named_sharding(shapes, mesh)
    tx = mfac_jax.mfac(3e-3, num_grads)
    state_shardings = mfac_jax.state_shardings(tx, shapes, shardings)
    sequences = batch * mesh.shape["fsdp"]
    tokens = jax.ShapeDtypeStruct(
        (sequences, size.context + 1), jnp.int32, sharding=pod.batch_sharding(mesh)
    )
    replicated = NamedSharding(mesh, PartitionSpec())
    begin = time.perf_counter()
    step = jax.jit(
        functools.partial(train_step, graph, tx),
        donate_argnums=(0, 1),
        out_shardings=(shardings, state_shardings, replicated),
    )
    state = placed(jax.eval_shape(tx.init, shapes), state_shardings)
    compiled: Any = step.lower(placed(shapes, shardings), state, tokens).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "topology": topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "parameters": size.parameters,
        "num_grads": num_grads,
        "sequences": sequences,
        "step_temporaries": memory.temp_size_in_bytes,
        "step_peak": held + memory.temp_size_in_bytes,
        "step_collectives": collectives(compiled.as_text()),
        "compile_seconds": round(seconds, 1),
    } | measure_update(tx, shapes, shardings)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The measurements in Markdown; memory in MiB on each chip."""
    header = ["", "chips", "window", "state", "temporaries", "peak of the step", "M-FAC's temporaries"]
    header += ["its traffic / window", "its collectives", "allowed", "compile, s"]
    lines = [header, ["---"] * len(header)]
    for row in rows:
        named = [
            f"{count} {name}, {size / 1024:.0f} KiB"
            for name, (count, size) in row["update_collectives"].items()
        ]
        mebibytes = ("window_bytes", "state_bytes", "step_temporaries", "step_peak", "update_temporaries")
        lines.append(
            [
                f"{row['topology']} ({row['mesh']['fsdp']} x {row['mesh']['tensor']})",
                str(row["chips"]),
                *(f"{row[name] / 2**20:,.0f}" for name in mebibytes),
                f"{row['update_traffic'] / row['window_bytes']:.2f}",
                "; ".join(named),
                f"{row['leaves'] * row['num_grads'] * 4 / 1024:.0f} KiB",
                str(row["compile_seconds"]),
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Compile for each topology; `argv` is the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--topologies", nargs="+", default=TOPOLOGIES, help="(default: %(default)s)")
    add("--size", choices=SIZES, default="1b", help="of the transformer (default: %(default)s)")
    add("--num-grads", type=int, default=1024, help="(default: %(default)s)")
    add("--tensor", type=int, default=4, help="chips along the tensor axis (default: %(default)s)")
    add("--batch", type=int, default=4, help="sequences for each step of fsdp (default: %(default)s)")
    add("--out", type=Path, help="file to add a line of JSON to for each topology")
    args = parser.parse_args(argv)
    rows = []
    for topology in args.topologies:
        try:
            row = measure(topology, SIZES[args.size], args.num_grads, args.tensor, args.batch)
        except Exception as error:  # a topology that does not compile is a result too
            print(f"{topology}: {type(error).__name__}: {str(error)[:500]}", file=sys.stderr)
            continue
        rows.append(row)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(row | {"jax": jax.__version__}) + "\n")
        print(f"{topology}: compiled in {row['compile_seconds']} s", file=sys.stderr)
    if not rows:
        sys.exit("Nothing compiled: see above. libtpu comes with pip install '.[tpu]'")
    print(table(rows))


if __name__ == "__main__":
    main()
