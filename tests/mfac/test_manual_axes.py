"""What is refused inside of shard_map and pmap, where only local shapes can be seen."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

from mfac_jax import scale_by_mfac, state_shardings
from tests.mfac.on_mesh import AXES, P, make_mesh
from tests.training_runs import relative_error


def test_an_axis_that_is_not_bound_is_refused():
    tx: Any = scale_by_mfac(4, axis_name="model")
    state = tx.init(jnp.ones(8))
    with pytest.raises(ValueError, match="axis_name='model' is not bound"):
        tx.update(jnp.ones(8), state)
    mesh = make_mesh(AxisType.Auto)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="axis_name='model' is not bound"):
        update(jnp.ones(8), state)


@pytest.mark.parametrize("axis_name", [3, ("x", 3), (), ("x", "x")])
def test_an_axis_name_that_is_none_is_refused(axis_name):
    with pytest.raises((TypeError, ValueError), match="axis_name must"):
        scale_by_mfac(4, axis_name=axis_name)


def test_a_window_split_over_an_axis_that_is_not_named_is_refused():
    mesh = make_mesh(AxisType.Auto)
    tx = scale_by_mfac(4, axis_name="y")
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, jnp.ones(8), NamedSharding(mesh, P())))
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs))
    with pytest.raises(ValueError, match="name in axis_name all mesh axes"):
        update(jnp.ones(8), tx.init(jnp.ones(8)))


MAY_BE_A_SHARD = r"leaf \[?.* may be a shard or replicated.*Pass param_specs=.*check_vma=True"


def test_without_check_vma_what_may_be_a_shard_is_refused():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx: Any = scale_by_mfac(4, axis_name="x")
    params = {"shard": jnp.ones((64, 3)), "odd": jnp.ones(3)}
    specs, state = {"shard": P("x"), "odd": P()}, tx.init(params)
    shardings = state_shardings(
        tx, params, {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    )
    state_specs = jax.tree.map(lambda s: s.spec, shardings)
    options = {"mesh": mesh, "in_specs": (specs, state_specs), "out_specs": (specs, state_specs)}
    with pytest.raises(ValueError, match=MAY_BE_A_SHARD):
        jax.shard_map(tx.update, check_vma=False, **options)(params, state)
    jax.eval_shape(jax.shard_map(tx.update, **options), params, state)


def test_without_check_vma_a_shard_whose_window_is_split_further_is_refused():
    mesh = make_mesh(AxisType.Auto)
    tx: Any = scale_by_mfac(4, axis_name=AXES)
    params, sharding = jnp.ones((8, 5)), NamedSharding(mesh, P("x"))
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, sharding))
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(P("x"), specs), out_specs=(P("x"), specs), check_vma=False
    )
    with pytest.raises(ValueError, match=MAY_BE_A_SHARD):
        update(params, tx.init(params))


def test_inside_of_pmap_a_state_from_outside_is_refused():
    tx: Any = scale_by_mfac(4, axis_name="i")
    params = jnp.ones((8, 16, 3))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), tx.init(params[0]))
    with pytest.raises(ValueError, match=MAY_BE_A_SHARD):
        jax.pmap(tx.update, axis_name="i")(params, state)


def test_gradients_that_were_not_averaged_are_refused():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx: Any = scale_by_mfac(4, axis_name="x")
    params = {"w": jnp.ones((32, 3))}
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, NamedSharding(mesh, P())))

    def update(grads, state):
        return tx.update(jax.tree.map(lambda g: g * jax.lax.axis_index("x"), grads), state)

    update = jax.shard_map(update, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs))
    with pytest.raises(ValueError, match=r"leaf \['w'\] differs along \('x',\). Average it before"):
        update(params, tx.init(params))


def test_shards_along_an_axis_without_a_name_are_refused():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx: Any = scale_by_mfac(4)
    params = {"w": jnp.ones((32, 3))}
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, NamedSharding(mesh, P("x"))))
    options: dict[str, Any] = {"in_specs": (P("x"), specs), "out_specs": (P("x"), specs)}
    with pytest.raises(ValueError, match=r"leaf \['w'\] varies along \('x',\) and axis_name is None"):
        jax.shard_map(tx.update, mesh=mesh, **options)(params, tx.init(params))


@pytest.mark.slow
def test_on_one_device_all_modes_run():
    device, params = jax.devices()[:1], {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    tx: Any = scale_by_mfac(4, axis_name="i")
    expected = scale_by_mfac(4).update(params, scale_by_mfac(4).init(params))[0]
    stacked = jax.tree.map(lambda p: p[None], params)
    state = jax.pmap(tx.init, axis_name="i", devices=device)(stacked)
    updates, _ = jax.pmap(tx.update, axis_name="i", devices=device)(stacked, state)
    assert relative_error(updates, expected) < 1e-6
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,), devices=device)
    for check_vma in (True, False):
        options: dict[str, Any] = {"mesh": mesh, "out_specs": P(), "check_vma": check_vma}
        update = jax.jit(jax.shard_map(lambda p: tx.update(p, tx.init(p))[0], in_specs=P(), **options))
        assert relative_error(update(params), expected) < 1e-6
