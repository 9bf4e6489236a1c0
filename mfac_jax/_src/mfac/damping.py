"""Where the damping is applied: what is added to the diagonal of the Gram matrix, and what that scales."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

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
    """Damping in units of the window: shift rho s, gain (1 + rho) s, s the mean squared norm of a row.

    Where rows are too small to tell, shift and gain are those of the limit: a lone g has g g^T = n s.
    """
    mean = mean_square(gram, rows_used)
    is_known = mean > 2.0**-100
    energy = jnp.where(is_known, mean, 1)
    # Their product must not overflow. Of `minimum` and a quotient the derivatives would.
    largest = 2.0**126 * lax.reciprocal(jnp.maximum(energy, 1))
    rho = jnp.where(damping < largest, damping, largest)
    lone = jnp.where(is_known, 0, rows_used.astype(gram.dtype))
    return System(rho * energy + lone, (1 + rho) * energy)
