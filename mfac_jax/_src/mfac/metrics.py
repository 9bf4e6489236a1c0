"""In which coordinates the window works: the seam, and the metrics of the package.

A metric maps gradients into its coordinates before they enter the window, and updates out of them. The map
is symmetric: P g goes in, P times what comes out is the update.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import numerics

_DECAY = 0.99  # forgets in a hundred steps, about as a window does
_EPS = 1e-8  # in units of a gradient's entry: bounds D where gradients are zero; as in Adam


class Coordinates(NamedTuple):
    """The two maps of a metric, for one step.

    Attributes:
      into: from gradients to the metric's coordinates, a tree to a tree.
      out_of: from the metric's coordinates to an update.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> halved = mfac_jax.components.Coordinates(lambda g: g / 2, lambda u: u / 2)
      >>> print(halved.out_of(halved.into(jnp.array([4.0]))))
      [1.]
    """

    into: Callable[[optax.Updates], optax.Updates]
    out_of: Callable[[optax.Updates], optax.Updates]


class Metric(NamedTuple):
    """Preconditions in coordinates of your choice: pass it as `metric` to `scale_by_mfac`.

    Its functions are pure. Gradients come in float32, or float64, clipped so that
    their squares do not overflow. What the metric returns for a gradient with a NaN is thrown away.

    Attributes:
      name: recorded in the state. A state is refused by a metric of another name.
      init: from a function to the metric's state. The function makes a new tree of zeros like the
        gradients at each call; the state may hold such trees and other arrays.
      update: `(state, gradients, count)` to the new state and the `Coordinates` of this step; `count` is
        the number of gradients with this one.
      elementwise: whether entries do not meet each other. Only then a part of a leaf is enough, as a device
        has it inside of `jax.shard_map` and `jax.pmap`; elsewhere metrics see whole leaves.

    Example:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> def flipped(tree):
      ...   return jax.tree.map(jnp.negative, tree)
      >>> metric = mfac_jax.components.Metric(
      ...   name='flipped',
      ...   init=lambda new: (),
      ...   update=lambda state, grads, count: (state, mfac_jax.components.Coordinates(flipped, flipped)),
      ... )
      >>> tx = mfac_jax.scale_by_mfac(num_grads=4, damping=0.5, metric=metric)
      >>> updates, state = tx.update(jnp.array([1.0, 1.0]), tx.init(jnp.zeros(2)))
      >>> print(updates, state.window[0])
      [1. 1.] [-1. -1.]
    """

    name: str
    init: Callable[[Callable[[], optax.Params]], Any]
    update: Callable[[Any, optax.Updates, jax.Array], tuple[Any, Coordinates]]
    elementwise: bool = False


class DiagonalMetricState(NamedTuple):
    """State of the diagonal metric.

    Attributes:
      second_moment: running mean of the squared gradients, without its bias correction.
    """

    second_moment: optax.Params  # leaves like the parameters', float32, float64 with a float64 leaf


def _unchanged(tree: optax.Updates) -> optax.Updates:
    return tree


# The paper's: gradients as they are.
IDENTITY = Metric(
    name="identity",
    init=lambda new: (),
    update=lambda state, gradients, count: (state, Coordinates(_unchanged, _unchanged)),
    elementwise=True,
)


def _update_diagonal(
    state: DiagonalMetricState, gradients: optax.Updates, count: jax.Array
) -> tuple[DiagonalMetricState, Coordinates]:
    """With v the running mean of g^2, corrected for its bias, D = (sqrt(v) + eps)^(-1/2) both ways."""

    def mean(v, g):
        return _DECAY * v + (1 - _DECAY) * jnp.square(g)

    def inverse_root(v):
        correction = -jnp.expm1(count.astype(v.dtype) * jnp.log(jnp.asarray(_DECAY, v.dtype)))
        return jax.lax.rsqrt(numerics.root(v / correction) + _EPS)

    second_moment = jax.tree.map(mean, state.second_moment, gradients)
    scale = jax.tree.map(inverse_root, second_moment)

    def into(tree):
        return jax.tree.map(jnp.multiply, tree, scale)

    def out_of(tree):
        return jax.tree.map(numerics.scaled, tree, scale)

    return DiagonalMetricState(second_moment), Coordinates(into, out_of)


DIAGONAL = Metric("diagonal", lambda new: DiagonalMetricState(new()), _update_diagonal, elementwise=True)
MetricName = Literal["identity", "diagonal"]
METRICS = {metric.name: metric for metric in (IDENTITY, DIAGONAL)}
