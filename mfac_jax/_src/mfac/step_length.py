"""The factor that `scale_by_mfac(step_adaptation=...)` puts on the update's length."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Where only the next step counts, the best cosine of a gradient and the update before it is 0. In the long
# run it is below: -0.05 to -0.1 at the best fixed rates on digits and text.
_DRIFT = 0.06
# So the factor grows also without evidence, but only up to here: gradients that are pure noise have the
# cosine 0 at any length, and would drive it on for ever. Beyond, it drifts on only while gradients shrink,
# that is as long as no noise is their floor, and falls back otherwise.
_FREE_UP_TO = math.log(5)
_RETURN = 0.005
_LARGEST = math.log(30)
_MEMORY = 0.95  # of the mean cosine, which is about that of the last 20 gradients
_STANDARD_ERRORS = 2  # of unrelated gradients, that a mean cosine has to exceed to count


class StepStatistics(NamedTuple):
    """What a new gradient tells about the last update.

    Attributes:
      cosine: of the two.
      typical_cosine: of two gradients of the window, in root mean square.
      shrinkage: how much smaller the newer gradients of the window are, in [-1, 1].
      seen: gradients before this one.
    """

    cosine: jax.Array
    typical_cosine: jax.Array
    shrinkage: jax.Array
    seen: jax.Array


def adapt(
    mean_cosine: jax.Array, log_step: jax.Array, statistics: StepStatistics, rate: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The running mean of the cosines, and the logarithm of the factor, after a new gradient."""
    share = jnp.maximum(1 - _MEMORY, 1 / jnp.maximum(statistics.seen, 1).astype(log_step.dtype))
    mean = mean_cosine + share * (statistics.cosine - mean_cosine)
    standard_error = statistics.typical_cosine * jnp.sqrt(share / (2 - share))
    significant = jnp.sign(mean) * jnp.maximum(jnp.abs(mean) - _STANDARD_ERRORS * standard_error, 0)
    beyond = significant + _DRIFT * statistics.shrinkage - _RETURN
    moved = log_step + rate * jnp.where(log_step < _FREE_UP_TO, statistics.cosine + _DRIFT, beyond)
    return mean, jnp.clip(moved, -_LARGEST, _LARGEST)
