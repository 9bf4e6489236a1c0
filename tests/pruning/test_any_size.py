"""Pruning of weights, by gradients, of any size."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mfac_jax.pruning import obs_scores, obs_update, prune

LARGEST = float(np.finfo(np.float32).max)
SHAPES = {"bias": (4,), "first": (6, 4), "second": (4, 3)}
MASKS = {"bias": None, "first": np.ones((6, 4), bool), "second": np.ones((4, 3), bool)}


def random_tree(rows: tuple[int, ...] = ()) -> dict:
    random = np.random.default_rng(len(rows))
    return {name: random.standard_normal((*rows, *s)).astype(np.float32) for name, s in SHAPES.items()}


W, G = random_tree(), random_tree((4,))
DAMPING, TERM = 1e-2, 0.25


def times_power(tree, exponent: int) -> Any:
    """The tree times 2^exponent in float32; what it cannot hold is clipped."""
    scaled = jax.tree.map(lambda x: np.ldexp(np.asarray(x, np.float64), exponent), tree)
    return jax.tree.map(lambda x: np.clip(x, -LARGEST, LARGEST).astype(np.float32), scaled)


def assert_same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    ("update", "pattern"),
    [("independent", None), pytest.param("joint", "2:4", marks=pytest.mark.slow)],
)
@settings(max_examples=1, deadline=None)
@given(st.integers(-90, 110), st.integers(-100, 100))
@example(66, 0)  # weights of 1e20
@example(-83, 66)  # weights of 1e-25, gradients of 1e20
def test_powers_of_two_pass_through_bit_for_bit(update, pattern, of_weights, of_gradients):
    """Weights 2^a w, gradients 2^b g, damping 4^b and a gradient term 2^(a+b) give 2^a times the result."""
    masks = MASKS if pattern is None else {**MASKS, "first": None}
    options: Any = {"update": update, "pattern": pattern, "masks": masks, "step_limit": 0.5}
    term = TERM if abs(of_weights + of_gradients) < 120 else 0.0
    expected, kept = prune(W, G, 0.5, damping=DAMPING, gradient_term=term, **options)
    w, g = times_power(W, of_weights), times_power(G, of_gradients)
    damping = np.ldexp(DAMPING, 2 * of_gradients)
    found, masks = prune(
        w, g, 0.5, damping=damping, gradient_term=np.ldexp(term, of_weights + of_gradients), **options
    )
    assert_same(masks, kept)
    assert_same(found, times_power(expected, of_weights))
    scores = obs_scores(w, g, damping, masks=MASKS)
    assert_same(
        scores, times_power(obs_scores(W, G, DAMPING, masks=MASKS), 2 * (of_weights + of_gradients))
    )


@pytest.mark.parametrize("pattern", [None, pytest.param("2:4", marks=pytest.mark.slow)])
def test_the_smallest_of_weights_of_all_sizes_go(pattern):
    """Their squares are 0 and infinite in float32."""
    w = np.array([1e20, 1e-25, 3e-25, 2e-25, 1e30, 5.0, 4.0, 1e-30], np.float32)[:, None]
    _, masks = prune(w, np.zeros((3, 8, 1), np.float32), 0.5, pattern=pattern)
    smallest = [1, 2, 3, 7] if pattern is None else [1, 3, 6, 7]
    np.testing.assert_array_equal(np.flatnonzero(~np.asarray(masks)), smallest)


def test_rows_of_all_sizes_move_the_survivors_as_dense_matrices_do():
    """Gradients of 1e25, 1 and 1e-25 in float32, beside float64."""
    random = np.random.default_rng(0)
    grads = random.standard_normal((3, 8)) * np.array([[1e25], [1.0], [1e-25]])
    w, keep, damping = random.standard_normal(8), np.arange(8) > 2, 1e-4
    S, Q = grads[:, keep], grads[:, ~keep]
    # The system over the sizes of its rows: as it stands, float64 would lose the smaller ones.
    size = np.linalg.norm(S, axis=1)
    system = (S / size[:, None]) @ (S / size[:, None]).T + 3 * damping * np.diag(size**-2.0)
    expected = w[keep] + (S / size[:, None]).T @ np.linalg.solve(system, Q @ w[~keep] / size)
    shape = (8, 1)
    found: Any = obs_update(
        jnp.asarray(w.reshape(shape), jnp.float32),
        jnp.asarray(grads.reshape(3, *shape), jnp.float32),
        keep.reshape(shape),
        damping,
    )
    np.testing.assert_allclose(np.ravel(found)[keep], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("damping", [1e-40, 1e39])
def test_the_damping_may_be_beyond_float32(damping):
    """Without gradients the score is w^2 damping / 2."""
    w = jnp.array([[1.0, 2.0]]) / np.sqrt(damping)
    scores = obs_scores(w, jnp.zeros((1, 1, 2)), damping)
    np.testing.assert_allclose(scores, [[0.5, 2.0]], rtol=1e-5)
