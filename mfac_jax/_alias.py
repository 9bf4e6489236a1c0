"""The optimizers people call: each a chain of preconditioner, momentum, weight decay and learning rate."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from mfac_jax import _tree, _validation
from mfac_jax._cgfac import scale_by_cgfac
from mfac_jax._layer_fisher import Factors
from mfac_jax._layout import AxisName
from mfac_jax._transform import Metric, Normalization, Solver, scale_by_mfac
from mfac_jax._window import Blocks


def mfac(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    num_grads: int = 64,
    damping: optax.ScalarOrSchedule = 0.2,
    momentum: float | None = 0.9,
    weight_decay: float | None = None,
    mask: optax.MaskOrFn = None,
    *,
    metric: Metric = "diagonal",
    relative_damping: bool = True,
    momentum_in: Literal["window", "update"] = "window",
    step_adaptation: optax.ScalarOrSchedule = 0.3,
    decoupled_weight_decay: bool = True,
    normalize_by: Normalization = "window",
    power: float = 1.0,
    blocks: Blocks = None,
    solver: Solver = "cholesky",
    storage: Any = None,
    axis_name: AxisName = None,
    host_chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The M-FAC optimizer: natural gradient descent on the Fisher matrix of the last gradients.

    With :math:`D_t` the diagonal metric of `scale_by_mfac`, :math:`F_t` the damped Fisher matrix of
    the last `num_grads` gradients :math:`D_s g_s` in that metric, :math:`\bar g_t` their Nesterov
    momentum, :math:`\bar s_t` their mean squared norm, :math:`\rho` the damping, :math:`a_t` the step
    factor, :math:`\eta` the learning rate and :math:`\omega` the weight decay, the default is

    .. math::
      u_t = a_t \, (1 + \rho) \, \bar s_t \, D_t F_t^{-1} \bar g_t, \qquad
      F_t = \rho \bar s_t I + \sum_s D_s g_s g_s^\top D_s, \qquad
      \theta_{t+1} = \theta_t - \eta \left(u_t + \omega \theta_t\right).

    A gradient that has nothing in common with the others in the window moves the parameters as in Adam, and
    all do where the damping is large: learning rates are those of Adam. The chain is `scale_by_mfac`,
    `optax.add_decayed_weights`, `optax.scale_by_learning_rate`; what is None is left out. A
    gradient with a NaN or an Inf makes a non-finite update and leaves the state as it was.

    The paper's algorithm, with the settings of its authors for ResNet-20, is `mfac(1e-3, num_grads=512,
    damping=1e-5, weight_decay=3e-3, metric='identity', relative_damping=False, momentum_in='update',
    step_adaptation=0, decoupled_weight_decay=False)`.

    Args:
      learning_rate: :math:`\eta`, a number or a schedule. 3e-3 with a warm-up and a decay to zero did on
        three kinds of networks without tuning. In the identity metric with absolute damping, the update
        is that of gradient descent with rate `learning_rate / damping` where gradients are small.
      num_grads: gradients in the window, any integer >= 1; see `scale_by_mfac`. The authors' code has
        1024 by default and takes only multiples of 32 up to there; 64 needs 16 times less memory.
      damping: :math:`\rho` > 0, or lambda without `relative_damping`; see `scale_by_mfac`. 0.1 to 1 is the
        useful range; smaller is bolder. The authors' default is lambda = 1e-5.
      momentum: :math:`\beta` in [0, 1), or None for none. The authors use 0 or 0.9.
      weight_decay: :math:`\omega` >= 0, or None. Needs `params` in `update`. The authors use 3e-3 to
        1e-4, coupled.
      mask: a tree of bools, or a function from parameters to one: where weight decay acts. Needs
        `weight_decay`.
      metric: `'diagonal'`: the Fisher matrix is damped in the metric of a running second moment.
        `'identity'`: as in the paper. See `scale_by_mfac`.
      relative_damping: see `scale_by_mfac`.
      momentum_in: `'window'`: the gradients in the window are averaged, with Nesterov's term, and meet the
        newest Fisher matrix; no buffer. `'update'`: the updates are averaged, as the authors do, by
        `optax.ema` (divided by :math:`1 - \beta^t`, which the authors do not).
      step_adaptation: see `scale_by_mfac`; 0 for none, which `momentum_in='update'` needs. It rests while
        a schedule given as `learning_rate` rises, because a warm-up is meant to be short of the best
        step. Under `optax.inject_hyperparams` the schedule is not seen: pass a schedule that is 0 during
        the warm-up here too.
      decoupled_weight_decay: True adds :math:`\omega \theta` to the update, as in AdamW. False, as
        the authors do, adds it to the gradient before it enters the window.
      normalize_by: see `scale_by_mfac`.
      power: see `scale_by_mfac`.
      blocks: see `scale_by_mfac`.
      solver: see `scale_by_mfac`.
      storage: see `scale_by_mfac`.
      axis_name: see `scale_by_mfac`.
      host_chunk: see `scale_by_mfac`.

    Returns:
      The chain; its state holds a `ScaleByMFACState`.

    Raises:
      TypeError: as `scale_by_mfac`; `momentum`, `weight_decay` or `decoupled_weight_decay` has a wrong
        type.
      ValueError: as `scale_by_mfac`; `momentum`, `weight_decay`, `metric` or `momentum_in` is out of its
        range or not among its choices; `mask` comes without `weight_decay`; `step_adaptation` is not 0
        with `momentum_in='update'`; `update` with weight decay gets no `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> tx = mfac_jax.mfac(learning_rate=optax.cosine_decay_schedule(0.2, 100))
      >>> params = jnp.array([3.0, -2.0])
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   updates, state = tx.update(jax.grad(lambda p: jnp.sum(p ** 2))(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(jnp.sum(params ** 2) < 0.01)
      True

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """
    _validation.check_bool("decoupled_weight_decay", decoupled_weight_decay)
    _validation.check_choice("momentum_in", momentum_in, ("window", "update"))
    if momentum is not None:
        _validation.check_decay("momentum", momentum, "0.9")
    if not callable(step_adaptation):
        _validation.check_share("step_adaptation", step_adaptation, "0.3")
    is_traced = isinstance(step_adaptation, Tracer)
    if momentum_in == "update" and not is_traced and not _validation.is_known_zero(step_adaptation):
        raise ValueError(
            f"step_adaptation must be 0 with momentum_in='update', got {step_adaptation!r}: it would not "
            "see the momentum. Pass step_adaptation=0, or momentum_in='window'."
        )
    decay = _weight_decay(weight_decay, mask)
    window_momentum = momentum if momentum_in == "window" and momentum is not None else 0.0
    preconditioner = scale_by_mfac(
        num_grads,
        damping,
        normalize_by=normalize_by,
        relative_damping=relative_damping,
        power=power,
        window_momentum=window_momentum,
        nesterov=True,
        step_adaptation=_resting_while_rising(step_adaptation, learning_rate),
        blocks=blocks,
        metric=metric,
        solver=solver,
        storage=storage,
        axis_name=axis_name,
        host_chunk=host_chunk,
    )
    average = _momentum(momentum, axis_name) if momentum_in == "update" else []
    before, after = ([], decay) if decoupled_weight_decay else (decay, [])
    return optax.chain(
        *before, preconditioner, *average, *after, optax.scale_by_learning_rate(learning_rate)
    )


