"""CG-FAC as an optax transform: jit, donation, wrappers, masks, checkpoints, Flax."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

from mfac_jax import cgfac, nnx_value_and_grad_with_factors, scale_by_cgfac, value_and_grad_with_factors
from tests.cgfac.network import (
    AFTER_CG,
    PARAMS,
    STEP,
    LayerFactors,
    X,
    cross_entropy,
    flat,
    gradient_and_factors,
    tx_and_state,
)
from tests.dense_reference import relative_error

OPTIONS = {
    "default": {},
    "window": {"num_batches": 3, "factors": gradient_and_factors()[1]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_training_under_jit_with_a_donated_state_is_that_without(name):
    tx = cgfac(0.3, weight_decay=1e-3, **OPTIONS[name])

    def step(params, state):
        _, gradient, factors = STEP(params)
        updates, state = tx.update(gradient, state, params, curvature=factors)
        return optax.apply_updates(params, updates), state

    plain, donated = (PARAMS, tx.init(PARAMS)), jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    compiled = jax.jit(chex.assert_max_traces(step, n=1), donate_argnums=(0, 1))
    chex.clear_trace_counter()
    for _ in range(4):
        before = donated
        plain, donated = step(*plain), compiled(*donated)
        assert all(x.is_deleted() for x in jax.tree.leaves(before))
        assert jax.tree.map(jax.typeof, before[1]) == jax.tree.map(jax.typeof, donated[1])
    chex.assert_trees_all_close(plain[0], donated[0], rtol=AFTER_CG, atol=0.1 * AFTER_CG)


WRAPPED = {
    "chain": optax.chain(optax.identity(), cgfac(0.1)),
    "partition": optax.partition({"all": cgfac(0.1)}, "all"),
    "inject_hyperparams": optax.inject_hyperparams(cgfac, static_args=("max_iterations", "num_batches"))(
        0.1
    ),
    "apply_if_finite": optax.apply_if_finite(cgfac(0.1), 3),
    "MultiSteps": optax.MultiSteps(cgfac(0.1), 1).gradient_transformation(),
}
COMPILES_MUCH = ("apply_if_finite", "MultiSteps")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in COMPILES_MUCH else name for name in WRAPPED],
)
def test_a_wrapper_changes_nothing(name):
    gradient, factors = gradient_and_factors()
    tx: Any = WRAPPED[name]
    updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS, curvature=factors)
    expected, _ = cgfac(0.1).update(gradient, cgfac(0.1).init(PARAMS), PARAMS, curvature=factors)
    chex.assert_trees_all_close(updates, expected, rtol=AFTER_CG, atol=0.1 * AFTER_CG)


def test_init_takes_shapes_in_the_place_of_arrays():
    shapes = jax.eval_shape(lambda: PARAMS)
    for options in OPTIONS.values():
        tx = cgfac(0.1, **options)
        chex.assert_trees_all_equal(tx.init(shapes), tx.init(PARAMS))


def test_training_goes_on_bit_for_bit_from_a_checkpoint(tmp_path):
    tx = cgfac(0.1, **OPTIONS["window"])
    gradient, factors = gradient_and_factors()
    step = jax.jit(lambda state: tx.update(gradient, state, PARAMS, curvature=factors))
    _, state = step(tx.init(PARAMS))
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", jax.eval_shape(lambda: state))
    chex.assert_trees_all_equal(step(restored), step(state))


@pytest.mark.parametrize("name", OPTIONS)
def test_map_params_finds_nothing_like_the_parameters(name):
    tx = cgfac(0.1, momentum=None, **OPTIONS[name])
    mapped = optax.tree.map_params(tx, lambda _: "parameter", tx.init(PARAMS))
    chex.assert_trees_all_equal(mapped, tx.init(PARAMS))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_leaves_of_half_precision_keep_their_dtype(dtype):
    gradient, factors = gradient_and_factors()
    expected, _ = scale_by_cgfac().update(gradient, scale_by_cgfac().init(PARAMS), curvature=factors)
    params, gradient = jax.tree.map(lambda x: x.astype(dtype), (PARAMS, gradient))
    tx, state = tx_and_state(params)
    updates, state = tx.update(gradient, state, curvature=factors)
    chex.assert_trees_all_equal_dtypes(updates, params)
    assert state.residuals.dtype == jnp.float32
    assert relative_error(flat(updates), flat(expected)) < 30 * float(jnp.finfo(dtype).eps)


@pytest.mark.slow
def test_vmap_over_problems_takes_the_plain_steps_of_each():
    tx = scale_by_cgfac(0.1)

    def step(scale):
        _, gradient, factors = STEP(jax.tree.map(lambda p: scale * p, PARAMS))
        return tx.update(gradient, tx.init(PARAMS), curvature=factors)

    together, step = jax.jit(jax.vmap(step))(jnp.array([0.5, 3.0])), jax.jit(step)
    for number, scale in enumerate((0.5, 3.0)):
        chex.assert_trees_all_close(
            jax.tree.map(lambda x, i=number: x[i], together),
            step(scale),
            rtol=AFTER_CG,
            atol=0.1 * AFTER_CG,
        )


class Normed(nn.Module):
    """A layer and a scale that is none."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.LayerNorm()(nn.tanh(nn.Dense(5)(x))))


