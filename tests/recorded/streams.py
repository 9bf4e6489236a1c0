"""Fixed streams of gradients through every part of the package, and a few numbers of what comes out.

`figures.json` beside this file holds these numbers as revision 2190069 gave them, before the house was
rebuilt. `python -m tests.recorded.streams FILE` writes them as they are now.
"""

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax
from mfac_jax import pruning

P = PartitionSpec
FIGURES = Path(__file__).with_name("figures.json")
SAMPLES = 24  # entries that are recorded of an array
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "vector": {"w": (37,)},
    "network": {"conv": (3, 3, 2, 4), "kernel": (8, 16), "bias": (16,), "scale": ()},
    "long": {
        "a": (12, 1024),
        "b": (300_008,),
    },  # above the length that a matrix-vector product is exact for
    "even": {"kernel": (8, 16), "table": (24, 8), "bias": (16,), "odd": (5, 3)},
}
STREAMS: dict[str, Callable[[], Any]] = {}


def gradients(shapes: dict[str, tuple[int, ...]], steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """A drifting direction with noise: correlated, as gradients are; of different sizes in each leaf."""
    random = np.random.default_rng(seed)
    base = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    grads = []
    for _ in range(steps):
        for name, shape in shapes.items():
            base[name] = 0.8 * base[name] + 0.6 * random.standard_normal(shape)
        grads.append({name: np.asarray(x * 0.3**i, np.float32) for i, (name, x) in enumerate(base.items())})
    return grads


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


def stream(name: str):
    """Register a function that gives a tree of arrays."""

    def add(function):
        STREAMS[name] = function
        return function

    return add


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
        lambda options: run(mfac_jax.mfac(num_grads=8, **options), spoiled("network")), _options
    )


@stream("mfac, as published")
def _published():
    return run(mfac_jax.mfac_published(num_grads=8), spoiled("network"))


@stream("mfac, one vector")
def _vector():
    return run(mfac_jax.mfac(num_grads=5), spoiled("vector"))


@stream("mfac, long leaves")
def _long():
    return run(mfac_jax.mfac(num_grads=3), gradients(SHAPES["long"], 5))


@stream("scale_by_mfac, many rows")
def _many_rows():
    return run(mfac_jax.scale_by_mfac(600, 1e-4), gradients({"w": (700,)}, 12))


@stream("mfac, injected hyper-parameters")
def _injected():
    make = optax.inject_hyperparams(mfac_jax.mfac, static_args=("num_grads",))
    tx = make(learning_rate=1e-2, num_grads=6, damping=0.3)
    return run(tx, spoiled("network"))


