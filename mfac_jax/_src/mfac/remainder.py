"""What the rows of a window leave out of the gradients: its running mean, preconditioned beside them.

With v the mean of the gradients, G^T w that of their rows and r = v - G^T w, for each block

    gain (G^T G + shift I)^-1 v = gain G^T (K + shift I)^-1 (w - G r / shift) + gain / shift r.

This is how storages that keep little of a gradient lose nothing of it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def next_mean(
    mean: optax.Params, left_out: optax.Params, seen: jax.Array, momentum: Any, nesterov: bool
) -> tuple[optax.Params, optax.Params]:
    """The running mean with what the newest row leaves out, and r; weights as the rows'."""

    def next_of(mean, new):
        beta = jnp.asarray(momentum, new.dtype)
        return beta * mean + (1 - beta) * new

    def vector_of(mean, new):
        beta = jnp.asarray(momentum, new.dtype)
        vector = mean / (1 - beta ** seen.astype(new.dtype))
        return beta * vector + (1 - beta) * new if nesterov else vector

    mean = jax.tree.map(next_of, mean, left_out)
    return mean, jax.tree.map(vector_of, mean, left_out)


def outside(shift: jax.Array, gain: jax.Array) -> jax.Array:
    """gain / shift of each block; zero where nothing is known of the scale."""
    return jnp.where(shift > 0, gain / jnp.where(shift > 0, shift, 1), 0)
