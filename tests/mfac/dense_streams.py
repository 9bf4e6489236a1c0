"""Streams of gradients of a small tree, and what a dense float64 Fisher matrix makes of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.dense_reference import inverse_product, mean_by_age, relative_error

SIZES = {"bias": (3,), "kernel": (2, 3), "scale": ()}  # in the order of the leaves: 10 parameters
WIDTH = 10
slow = pytest.mark.slow


def by_rank(path) -> bool:
    return path[0].key == "kernel"


# The slices of the flattened parameters that make up each block; `by_rank` splits off the kernel alone.
BLOCKS = {
    None: (slice(None),),
    "leaf": (slice(0, 3), slice(3, 9), slice(9, 10)),
    by_rank: (np.array([0, 1, 2, 9]), slice(3, 9)),
}


def as_tree(flat):
    """Flat gradients `(*batch, 10)` as the tree of SIZES."""
    leaves = jnp.split(jnp.asarray(flat), [3, 9], axis=-1)
    shapes = zip(SIZES.items(), leaves, strict=True)
    return {name: leaf.reshape(*flat.shape[:-1], *shape) for (name, shape), leaf in shapes}


def as_flat(tree) -> np.ndarray:
    """The inverse of `as_tree`."""
    batch = tree["scale"].shape
    return np.concatenate([np.reshape(tree[name], (*batch, -1)) for name in SIZES], axis=-1)


def stream(length: int, width: int = WIDTH, seed: int = 0) -> np.ndarray:
    """Correlated float64 gradients of different norms."""
    rng = np.random.default_rng(seed)
    grads = rng.standard_normal((length, width)) + rng.standard_normal(width)
    return grads * rng.uniform(0.3, 3, (length, 1))


def run(tx: optax.GradientTransformationExtraArgs, grads) -> tuple[Any, Any]:
    """All updates over a stream of gradients, stacked, and the last state."""
    state = tx.init(jax.tree.map(lambda g: g[0], grads))

    def step(state, g):
        updates, state = tx.update(g, state)
        return state, updates

    state, updates = jax.lax.scan(step, state, grads)
    return updates, state


@functools.partial(jax.jit, static_argnames="tx")
def jitted_run(tx, grads):
    return run(tx, grads)


def dense_run(grads, num_grads, damping, window_momentum, blocks) -> np.ndarray:
    """What `scale_by_mfac` should answer at every step; `damping` is a schedule."""
    answers = []
    for step in range(len(grads)):
        window = grads[max(0, step + 1 - num_grads) : step + 1]
        x = mean_by_age(window, window_momentum)
        answers.append(inverse_product(window, x, damping(step), num_grads, BLOCKS[blocks]))
    return np.stack(answers)


def constant(step):
    return 0.05


def decaying(step):
    return 0.5 * 0.9**step


def worst_error(actual: np.ndarray, expected: np.ndarray) -> float:
    return max(map(relative_error, actual, expected))


ONE_BLOCKING = pytest.mark.parametrize(
    "blocks", [by_rank, pytest.param(None, marks=slow), pytest.param("leaf", marks=slow)]
)