@stream("mfac, float64")
def _float64():
    with jax.enable_x64(True):
        return run(mfac_jax.mfac(num_grads=8), spoiled("network"), x64=True)


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
        "mfac": mfac_jax.mfac(num_grads=8, weight_decay=1e-3),
        "plain": mfac_jax.scale_by_mfac(8, 1e-2, solver="inverse"),
        "leaf": mfac_jax.mfac(num_grads=8, blocks="leaf", storage=jnp.bfloat16),
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
    tx, grads = mfac_jax.mfac(num_grads=8, axis_name="x"), spoiled("even", 14)
    params = jax.tree.map(jnp.ones_like, grads[0])
    specs = {"kernel": P("x"), "table": P("x"), "bias": P(), "odd": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    plain = mfac_jax.mfac(num_grads=8)
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
    tx, grads = mfac_jax.mfac(num_grads=8, axis_name="x"), spoiled("even", 14)
    repeated = [jax.tree.map(lambda x: np.broadcast_to(x, (8, *x.shape)), g) for g in grads]
    params = jax.tree.map(np.ones_like, repeated[0])
    state = jax.pmap(tx.init, axis_name="x")(params)
    step, updates = jax.pmap(tx.update, axis_name="x"), []
    for g in repeated:
        u, state = step(g, state, params)
        updates.append(jax.tree.map(lambda x: jax.device_get(x)[3], u))
    return updates


def _stacked(shapes, number: int, seed: int = 0):
    grads = gradients(shapes, number, seed)
    return jax.tree.map(lambda *x: jnp.stack(x), *grads)


for _name, _blocks in {"one": None, "leaf": "leaf", "cut": 20, "narrow": 5}.items():

    def _fisher(blocks):
        grads = _stacked(SHAPES["network"], 12)
        fisher = mfac_jax.FisherInverse.from_gradients(grads, 1e-3, blocks=blocks)
        return {
            "ihvp": fisher.ihvp(gradients(SHAPES["network"], 1, 7)[0]),
            "batch": fisher.ihvp(_stacked(SHAPES["network"], 3, 5)),
            "diagonal": fisher.diagonal(),
            "submatrix": fisher.submatrix([0, 3, 17, 60, 90, 150, 210]),
            "entry": fisher.entry(2, 19),
        }

    STREAMS[f"FisherInverse, {_name}"] = functools.partial(_fisher, _blocks)


def _pruned(function_of_params: bool, **options):
    random = np.random.default_rng(3)
    w = {
        "in": {"kernel": jnp.asarray(random.standard_normal((8, 12)), jnp.float32), "bias": jnp.zeros(12)},
        "out": {"kernel": jnp.asarray(random.standard_normal((12, 4)), jnp.float32)},
    }
    x = jnp.asarray(random.standard_normal((24, 8)), jnp.float32)
    y = jnp.asarray(random.standard_normal((24, 4)), jnp.float32)

    def loss(w, batch):
        x, y = batch
        return jnp.mean((jnp.tanh(x @ w["in"]["kernel"] + w["in"]["bias"]) @ w["out"]["kernel"] - y) ** 2)

    def grads_fn(w):
        return mfac_jax.collect_gradients(loss, w, [(x, y)], 24, per_example=True)

    pruned, masks = pruning.prune(w, grads_fn if function_of_params else grads_fn(w), **options)
    return {"pruned": pruned, "masks": masks, "scores": pruning.obs_scores(w, grads_fn(w))}


for _name, _options in {
    "half": {"function_of_params": False, "sparsity": 0.5},
    "most, four steps": {"function_of_params": True, "sparsity": 0.8, "num_steps": 4},
    "independent": {"function_of_params": True, "sparsity": 0.6, "num_steps": 3, "update": "independent"},
    "2:4": {"function_of_params": True, "sparsity": 0.5, "num_steps": 2, "pattern": "2:4"},
    "block:4": {"function_of_params": True, "sparsity": 0.5, "num_steps": 2, "pattern": "block:4"},
    "limited": {
        "function_of_params": True,
        "sparsity": 0.7,
        "num_steps": 3,
        "step_limit": 0.1,
        "gradient_term": 0.0,
        "damping": 1e-4,
    },
}.items():
    STREAMS[f"prune, {_name}"] = functools.partial(_pruned, **_options)


@stream("keep_pruned and set_masks")
def _keep_pruned():
    grads = gradients(SHAPES["network"], 8)
    params = jax.tree.map(jnp.ones_like, grads[0])
    masks = pruning.kernel_masks(params)
    tx = pruning.keep_pruned(mfac_jax.mfac(num_grads=4, blocks="leaf"), masks)
    state, updates = tx.init(params), []
    for i, g in enumerate(grads):
        if i == 4:
            fewer = jax.tree.map(
                lambda mask: mask & (jnp.arange(mask.size).reshape(mask.shape) % 3 > 0), masks
            )
            state = pruning.set_masks(tx, state, fewer)
        u, state = tx.update(jax.tree.map(jnp.asarray, g), state, params)
        params = optax.apply_updates(params, u)
        updates.append(u)
    return {"updates": updates, "params": params}


def _cgfac(**options):
    random = np.random.default_rng(5)
    params = {
        "conv": {"kernel": jnp.asarray(random.standard_normal((3, 3, 1, 2)) / 3, jnp.float32)},
        "dense": {
            "kernel": jnp.asarray(random.standard_normal((18, 5)) / 4, jnp.float32),
            "bias": jnp.zeros(5),
        },
        "scale": jnp.ones(2),
    }
    x = jnp.asarray(random.standard_normal((6, 5, 5, 1)), jnp.float32)

    def loss(p):
        y = jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        y = jnp.tanh(y * p["scale"]).reshape(6, -1)
        return jnp.mean(jnp.sum((y @ p["dense"]["kernel"] + p["dense"]["bias"] - 1) ** 2, axis=1))

    evaluate = jax.jit(mfac_jax.value_and_grad_with_factors(loss))
    factors = jax.eval_shape(evaluate, params)[2] if options.get("num_batches", 1) > 1 else None
    tx = mfac_jax.cgfac(0.3, factors=factors, **options)
    state, updates, values = tx.init(params), [], []
    update = jax.jit(tx.update)
    for _ in range(6):
        value, grads, found = evaluate(params)
        u, state = update(grads, state, params, curvature=found)
        params = optax.apply_updates(params, u)
        updates.append(u)
        values.append(value)
    return {"updates": updates, "values": values}


# Solved to the end, or stopped early. What 20 iterations leave of a system that needs more is rounding:
# another version of XLA changed it by a fifth, in the old revision too.
_TO_THE_END = {"tolerance": 1e-4, "max_iterations": 200}
for _name, _options in {
    "momentum and norm constraint": {"damping": 1.0, **_TO_THE_END},
    "small damping": {"norm_constraint": None, **_TO_THE_END, "tolerance": 1e-5},
    "two iterations": {"damping": 1e-4, "max_iterations": 2},
    "three batches": {
        "damping": 1.0,
        "num_batches": 3,
        "weight_decay": 1e-3,
        "momentum": None,
        **_TO_THE_END,
    },
}.items():
    STREAMS[f"cgfac, {_name}"] = functools.partial(_cgfac, **_options)


@stream("cgfac, functions as curvature")
def _operators():
    grads = _stacked(SHAPES["network"], 10)
    tx = mfac_jax.scale_by_cgfac(0.1, tolerance=1e-3, max_iterations=30)
    g = jax.tree.map(lambda x: x[0], grads)
    fisher = mfac_jax.empirical_fisher(grads)
    u, _ = jax.jit(lambda g, s: tx.update(g, s, curvature=fisher))(g, tx.init(g))
    return u


def sampled(tree: Any) -> list[list[float]]:
    """Of each leaf some entries, and the norm; NaN and Inf as they are, which Python's JSON reads."""
    found = []
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf, np.float64).ravel()
        entries = x[np.unique(np.linspace(0, x.size - 1, min(SAMPLES, x.size)).round().astype(int))]
        found.append([float(f"{number:.9g}") for number in (*entries, np.linalg.norm(x))])
    return found


def folded(tree: Any) -> Any:
    """Streams are long: the leaves of every fourth update, and of the last."""
    updates = tree.get("updates") if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    if updates is None:
        return tree
    kept = [*updates[:-1:4], updates[-1]]
    return tree | {"updates": kept} if isinstance(tree, dict) else kept


if __name__ == "__main__":
    figures = {}
    full = {}
    for name, make in STREAMS.items():
        print(name, flush=True)
        result = make()
        figures[name] = sampled(folded(result))
        full[name] = result
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in figures.items())
    Path(sys.argv[1]).write_text(f"{{\n{rows}\n}}\n")
    if len(sys.argv) > 2:
        import pickle

        Path(sys.argv[2]).write_bytes(pickle.dumps(jax.tree.map(np.asarray, full)))
