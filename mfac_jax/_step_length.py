"""The factor that `scale_by_mfac(step_adaptation=...)` puts on the update's length."""

import math

import jax
import jax.numpy as jnp

# Where only the next step counts, the best cosine of a gradient and the update before it is 0. In the long
# run it is below: -0.05 to -0.1 at the best fixed rates on digits and text.
_DRIFT = 0.05
# So the factor grows also without evidence, but only up to here: gradients that are pure noise have the
# cosine 0 at any length, and would drive it on for ever. Beyond, it falls back slowly without evidence.
_FREE = math.log(5)
_RETURN = 0.005
_LARGEST = math.log(30)
_MEMORY = 0.95  # of the mean cosine, which is about that of the last 20 gradients


def next_mean(mean: jax.Array, cosine: jax.Array, count: jax.Array) -> jax.Array:
    """The running mean of cosines, with the newest, the `count`-th, in it."""
    return mean + _share(count, mean.dtype) * (cosine - mean)


def next_log_factor(
    log_factor: jax.Array, cosine: jax.Array, mean: jax.Array, noise: jax.Array, count: jax.Array, rate
) -> jax.Array:
    """The logarithm of the factor after a gradient with this cosine to the last update.

    Args:
      log_factor: the one before.
      cosine: of the newest gradient and the last update.
      mean: running mean of the cosines, as `next_mean` gives it.
      noise: the cosine that two unrelated gradients have, in root mean square.
      count: the cosines that were seen.
      rate: how far a cosine of one moves the logarithm.
    """
    share = _share(count, mean.dtype)
    deviation = noise * jnp.sqrt(share / (2 - share))  # of the mean of unrelated cosines
    evidence = jnp.sign(mean) * jnp.maximum(jnp.abs(mean) - deviation, 0)
    moved = log_factor + rate * jnp.where(log_factor < _FREE, cosine + _DRIFT, evidence - _RETURN)
    return jnp.clip(moved, -_LARGEST, _LARGEST)


def _share(count: jax.Array, dtype) -> jax.Array:
    """The part of the newest cosine in the mean: a plain mean at first."""
    return jnp.maximum(1 - _MEMORY, 1 / jnp.maximum(count, 1).astype(dtype))
