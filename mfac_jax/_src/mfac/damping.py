"""Where the damping is applied: what is added to the diagonal of the Gram matrix, and what that scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax._src.linalg.gram import mean_square


class System(NamedTuple):
    """The update is gain G^T (K + shift I)^-1 w.

    Attributes:
      shift: delta, in units of a squared gradient.
      gain: n, or the scale of the window.
    """

    shift: jax.Array  # (blocks,)
    gain: jax.Array  # (blocks,)


def absolute(gram: jax.Array, damping: jax.Array) -> System:
    """F = lambda I + G^T G / m: shift m lambda, gain m."""
    blocks, m = gram.shape[:2]
    return System(jnp.full(blocks, m * damping), jnp.full(blocks, m, gram.dtype))


def relative(gram: jax.Array, damping: jax.Array, rows_used: jax.Array) -> System:
    """Damping in units of the window: shift rho s, gain (1 + rho) s, s the mean squared norm of a row."""
    energy = mean_square(gram, rows_used)
    rho = jnp.minimum(damping, 2.0**126 / jnp.maximum(energy, 1))  # their product must not overflow
    return System(rho * energy, (1 + rho) * energy)