def cgfac(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    damping: optax.ScalarOrSchedule = 1e-2,
    momentum: float | None = 0.9,
    weight_decay: float | None = None,
    mask: optax.MaskOrFn = None,
    *,
    tolerance: float | jax.Array = 0.1,
    max_iterations: int = 20,
    norm_constraint: float | jax.Array | None = 1.0,
    num_batches: int = 1,
    factors: Factors | None = None,
    warm_start: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""The CG-FAC optimizer: natural gradient descent on K-FAC's Fisher matrix, by conjugate gradients.

    With :math:`v_t` the update of `scale_by_cgfac`, :math:`\beta` the momentum, :math:`\eta` the learning
    rate and :math:`\omega` the weight decay

    .. math::
      u_t = \frac{\sum_s \beta^{t - s} v_s}{\sum_s \beta^{t - s}}, \qquad
      \theta_{t+1} = \theta_t - \eta \left(u_t + \omega \theta_t\right).

    The chain is `scale_by_cgfac`, `optax.ema`, `optax.add_decayed_weights`, `optax.scale_by_learning_rate`;
    what is None is left out. `update` needs the extra argument `curvature`, as `scale_by_cgfac` says.

    Args:
      learning_rate: :math:`\eta`, a number or a schedule. 1 is the whole natural gradient, which the Fisher
        matrix of one batch is too noisy for; on digits 0.1 did, with a warm-up and a decay to zero.
      damping: lambda, > 0; see `scale_by_cgfac`.
      momentum: :math:`\beta` in [0, 1), or None for none.
      weight_decay: :math:`\omega` >= 0, or None; decoupled, as in AdamW. Needs `params` in `update`.
      mask: a tree of bools, or a function from parameters to one: where weight decay acts. Needs
        `weight_decay`.
      tolerance: see `scale_by_cgfac`.
      max_iterations: see `scale_by_cgfac`.
      norm_constraint: see `scale_by_cgfac`. 1.0 shortens the first steps; without, one of two seeds on
        digits took twice as long.
      num_batches: see `scale_by_cgfac`.
      factors: see `scale_by_cgfac`.
      warm_start: see `scale_by_cgfac`.

    Returns:
      The chain; its state holds a `ScaleByCGFACState`.

    Raises:
      TypeError: as `scale_by_cgfac`; `momentum` or `weight_decay` has a wrong type.
      ValueError: as `scale_by_cgfac`; `momentum` or `weight_decay` is out of its range; `mask` comes
        without `weight_decay`; `update` with weight decay gets no `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> tx = mfac_jax.cgfac(learning_rate=optax.cosine_decay_schedule(0.5, 60))
      >>> params, x = jnp.ones((3, 2)), jax.random.normal(jax.random.key(0), (8, 3))
      >>> loss = mfac_jax.value_and_grad_with_factors(lambda w: jnp.mean(jnp.sum((x @ w) ** 2, axis=1)))
      >>> state = tx.init(params)
      >>> for _ in range(60):
      ...   value, grads, factors = loss(params)
      ...   updates, state = tx.update(grads, state, params, curvature=factors)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(value < 1e-2)
      True

    References:
      Yingshi Chen, `An iterative K-FAC algorithm for Deep Learning <https://arxiv.org/abs/2101.00218>`_,
      2021.
    """
    preconditioner = scale_by_cgfac(
        damping,
        tolerance=tolerance,
        max_iterations=max_iterations,
        norm_constraint=norm_constraint,
        num_batches=num_batches,
        factors=factors,
        warm_start=warm_start,
    )
    return optax.chain(
        preconditioner,
        *_momentum(momentum, None),
        *_weight_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _momentum(momentum: float | None, axis_name: AxisName) -> list[optax.GradientTransformation]:
    """An average of updates, if there is to be one."""
    if momentum is None:
        return []
    _validation.check_decay("momentum", momentum, "0.9")
    return [_skip_not_finite(optax.ema(momentum), axis_name)]


def _weight_decay(weight_decay: float | None, mask: optax.MaskOrFn) -> list[optax.GradientTransformation]:
    """Weight decay, if there is to be one."""
    if weight_decay is None:
        if mask is not None:
            raise ValueError(
                "mask says where weight_decay acts, but weight_decay is None. Pass e.g. 1e-4, or no mask."
            )
        return []
    _validation.check_not_negative("weight_decay", weight_decay, "1e-4")
    return [optax.add_decayed_weights(weight_decay, mask)]


def _resting_while_rising(
    rate: optax.ScalarOrSchedule, learning_rate: optax.ScalarOrSchedule
) -> optax.ScalarOrSchedule:
    """The rate, as a schedule that is 0 where `learning_rate` is one and rises."""
    if not callable(learning_rate) or _validation.is_known_zero(rate):
        return rate

    def resting(count):
        rise = jnp.asarray(learning_rate(count)) - learning_rate(jnp.maximum(count - 1, 0))
        return jnp.where(rise > 0, 0, rate(count) if callable(rate) else rate)

    return resting


def _skip_not_finite(
    inner: optax.GradientTransformation, axis_name: AxisName
) -> optax.GradientTransformation:
    """`inner`, but updates with a NaN or an Inf on any device pass it by and leave its state as it was."""

    def update(updates, state, params=None):
        accepted = inner.update(updates, state, params)
        finite = _tree.all_finite(updates)
        if axis_name is not None:
            finite = jax.lax.pmin(finite.astype(jnp.int32), axis_name) == 1
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), accepted, (updates, state))

    return optax.GradientTransformation(inner.init, update)
