"""The programs that are compiled for GPUs: parameters, updates, ways to spread them, and what is read out.

`compile_for_gpu` compiles them for GPUs that are not here, `gpu_step_time` times them on one that is.
"""

import functools
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

import mfac_jax
from benchmarks import gpu_program, timing
from benchmarks.compiled_update import bytes_on_device, collectives, placed
from benchmarks.parameter_trees import Shapes, resnet50_shapes, transformer_shapes
from benchmarks.storages import STORAGES

SEVERAL = 8  # GPUs of a host


class Tree(NamedTuple):
    """Parameters, and the gradients that are kept of them."""

    num_grads: int
    shapes: Shapes


TREES = {
    "272,474 in one leaf": Tree(1024, ((272_474,),)),
    "1,000,000 in one leaf": Tree(1024, ((1_000_000,),)),
    "ResNet-50": Tree(64, resnet50_shapes()),
    "transformer of 12 layers": Tree(64, transformer_shapes(768, 12, 12, 1024)),
}
TRANSFORMS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "mfac": lambda **options: mfac_jax.mfac(3e-3, metric="diagonal", **options),
    "mfac, inverse": lambda **options: mfac_jax.mfac(3e-3, metric="diagonal", solver="inverse", **options),
    "scale_by_mfac": mfac_jax.scale_by_mfac,
}
MODES = ("one GPU", "jit", "explicit", "shard_map", "pmap")


class Case(NamedTuple):
    """One program."""

    target: str
    mode: str
    tree: str
    transform: str
    storage: str


class Lowered(NamedTuple):
    """An update ready to be compiled, and what it is called with; of pmap, that of all devices."""

    update: Any
    params: Any
    state: Any


def lower(mode: str, make: Callable[..., Any], shapes: Shapes, devices: Sequence[Any]) -> Lowered:
    """Trace the update with donated state, in that mode; `make` makes the transform from its axes."""
    params: Any = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if mode == "pmap":
        return _lower_pmap(make(axis_name="data", param_specs=PartitionSpec()), params, devices)
    if mode == "one GPU":
        tx, sharding = make(), SingleDeviceSharding(devices[0])
        state = jax.eval_shape(tx.init, params)
        shardings, state_shardings = (jax.tree.map(lambda _: sharding, tree) for tree in (params, state))
        return lower_jit(tx.update, params, state, shardings, state_shardings)
    axis_type = AxisType.Explicit if mode == "explicit" else AxisType.Auto
    mesh = Mesh(devices, ("data",), axis_types=(axis_type,))
    # A leaf whose last axis does not divide stays whole. Its window is split.
    specs = [
        PartitionSpec(*[None] * (x.ndim - 1), "data" if x.shape[-1] % len(devices) == 0 else None)
        for x in params
    ]
    tx = make(axis_name="data", param_specs=specs) if mode == "shard_map" else make()
    shardings = [NamedSharding(mesh, spec) for spec in specs]
    state_shardings = mfac_jax.state_shardings(tx, params, shardings)
    update = tx.update
    if mode == "shard_map":
        state_specs = jax.tree.map(lambda sharding: sharding.spec, state_shardings)
        outs = (specs, state_specs)
        update = jax.shard_map(tx.update, mesh=mesh, in_specs=(*outs, specs), out_specs=outs)
    return lower_jit(update, params, jax.eval_shape(tx.init, params), shardings, state_shardings)


def lower_jit(
    update: Callable[..., Any], params: Any, state: Any, shardings: Any, state_shardings: Any
) -> Lowered:
    """Trace the update with donated state and these shardings."""
    params, state = placed(params, shardings), placed(state, state_shardings)
    step = jax.jit(update, donate_argnums=1, out_shardings=(shardings, state_shardings))
    return Lowered(step.lower(params, state, params), params, state)


def _lower_pmap(tx, params, devices) -> Lowered:
    """All devices hold all parameters, and a part of the window each."""
    stacked = [jax.ShapeDtypeStruct((len(devices), *x.shape), x.dtype) for x in params]
    state = jax.eval_shape(jax.pmap(tx.init, axis_name="data", devices=devices), stacked)
    update = jax.pmap(tx.update, axis_name="data", devices=devices, donate_argnums=1)
    return Lowered(update.lower(stacked, state, stacked), stacked, state)


def compile_and_read(lowered: Any, options: Mapping[str, Any]) -> tuple[Any, str]:
    """Compile with these options; return the program, and the sequence of thunks that XLA writes of it."""
    with tempfile.TemporaryDirectory() as folder:
        dump = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(compiler_options=dump | dict(options))
        (sequence,) = Path(folder).glob("*thunk_sequence_after_thunk_passes.txt")
        return compiled, sequence.read_text()


def _bytes(tree: Any, mode: str) -> int:
    """The bytes of one device."""
    if mode == "pmap":
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) // SEVERAL
    return bytes_on_device(tree)


def _shape(x: Any, mode: str) -> tuple[int, ...]:
    """The shape of one device's part of an array."""
    return x.shape[1:] if mode == "pmap" else x.sharding.shard_shape(x.shape)


def make(case: Case, **axes: Any) -> optax.GradientTransformationExtraArgs:
    """The transform of a program."""
    options = {"num_grads": TREES[case.tree].num_grads, "storage": STORAGES[case.storage]}
    return TRANSFORMS[case.transform](**options, **axes)


def compile_case(
    case: Case, devices: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Compile a program; return it, and a line of the table with the figures of one device."""
    tree = TREES[case.tree]
    lowered = lower(case.mode, functools.partial(make, case), tree.shapes, devices)
    (compiled, sequence), seconds = timing.stopwatch(lambda: compile_and_read(lowered.update, options))
    text, window = compiled.as_text(), optax.tree.get(lowered.state, "window")
    # No larger than the Gram matrix, an array is not told from it.
    shapes = [_shape(rows, case.mode) for rows in jax.tree.leaves(window)]
    large = [shape for shape in shapes if math.prod(shape) > tree.num_grads**2]
    memory = compiled.memory_analysis()
    return compiled, case._asdict() | {
        "devices": len(devices),
        "leaves": len(tree.shapes),
        "parameters": sum(map(math.prod, tree.shapes)),
        "num_grads": tree.num_grads,
        "gradient_bytes": _bytes(lowered.params, case.mode),
        "window_bytes": _bytes(window, case.mode),
        "state_bytes": _bytes(lowered.state, case.mode),
        "temporaries": memory.temp_size_in_bytes,
        "alias": memory.alias_size_in_bytes,
        "traffic": gpu_program.traffic(text)._asdict(),
        "copied": gpu_program.copied(text, large),
        "launches": gpu_program.launches(sequence)._asdict(),
        "collectives": collectives(text),
        "compile_seconds": round(seconds, 1),
    }
