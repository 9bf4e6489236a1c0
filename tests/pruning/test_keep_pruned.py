"""Pruned weights stay at zero under any optimizer, which sees the survivors only."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from mfac_jax import mfac
from mfac_jax.pruning import apply_masks, keep_pruned, kernel_masks, set_masks
from tests.pruning.pruned_training import (
    ALL_KEPT,
    GRADIENTS,
    MASKS,
    PARAMS,
    SGD,
    STATE,
    STEPS,
    TX,
    M,
    assert_close,
    gradients_for,
    pruned_entries,
    step_once,
    surviving,
    train,
)

# Zero stays zero.


@pytest.mark.parametrize(
    "tx",
    {
        "mfac": TX,
        "adamw": keep_pruned(optax.adamw(0.1), MASKS),
        "noise": keep_pruned(optax.chain(SGD, optax.add_noise(0.1, 0.5, 0)), MASKS),
        "inject_hyperparams": keep_pruned(optax.inject_hyperparams(optax.adamw)(0.1), MASKS),
        "MultiSteps": keep_pruned(optax.MultiSteps(SGD, 2).gradient_transformation(), MASKS),
        "apply_if_finite": keep_pruned(optax.apply_if_finite(SGD, 2), MASKS),
        "masked": keep_pruned(optax.masked(SGD, {"bias": False, "kernel": True, "other": False}), MASKS),
    }.items(),
    ids=lambda item: item[0],
)
def test_pruned_weights_are_zero_after_every_step(tx):
    after, _, _ = train(tx[1], PARAMS, tx[1].init(PARAMS))
    assert np.all(pruned_entries(after) == 0)
    assert np.all(surviving(after, 1)["kernel"][-1] != 0)


AROUND = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "masked": lambda tx: optax.masked(tx, {"bias": False, "kernel": True, "other": True}),
    "chain before": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, 0), tx
    ),
    "partition": lambda tx: optax.partition(
        {"pruned": tx, "dense": optax.sgd(0.1)}, {"bias": "dense", "kernel": "pruned", "other": "pruned"}
    ),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(
        lambda rate: keep_pruned(optax.sgd(rate), ALL_KEPT)
    )(rate=0.1),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_wrappers_around_leave_zeros_and_masks_can_be_set_through_them(around):
    tx = around(keep_pruned(SGD, ALL_KEPT))
    _, params, state = train(tx, PARAMS, tx.init(PARAMS))
    params, state = apply_masks(params, MASKS), set_masks(tx, state, MASKS)
    after, _, _ = train(tx, params, state)
    assert np.all(pruned_entries(after) == 0)
    assert np.all(surviving(after, 1)["kernel"][-1] != 0)


def test_lookahead_stays_sparse_on_both_sides():
    tx = optax.lookahead(keep_pruned(SGD, MASKS), 2, 0.5)
    params = optax.LookaheadParams.init_synced(apply_masks(PARAMS, MASKS))
    _, params, state = train(tx, params, tx.init(params))
    assert np.all(pruned_entries(params.fast) == 0)
    assert np.all(pruned_entries(params.slow) == 0)
    none = jax.tree.map(jnp.zeros_like, ALL_KEPT)
    params = optax.LookaheadParams(*(apply_masks(p, none) for p in params))
    _, params, _ = train(tx, params, set_masks(tx, state, none))
    assert not np.any(params.fast["kernel"])
    assert not np.any(params.slow["kernel"])


@pytest.mark.parametrize(
    "dtype",
    [
        jnp.bfloat16,
        pytest.param(jnp.float16, marks=pytest.mark.slow),
        pytest.param(jnp.float32, marks=pytest.mark.slow),
    ],
)
def test_weights_that_are_not_zero_yet_become_so_exactly(dtype):
    params = jax.tree.map(lambda p: (p / 7).astype(dtype), PARAMS)
    tx = keep_pruned(SGD, MASKS)
    gradients = gradients_for(params)
    updates: Any = tx.update(jax.tree.map(lambda g: g[0], gradients), tx.init(params), params)[0]
    assert updates["kernel"].dtype == dtype
    np.testing.assert_array_equal(pruned_entries(updates), -pruned_entries(params))
    after, _, _ = train(tx, params, tx.init(params), gradients)
    assert np.all(pruned_entries(after) == 0)


def test_updates_with_fewer_digits_take_a_few_steps():
    params = jax.tree.map(lambda p: p / 7, PARAMS)
    gradients = gradients_for(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    tx = keep_pruned(optax.sgd(0.1), MASKS)
    after, _, _ = train(tx, params, tx.init(params), gradients)
    assert np.all(np.abs(pruned_entries(after)[0]) <= 2.0**-8 * pruned_entries(params))
    assert np.all(np.abs(pruned_entries(after)[2]) <= 2.0**-24 * pruned_entries(params))
    zeros = apply_masks(params, MASKS)
    assert np.all(pruned_entries(train(tx, zeros, tx.init(zeros), gradients)[0]) == 0)


def test_what_a_later_transform_adds_stands_until_the_next_step():
    add_one = optax.stateless_with_tree_map(lambda u, _: u + 1)
    tx = optax.chain(keep_pruned(SGD, MASKS), add_one)
    after, _, _ = train(tx, PARAMS, tx.init(PARAMS))
    np.testing.assert_array_equal(pruned_entries(after), 1)  # not the number of the step


def test_without_params_there_is_no_update():
    tx = keep_pruned(optax.sgd(0.1), MASKS)
    with pytest.raises(ValueError, match="keep_pruned needs params"):
        tx.update(PARAMS, tx.init(PARAMS))


# What the optimizer inside sees.


def test_mfac_trains_as_if_the_survivors_were_all_there_is():
    after, _, _ = train(TX, PARAMS, STATE)
    alone, inner = surviving(PARAMS), mfac(0.1, M, weight_decay=0.1, metric="diagonal")
    expected, _, _ = train(inner, alone, inner.init(alone), surviving(GRADIENTS, 1))
    assert_close(surviving(after, 1), expected)


def test_norms_are_those_of_the_survivors():
    """Also of parameters that are not zero yet."""
    inner = optax.chain(optax.add_decayed_weights(1.0), optax.clip_by_global_norm(0.1), optax.scale(-1.0))
    tx = keep_pruned(inner, MASKS)
    found, _ = step_once(tx, PARAMS, tx.init(PARAMS))
    alone = surviving(PARAMS)
    expected, _, _ = train(inner, alone, inner.init(alone), surviving(GRADIENTS, 1))
    assert_close(surviving(found), jax.tree.map(lambda p: p[0], expected))


def test_gradients_of_pruned_weights_may_be_anything():
    spoiled = {**GRADIENTS, "kernel": jnp.where(MASKS["kernel"], GRADIENTS["kernel"], jnp.nan)}
    chex.assert_trees_all_equal(train(TX, PARAMS, STATE, spoiled), train(TX, PARAMS, STATE))


def test_extra_arguments_pass_through():
    def update(updates, state, params=None, *, factor=1.0, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = keep_pruned(inner, MASKS)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, factor=3.0, unknown=1)
    np.testing.assert_array_equal(surviving(updates)["kernel"], 3 * surviving(PARAMS)["kernel"])


# Training loops.


def test_a_flax_train_state_is_pruned_while_it_trains():
    tx = keep_pruned(SGD, ALL_KEPT)
    state: Any = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda state, g: state.apply_gradients(grads=g))
    for number in range(STEPS):
        if number == 2:
            state = state.replace(opt_state=set_masks(state.tx, state.opt_state, MASKS))
        state = step(state, jax.tree.map(lambda g: g[number], GRADIENTS))  # noqa: B023
    assert np.all(pruned_entries(state.params) == 0)


def test_an_nnx_optimizer_is_pruned_while_it_trains():
    rngs = nnx.Rngs(0)
    first = nnx.Linear(3, 8, rngs=rngs)
    model = nnx.Sequential(first, jnp.tanh, nnx.Linear(8, 1, rngs=rngs))
    masks = kernel_masks(nnx.state(model, nnx.Param))
    tx = keep_pruned(optax.adam(0.1), masks)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    inputs = jax.random.normal(jax.random.key(0), (16, 3))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(inputs) - 1) ** 2))(model))

    step(model, optimizer)
    masks = jax.tree.map(
        lambda p, m: None if m is None else jnp.abs(p) > 0.3, nnx.state(model, nnx.Param), masks
    )
    state = set_masks(tx, nnx.as_pure(optimizer.opt_state), nnx.as_pure(masks))
    nnx.update(optimizer.opt_state, nnx.state(state))
    for _ in range(3):
        step(model, optimizer)
    np.testing.assert_array_equal(first.kernel[...] != 0, masks["layers"][0]["kernel"][...])


@pytest.mark.parametrize("power", [1, 3], ids=["linear", "cubic"])
def test_the_schedules_of_optax_are_those_of_the_field(power):
    first, last, begin, steps = 0.1, 0.9, 7, 40
    schedule = optax.polynomial_schedule(first, last, power, steps, begin)
    step = np.arange(60)
    share = np.clip((step - begin) / steps, 0, 1)
    expected = last + (first - last) * (1 - share) ** power
    np.testing.assert_allclose(np.array([schedule(t) for t in step]), expected, rtol=1e-5)


def test_masks_that_do_not_fit_the_parameters_are_refused():
    with pytest.raises(ValueError, match=r"must have the shapes.*\['kernel'\]"):
        keep_pruned(mfac(), {**MASKS, "kernel": np.ones((3, 4))}).init(PARAMS)
    with pytest.raises(TypeError, match="inner must be a transform of optax, got None"):
        keep_pruned(None, MASKS)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="no values but 0"):
        keep_pruned(mfac(), {**MASKS, "kernel": 2 * np.ones((4, 3))})
    with pytest.raises(ValueError, match="only in one of the two"):
        TX.update({"kernel": PARAMS["kernel"]}, STATE, PARAMS)