def test_a_leaf_without_factors_has_a_multiple_of_the_identity():
    model = Normed()
    params = jax.jit(model.init)(jax.random.key(0), X)["params"]
    run = jax.jit(value_and_grad_with_factors(lambda p: cross_entropy(model.apply({"params": p}, X))))
    _, gradient, factors = run(params)
    assert set(factors) == {"Dense_0/kernel", "Dense_1/kernel"}
    tx, state = tx_and_state(params, 0.1)
    updates, state = tx.update(gradient, state, curvature=factors)
    g = gradient["LayerNorm_0"]["scale"]
    np.testing.assert_allclose(updates["LayerNorm_0"]["scale"], g / (12 * jnp.mean(g**2) + 0.1), rtol=1e-4)
    assert list(np.asarray(state.iterations) == 0) == [False, False, False, False, True, True]


def test_masked_leaves_stay_out():
    gradient, factors = gradient_and_factors()
    mask = {"layers_0": False, "layers_2": {"kernel": True, "bias": False}}
    tx: Any = optax.masked(scale_by_cgfac(0.1), mask)
    updates, _ = tx.update(gradient, tx.init(PARAMS), PARAMS, curvature=factors)
    chex.assert_trees_all_equal(updates["layers_0"], gradient["layers_0"])
    chex.assert_trees_all_equal(updates["layers_2"]["bias"], gradient["layers_2"]["bias"])
    alone = {"kernel": gradient["layers_2"]["kernel"]}
    without_bias = LayerFactors(factors["layers_2/kernel"].inputs, factors["layers_2/kernel"].output_grads)
    tx, state = tx_and_state(alone, 0.1)
    expected, _ = tx.update(alone, state, curvature={"kernel": without_bias})
    chex.assert_trees_all_close(updates["layers_2"]["kernel"], expected["kernel"], rtol=1e-5)


def test_the_norm_constraint_bounds_the_norm_in_the_fisher_matrix():
    """Of a solution x the squared norm is its product with the gradient; of c x it is c^2 times that."""
    gradient, factors = gradient_and_factors()
    free, _ = scale_by_cgfac(0.1).update(gradient, scale_by_cgfac(0.1).init(PARAMS), curvature=factors)
    size = flat(free) @ flat(gradient)
    for limit in (size / 4, 2 * size):
        tx, state = tx_and_state(PARAMS, 0.1, norm_constraint=float(limit))
        updates, _ = tx.update(gradient, state, curvature=factors)
        squared = (flat(updates) @ flat(gradient)) ** 2 / size
        assert squared == pytest.approx(min(limit, size), rel=1e-4)
        assert (
            relative_error(
                flat(updates) * np.linalg.norm(flat(free)), flat(free) * np.linalg.norm(flat(updates))
            )
            < 1e-5
        )


def test_an_nnx_optimizer_trains_and_batch_statistics_move():
    rngs = nnx.Rngs(1)
    model: Any = nnx.Sequential(
        nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs), nnx.tanh, nnx.Linear(8, 3, rngs=rngs)
    )
    optimizer = nnx.Optimizer(model, cgfac(0.3), wrt=nnx.Param)
    run = nnx_value_and_grad_with_factors(lambda model: cross_entropy(model(X)))

    @nnx.jit
    def step(model, optimizer):
        value, gradient, factors = run(model)
        optimizer.update(model, gradient, curvature=factors)
        return value

    before = np.asarray(model.layers[1].mean[...])
    values = [float(step(model, optimizer)) for _ in range(30)]
    assert values[-1] < values[0] / 4
    assert not np.allclose(before, np.asarray(model.layers[1].mean[...]))
