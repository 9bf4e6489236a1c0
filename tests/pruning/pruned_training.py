"""Short trainings of a network that is pruned in part."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax import mfac
from mfac_jax.pruning import keep_pruned, kernel_masks

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.arange(1.0, 13.0).reshape(4, 3), "other": jnp.ones((2, 2))}
KEPT = {"kernel": np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]], bool), "other": np.eye(2) == 1}
MASKS: Any = {"bias": None, **KEPT}
ALL_KEPT: Any = kernel_masks(PARAMS)
STEPS = 5
EPS = float(jnp.finfo(jnp.float32).eps)
M = 3  # of the windows; they wrap


# A rotated metric would mix survivors with what is gone.
TX = keep_pruned(mfac(0.1, M, weight_decay=0.1, metric="diagonal"), MASKS)
STATE: Any = TX.init(PARAMS)
SGD = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))


def gradients_for(params, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((STEPS, *p.shape)), p.dtype), params)


GRADIENTS = gradients_for(PARAMS)


def train(tx, params, state, gradients=GRADIENTS):
    """Parameters after every step, the last ones and the last state, whose types may not change."""
    return scan(tx, params, state, gradients)


@functools.partial(jax.jit, static_argnames="tx")
def scan(tx, params, state, gradients):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (params, state), after = jax.lax.scan(step, (params, state), gradients)
    return after, params, state


def first_step(tx, params, state):
    updates, state = tx.update(jax.tree.map(lambda g: g[0], GRADIENTS), state, params)
    return optax.apply_updates(params, updates), state


step_once: Any = jax.jit(first_step, static_argnums=0)


def pruned_entries(params) -> np.ndarray:
    return np.concatenate(
        [np.asarray(params[name], np.float32)[..., ~kept] for name, kept in KEPT.items()], -1
    )


def surviving(tree, axes: int = 0) -> dict:
    """The survivors alone, flat, behind some axes in front."""
    return {**tree, **{name: tree[name][(slice(None),) * axes + (kept,)] for name, kept in KEPT.items()}}


def assert_close(actual, expected, factor: float = 100):
    chex.assert_trees_all_close(actual, expected, rtol=factor * EPS, atol=factor * EPS)
