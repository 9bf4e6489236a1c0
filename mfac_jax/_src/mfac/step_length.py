"""How long the step is: the seam, and the rule that learns a factor from the window's scalars alone."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import schedules
from mfac_jax._src.base.accept import select
from mfac_jax._src.base.numerics import root
from mfac_jax._src.linalg.gram import cosines_of_rows, shrinkage
from mfac_jax._src.mfac.momentum import ages

# Where only the next step counts, the best cosine of a gradient and the update before it is 0. In the long
# run it is below: -0.05 to -0.1 at the best fixed rates on digits and text.
_DRIFT = 0.06
# So the factor grows without evidence too, but only up to here. Pure noise has the cosine 0 at any length,
# and would let it grow for ever. Beyond, it grows only while gradients shrink, and falls back otherwise.
_FREE_UP_TO = math.log(5)
# Share of the drift that is lost on the way there, with up to 32 rows; less with more, nothing from 64 on.
# Short windows otherwise end 20 times above the loss without the factor, on minibatches at long rates. With
# 64 rows nothing is gained, and on digits at the default rate the loss would end a quarter higher.
_DRIFT_LOST = 0.7
_RETURN = 0.005
_LARGEST = math.log(30)
# Of the mean cosine: about the last 20 gradients. Short windows have a shorter one, because the update
# forgets as fast as the window, and with it the reason why gradients pointed along it.
_MEMORY = 0.95
_STANDARD_ERRORS = 2  # of unrelated gradients, that a mean cosine has to exceed to count


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
    """A factor in [1/30, 30] that grows while gradients still point along the last update.

    Up to 5 its logarithm moves by rate (cos(g_t, u_{t-1}) + 0.06) a step, where windows of less than 64
    rows lose up to 0.042 on the way from 1 to 5. Beyond, it moves by the rate times the mean of the last 20
    cosines or so, as far as that is larger than for unrelated gradients. But it never grows more than the
    newest cosine allows: the mean is late where steps suddenly are too long. And it is at most m^2 / 8;
    with fewer than 4 rows it is 1.
    """

    def init(zeros):
        return AdaptedStepState(zeros(()))

    def update(state, view):
        gram, newest, dtype = view.gram, view.newest, view.gram.dtype
        speed = jnp.clip(jnp.nan_to_num(schedules.at(rate, view.grads_seen, dtype)), 0, 1)
        num_grads = gram.shape[-1]
        in_use = jnp.minimum(view.grads_seen, num_grads - 1) + 1
        statistics = _Statistics(
            view.cosine,
            *cosines_of_rows(gram),
            shrinkage(gram, ages(newest, num_grads), in_use),
            jnp.clip(view.grads_seen, 1, num_grads),
        )
        before = (state.mean_cosine, view.log_step)
        mean_cosine, log_step = _moved(*before, statistics, _drift(view.log_step, num_grads), speed)
        after = mean_cosine, jnp.clip(log_step, *_bounds(num_grads))
        # Without a direction on both sides there is nothing to learn, not even the drift.
        is_known = jnp.any(view.last_update != 0) & jnp.any(gram[:, newest, newest] > 0)
        mean_cosine, log_step = select(is_known, after, before)
        return AdaptedStepState(mean_cosine), log_step

    return StepLength("adapted", init, update)


class _Statistics(NamedTuple):
    """What a new gradient tells about the last update.

    Attributes:
      cosine: of the two.
      mean_square: of the cosines of two gradients of the window.
      variance: of the same.
      shrinkage: how much smaller the newer gradients of the window are, in [-1, 1].
      remembered: gradients before this one that the window can hold.
    """

    cosine: jax.Array
    mean_square: jax.Array
    variance: jax.Array
    shrinkage: jax.Array
    remembered: jax.Array


def _moved(
    mean_cosine: jax.Array,
    log_step: jax.Array,
    statistics: _Statistics,
    drift: jax.Array,
    speed: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The running mean of the cosines, and the logarithm of the factor, after a new gradient."""
    share = jnp.maximum(1 - _MEMORY, 1 / statistics.remembered.astype(log_step.dtype))
    mean = mean_cosine + share * (statistics.cosine - mean_cosine)
    standard_error = root(statistics.mean_square) * jnp.sqrt(share / (2 - share))
    significant = jnp.sign(mean) * jnp.maximum(jnp.abs(mean) - _STANDARD_ERRORS * standard_error, 0)
    beyond = jnp.minimum(
        significant + _DRIFT * statistics.shrinkage - _RETURN,
        statistics.cosine + _STANDARD_ERRORS * root(statistics.variance),
    )
    return mean, log_step + speed * jnp.where(log_step < _FREE_UP_TO, statistics.cosine + drift, beyond)


def _drift(log_step: jax.Array, num_grads: int) -> jax.Array:
    lost = _DRIFT_LOST * min(max(2 - num_grads / 32, 0), 1)
    return _DRIFT * (1 - lost * jnp.clip(log_step / _FREE_UP_TO, 0, 1))


def _bounds(num_grads: int) -> tuple[float, float]:
    """Of the logarithm. On full batches few rows swing: their steps grow until one of them is far too long.

    Between such steps the cosines are as good as ever, so they cannot tell.
    """
    if num_grads < 4:
        return 0.0, 0.0
    return -_LARGEST, min(math.log(num_grads**2 / 8), _LARGEST)
