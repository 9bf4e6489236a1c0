"""What `prune` and `obs_update` refuse, and in which words."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax.pruning import obs_update, prune
from tests.pruning.small_network import (
    ALL,
    DAMPING,
    MASKED,
    NUM_GRADS,
    G,
    W,
    as_flat,
    as_masks,
    as_tree,
    pruned,
)

BAD_ROW = np.where(np.arange(NUM_GRADS)[:, None] == 7, np.nan, G).astype(np.float32)
KEPT_HALF = as_masks(~MASKED | (np.arange(67) % 2 > 0))
GIVEN = as_tree(G.astype(np.float32))
PARAMS = as_tree(W.astype(np.float32))


def other(tree, **leaves) -> Any:
    return {**tree, **leaves}


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    {
        "one": ((PARAMS, GIVEN, 1.0), {}, ValueError, "sparsity must be .*< 1, got 1.0"),
        "negative": ((PARAMS, GIVEN, -0.1), {}, ValueError, "sparsity must be .*got -0.1"),
        "no number": ((PARAMS, GIVEN, "0.5"), {}, TypeError, "sparsity must be .*got '0.5'"),
        "below masks": (
            (PARAMS, GIVEN, 0.4),
            {"masks": KEPT_HALF},
            ValueError,
            r"got 0.4, where masks already have 0.5 \(32 of 64\)",
        ),
        "axes differ": (
            (PARAMS, other(GIVEN, out=jnp.ones((5, 8, 5))), 0.5),
            {},
            ValueError,
            r"one leading axis of the same length .*\['out'\]: \(5, 8, 5\)",
        ),
        "other tree": (
            (PARAMS, {"out": GIVEN["out"]}, 0.5),
            {},
            ValueError,
            r"grads must have the tree of the parameters, but leaf \['conv'\]\['bias'\] is only in one.*"
            "collect_gradients",
        ),
        "not stacked": ((PARAMS, PARAMS, 0.5), {}, ValueError, "one leading axis of the same length"),
        "other shape": (
            (PARAMS, other(GIVEN, out=jnp.ones((NUM_GRADS, 5, 8))), 0.5),
            {},
            ValueError,
            r"after one leading axis, but leaf \['out'\] is \(12, 5, 8\) for \(8, 5\).*jnp.stack",
        ),
        "no gradients": (
            (PARAMS, jax.tree.map(lambda g: g[:0], GIVEN), 0.5),
            {},
            ValueError,
            "one leading axis of the same length >= 1",
        ),
        "ints": (
            (PARAMS, other(GIVEN, out=jnp.ones((NUM_GRADS, 8, 5), int)), 0.5),
            {},
            TypeError,
            r"grads must be real floating-point arrays, but leaf \['out'\] is int32",
        ),
        "does not divide": (
            (PARAMS, GIVEN, 0.5),
            {"pattern": "2:8"},
            ValueError,
            r"groups of 8, which must divide .*\['kernel'\], \(2, 4, 3\), has 4 entries.*None there",
        ),
        "too sparse for it": (
            (PARAMS, GIVEN, 0.6),
            {"pattern": "2:4"},
            ValueError,
            "at most 0.5 with this",
        ),
        "unknown pattern": ((PARAMS, GIVEN, 0.5), {"pattern": "4:2"}, ValueError, "got '4:2'.*'2:4'"),
        "no kernel": (
            ({"bias": jnp.ones(3)}, {"bias": jnp.ones((2, 3))}, 0.5),
            {},
            ValueError,
            r"must have a kernel.*\['bias'\].*masks of your own",
        ),
        "a NaN": (
            (PARAMS, as_tree(BAD_ROW), 0.5),
            {},
            ValueError,
            r"those with the indices \[7\] have a NaN or an Inf",
        ),
        "a parameter": (
            (other(PARAMS, out=PARAMS["out"].at[2, 1].set(jnp.inf)), GIVEN, 0.5),
            {},
            ValueError,
            r"params must be finite, but leaf \['out'\] has a NaN.*training that went well",
        ),
        "int parameter": (
            (other(PARAMS, out=jnp.ones((8, 5), int)), GIVEN, 0.5),
            {},
            TypeError,
            r"params must be real floating-point arrays, but leaf \['out'\] is int32",
        ),
        "masks": (
            (PARAMS, GIVEN, 0.5),
            {"masks": {"out": KEPT_HALF["out"]}},
            ValueError,
            "masks must have the tree of the parameters",
        ),
        "steps": (
            (PARAMS, GIVEN, 0.5),
            {"num_steps": 2},
            ValueError,
            "num_steps must be 1 with given gradients, got 2.*Pass a function",
        ),
        "no steps": (
            (PARAMS, lambda _: GIVEN, 0.5),
            {"num_steps": 0},
            ValueError,
            "num_steps must be an int",
        ),
        "traced": (
            (PARAMS, GIVEN, 0.5),
            {"jit": True},
            TypeError,
            "not traced.*outside of jax.jit; obs_scores and obs_update can",
        ),
        "damping": ((PARAMS, GIVEN, 0.5), {"damping": 0.0}, ValueError, "damping must be .* > 0, got 0.0"),
        "update": ((PARAMS, GIVEN, 0.5), {"update": "both"}, ValueError, "update must be one of 'joint'"),
        "no update": ((PARAMS, GIVEN, 0.5), {"update": None}, ValueError, "update must be one of 'joint'"),
        "gradient_term": (
            (PARAMS, GIVEN, 0.5),
            {"gradient_term": -1.0},
            ValueError,
            "gradient_term must be .* >= 0, got -1.0",
        ),
        "step_limit": ((PARAMS, GIVEN, 0.5), {"step_limit": 0.0}, ValueError, "step_limit must be .* > 0"),
        "NaN": ((PARAMS, GIVEN, 0.5), {"step_limit": math.nan}, ValueError, "step_limit must be .* > 0"),
        "None": (
            (PARAMS, lambda _: None, 0.5),
            {},
            ValueError,
            "grads must have the tree of the parameters",
        ),
    }.values(),
)
def test_bad_input_is_refused(args, options, error, message):
    call = jax.jit(prune, static_argnums=2) if options.pop("jit", False) else prune
    with pytest.raises(error, match=message):
        call(*args, **options)


def test_parameters_that_are_not_finite_are_refused_before_gradients_are_asked_for():
    with pytest.raises(ValueError, match="params must be finite"):
        prune(other(PARAMS, out=PARAMS["out"] * jnp.nan), lambda _: pytest.fail("asked for"), 0.5)


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        (jax.tree.map(lambda g: g.at[3].set(jnp.inf), GIVEN), r"indices \[3\]"),
        (jax.tree.map(lambda g: g[0], GIVEN), "one leading axis"),
        (GIVEN["conv"], "tree of the parameters"),
    ],
)
def test_nonsense_at_a_later_step_is_refused_and_the_parameters_are_as_they_were(nonsense, message):
    params = jax.tree.map(jnp.copy, PARAMS)
    answers = iter([GIVEN, nonsense])
    with pytest.raises(ValueError, match=message):
        pruned(params, lambda _: next(answers), 0.5)
    assert next(answers, None) is None
    np.testing.assert_array_equal(as_flat(params), W)


def test_an_update_that_overflows_is_refused_with_the_cure():
    """Gradients of 1e-3 move the survivors by about 1e3 gradient terms."""
    small = jax.tree.map(lambda g: g * 1e-3, GIVEN)
    with pytest.raises(ValueError, match=r"after pruning\. Pass a larger damping, or a step_limit"):
        pruned(PARAMS, small, 0.5, damping=1e-9, gradient_term=3e38)


def test_masks_of_an_update_must_fit_those_before():
    with pytest.raises(ValueError, match=r"keep no weight that masks_before prune.*\['kernel'\] has 12\."):
        obs_update(PARAMS, GIVEN, as_masks(ALL), DAMPING, masks_before=KEPT_HALF)
    with pytest.raises(ValueError, match=r"of masks_before, but leaf \['out'\] is only in one.*jnp.ones"):
        obs_update(PARAMS, GIVEN, KEPT_HALF, DAMPING, masks_before=other(KEPT_HALF, out=None))
