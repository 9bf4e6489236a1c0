"""The diagonal metric: gradients and updates scaled by a running second moment, elementwise.

With v the running mean of g^2, corrected for its bias, and D = (sqrt(v) + eps)^(-1/2), the window holds D g
and the update is D times what comes out of it.
"""

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import numerics

_DECAY = 0.99  # forgets in a hundred steps, about as a window does
_EPS = 1e-8  # in units of a gradient's entry: bounds D where gradients are zero; as in Adam


def average(second_moment: optax.Params, updates: optax.Updates) -> optax.Params:
    """The running mean of the squared gradients with a new one in it, without the bias correction."""

    def mean(v, g):
        return _DECAY * v + (1 - _DECAY) * jnp.square(numerics.bounded(g, v.dtype))

    return jax.tree.map(mean, second_moment, updates)


def scale(second_moment: optax.Params, count: jax.Array) -> optax.Params:
    """D of the mean over `count` gradients."""

    def inverse_root(v):
        correction = -jnp.expm1(count.astype(v.dtype) * jnp.log(jnp.asarray(_DECAY, v.dtype)))
        return jax.lax.rsqrt(jnp.sqrt(v / correction) + _EPS)

    return jax.tree.map(inverse_root, second_moment)
