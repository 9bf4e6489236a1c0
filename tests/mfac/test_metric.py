"""The diagonal metric: against scale_by_adam, and a step of mfac written out in NumPy."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax import mfac, scale_by_mfac
from tests.dense_reference import inverse_product, relative_error

slow = pytest.mark.slow
MFAC = mfac(0.01, 4, metric="diagonal")
WIDTH = 12


def gradients(length: int) -> np.ndarray:
    """Correlated gradients whose coordinates differ in scale by six decades."""
    random = np.random.default_rng(0)
    scales = 10.0 ** random.uniform(-3, 3, WIDTH)
    return scales * (random.standard_normal((length, WIDTH)) + random.standard_normal(WIDTH))


def states_and_updates(tx, grads) -> tuple[np.ndarray, list[Any]]:
    """By one compiled step, of which all runs of a transform here make use."""
    state = tx.init(jnp.asarray(grads[0]))
    update, updates, states = jax.jit(tx.update), [], []
    for g in grads:
        u, state = update(jnp.asarray(g), state, jnp.zeros_like(g))
        updates.append(np.asarray(u))
        states.append(state)
    return np.stack(updates), states


def run(tx, grads) -> tuple[np.ndarray, Any]:
    updates, states = states_and_updates(tx, grads)
    return updates, states[-1]


def test_where_the_damping_rules_it_is_adam_without_momentum(x64):
    grads = gradients(20)
    updates, _ = run(scale_by_mfac(4, 1e12, relative_damping=True, metric="diagonal"), grads)
    expected, _ = run(optax.scale_by_adam(b1=0.0, b2=0.99), grads)
    np.testing.assert_allclose(updates, expected, rtol=1e-8)


def test_a_step_in_the_diagonal_metric_is_the_formula_of_the_docstring(x64):
    """Written out in NumPy with a dense Fisher matrix, the window wrapping, without the step factor."""
    grads, m, rho, beta, rate = gradients(9), 4, 0.2, 0.9, 0.01
    updates, states = states_and_updates(
        mfac(rate, m, rho, metric="diagonal", step_adaptation=0.0, storage=None), grads
    )
    v, rows = np.zeros(grads.shape[1]), []
    for step, g in enumerate(grads):
        v = 0.99 * v + 0.01 * g**2
        scale = (np.sqrt(v / (1 - 0.99 ** (step + 1))) + 1e-8) ** -0.5
        rows = [*rows, scale * g][-m:]
        window = np.stack(rows)
        weights = beta ** np.arange(len(rows))[::-1]
        x = beta * (weights / weights.sum()) @ window + (1 - beta) * window[-1]
        energy = np.mean(np.sum(window**2, axis=1))
        direction = (1 + rho) * energy * inverse_product(window, x, rho * energy, 1)
        assert relative_error(updates[step], -rate * scale * direction) < 1e-9
    assert optax.tree.get(states[-1], "log_step") == 0
    first_window = optax.tree.get(states[0], "window")
    np.testing.assert_allclose(first_window[0], np.sign(grads[0]) * np.sqrt(np.abs(grads[0])), rtol=1e-4)
    assert not np.any(first_window[1:])


def test_it_does_not_depend_on_the_scale_of_the_loss():
    grads = gradients(12).astype(np.float32)
    updates, _ = run(MFAC, grads)
    scaled, _ = run(MFAC, grads * np.float32(2.0**20))
    np.testing.assert_allclose(scaled, updates, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, pytest.param(jnp.bfloat16, marks=slow)])
def test_half_precision_sees_what_is_not_finite_and_keeps_a_float32_second_moment(dtype):
    good = jnp.asarray([1.0, 2.0, 3.0], dtype)
    update: Any = jax.jit(MFAC.update)
    _, state = update(good, MFAC.init(good))
    for bad in (jnp.nan, jnp.inf):
        updates, after = update(good.at[1].set(bad), state)
        assert not jnp.isfinite(updates).all()
        assert optax.tree.get(after, "grads_rejected") == 1
        forgiven: Any = optax.tree.set(after, grads_rejected=jnp.int32(0))
        chex.assert_trees_all_equal(forgiven, state)
        chex.assert_type([updates, optax.tree.get(after, "second_moment")], [dtype, jnp.float32])


@pytest.mark.parametrize("entry", [1e15, 1e20, 3e38])
def test_a_lone_huge_gradient_makes_a_step_of_the_rate(entry):
    updates, _ = run(MFAC, np.full((1, WIDTH), entry, np.float32))
    np.testing.assert_allclose(updates, -0.01, rtol=1e-3)


def test_zero_gradients_do_not_lengthen_the_step():
    grads = np.concatenate([gradients(2), np.zeros((20, WIDTH))]).astype(np.float32)
    _, states = states_and_updates(MFAC, grads)
    before, after = (optax.tree.get(state, "log_step") for state in (states[1], states[-1]))
    assert after <= before + 1e-6


@pytest.mark.parametrize("norm", [0.0, 1e-38, 1e-20, 1e15, 1e30, 3e38])
def test_updates_stay_finite_at_any_norm(norm):
    grads = np.float32(norm) * np.sign(gradients(6)).astype(np.float32)
    updates, state = run(MFAC, np.concatenate([grads, grads[:1] * 0, grads]))
    assert np.isfinite(updates).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_metric(bad):
    grads = gradients(6).astype(np.float32)
    expected, expected_state = run(MFAC, grads)
    interrupted = np.insert(grads, 3, grads[0], axis=0)
    interrupted[3, 1] = bad
    updates, state = run(MFAC, interrupted)
    assert not np.isfinite(updates[3]).all()
    np.testing.assert_array_equal(np.delete(updates, 3, axis=0), expected)
    moments = [optax.tree.get(s, "second_moment") for s in (state, expected_state)]
    np.testing.assert_array_equal(*moments)


@pytest.mark.parametrize(
    ("updates", "error", "message"),
    [
        (jnp.ones(()), ValueError, "updates must have the shapes of the parameters"),
        (jnp.ones(2), ValueError, "updates must have the shapes of the parameters"),
        (jnp.ones(3, int), TypeError, "updates must be real floating-point arrays"),
        ({"x": jnp.ones(3)}, ValueError, "updates must have the tree of the parameters"),
    ],
)
def test_updates_that_do_not_fit_are_refused(updates, error, message):
    with pytest.raises(error, match=message):
        MFAC.update(updates, MFAC.init(jnp.ones(3)))


def test_step_adaptation_rests_while_the_learning_rate_rises():
    grads = np.repeat(gradients(1).astype(np.float32), 12, axis=0)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.01, 6, 12)
    _, states = states_and_updates(mfac(schedule, 8), grads)
    assert optax.tree.get(states[5], "log_step") == 0
    assert optax.tree.get(states[-1], "log_step") > 1
    _, state = run(mfac(0.01, 8), grads[:6])
    assert optax.tree.get(state, "log_step") > 1


@slow
def test_step_adaptation_may_be_a_schedule():
    grads = np.repeat(gradients(1).astype(np.float32), 6, axis=0)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 0.01, 6, 12)
    _, state = run(mfac(0.01, 4, step_adaptation=schedule), grads)
    assert 0 < optax.tree.get(state, "log_step") < 0.2
