"""Recorded streams through M-FAC's step: options, meshes, products with its inverse."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax
from tests.recorded.gradients import SHAPES, STREAMS, gradients, stream

P = PartitionSpec


def run(tx, grads, *, mesh_spec=None, x64: bool = False) -> dict[str, Any]:
    """All updates of a stream, the newest state's Gram matrix and diagnostics."""
    params = jax.tree.map(lambda g: np.ones_like(g), grads[0])
    if x64:
        params, grads = (jax.tree.map(lambda x: x.astype(np.float64), tree) for tree in (params, grads))
    place = jax.tree.map(jnp.asarray, params) if mesh_spec is None else jax.device_put(params, mesh_spec)
    init, update = jax.jit(tx.init), jax.jit(tx.update)
    if mesh_spec is not None:
        init = jax.jit(tx.init, out_shardings=mfac_jax.state_shardings(tx, place, mesh_spec))
    state, updates = init(place), []
    for g in grads:
        u, state = update(g if mesh_spec is None else jax.device_put(g, mesh_spec), state, place)
        updates.append(jax.device_get(u))
    inner = optax.tree.get(state, "ScaleByMFACState")
    found = {"updates": updates, "gram": jax.device_get(inner.gram)}
    return found | {"diagnostics": jax.device_get(mfac_jax.diagnostics(state))._asdict()}


# Fixed constants of the house's options; each gets the streams of `network`, one refused in the middle.
OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "small damping": {"damping": 1e-6},
    "schedule": {"damping": optax.linear_schedule(1.0, 0.01, 12)},
    "relative": {"relative_damping": True, "damping": 0.2},
    "momentum": {"window_momentum": 0.9},
    "nesterov": {"window_momentum": 0.9, "nesterov": True},
    "adapted": {"relative_damping": True, "damping": 0.2, "step_adaptation": 0.3},
    "diagonal": {"metric": "diagonal", "relative_damping": True, "damping": 0.2},
    "diagonal, absolute": {"metric": "diagonal"},
    "kept inverse": {"solver": "inverse"},
    "kept inverse, relative": {"solver": "inverse", "relative_damping": True, "damping": 0.1},
    "leaf": {"blocks": "leaf"},
    "labels": {"blocks": lambda path: str(path[-1]) < "['d"},
    "leaf, inverse": {"blocks": "leaf", "solver": "inverse"},
    "bfloat16": {"storage": jnp.bfloat16},
    "bfloat16, diagonal": {"storage": jnp.bfloat16, "metric": "diagonal"},
    "host": {"host_chunk": 3},
}


def spoiled(shapes: str, steps: int = 20):
    """A stream with a gradient that is refused, and one of zeros."""
    grads = gradients(SHAPES[shapes], steps)
    first = next(iter(grads[0]))
    grads[9] = grads[9] | {first: np.full_like(grads[9][first], np.nan)}
    grads[-4] = jax.tree.map(np.zeros_like, grads[-4])
    return grads


old_default = functools.partial(
    mfac_jax.mfac, learning_rate=3e-3, damping=0.2, metric="diagonal", storage=None
)

for _name, _options in OPTIONS.items():
    STREAMS[f"scale_by_mfac, {_name}"] = functools.partial(
        lambda options: run(mfac_jax.scale_by_mfac(8, **({"damping": 1e-2} | options)), spoiled("network")),
        _options,
    )
for _name, _options in {
    "as it comes": {},
    "decayed": {"weight_decay": 1e-2, "momentum": None},
    "schedule": {"learning_rate": optax.warmup_cosine_decay_schedule(0.0, 3e-3, 5, 20)},
    "identity": {"metric": "identity", "step_adaptation": 0.0},
    "blocks and inverse": {"blocks": "leaf", "solver": "inverse"},
}.items():
    STREAMS[f"mfac, {_name}"] = functools.partial(
        lambda options: run(old_default(num_grads=8, **options), spoiled("network")), _options
    )


