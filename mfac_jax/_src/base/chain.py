"""What the aliases chain behind their preconditioner."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax._src.base import checks, numerics, schedules
from mfac_jax._src.base.accept import select


def scaled_by(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Minus the learning rate times the updates, in their dtypes."""
    inner = _promoting(optax.scale_by_learning_rate(learning_rate))

    def update(updates, state, params=None):
        scaled, state = inner.update(updates, state, params)
        return jax.tree.map(lambda x, u: x.astype(u.dtype), scaled, updates), state

    return optax.GradientTransformation(inner.init, update)


def momentum_of_updates(
    momentum: float | None, axis_name: str | Sequence[str] | None
) -> list[optax.GradientTransformation]:
    """An average of updates, if there is to be one."""
    check_momentum(momentum)
    return [] if momentum is None else [_skip_not_finite(_promoting(optax.ema(momentum)), axis_name)]


def check_momentum(momentum: float | None) -> None:
    """Raise for anything but None or a number in [0, 1)."""
    if momentum is not None:
        checks.check_decay("momentum", momentum, "0.9")


def weight_decay(weight_decay: float | None, mask: optax.MaskOrFn) -> list[optax.GradientTransformation]:
    """Weight decay, if there is to be one."""
    if weight_decay is None:
        if mask is not None:
            raise ValueError(
                "mask says where weight_decay acts, but weight_decay is None. Pass e.g. 1e-4, or no mask."
            )
        return []
    checks.check_not_negative("weight_decay", weight_decay, "1e-4")
    # A number of NumPy has a dtype, which float32 updates would take on under x64.
    number = float(weight_decay) if isinstance(weight_decay, np.number) else weight_decay
    return [_promoting(optax.add_decayed_weights(number, mask))]


def _promoting(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which promotes dtypes and axes, for users whose flags forbid it."""

    def update(updates, state, params=None):
        with schedules.ordinary_promotion():
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _skip_not_finite(
    inner: optax.GradientTransformation, axis_name: str | Sequence[str] | None
) -> optax.GradientTransformation:
    """`inner`, but updates with a NaN or an Inf on any device pass it by and leave its state as it was."""

    def update(updates, state, params=None):
        accepted = inner.update(updates, state, params)
        finite = numerics.all_finite(updates)
        if axis_name is not None:
            finite = jax.lax.pmin(finite.astype(jnp.int32), axis_name) == 1
        return select(finite, accepted, (updates, state))

    return optax.GradientTransformation(inner.init, update)
