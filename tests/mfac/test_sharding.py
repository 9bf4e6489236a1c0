"""The same steps on a mesh of eight devices, in every mode, as on one device; what is compiled."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from benchmarks import compiled_update
from mfac_jax import mfac, mfac_published, scale_by_mfac, state_shardings
from tests.mfac.on_mesh import (
    AXES,
    NUM_GRADS,
    SHAPES,
    SPECS,
    STEPS,
    P,
    assert_sharded_as,
    make_mesh,
    named,
    start,
)
from tests.training_runs import correlated_gradients, relative_error, train_step

slow = pytest.mark.slow
TRANSFORMS = {
    "diagonal": functools.partial(
        mfac, 0.01, NUM_GRADS, metric="diagonal", weight_decay=1e-3, storage=None
    ),
    "plain": functools.partial(
        mfac,
        0.01,
        NUM_GRADS,
        metric="identity",
        momentum=None,
        step_adaptation=0.0,
        solver="inverse",
        storage=None,
    ),
    "half, a block a leaf": functools.partial(
        mfac, 0.01, NUM_GRADS, metric="diagonal", blocks="leaf", storage=jnp.bfloat16
    ),
}
CASES = [("diagonal", placement) for placement in SPECS] + [(kind, "mixed") for kind in [*TRANSFORMS][1:]]
QUICK = ("diagonal", "mixed")
KINDS_AND_PLACEMENTS = pytest.mark.parametrize(
    ("kind", "placement"), [pytest.param(*case, marks=[] if case == QUICK else slow) for case in CASES]
)


GRADIENTS = correlated_gradients(SHAPES, STEPS, refused="kernel")


@functools.cache
def single_device(kind: str):
    tx = TRANSFORMS[kind]()
    params = jax.device_put(start(), jax.devices()[0])
    state, step = tx.init(params), jax.jit(functools.partial(train_step, tx))
    for grads in GRADIENTS:
        params, state = step(params, state, grads)
    return jax.device_get((params, state))


def check_equal_to_one_device(kind: str, params, state) -> None:
    expected_params, expected_state = single_device(kind)
    moved, expected = (jax.tree.map(lambda p, s: p - s, p, start()) for p in (params, expected_params))
    assert relative_error(moved, expected) < 1e-5
    for name in ("window", "gram", "coefficients"):
        found, wanted = (jax.device_get(optax.tree.get(s, name)) for s in (state, expected_state))
        assert relative_error(found, wanted) < (4e-3 if "half" in kind and name == "window" else 1e-5), name
    assert optax.tree.get(state, "grads_rejected") == 1


@KINDS_AND_PLACEMENTS
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_under_jit_on_a_mesh_it_is_the_run_on_one_device(axis_type, placement, kind):
    mesh, tx = make_mesh(axis_type), TRANSFORMS[kind]()
    param_shardings = named(mesh, placement)
    params = jax.device_put(start(), param_shardings)
    shardings = state_shardings(tx, params, param_shardings)
    state = tx.init(params)
    assert_sharded_as(state, shardings)
    assert_sharded_as(jax.jit(tx.init, out_shardings=shardings)(params), shardings)
    auto = axis_type == AxisType.Auto
    step: Any = jax.jit(
        functools.partial(train_step, tx),
        donate_argnums=(0, 1),
        out_shardings=(param_shardings, shardings) if auto else None,
    )
    for grads in GRADIENTS:
        params, state = step(params, state, jax.device_put(grads, param_shardings))
        assert_sharded_as(params, param_shardings)
        assert_sharded_as(state, shardings)
    assert step._cache_size() == 1
    check_equal_to_one_device(kind, params, state)


@KINDS_AND_PLACEMENTS
@pytest.mark.parametrize(
    "inside",
    [pytest.param(False, marks=slow), True],
    ids=["init outside", "init inside"],
)
def test_inside_of_shard_map_it_is_the_run_on_one_device(placement, kind, inside):
    mesh, tx = make_mesh(AxisType.Auto), TRANSFORMS[kind](axis_name=AXES)
    param_shardings = named(mesh, placement)
    params = jax.device_put(start(), param_shardings)
    shardings = state_shardings(tx, params, param_shardings)
    specs, state_specs = (jax.tree.map(lambda s: s.spec, t) for t in (param_shardings, shardings))
    mapped = functools.partial(jax.shard_map, mesh=mesh)
    init = jax.jit(mapped(tx.init, in_specs=(specs,), out_specs=state_specs)) if inside else tx.init
    state = init(params)
    assert_sharded_as(state, shardings)
    in_specs, out_specs = (specs, state_specs, specs), (specs, state_specs)
    step = jax.jit(mapped(functools.partial(train_step, tx), in_specs=in_specs, out_specs=out_specs))
    for grads in GRADIENTS:
        params, state = step(params, state, jax.device_put(grads, param_shardings))
        assert_sharded_as(state, shardings)
    check_equal_to_one_device(kind, params, state)


@pytest.mark.parametrize(
    ("kind", "axis_name"),
    [
        ("diagonal", "i"),
        pytest.param("diagonal", None, marks=slow),
        *(pytest.param(kind, "i", marks=slow) for kind in [*TRANSFORMS][1:]),
    ],
    ids=str,
)
def test_inside_of_pmap_it_is_the_run_on_one_device(kind, axis_name):
    tx = TRANSFORMS[kind](axis_name=axis_name, param_specs=P())
    params = jax.tree.map(lambda p: np.broadcast_to(p, (8, *p.shape)), start())
    state = jax.pmap(tx.init, axis_name="i")(params)
    sizes = {name: rows.size // 8 for name, rows in optax.tree.get(state, "window").items()}
    whole = {name: NUM_GRADS * p.size for name, p in start().items()}
    assert sizes == {
        n: s if axis_name is None or n in ("odd", "scale") else s // 8 for n, s in whole.items()
    }

    def step(params, state, grads):
        return train_step(tx, params, state, jax.lax.pmean(grads, "i"))

    step = jax.pmap(step, axis_name="i", donate_argnums=(0, 1))
    for grads in GRADIENTS:
        grads = jax.tree.map(lambda g: np.broadcast_to(g, (8, *g.shape)), grads)
        params, state = step(params, state, grads)
    params, state = jax.device_get((params, state))
    for name in ("gram", "coefficients"):
        copies = optax.tree.get(state, name)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))
    expected_params, expected_state = single_device(kind)
    moved, expected = (jax.tree.map(lambda p, s: p - s, p, start()) for p in (params, expected_params))
    assert relative_error(jax.tree.map(lambda p: p[0], moved), expected) < 1e-5
    assert relative_error(optax.tree.get(state, "gram")[0], optax.tree.get(expected_state, "gram")) < 1e-5


@slow
def test_momentum_of_updates_skips_a_gradient_that_is_bad_on_another_device():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx, alone = (mfac_published(0.01, 4, weight_decay=None, axis_name=name) for name in ("x", None))
    bad = jnp.ones(8).at[3].set(jnp.inf)
    state, expected = tx.init(bad), alone.init(bad)
    shardings = state_shardings(tx, bad, NamedSharding(mesh, P("x")))
    specs = jax.tree.map(lambda s: s.spec, shardings)
    step = jax.jit(jax.shard_map(tx.update, mesh=mesh, in_specs=(P("x"), specs), out_specs=(P("x"), specs)))
    updates: Any = None
    wanted: Any = None
    for gradient in (jnp.arange(8.0), bad, jnp.ones(8)):
        updates, state = step(gradient, state)
        wanted, expected = alone.update(gradient, expected)
    np.testing.assert_allclose(updates, wanted, rtol=1e-5)


@slow
def test_of_a_mesh_with_explicit_and_automatic_axes_the_window_uses_the_former():
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Explicit, AxisType.Auto))
    tx: Any = scale_by_mfac(4)
    params: Any = jax.device_put({"w": jnp.ones((8, 16))}, NamedSharding(mesh, P()))
    state = tx.init(params)
    assert state.window["w"].sharding.spec == P(None, "x", None)
    updates, state = jax.jit(tx.update, donate_argnums=1)(params, state)
    assert state.window["w"].sharding.spec == P(None, "x", None)
    alone: Any = jax.device_get(params)
    assert relative_error(updates, tx.update(alone, tx.init(alone))[0]) < 1e-6


# The compiled programs.


def compile_on_mesh(tx, placement: str, mode: str):
    """A compiled update, and the bytes of the state on one device."""
    mesh = make_mesh(AxisType.Explicit if mode == "Explicit" else AxisType.Auto)
    param_shardings = named(mesh, placement)
    params = jax.device_put(start(), param_shardings)
    shardings, state = state_shardings(tx, params, param_shardings), tx.init(params)
    update: Any = tx.update
    options: dict[str, Any] = {}
    if mode == "shard_map":
        specs, state_specs = (jax.tree.map(lambda s: s.spec, t) for t in (param_shardings, shardings))
        in_specs, out_specs = (specs, state_specs, specs), (specs, state_specs)
        update = jax.shard_map(update, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    elif mode == "Auto":
        options = {"out_shardings": (param_shardings, shardings)}
    compiled: Any = jax.jit(update, donate_argnums=1, **options).lower(params, state, params).compile()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    return compiled, held


@pytest.mark.parametrize(
    ("mode", "placement"),
    [
        pytest.param(*case, marks=[] if case == ("shard_map", "replicated") else slow)
        for case in itertools.product(["Auto", "Explicit", "shard_map"], SPECS)
    ],
)
def test_only_products_are_added_up_and_only_split_updates_gathered(placement, mode):
    tx = TRANSFORMS["diagonal"](axis_name=AXES if mode == "shard_map" else None)
    compiled, held = compile_on_mesh(tx, placement, mode)
    found = compiled_update.collectives(compiled.as_text())
    assert set(found) <= {"all-reduce", "all-gather"}
    reduced = found.get("all-reduce", [0, 0])[1]
    if mode == "shard_map":
        assert reduced == 4 * (NUM_GRADS + 1)  # the products with the rows, and the square
    else:
        # A leaf that is spread over two mesh axes is added up over one after the other on CPU.
        two_stages = sum(len([e for e in spec if e]) > 1 for spec in SPECS[placement].values())
        two_stages += {"replicated": 0, "sharded": 0, "mixed": 2}[placement]
        assert reduced <= (len(SHAPES) + two_stages) * (NUM_GRADS + 1) * 4 + 4 * two_stages
    gathered = found.get("all-gather", [0, 0])[1]
    updates = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    assert gathered <= 1.5 * updates  # over two axes one after the other
    assert compiled.memory_analysis().alias_size_in_bytes == held


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_a_replicated_parameters_window_takes_its_share_of_memory(mode):
    mesh = make_mesh(AxisType.Auto if mode == "Auto" else AxisType.Explicit)
    params = {
        "kernel": jnp.ones((64, 128)),
        "bias": jnp.ones(128),
        "out": jnp.ones((128, 10)),
        "b": jnp.ones(10),
    }
    params = jax.device_put(params, NamedSharding(mesh, P()))
    tx = mfac(0.01, NUM_GRADS)
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, NamedSharding(mesh, P())))(params)
    rows = jax.tree.leaves(optax.tree.get(state, "window"))
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in rows)
    assert on_one < 1.05 * sum(leaf.nbytes for leaf in rows) / 8


@slow
def test_a_bfloat16_window_is_never_copied_as_float32():
    params = {"kernel": jnp.ones((2048, 1024)), "bias": jnp.ones(1024)}
    tx = mfac(0.01, 64, metric="diagonal", storage=jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    compiled: Any = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    window = 64 * 2 * 2049 * 1024
    # Temporaries of a row's size; a float32 copy would be two windows.
    assert compiled.memory_analysis().temp_size_in_bytes < 0.1 * window
