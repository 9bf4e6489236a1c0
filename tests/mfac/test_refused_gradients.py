"""After a gradient with a NaN or an Inf all is as if it had not come."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from mfac_jax import mfac, mfac_published
from tests.mfac.small_runs import GRADIENTS, PARAMS, at

slow = pytest.mark.slow


def spoiled(value: float):
    """The gradients with a bad one before the first, the third and after the last: 0, 3 and 7 of 8."""
    order = jnp.array([0, 0, 1, 2, 2, 3, 4, 4])
    gradients = jax.tree.map(lambda g: g[order], GRADIENTS)
    bad = jnp.array([0, 3, 7])
    return {**gradients, "kernel": gradients["kernel"].at[bad, 1, 2].set(value)}, bad.tolist()


def loop(tx, gradients) -> tuple[list[Any], Any]:
    """As `run`, but each step is one call of one compiled program."""
    step, state, all_updates = jax.jit(tx.update), tx.init(PARAMS), []
    for number in range(len(gradients["scale"])):
        updates, state = step(at(number, gradients), state, PARAMS)
        all_updates.append(updates)
    return all_updates, state


def apart(updates, bad: list[int]):
    return [u for i, u in enumerate(updates) if i not in bad], [updates[i] for i in bad]


DECAYED = mfac(0.1, 3, optax.exponential_decay(0.5, 3, 0.3), weight_decay=0.1)
WITH_BAD_GRADIENTS = {
    "published": mfac_published(0.1, 3, 0.5),
    "mfac": DECAYED,
    "no momentum": mfac(0.1, 3, 0.5, None),
    "other options": mfac(0.1, 3, 0.5, blocks="leaf", storage=jnp.bfloat16),
    "as in the paper, without momentum": mfac_published(0.1, 3, 0.5, None, blocks="leaf"),
}


@pytest.mark.parametrize("value", [jnp.nan, pytest.param(-jnp.inf, marks=slow)])
@pytest.mark.parametrize(
    "name", ["published", "mfac", *(pytest.param(n, marks=slow) for n in [*WITH_BAD_GRADIENTS][2:])]
)
def test_after_a_bad_gradient_all_is_as_if_it_had_not_come(value, name):
    """The schedule of the damping has not moved, nor have metric, momentum or step factor."""
    tx = WITH_BAD_GRADIENTS[name]
    gradients, bad = spoiled(value)
    updates, state = loop(tx, gradients)
    good_updates, bad_updates = apart(updates, bad)
    expected, expected_state = loop(tx, GRADIENTS)
    chex.assert_trees_all_equal(good_updates, expected)
    assert not any(jnp.isfinite(u["kernel"][1, 2]) for u in bad_updates)
    assert optax.tree.get(state, "grads_rejected") == len(bad)
    chex.assert_trees_all_equal(optax.tree.set(state, grads_rejected=jnp.int32(0)), expected_state)


def test_apply_if_finite_sees_a_bad_gradient_and_skips_it():
    tx = optax.apply_if_finite(DECAYED, 3)
    gradients, bad = spoiled(jnp.nan)
    updates, state = loop(tx, gradients)
    good_updates, bad_updates = apart(updates, bad)
    expected, expected_state = loop(tx, GRADIENTS)
    chex.assert_trees_all_equal(good_updates, expected)
    chex.assert_trees_all_equal(bad_updates, [jax.tree.map(jnp.zeros_like, PARAMS)] * len(bad))
    assert optax.tree.get(state, "total_notfinite") == len(bad)
    chex.assert_trees_all_equal(state.inner_state, expected_state.inner_state)


@slow
def test_a_users_own_check_sees_a_bad_gradient_and_trains_on():
    tx = DECAYED

    @jax.jit
    def step(params, state, g):
        updates, state = tx.update(g, state, params)
        new_params = optax.apply_updates(params, updates)
        finite = jnp.isfinite(optax.tree.norm(updates))
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new_params, params), state

    def train(gradients):
        params, state = PARAMS, tx.init(PARAMS)
        for number in range(len(gradients["scale"])):
            params, state = step(params, state, at(number, gradients))
        return params

    chex.assert_trees_all_equal(train(spoiled(jnp.nan)[0]), train(GRADIENTS))
