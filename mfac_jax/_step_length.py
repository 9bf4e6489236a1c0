"""The factor that `scale_by_mfac(step_adaptation=...)` puts on the update's length."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Where only the next step counts, the best cosine of a gradient and the update before it is 0. In the long
# run it is below: -0.05 to -0.1 at the best fixed rates on digits and text.
_DRIFT = 0.05
# So the factor grows also without evidence, but only up to here: gradients that are pure noise have the
# cosine 0 at any length, and would drive it on for ever. Beyond, it drifts on only while gradients shrink,
# that is as long as no noise is their floor, and falls back slowly otherwise.
_FREE = math.log(5)
_RETURN = 0.005
_LARGEST = math.log(30)
_MEMORY = 0.95  # of the mean cosine, which is about that of the last 20 gradients


class Signs(NamedTuple):
    """What a new gradient tells about the last update.

    Attributes:
      cosine: of the two.
      typical_cosine: of two gradients of the window, in root mean square.
      shrinkage: how much smaller the newer gradients of the window are, in [0, 1].
      seen: gradients before this one.
    """

    cosine: jax.Array
    typical_cosine: jax.Array
    shrinkage: jax.Array
    seen: jax.Array


def adapt(
    mean_cosine: jax.Array, log_step: jax.Array, signs: Signs, rate: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The running mean of the cosines, and the logarithm of the factor, after a new gradient."""
    share = jnp.maximum(1 - _MEMORY, 1 / jnp.maximum(signs.seen, 1).astype(log_step.dtype))
    mean = mean_cosine + share * (signs.cosine - mean_cosine)
    noise = signs.typical_cosine * jnp.sqrt(share / (2 - share))  # the mean of unrelated cosines has it
    evidence = jnp.sign(mean) * jnp.maximum(jnp.abs(mean) - noise, 0)
    beyond = evidence + _DRIFT * signs.shrinkage - _RETURN
    moved = log_step + rate * jnp.where(log_step < _FREE, signs.cosine + _DRIFT, beyond)
    return mean, jnp.clip(moved, -_LARGEST, _LARGEST)
