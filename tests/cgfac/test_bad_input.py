"""Numbers that are not finite or extreme, and arguments that are refused."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import cgfac, scale_by_cgfac
from tests.cgfac.network import (
    AFTER_CG,
    INF,
    NAN,
    PARAMS,
    LayerFactors,
    flat,
    gradient_and_factors,
    tx_and_state,
)
from tests.dense_reference import relative_error


@pytest.mark.parametrize("step", [0, 1])
def test_factors_that_are_not_finite_leave_the_state_and_make_no_step(step):
    gradient, factors = gradient_and_factors()
    tx, state = tx_and_state(PARAMS, 0.1, num_batches=2, factors=factors)
    for _ in range(step):
        _, state = tx.update(gradient, state, curvature=factors)
    first = factors["layers_0/kernel"]
    spoiled = {
        **factors,
        "layers_0/kernel": LayerFactors(first.inputs, first.output_grads.at[0, 0].set(NAN), first.bias),
    }
    updates, new = tx.update(gradient, state, curvature=spoiled)
    assert not np.any(flat(updates))
    assert int(new.grads_rejected) == 1
    chex.assert_trees_all_equal(new._replace(grads_rejected=state.grads_rejected), state)


@pytest.mark.parametrize("damping", [1e-30, 1e20])
@pytest.mark.parametrize("value", [1e38, 1e-30, 0.0])
def test_updates_are_finite_whatever_the_factors(value, damping):
    """Also those that come after, from good factors."""
    gradient, factors = gradient_and_factors()
    tx, state = tx_and_state(PARAMS, damping)
    large = jax.tree.map(lambda g: 1e13 * g, gradient)
    spoiled = jax.tree.map(lambda x: jnp.full_like(x, value), factors)
    for g, curvature in ((large, spoiled), (gradient, spoiled), (gradient, factors)):
        updates, state = tx.update(g, state, curvature=curvature)
        assert np.all(np.isfinite(flat(updates)))
        assert np.all(np.isfinite(flat(state)))
    few = {"kernel": LayerFactors(jnp.full((3, 30), value), jnp.ones((3, 5)))}
    wide = {"kernel": jnp.ones((30, 5))}
    updates, state = tx.update(wide, tx.init(wide), curvature=few)
    assert np.all(np.isfinite(flat(updates)))


@pytest.mark.parametrize("bad", [NAN, INF])
def test_a_gradient_that_is_not_finite_leaves_the_state(bad):
    gradient, factors = gradient_and_factors()
    tx, state = tx_and_state(PARAMS, 1e-3)
    _, state = tx.update(gradient, state, curvature=factors)
    spoiled = {**gradient, "layers_0": jax.tree.map(lambda g: g.at[0].set(bad), gradient["layers_0"])}
    updates, new = tx.update(spoiled, state, curvature=factors)
    chex.assert_trees_all_equal(updates, spoiled)
    assert int(new.grads_rejected) == 1
    chex.assert_trees_all_equal(new._replace(grads_rejected=state.grads_rejected), state)


def test_a_zero_gradient_takes_no_iteration_and_no_step():
    gradient, factors = gradient_and_factors()
    tx, state = tx_and_state(PARAMS, 1e-3)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, gradient), state, curvature=factors)
    assert not np.any(flat(updates))
    assert not np.any(state.iterations)


@pytest.mark.parametrize("scale", [1e-30, 1e12])
def test_the_scale_of_the_gradient_does_not_matter(scale):
    gradient, factors = gradient_and_factors()
    tx, state = tx_and_state(PARAMS, 1e-2)
    plain, _ = tx.update(gradient, state, curvature=factors)
    scaled, _ = tx.update(jax.tree.map(lambda g: scale * g, gradient), state, curvature=factors)
    assert relative_error(flat(scaled) / scale, flat(plain)) < AFTER_CG


KERNEL = jnp.ones((3, 2))
GOOD = LayerFactors(jnp.ones((4, 3)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("curvature", "error", "message"),
    [
        (None, ValueError, "curvature must be given"),
        ({}, ValueError, "must have the factors of a layer"),
        ({"kernel": jnp.ones(3)}, TypeError, "LayerFactors"),
        ([GOOD], TypeError, "must be a dict"),
        ({"kernle": GOOD}, ValueError, "'kernle' is none of 'bias', 'kernel'"),
        ({"kernel": LayerFactors(GOOD.inputs, GOOD.output_grads, "b")}, ValueError, "'b' is none of"),
        ({"kernel": LayerFactors(jnp.ones((4, 5)), GOOD.output_grads)}, ValueError, "the kernel is (3, 2)"),
        ({"kernel": LayerFactors(GOOD.inputs, jnp.ones((4, 5)))}, ValueError, "5 outputs"),
        ({"kernel": LayerFactors(GOOD.inputs[0], GOOD.output_grads)}, ValueError, "(1, 3)"),
        (
            {"kernel": LayerFactors(GOOD.inputs[:0], GOOD.output_grads)},
            ValueError,
            "axis of one or more examples",
        ),
        ({"kernel": LayerFactors(GOOD.inputs, GOOD.output_grads, "kernel")}, ValueError, "in two layers"),
        (
            {"bias": LayerFactors(jnp.ones((4, 1)), GOOD.output_grads, "kernel")},
            ValueError,
            "'kernel' is (3, 2)",
        ),
    ],
)
def test_a_bad_curvature_is_refused_before_tracing(curvature, error, message):
    params = {"bias": jnp.ones(2), "kernel": KERNEL}
    tx, state = tx_and_state(params, 0.1)
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(lambda: tx.update(params, state, curvature=curvature))


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.0},
        {"damping": -1.0},
        {"damping": NAN},
        {"tolerance": 0.0},
        {"tolerance": INF},
        {"max_iterations": 0},
        {"norm_constraint": 0.0},
        {"norm_constraint": -1.0},
        {"num_batches": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("factory", [scale_by_cgfac, cgfac])
def test_options_out_of_range_are_refused(factory, options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name} must be .*got {value!r}"):
        factory(**options)


@pytest.mark.parametrize(
    "options",
    [{"max_iterations": 1.5}, {"damping": "1"}, {"num_batches": 2, "factors": [GOOD]}],
    ids=str,
)
def test_options_of_another_type_are_refused(options):
    with pytest.raises(TypeError, match=list(options)[-1]):
        scale_by_cgfac(**options)


def test_a_state_of_another_transform_is_refused():
    with pytest.raises(ValueError, match="have 4 leaves, and the state was made for 1"):
        scale_by_cgfac().update(PARAMS, scale_by_cgfac().init(KERNEL), curvature=gradient_and_factors()[1])
    tx, state = tx_and_state({"kernel": KERNEL}, 0.1)
    of_three = {"kernel": LayerFactors(GOOD.inputs[:3], GOOD.output_grads[:3])}
    window = scale_by_cgfac(num_batches=2, factors={"kernel": GOOD})
    with pytest.raises(ValueError, match="must have the shapes of the factors"):
        window.update({"kernel": KERNEL}, window.init({"kernel": KERNEL}), curvature=of_three)
    with pytest.raises(ValueError, match="num_batches=3, got num_batches=2"):
        scale_by_cgfac(num_batches=3, factors={"kernel": GOOD}).update(
            {"kernel": KERNEL}, window.init({"kernel": KERNEL}), curvature={"kernel": GOOD}
        )
    with pytest.raises(ValueError, match="must return a tree like the parameters"):
        tx.update({"kernel": KERNEL}, state, curvature=lambda v: v["kernel"])
    with pytest.raises(ValueError, match="num_batches must be 1"):
        window.update({"kernel": KERNEL}, window.init({"kernel": KERNEL}), curvature=lambda v: v)
    with pytest.raises(ValueError, match="preconditioner must be a function"):
        tx.update({"kernel": KERNEL}, state, curvature={"kernel": GOOD}, preconditioner=lambda v: v)
