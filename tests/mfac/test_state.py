"""The state: its types, its fields, donation, checkpoints, and the optimizers of Flax that hold it."""

from typing import Any

import chex
import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from mfac_jax import ScaleByMFACState, mfac, mfac_published, scale_by_mfac
from tests.mfac.small_runs import GRADIENTS, MFAC, PARAMS, PLAIN, at, plain_update, run

slow = pytest.mark.slow


def types(state):
    """Shape, dtype, weak type and sharding of every array."""
    return jax.tree.map(jax.typeof, state)


def traced_types(function, *args):
    """As `types`, of what a function returns, without compiling it."""
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*args)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr.out_avals)


@pytest.mark.parametrize(
    "tx",
    [mfac(0.1, 3, weight_decay=0.1, blocks="leaf"), mfac_published(num_grads=3, solver="inverse")],
    ids=["mfac", "mfac_published"],
)
def test_the_state_keeps_its_types_from_init_on(tx):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    state = tx.init(params)
    updates, new_state = traced_types(tx.update, params, state, params)
    assert types(state) == new_state == traced_types(tx.init, params)
    assert types(params) == updates
    assert not any(aval.weak_type for aval in jax.tree.leaves(new_state))


def test_init_takes_shapes_in_the_place_of_arrays():
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), PARAMS)
    chex.assert_trees_all_equal(PLAIN.init(shapes), PLAIN.init(PARAMS))
    assert jax.eval_shape(PLAIN.init, shapes) == jax.eval_shape(lambda: PLAIN.init(PARAMS))


update: Any = jax.jit(MFAC.update, donate_argnums=1)


def test_no_step_is_traced_twice_and_all_of_the_state_can_be_donated():
    """An array in two fields would be donated twice, which is an error."""
    chex.clear_trace_counter()
    traced_once: Any = jax.jit(chex.assert_max_traces(MFAC.update, n=1), donate_argnums=1)
    for init in (MFAC.init, jax.jit(MFAC.init)):
        state = init(PARAMS)
        for number in range(3):
            donated = jax.tree.leaves(state)
            _, state = traced_once(at(number), state)
            assert all(leaf.is_deleted() for leaf in donated)
        places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
        assert len(set(places)) == len(places)


def test_the_state_is_an_immutable_named_tuple():
    state: Any = PLAIN.init(PARAMS)
    assert state._fields == (
        *("made_with", "grads_seen", "grads_rejected", "next_row", "window", "remainder", "metric", "gram"),
        "solver",
        *("coefficients", "shift", "step_length", "log_step", "block_of_leaf"),
    )
    with pytest.raises(AttributeError):
        state.gram = state.gram
    before = jax.tree.map(np.array, state)
    plain_update(at(0), state)
    chex.assert_trees_all_equal(state, before)


def test_the_state_says_what_it_was_made_with():
    options: dict[str, Any] = {"storage": jnp.bfloat16, "blocks": lambda path: path[0].key == "kernel"}
    state: Any = scale_by_mfac(3, metric="diagonal", **options).init(PARAMS)
    kinds = {"metric=diagonal", "solver=cholesky", "storage=bfloat16", "step_adaptation=none"}
    assert state.made_with.keys() == kinds
    np.testing.assert_array_equal(state.block_of_leaf, [0, 1, 0])
    assert not jax.tree.leaves((state.made_with, state.solver, state.step_length))


def test_tree_get_and_set_find_the_fields_in_a_chain():
    tx = optax.chain(optax.clip_by_global_norm(1.0), MFAC)
    state = tx.init(PARAMS)
    assert isinstance(optax.tree.get(state, "ScaleByMFACState"), ScaleByMFACState)
    assert optax.tree.get(state, "window").keys() == PARAMS.keys()
    changed = optax.tree.set(state, grads_seen=jnp.int32(7))
    assert optax.tree.get(changed, "ScaleByMFACState").grads_seen == 7


def test_map_params_reaches_window_and_second_moment_and_nothing_else_of_the_state():
    tx = optax.chain(optax.clip_by_global_norm(1.0), MFAC)
    names = {name: name for name in PARAMS}
    mapped = optax.tree.map_params(
        tx, lambda _, name: name, tx.init(PARAMS), names, transform_non_params=lambda _: "no parameter"
    )
    assert optax.tree.get(mapped, "window") == names
    assert optax.tree.get(mapped, "second_moment") == names
    state = optax.tree.get(mapped, "ScaleByMFACState")
    others = jax.tree.leaves(state._replace(window=None, metric=None))
    # The window, the metric, the solver and `made_with` have none; the step length has the mean cosine.
    assert others == ["no parameter"] * (len(state._fields) - 5)


def with_flax(state, directory):
    del directory
    return flax.serialization.from_bytes(MFAC.init(PARAMS), flax.serialization.to_bytes(state))


def with_orbax(state, directory):
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory / "state", state)
        checkpointer.wait_until_finished()
        return checkpointer.restore(directory / "state", jax.eval_shape(MFAC.init, PARAMS))


@pytest.mark.parametrize("save_and_restore", [with_flax, with_orbax])
def test_training_goes_on_bit_for_bit_from_a_checkpoint(save_and_restore, tmp_path):
    _, state = run(MFAC, GRADIENTS)
    restored = save_and_restore(state, tmp_path)
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(restored, state)
    restored = jax.tree.map(jnp.array, restored)  # what is donated has to be JAX's own
    chex.assert_trees_all_equal(update(at(0), restored), update(at(0), state))


# Flax.


INPUTS = jax.random.normal(jax.random.key(0), (64, 3))
TARGETS = jnp.sin(INPUTS @ jnp.array([1.0, -2.0, 0.5]))[:, None]


def squared_error(predictions):
    return jnp.mean((predictions - TARGETS) ** 2)


@slow
def test_a_linen_train_state_trains():
    model = flax.linen.Sequential([flax.linen.Dense(16), jnp.tanh, flax.linen.Dense(1)])
    params = model.init(jax.random.key(1), INPUTS)
    state = TrainState.create(apply_fn=model.apply, params=params, tx=mfac(0.1, 8, 0.1))

    @jax.jit
    def step(state):
        loss, gradients = jax.value_and_grad(lambda p: squared_error(state.apply_fn(p, INPUTS)))(
            state.params
        )
        return state.apply_gradients(grads=gradients), loss

    losses = []
    for _ in range(30):
        state, loss = step(state)
        losses.append(loss)
    assert losses[-1] < losses[0] / 2


@slow
def test_an_nnx_optimizer_trains():
    rngs = nnx.Rngs(1)
    model = nnx.Sequential(nnx.Linear(3, 16, rngs=rngs), jnp.tanh, nnx.Linear(16, 1, rngs=rngs))
    optimizer = nnx.Optimizer(model, mfac(0.1, 8, 0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, gradients = nnx.value_and_grad(lambda model: squared_error(model(INPUTS)))(model)
        optimizer.update(model, gradients)
        return loss

    losses = [step(model, optimizer) for _ in range(30)]
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    "options", [{}, {"solver": "inverse", "metric": "diagonal", "step_adaptation": 0.3}]
)
def test_a_state_of_numpy_arrays_goes_on_outside_of_jit(options):
    tx, params = scale_by_mfac(3, 0.1, **options), jnp.ones(4)
    state: Any = jax.jit(tx.init)(params)
    _, state = jax.jit(tx.update)(params, state)
    gradient = jnp.arange(4.0)
    expected: Any = tx.update(gradient, state)[0]
    found: Any = tx.update(np.asarray(gradient), jax.device_get(state))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
