"""How long the step is: the seam, and the rule that learns a factor from the window's scalars alone."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import schedules
from mfac_jax._src.base.accept import select

# Where only the next step counts, the best cosine of a gradient and the update before it is 0. In the long
# run it is below: -0.05 to -0.1 at the best fixed rates on digits and text.
_DRIFT = 0.06
# Pure noise has the cosine 0 at any length, and the drift would lengthen steps without end. So it falls
# to zero on the way from 1 to this, and beyond it leads back. Where it ended at 6, the validation loss of
# digits with random labels was a third higher.
_DRIFT_ENDS = 2
_RETURN = 0.01
# Beyond this bound it grows only while gradients go on to point along the updates: from the first of these
# mean cosines to the second the bound rises to five times. With five times at any cosine, the loss on other
# data of digits after 1,320 steps rose to five times too.
_LARGEST = 6
_ALONG = (0.05, 0.15)
_LONGER = 5
# First updates are small against later ones, since first gradients span few directions. So in the first
# gradients, up to this number, the factor moves faster, and the bound is higher.
_EARLY = 25
_EXTREME = 30  # whatever the number of gradients
_MEMORY = 0.95  # of the mean cosine: about the last 20 gradients


class StepView(NamedTuple):
    """What a rule for the step's length may look at, after a new gradient has come.

    Attributes:
      gram: inner products of the rows, the new one among them, `(blocks, m, m)`.
      last_update: coefficients of the update before, `(blocks, m)`. Row `newest` was another gradient then.
      cosine: of the new gradient and the update before; zero where one of them is zero.
      newest: the new gradient's row.
      grads_seen: gradients before this one.
      log_step: the logarithm of the factor before.
    """

    gram: jax.Array
    last_update: jax.Array
    cosine: jax.Array
    newest: jax.Array
    grads_seen: jax.Array
    log_step: jax.Array


class StepLength(NamedTuple):
    """Sets the length of the update: pass it as `step_adaptation` to `scale_by_mfac`.

    Attributes:
      name: recorded in the state. A state is refused by a rule of another name.
      init: `zeros(shape)`, which makes arrays of the Gram matrix's dtype, to the rule's state.
      update: `(state, view)`, with a `StepView`, to the new state and the logarithm of the factor that
        multiplies the update.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> halved = mfac_jax.components.StepLength(
      ...   name='halved', init=lambda zeros: (), update=lambda state, view: (state, jnp.log(0.5))
      ... )
      >>> tx = mfac_jax.scale_by_mfac(num_grads=1, damping=1.0, step_adaptation=halved)
      >>> updates, state = tx.update(jnp.array([1.0, 0.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [0.25 0.  ]
    """

    name: str
    init: Callable[[Callable[[tuple[int, ...]], jax.Array]], Any]
    update: Callable[[Any, StepView], tuple[Any, jax.Array]]


class AdaptedStepState(NamedTuple):
    """State of `adapted`.

    Attributes:
      mean_cosine: running mean of the cosine of a gradient and the update before it.
    """

    mean_cosine: jax.Array  # (), of the dtype of the Gram matrix


# The update as it is.
NAMES = ("none", "adapted")
NONE = StepLength("none", lambda zeros: (), lambda state, view: (state, jnp.zeros_like(view.log_step)))


def adapted(rate: optax.ScalarOrSchedule) -> StepLength:
    """A factor that grows while gradients still point along the last update, and falls back to 1 if not.

    At gradient t its logarithm moves by rate k (cos(g_t, u_{t-1}) + d), with k = max(1, 25 / t), rate k at
    most 1, and a drift d of 0.06 at the factor 1, zero at 2, and -0.01 beyond. It stays in
    [1, min(6 k 5^c, 30)], and below m^2 / 8; with fewer than 4 rows it is 1. Here c goes from 0 to 1 as the
    running mean of the cosine goes from 0.05 to 0.15.

    It does not fall below 1: in narrow valleys gradients point against the last update at steps of any
    length. Where it could, an autoencoder of digits ended at three times the loss.
    """

    def init(zeros):
        return AdaptedStepState(zeros(()))

    def update(state, view):
        num_grads, dtype = view.gram.shape[-1], view.log_step.dtype
        early = jnp.maximum(1, _EARLY / (view.grads_seen.astype(dtype) + 1))
        speed = jnp.clip(jnp.nan_to_num(schedules.at(rate, view.grads_seen, dtype)), 0, 1)
        move = jnp.minimum(early * speed, 1) * (view.cosine + _drift(view.log_step))
        remembered = jnp.clip(view.grads_seen, 1, num_grads)
        mean = _with_cosine(state.mean_cosine, view.cosine, remembered)
        after = (mean, jnp.clip(view.log_step + move, 0, _bound(early, mean, num_grads)))
        # Without a direction on both sides there is nothing to learn, not even the drift.
        is_known = jnp.any(view.last_update != 0) & jnp.any(view.gram[:, view.newest, view.newest] > 0)
        mean_cosine, log_step = select(is_known, after, (state.mean_cosine, view.log_step))
        return AdaptedStepState(mean_cosine), log_step

    return StepLength("adapted", init, update)


def _with_cosine(mean: jax.Array, cosine: jax.Array, remembered: jax.Array) -> jax.Array:
    """The running mean with one more value. In a short window it is short too."""
    return mean + jnp.maximum(1 - _MEMORY, 1 / remembered.astype(mean.dtype)) * (cosine - mean)


def _drift(log_step: jax.Array) -> jax.Array:
    return jnp.clip(_DRIFT * (1 - log_step / math.log(_DRIFT_ENDS)), -_RETURN, _DRIFT)


def _bound(early: jax.Array, mean_cosine: jax.Array, num_grads: int) -> jax.Array | float:
    """Of the logarithm. On full batches few rows swing: their steps grow until one of them is far too long.

    Between such steps the cosines are as good as ever, so they cannot tell.
    """
    if num_grads < 4:
        return 0.0
    start, end = _ALONG
    largest = _LARGEST * early * _LONGER ** jnp.clip((mean_cosine - start) / (end - start), 0, 1)
    return jnp.log(jnp.minimum(largest, min(num_grads**2 / 8, _EXTREME)))
