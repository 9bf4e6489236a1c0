"""Short runs on a small tree. Each transform here is one object, so that tests compile it once."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax import mfac, scale_by_mfac

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3)), "scale": jnp.ones(())}
PLAIN = scale_by_mfac(3, 0.5)
MFAC = mfac(0.1, 3, storage=None)
STEPS = 5  # the window of three wraps
EPS = float(jnp.finfo(jnp.float32).eps)
plain_update: Any = jax.jit(PLAIN.update)


def gradients_for(params, steps: int = STEPS, seed: int = 0):
    """Random gradients, with an axis of steps in front of every leaf."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((steps, *p.shape)), p.dtype), params)


GRADIENTS = gradients_for(PARAMS)


def at(step: int, gradients=GRADIENTS):
    return jax.tree.map(lambda g: g[step], gradients)


def traceable_run(tx: optax.GradientTransformation, gradients, params=None) -> tuple[Any, Any]:
    """All updates, with an axis of steps in front, and the last state."""

    def step(state, g):
        updates, state = tx.update(g, state, params)
        return state, updates

    state, updates = jax.lax.scan(step, tx.init(at(0, gradients)), gradients)
    return updates, state


run = jax.jit(traceable_run, static_argnames="tx")


def assert_close(actual, expected, eps: float = EPS):
    chex.assert_trees_all_close(actual, expected, rtol=100 * eps, atol=100 * eps)
