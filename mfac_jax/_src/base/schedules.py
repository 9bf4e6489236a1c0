"""Numbers that may be schedules."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax


def is_known_zero(number_or_schedule: optax.ScalarOrSchedule) -> bool:
    """Whether it is a number of Python or NumPy, and zero. Arrays may be traced the next time."""
    is_number = isinstance(number_or_schedule, (int, float, np.number))
    return is_number and float(number_or_schedule) == 0


def damping_at(damping: optax.ScalarOrSchedule, step: jax.Array, dtype) -> jax.Array:
    """The damping after `step` gradients, moved into what the dtype can hold; NaN becomes the upper end."""
    return jnp.fmax(jnp.fmin(at(damping, step, dtype), 2.0**100), jnp.finfo(dtype).tiny)


def at(number_or_schedule: optax.ScalarOrSchedule, step: jax.Array, dtype) -> jax.Array:
    """The number, or the schedule's value at the step."""
    if not callable(number_or_schedule):
        return jnp.asarray(number_or_schedule, dtype)
    with ordinary_promotion():
        return jnp.asarray(number_or_schedule(step), dtype)


@contextlib.contextmanager
def ordinary_promotion():
    """Promote dtypes and axes, whatever the user's flags say: optax and its schedules rely on it."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def resting_while_rising(
    rate: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule
) -> optax.ScalarOrSchedule:
    """The rate, as a schedule that is 0 where `learning_rate` is one and rises."""
    if not callable(learning_rate) or is_known_zero(rate):
        return rate

    def resting(count):
        rise = jnp.asarray(learning_rate(count)) - learning_rate(jnp.maximum(count - 1, 0))
        return jnp.where(rise > 0, 0, rate(count) if callable(rate) else rate)

    return resting
