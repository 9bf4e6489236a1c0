"""What the rows of a window leave out of the gradients: its running mean, preconditioned beside them.

With v the mean of the gradients, G^T w that of their rows and r = v - G^T w, for each block

    gain (G^T G + shift I)^-1 v = gain G^T (K + shift I)^-1 (w - G r / shift) + gain / shift r.

This is how storages that keep little of a gradient lose nothing of it.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class Beside(NamedTuple):
    """What a step adds to the combination of the rows.

    Attributes:
      mean: the running mean of what rows left out, for the state.
      vector: r, the mean that is preconditioned.
    """

    mean: optax.Params
    vector: optax.Params


def next_mean(
    mean: optax.Params, left_out: optax.Params, seen: jax.Array, momentum: Any, nesterov: bool
) -> Beside:
    """The mean with what the newest row leaves out, weighted as the rows are: by momentum^age."""

    def of_leaf(mean, new):
        beta = jnp.asarray(momentum, new.dtype)
        mean = beta * mean + (1 - beta) * new
        vector = mean / (1 - beta ** seen.astype(new.dtype))
        return mean, beta * vector + (1 - beta) * new if nesterov else vector

    leaves, structure = jax.tree.flatten(left_out)
    pairs = list(map(of_leaf, jax.tree.leaves(mean), leaves))
    return Beside(*(structure.unflatten([pair[i] for pair in pairs]) for i in range(2)))


def outside(shift: jax.Array, gain: jax.Array) -> jax.Array:
    """gain / shift of each block; zero where nothing is known of the scale."""
    return jnp.where(shift > 0, gain / jnp.where(shift > 0, shift, 1), 0)
