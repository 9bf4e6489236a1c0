"""Momentum over the rows of the window: which mean of them is preconditioned."""

import jax
import jax.numpy as jnp


def weights_by_age(
    newest: jax.Array, seen: jax.Array, num_grads: int, momentum, nesterov: bool, dtype
) -> jax.Array:
    """Weights `(m,)` proportional to momentum^age over the rows in use; they add up to one."""
    age = (newest - jnp.arange(num_grads, dtype=newest.dtype)) % num_grads  # zero for the newest
    momentum = jnp.asarray(momentum, dtype)
    decayed = momentum ** age.astype(dtype)  # one for the newest row, also where the momentum is 0
    weights = jnp.where(age < jnp.maximum(seen, 1), decayed, 0)
    weights /= jnp.sum(weights)
    return momentum * weights + jnp.where(age == 0, 1 - momentum, 0) if nesterov else weights
