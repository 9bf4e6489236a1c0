"""Rows of one byte inside of shard_map and pmap, where a device has a part of a leaf, and of its groups."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding

from mfac_jax import components, ihvp, scale_by_mfac, state_shardings
from tests.mfac.on_devices import MODES, STEPS, OnDevices, gradients, on_one_device
from tests.mfac.on_mesh import P
from tests.training_runs import relative_error

slow = pytest.mark.slow
# Groups of rows go along the last axis, those of columns along the first, of conv along two.
PLACEMENTS = {
    "replicated": dict.fromkeys(("rows", "columns", "conv", "odd"), P()),
    "scales split": {"rows": P("x"), "columns": P(None, "x"), "conv": P(None, None, "x")},
    "groups split": {"rows": P(None, "x"), "columns": P("x"), "conv": P(None, "x"), "kernel": P("x")},
}
# Entries that lie between two steps of a row may be rounded either way. Other scales differ by 1e-2.
ROUNDING = 1e-3
QUICK = ("no types", "groups split", True, jnp.int8)


@pytest.mark.parametrize(
    ("mode", "placement", "inside", "dtype"),
    [
        pytest.param(
            *(mode, placement, inside, dtype),
            marks=[] if (mode, placement, inside, dtype) == QUICK else slow,
        )
        for mode in MODES
        for placement in PLACEMENTS
        for inside in (True, False)[: 1 if mode == "pmap" else 2]
        for dtype in (jnp.int8, jnp.float8_e4m3fn)
    ],
)
def test_it_is_the_run_on_one_device(mode, placement, inside, dtype):
    specs = PLACEMENTS[placement]
    run = OnDevices(mode, specs, param_specs=specs, storage=dtype)
    expected, state = on_one_device(specs, storage=dtype)
    for found, wanted in zip(run.updates(run.init(inside)), expected, strict=True):
        assert relative_error(found, wanted) < ROUNDING
    if mode != "pmap":
        window = optax.tree.get(run.state, "window")
        assert relative_error(window.scales, state.window.scales) < 1e-5


@pytest.mark.parametrize("placement", [pytest.param("scales split", marks=slow), "groups split"])
@pytest.mark.parametrize("mode", [*(pytest.param(mode, marks=slow) for mode in MODES[:2]), "pmap"])
def test_products_are_those_of_one_device(mode, placement):
    specs = PLACEMENTS[placement]
    run = OnDevices(mode, specs, param_specs=specs, storage=jnp.int8)
    assert len(list(run.updates(run.init(True)))) == STEPS
    vector = gradients(specs)[0]
    expected = ihvp(on_one_device(specs, storage=jnp.int8)[1], vector, 0.1)
    assert relative_error(run.product(vector), expected) < ROUNDING


def test_replicated_parameters_need_no_specs_where_types_tell():
    specs = PLACEMENTS["replicated"]
    run = OnDevices("types", specs, storage=jnp.int8)
    expected = on_one_device(specs, storage=jnp.int8)[0]
    for found, wanted in zip(run.updates(run.init(True)), expected, strict=True):
        assert relative_error(found, wanted) < ROUNDING


@pytest.mark.parametrize("inside", [True, False], ids=["init inside", "init outside"])
def test_shards_that_nothing_declares_are_refused(inside):
    run = OnDevices("types", PLACEMENTS["groups split"], storage=jnp.int8)
    with pytest.raises(ValueError, match=r"param_specs must say which axes of .* storage='int8'"):
        next(run.updates(run.init(inside)))


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_is_not_finite_on_one_device_is_refused_on_all(mode):
    specs = PLACEMENTS["groups split"]
    run = OnDevices(mode, specs, param_specs=specs, storage=jnp.int8)
    state = run.init(True)
    step = run.mapped(run.tx.update, (specs, run.state_specs), (specs, run.state_specs))
    bad = {name: np.array(x) for name, x in run.params.items()}
    bad["columns"][200, 3] = np.nan
    after = jax.device_get(step(run.placed(bad), state)[1])
    assert np.all(optax.tree.get(after, "grads_rejected") == 1)
    assert not any(np.any(x) for x in jax.tree.leaves(optax.tree.get(after, "window")))


class Half(NamedTuple):
    """Rows of float16 with one scale for a leaf."""

    values: Any
    scale: Any


def half(x, names=()):
    size = jnp.max(jnp.abs(x))
    scale = jax.lax.pmax(size, names) if names else size
    return Half((x / scale).astype(jnp.float16), scale)


ONE_SCALE = components.Storage(
    name="one scale",
    row=lambda leaf: Half(
        jax.ShapeDtypeStruct(leaf.shape, jnp.float16), jax.ShapeDtypeStruct((), jnp.float32)
    ),
    encode=lambda x, rows: half(x),
    encode_part=lambda x, rows, along: half(x, tuple(name for names in along for name in names)),
    decode=lambda row: row.values * row.scale,
    dots=lambda rows, x, dtype: jnp.einsum("mij,ij->m", rows.values.astype(dtype), x) * rows.scale,
    combine=lambda c, rows: jnp.tensordot(c * rows.scale, rows.values.astype(c.dtype), 1),
)


@pytest.mark.parametrize("inside", [True, pytest.param(False, marks=slow)])
def test_a_storage_of_ones_own_may_have_one_number_for_a_leaf(inside):
    specs = {"rows": P(None, "x"), "columns": P("x"), "table": P()}
    run = OnDevices("no types", specs, param_specs=specs, storage=ONE_SCALE)
    expected, _ = on_one_device(specs, storage=ONE_SCALE)
    for found, wanted in zip(run.updates(run.init(inside)), expected, strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_a_leaf_without_entries_may_be_a_shard():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    params, spec = {"none": jnp.ones((0, 256)), "some": jnp.ones((8, 256))}, P("x")
    tx = scale_by_mfac(4, storage=jnp.int8, axis_name="x", param_specs=spec)
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, NamedSharding(mesh, spec)))
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=spec, out_specs=specs)
    places = {"mesh": mesh, "in_specs": (spec, specs), "out_specs": (spec, specs)}
    updates, _ = jax.jit(jax.shard_map(tx.update, **places))(params, init(params))
    assert np.all(np.isfinite(updates["some"]))


def test_a_storage_that_needs_whole_leaves_is_refused():
    with pytest.raises(ValueError, match="storage must have one array for a row, or encode_part"):
        scale_by_mfac(4, storage=components.low_rank(), axis_name="x")


@slow
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mesh_axis_of_one_device_changes_nothing(check_vma):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    params, spec = jnp.ones((8, 256)), P("x")
    tx = scale_by_mfac(4, storage=jnp.int8, axis_name="x", param_specs=spec)
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, NamedSharding(mesh, spec)))
    options = {"mesh": mesh, "out_specs": (spec, specs), "check_vma": check_vma}
    for init in (tx.init, jax.shard_map(tx.init, in_specs=spec, **options | {"out_specs": specs})):
        update = jax.jit(jax.shard_map(tx.update, in_specs=(spec, specs), **options))
        assert np.all(np.isfinite(update(params, init(params))[0]))
