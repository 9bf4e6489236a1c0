"""In which coordinates the window works: the seam.

A metric maps gradients into its coordinates before they enter the window, and updates out of them. The map
is symmetric: P g goes in, P times what comes out is the update.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax


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
