"""The diagonal metric: each entry is measured by the running mean of its square, as Adam does."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import numerics
from mfac_jax._src.mfac.metric import Coordinates, Metric

_DECAY = 0.99  # forgets in a hundred steps, about as a window does
_EPS = 1e-8  # in units of a gradient's entry: bounds D where gradients are zero; as in Adam


class DiagonalMetricState(NamedTuple):
    """State of the diagonal metric.

    Attributes:
      second_moment: running mean of the squared gradients, without its bias correction.
    """

    second_moment: optax.Params  # leaves like the parameters', float32, float64 with a float64 leaf


def running_mean(mean: jax.Array, new: jax.Array, decay: float) -> jax.Array:
    """The mean with one more value, without its bias correction."""
    return decay * mean + (1 - decay) * new


def scale_of(second_moment: jax.Array, count: jax.Array, decay: float) -> jax.Array:
    """D = (sqrt(v) + eps)^(-1/2), with v the running mean of `count` squares, corrected for its bias."""
    v = second_moment
    correction = -jnp.expm1(count.astype(v.dtype) * jnp.log(jnp.asarray(decay, v.dtype)))
    return jax.lax.rsqrt(numerics.root(v / correction) + _EPS)


def _update(
    state: DiagonalMetricState, gradients: optax.Updates, count: jax.Array
) -> tuple[DiagonalMetricState, Coordinates]:
    """D both ways."""

    def mean(v, g):
        return running_mean(v, jnp.square(g), _DECAY)

    second_moment = jax.tree.map(mean, state.second_moment, gradients)
    scale = jax.tree.map(lambda v: scale_of(v, count, _DECAY), second_moment)

    def into(tree):
        return jax.tree.map(jnp.multiply, tree, scale)

    def out_of(tree):
        return jax.tree.map(numerics.scaled, tree, scale)

    return DiagonalMetricState(second_moment), Coordinates(into, out_of)


DIAGONAL = Metric("diagonal", lambda new: DiagonalMetricState(new()), _update, elementwise=True)
