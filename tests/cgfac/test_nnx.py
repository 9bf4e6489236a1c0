"""Factors of the layers of a module of Flax's nnx."""

import chex
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from mfac_jax import nnx_value_and_grad_with_factors

IMAGES = jax.random.normal(jax.random.key(0), (6, 8, 8, 2))
X = jnp.ones((6, 4))


def test_a_module_of_nnx_is_explained_and_a_kernel_that_is_left_out_is_named_once():
    model = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    function = nnx_value_and_grad_with_factors(
        lambda model: jnp.mean(X @ jnp.where(model.kernel[...] > 0, model.kernel[...], 0))
    )
    with pytest.warns(UserWarning, match="'kernel': its gradient is masked") as said:
        function(model)
    assert said[0].filename == __file__
    function(model)
    assert function.explain(model)["bias"] == "left out: the loss does not depend on it"


def test_a_module_of_nnx_has_the_gradient_of_nnx_and_the_layers_of_its_state():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Conv(2, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
    )

    def loss(model, x):
        out = model(x)
        return jnp.mean(out**2), out

    twin = nnx.clone(model)
    (value, out), grads, factors = nnx.jit(nnx_value_and_grad_with_factors(loss, has_aux=True))(
        model, IMAGES
    )
    expected = nnx.jit(nnx.value_and_grad(loss, has_aux=True))(twin, IMAGES)
    chex.assert_trees_all_close(
        ((value, out), nnx.to_pure_dict(grads)),
        (expected[0], nnx.to_pure_dict(expected[1])),
        rtol=1e-5,
        atol=1e-6,
    )
    assert factors["layers/0/kernel"].bias == "layers/0/bias"
    moved, also_moved = (nnx.to_pure_dict(nnx.state(m, nnx.BatchStat)) for m in (model, twin))
    chex.assert_trees_all_close(moved, also_moved, rtol=1e-5)
    counts = [nnx.state(m, nnx.RngCount) for m in (model, twin)]
    chex.assert_trees_all_equal(*map(nnx.to_pure_dict, counts))
