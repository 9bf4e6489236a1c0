"""Trees that have `__call__`, as modules of equinox do, are trees; what holds arrays may be a function."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.tree_util import Partial

import mfac_jax.pruning

pruning: Any = mfac_jax.pruning  # a tree of parameters may be of any class
collect_gradients: Any = mfac_jax.collect_gradients


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    kernel: Any

    def __call__(self, x):
        return x @ self.kernel


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class GradientsOnData:
    """A function from parameters to gradients, which holds its data."""

    inputs: Any

    def __call__(self, params):
        loss = lambda layer, x: jnp.mean(layer(x) ** 2)  # noqa: E731
        return collect_gradients(loss, params, [self.inputs], 5, per_example=True)


INPUTS = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
PARAMS: Any = Layer(jnp.linspace(-1, 1, 12).reshape(4, 3))
GRADS: Any = GradientsOnData(INPUTS)(PARAMS)


def as_dict(layer) -> dict:
    return {"kernel": layer.kernel}


@pytest.mark.parametrize("pattern", [pytest.param(None, marks=pytest.mark.slow), "2:4"])
def test_callable_gradients_prune_as_those_in_a_dict(pattern):
    expected, kept = pruning.prune(as_dict(PARAMS), as_dict(GRADS), 0.5, pattern=pattern)
    found, masks = pruning.prune(PARAMS, GRADS, 0.5, pattern=pattern)
    np.testing.assert_array_equal(found.kernel, expected["kernel"])
    np.testing.assert_array_equal(masks.kernel, kept["kernel"])
    inside, _ = pruning.prune({"layer": PARAMS}, {"layer": GRADS}, 0.5, pattern=pattern)
    np.testing.assert_array_equal(inside["layer"].kernel, expected["kernel"])


@pytest.mark.parametrize(
    "function",
    [
        GradientsOnData(INPUTS),
        Partial(lambda inputs, params: GradientsOnData(inputs)(params), INPUTS),
        Partial(GradientsOnData(INPUTS)),
        GradientsOnData(INPUTS).__call__,
    ],
    ids=["object", "partial", "partial of an object", "method"],
)
def test_functions_that_hold_arrays_are_called_at_each_step(function):
    expected, _ = pruning.prune(PARAMS, lambda params: GradientsOnData(INPUTS)(params), 0.5, num_steps=2)
    found, _ = pruning.prune(PARAMS, function, 0.5, num_steps=2)
    np.testing.assert_array_equal(found.kernel, expected.kernel)


@pytest.mark.parametrize(
    ("params", "grads", "message"),
    [
        (as_dict(PARAMS), GRADS, "grads must have the tree of the parameters"),
        (PARAMS, as_dict(GRADS), "grads must have the tree of the parameters"),
        (PARAMS, Layer(jnp.ones((5, 3, 4))), r"after one leading axis, but leaf .kernel is \(5, 3, 4\)"),
    ],
)
def test_callable_gradients_of_another_tree_are_refused_as_gradients(params, grads, message):
    with pytest.raises(ValueError, match=message):
        pruning.prune(params, grads, 0.5)


def test_masks_and_states_may_be_callable():
    masks = pruning.kernel_masks(PARAMS)
    tx = pruning.keep_pruned(optax.sgd(0.1), masks)
    state = tx.init(PARAMS)
    fewer = Layer(jnp.arange(12).reshape(4, 3) > 5)
    state = pruning.set_masks(tx, state, fewer)
    updates, _ = tx.update(PARAMS, state, PARAMS)
    expected = np.where(fewer.kernel, np.float32(-0.1) * PARAMS.kernel, -PARAMS.kernel)
    np.testing.assert_array_equal(updates.kernel, expected)
    assert pruning.sparsity(fewer) == 0.5
    np.testing.assert_array_equal(pruning.apply_masks(PARAMS, fewer).kernel[:2], 0)
    assert np.all(pruning.obs_update(PARAMS, GRADS, fewer).kernel[:2] == 0)
