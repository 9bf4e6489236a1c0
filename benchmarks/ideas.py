"""Ideas that were tried on M-FAC's default and did not earn a place in it.

Each is a function from a schedule of learning rates to a transform. `compare_optimizers --variants` runs
them beside the default, and `report_comparison` prints what they gave.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import mfac_jax

DAMPING, MOMENTUM, NUM_GRADS, ADAPTATION = (
    inspect.signature(mfac_jax.mfac).parameters[name].default
    for name in ("damping", "momentum", "num_grads", "step_adaptation")
)


def _adaptation(schedule: optax.Schedule) -> optax.Schedule:
    """The default's step adaptation, which rests while the schedule rises."""

    def adaptation(count):
        rise = jnp.asarray(schedule(count)) - schedule(jnp.maximum(count - 1, 0))
        return jnp.where(rise > 0, 0, ADAPTATION)

    return adaptation


def _norm_of_products(state: optax.OptState) -> jax.Array:
    """Root mean square of g.u over the window's gradients: the norm of the update u in their Fisher."""
    return mfac_jax.diagnostics(state).fisher_norm[0]


def _scaled(updates: optax.Updates, factor: jax.Array) -> optax.Updates:
    return jax.tree.map(lambda u: factor * u, updates)


def trust_region(schedule: optax.Schedule, radius: float = 1.0) -> optax.GradientTransformation:
    """The update's root mean square is at most the radius; Adam's is near one."""

    def limit(updates, params):
        del params
        size = sum(u.size for u in jax.tree.leaves(updates))
        rms = optax.tree.norm(updates) / jnp.sqrt(size)
        return _scaled(updates, jnp.minimum(1, radius / rms))

    direction = mfac_jax.mfac(1.0, step_adaptation=_adaptation(schedule))
    return optax.chain(direction, optax.stateless(limit), optax.scale_by_schedule(schedule))


def fisher_trust_region(schedule: optax.Schedule, radius: float = 1e-3) -> optax.GradientTransformation:
    """The step's squared norm in the Fisher matrix is at most the radius, 1e-3 as in kfac-jax."""
    inner = mfac_jax.mfac(schedule)

    def update(updates, state, params=None):
        updates, state = inner.update(updates, state, params)
        count = optax.tree.get(state, "grads_seen") - 1
        norm = schedule(count) * _norm_of_products(state)
        return _scaled(updates, jnp.minimum(1, jnp.sqrt(radius) / jnp.maximum(norm, 1e-30))), state

    return optax.GradientTransformation(inner.init, update)


class GraftedState(NamedTuple):
    """The two transforms' states."""

    direction: optax.OptState
    length: optax.OptState


def grafted(schedule: optax.Schedule) -> optax.GradientTransformation:
    """M-FAC's direction with the length of NAdam's update."""
    direction, length = mfac_jax.mfac(1.0, step_adaptation=0.0), optax.scale_by_adam(nesterov=True)

    def init(params):
        return GraftedState(direction.init(params), length.init(params))

    def update(updates, state, params=None):
        adam, length_state = length.update(updates, state.length, params)
        updates, direction_state = direction.update(updates, state.direction, params)
        factor = optax.tree.norm(adam) / jnp.maximum(optax.tree.norm(updates), 1e-30)
        return _scaled(updates, factor), GraftedState(direction_state, length_state)

    return optax.chain(optax.GradientTransformation(init, update), optax.scale_by_schedule(schedule))


class RecentState(NamedTuple):
    """The steps done, the second moment of the diagonal metric, and the state of the transform inside."""

    steps: jax.Array
    second_moment: optax.Params
    inner: optax.OptState


def recent(schedule: optax.Schedule, decay: float = 0.97) -> optax.GradientTransformation:
    """Rows of the window weigh decay^age: each gradient enters longer than the one before by decay^-1/2.

    In the diagonal metric, which is around the weights here: it must not see them.
    """
    growth = decay**-0.5
    inner = mfac_jax.scale_by_mfac(
        NUM_GRADS,
        DAMPING,
        relative_damping=True,
        window_momentum=MOMENTUM * growth,
        nesterov=True,
        step_adaptation=_adaptation(schedule),
    )

    def init(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return RecentState(jnp.zeros((), jnp.int32), zeros, inner.init(params))

    def update(updates, state, params=None):
        del params
        steps = state.steps + 1
        moment = jax.tree.map(lambda v, g: 0.99 * v + 0.01 * g**2, state.second_moment, updates)
        metric = jax.tree.map(lambda v: (jnp.sqrt(v / (1 - 0.99**steps)) + 1e-8) ** -0.5, moment)
        scale = growth ** state.steps.astype(jnp.float32)
        rows = jax.tree.map(lambda d, g: scale * d * g, metric, updates)
        updates, inner_state = inner.update(rows, state.inner)
        updates = jax.tree.map(lambda d, u: d * u / scale, metric, updates)
        return updates, RecentState(steps, moment, inner_state)

    transform = optax.GradientTransformation(init, update)
    return optax.chain(transform, optax.scale_by_learning_rate(schedule))


class LevenbergMarquardtState(NamedTuple):
    """Damping, running means of the actual and the predicted decrease, what the last step predicted."""

    damping: jax.Array
    actual: jax.Array
    predicted: jax.Array
    last_value: jax.Array
    last_prediction: jax.Array
    inner: optax.OptState


def levenberg_marquardt(
    schedule: optax.Schedule, change: float = 0.05
) -> optax.GradientTransformationExtraArgs:
    """The damping falls where the loss decreases as the quadratic model predicts, else it rises.

    The loss of the next batch stands for the loss after the step: running means over 20 steps are compared.
    """

    def init(params):
        damping, *zeros = jnp.array([DAMPING, 0, 0, 0, 0])  # five arrays, which may be donated
        return LevenbergMarquardtState(damping, *zeros, inner=mfac_jax.mfac(schedule).init(params))

    def update(updates, state, params=None, *, value: Any = None, **extra_args):
        del extra_args
        count = optax.tree.get(state.inner, "grads_seen")
        actual = 0.95 * state.actual + 0.05 * jnp.where(count > 0, state.last_value - value, 0)
        predicted = 0.95 * state.predicted + 0.05 * state.last_prediction
        ratio = actual / jnp.maximum(predicted, 1e-12)
        move = change * (jnp.where(ratio < 0.25, 1, 0) - jnp.where(ratio > 0.75, 1, 0))
        damping = jnp.clip(state.damping * jnp.exp(jnp.where(count > 20, move, 0)), 0.01, 30)
        steps, inner = mfac_jax.mfac(schedule, damping=damping).update(updates, state.inner, params)
        quadratic = jnp.square(schedule(count) * _norm_of_products(inner)) / 2
        prediction = -jnp.asarray(optax.tree.vdot(updates, steps)) - quadratic
        return steps, LevenbergMarquardtState(damping, actual, predicted, value, prediction, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def warmed_up(schedule: optax.Schedule) -> optax.GradientTransformation:
    """The rate rises until the window is full, whatever the schedule."""
    return mfac_jax.mfac(lambda count: schedule(count) * jnp.minimum(1, (count + 1) / NUM_GRADS))


IDEAS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "trust region": trust_region,
    "Fisher trust region": fisher_trust_region,
    "grafted onto NAdam": grafted,
    "recency weights": recent,
    "Levenberg-Marquardt": levenberg_marquardt,
    "warm-up of the window": warmed_up,
}
