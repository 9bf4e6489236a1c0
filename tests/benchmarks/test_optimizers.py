"""The optimizers that are compared, and the ideas that did not earn a place."""

from typing import Any

import jax
import numpy as np
import optax
import pytest

from benchmarks import optimizers, rivals

UNTUNED = (
    "mfac-default",
    "mfac-metric",
    "mfac-published",
    "prodigy",
    "dadapt-adamw",
    "schedule-free-adamw",
    "dog",
)
QUICK_IDEA = "mfac, recency weights"
SLOW_IDEAS = [pytest.param(name, marks=pytest.mark.slow) for name in optimizers.IDEAS if name != QUICK_IDEA]


@pytest.mark.parametrize("name", [QUICK_IDEA, *SLOW_IDEAS])
def test_every_idea_descends(name):
    tx = optimizers.IDEAS[name](optax.constant_schedule(0.05))
    params = jax.numpy.array([3.0, -2.0, 1.0])
    state, loss = tx.init(params), lambda p: jax.numpy.sum(p**2)
    step = jax.jit(lambda p, s: tx_step(tx, loss, p, s))
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 13.5  # 14 at the start


def tx_step(tx, loss, params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state


def test_every_tuned_optimizer_has_as_many_rates_and_they_rise_in_factors_of_two_to_three():
    for name, grids in optimizers.RATES.items():
        for family, rates in grids.items():
            tuned = 3 if family == "finetune" else 5
            assert len(rates) == (1 if name in UNTUNED else tuned)
            ratios = np.divide(rates[1:], rates[:-1])
            assert np.all((ratios > 1.9) & (ratios < 3.5))


def test_muon_sees_kernels_as_matrices():
    params = {"kernel": np.zeros((3, 3, 4, 8)), "bias": np.zeros(8), "dense": np.zeros((4, 2))}
    dimensions: Any = rivals.matrices(params)
    assert dimensions["kernel"] == ((0, 1, 2), 3)
    assert dimensions["dense"] == ((0,), 1)
    assert dimensions["bias"] is None


def test_the_published_window_of_the_notes_is_that_of_the_recipe():
    transform = optimizers.make_transform("mfac-published", 10, False)
    fisher = optax.tree.get(transform.init({"w": np.zeros(3, np.float32)}), "ScaleByMFACState")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(fisher.window)} == {optimizers.PUBLISHED_NUM_GRADS}
