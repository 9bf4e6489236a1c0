"""A diagonal metric around any transform: it sees, and answers in, coordinates scaled by a running RMS."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax import _tree, _validation

_LARGEST = 2.0**62  # entries beyond it are taken as this: their squares would overflow float32


class DiagonalMetricState(NamedTuple):
    """State of `in_diagonal_metric`.

    Attributes:
      metric_count: gradients in the running mean; stops at the largest int32.
      second_moment: running mean of the squared gradients, without its bias correction.
      inner_state: state of the transform inside.
    """

    metric_count: jax.Array  # () int32
    second_moment: optax.Params  # leaves like the parameters', float32, float64 with a float64 leaf
    inner_state: optax.OptState


def in_diagonal_metric(
    inner: optax.GradientTransformation, decay: float = 0.99, eps: float = 1e-8
) -> optax.GradientTransformationExtraArgs:
    r"""Run a transform in the metric of a running second moment of the gradients.

    With :math:`v` the bias-corrected running mean of :math:`g^2` (elementwise) and
    :math:`D = (\sqrt{v} + \epsilon)^{-1/2}`, the update is

    .. math::
      D \; \mathrm{inner}(D g).

    Where `inner` is the identity this is RMSProp, and Adam under momentum. Around `scale_by_mfac` with
    relative damping, a gradient that is orthogonal to the others in the window moves the parameters as in
    Adam, and what it shares with them by the natural gradient of the Fisher matrix in this metric. The
    identity in M-FAC's damping treats all coordinates alike; in this metric that is right also for networks
    whose layers differ in scale.

    A row of the window keeps the scale that it entered with: v moves slowly against the window, and scaling
    all rows anew would read and write the whole window once more a step.

    State: one copy of the parameters beside the state of `inner`. A gradient with a NaN or an Inf leaves v
    as it was; entries are clipped to 2^62, whose squares would overflow.

    Args:
      inner: any transform; extra arguments of `update` are passed on.
      decay: of the running mean, in [0, 1). 0.99 forgets in a hundred steps, about as a window of
        M-FAC does.
      eps: > 0, in units of a gradient's entry; bounds D where gradients are zero. As in Adam.

    Returns:
      A transform whose state is a `DiagonalMetricState`.

    Raises:
      ValueError: `decay` or `eps` is out of its range; updates do not have the tree or the shapes of the
        parameters given to `init`.
      TypeError: `decay` or `eps` is not a number; a parameter or an update is not a real floating-point
        array; the state is of another transform.

    Example:
      >>> import jax.numpy as jnp, mfac_jax, optax
      >>> tx = mfac_jax.in_diagonal_metric(optax.identity())
      >>> state = tx.init(jnp.zeros(2))
      >>> updates, state = tx.update(jnp.array([100.0, -0.01]), state)
      >>> print(updates.round(3))
      [ 1. -1.]

    References:
      Diederik Kingma, Jimmy Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, ICLR 2015 (the running second moment and its bias correction).
    """
    _validation.check_decay("decay", decay, "0.99")
    _validation.check_positive("eps", eps, "1e-8")
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> DiagonalMetricState:
        _validation.check_params(params)
        dtype = _tree.accumulation_dtype(params)
        second_moment = jax.tree.map(lambda p: jnp.zeros_like(p, dtype), params)
        return DiagonalMetricState(jnp.zeros((), jnp.int32), second_moment, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        if not isinstance(state, DiagonalMetricState):
            raise TypeError(
                f"state must be a DiagonalMetricState, got {type(state).__name__}: it is of a transform "
                "with other options. Call init again."
            )
        _validation.check_like_params("updates", updates, state.second_moment)
        finite, dtype = _tree.all_finite(updates), _tree.accumulation_dtype(updates)
        count = jnp.where(finite, optax.safe_increment(state.metric_count), state.metric_count)

        def average(v, g):
            square = jnp.square(jnp.clip(g.astype(v.dtype), -_LARGEST, _LARGEST))
            return jnp.where(finite, decay * v + (1 - decay) * square, v)

        second_moment = jax.tree.map(average, state.second_moment, updates)
        correction = -jnp.expm1(jnp.maximum(count, 1).astype(dtype) * jnp.log(jnp.asarray(decay, dtype)))

        def scaled(x, v):
            # Entries that are not finite pass, for what is inside and the caller to see.
            entry = jnp.where(jnp.isfinite(x), jnp.clip(x.astype(v.dtype), -_LARGEST, _LARGEST), x)
            y = entry * jax.lax.rsqrt(jnp.sqrt(v / correction) + eps)
            return jnp.where(jnp.isfinite(x), _tree.narrow(y, x.dtype), x)

        updates = jax.tree.map(scaled, updates, second_moment)
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra_args)
        updates = jax.tree.map(scaled, updates, second_moment)
        return updates, DiagonalMetricState(count, second_moment, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