@stream("mfac, as published")
def _published():
    return run(mfac_jax.mfac_published(num_grads=8), spoiled("network"))


@stream("mfac, one vector")
def _vector():
    return run(old_default(num_grads=5), spoiled("vector"))


@stream("mfac, long leaves")
def _long():
    return run(old_default(num_grads=3), gradients(SHAPES["long"], 5))


@stream("scale_by_mfac, many rows")
def _many_rows():
    return run(mfac_jax.scale_by_mfac(600, 1e-4), gradients({"w": (700,)}, 12))


@stream("mfac, injected hyper-parameters")
def _injected():
    make = optax.inject_hyperparams(old_default, static_args=("num_grads",))
    tx = make(learning_rate=1e-2, num_grads=6, damping=0.3)
    return run(tx, spoiled("network"))


@stream("mfac, float64")
def _float64():
    with jax.enable_x64(True):
        return run(old_default(num_grads=8), spoiled("network"), x64=True)


@stream("ihvp")
def _ihvp():
    tx = mfac_jax.scale_by_mfac(8, 1e-2)
    grads = gradients(SHAPES["network"], 12)
    state: Any = tx.init(jax.tree.map(jnp.asarray, grads[0]))
    for g in grads[:11]:
        _, state = tx.update(jax.tree.map(jnp.asarray, g), state)
    return {damping: mfac_jax.ihvp(state, grads[11], damping) for damping in (1e-3, 1.0)}


def _on_mesh(kind: str, axis_type: AxisType, specs: dict[str, PartitionSpec]):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = {
        "mfac": old_default(num_grads=8, weight_decay=1e-3),
        "plain": mfac_jax.scale_by_mfac(8, 1e-2, solver="inverse"),
        "leaf": old_default(num_grads=8, blocks="leaf", storage=jnp.bfloat16),
    }[kind]
    return run(tx, spoiled("even", 14), mesh_spec=shardings)


for _kind in ("mfac", "plain", "leaf"):
    for _axes in (AxisType.Auto, AxisType.Explicit):
        for _name, _specs in {
            "replicated": dict.fromkeys(SHAPES["even"], P()),
            "sharded": {"kernel": P("x", "y"), "table": P(("x", "y")), "bias": P("x"), "odd": P()},
        }.items():
            STREAMS[f"eight devices, {_kind}, {_axes.name}, {_name}"] = functools.partial(
                _on_mesh, _kind, _axes, _specs
            )


@stream("eight devices, shard_map")
def _shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    tx, grads = old_default(num_grads=8, axis_name="x"), spoiled("even", 14)
    params = jax.tree.map(jnp.ones_like, grads[0])
    specs = {"kernel": P("x"), "table": P("x"), "bias": P(), "odd": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    plain = old_default(num_grads=8)
    placed = mfac_jax.state_shardings(plain, params, shardings)
    state = jax.jit(plain.init, out_shardings=placed)(params)
    state_specs = jax.tree.map(lambda sharding: sharding.spec, placed)
    step = jax.jit(
        jax.shard_map(
            tx.update, mesh=mesh, in_specs=(specs, state_specs, specs), out_specs=(specs, state_specs)
        )
    )
    updates = []
    for g in grads:
        u, state = step(g, state, params)
        updates.append(jax.device_get(u))
    return updates


@stream("eight devices, pmap")
def _pmap():
    tx, grads = old_default(num_grads=8, axis_name="x", param_specs=P()), spoiled("even", 14)
    repeated = [jax.tree.map(lambda x: np.broadcast_to(x, (8, *x.shape)), g) for g in grads]
    params = jax.tree.map(np.ones_like, repeated[0])
    state = jax.pmap(tx.init, axis_name="x")(params)
    step, updates = jax.pmap(tx.update, axis_name="x"), []
    for g in repeated:
        u, state = step(g, state, params)
        updates.append(jax.tree.map(lambda x: jax.device_get(x)[3], u))
    return updates
