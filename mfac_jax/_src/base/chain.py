"""What the aliases chain behind their preconditioner."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import checks, numerics, schedules
from mfac_jax._src.base.accept import select
from mfac_jax._src.base.fields import CURE, check_field


def chained(
    preconditioner: optax.GradientTransformation,
    *,
    before: Sequence[optax.GradientTransformation] = (),
    after: Sequence[optax.GradientTransformation],
) -> optax.GradientTransformationExtraArgs:
    """`optax.chain`, but a state that another chain has made is refused.

    The preconditioner checks its own. Of the others only nodes are checked where `params` are not given,
    since their arrays have the dtypes of the parameters.
    """
    parts = (*before, preconditioner, *after)
    chain = optax.chain(*parts)

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, tuple) or len(state) != len(parts):
            length = f" of {len(state)}" if isinstance(state, tuple) else ""
            raise TypeError(
                f"state must be a tuple of {len(parts)}, one for each part of the chain, got "
                f"{type(state).__name__}{length}. Pass a momentum and a weight_decay where the state was "
                f"made with them. {CURE}"
            )
        for number, (part, own) in enumerate(zip(parts, state, strict=True)):
            if part is not preconditioner:
                expected = jax.eval_shape(part.init, updates if params is None else params)
                check_field(f"state[{number}]", own, expected, arrays=params is not None)
        return chain.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(chain.init, update)


def scaled_by(learning_rate: optax.ScalarOrSchedule, example: str) -> optax.GradientTransformation:
    """Minus the learning rate times the updates, in their dtypes.

    Raises for anything but a schedule or a number >= 0.
    """
    checks.check_not_negative("learning_rate", learning_rate, example, or_schedule=True)
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


def weight_decay(
    weight_decay: optax.ScalarOrSchedule | None, mask: optax.MaskOrFn
) -> list[optax.GradientTransformation]:
    """Weight decay, if there is to be one. A schedule counts all gradients, also those that are refused."""
    if weight_decay is None:
        if mask is not None:
            raise ValueError(
                "mask says where weight_decay acts, but weight_decay is None. Pass e.g. 1e-4, or no mask."
            )
        return []
    checks.check_not_negative("weight_decay", weight_decay, "1e-4", or_schedule=True)
    checks.check_mask(mask)
    inner = optax.add_decayed_weights(weight_decay, mask)

    def narrow(x, u, p):
        return None if x is None else x.astype(jnp.result_type(u, p))

    def update(updates, state, params=None):
        decayed, state = inner.update(updates, state, params)
        # Schedules and arrays have a dtype, which the updates would take on; numbers of Python have none.
        return jax.tree.map(narrow, decayed, updates, params, is_leaf=lambda x: x is None), state

    return [_promoting(optax.GradientTransformation(inner.init, update))]


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
