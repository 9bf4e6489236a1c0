"""The optimizers people call: each a chain of preconditioner, momentum, weight decay and learning rate."""

from typing import Any, Literal

import optax
from jax.core import Tracer

from mfac_jax._src.base import chain, checks, schedules
from mfac_jax._src.mfac.transform import Metric, Normalization, Solver, scale_by_mfac
from mfac_jax._src.rows.manual_axes import AxisName
from mfac_jax._src.rows.window import Blocks


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
    checks.check_bool("decoupled_weight_decay", decoupled_weight_decay)
    checks.check_choice("momentum_in", momentum_in, ("window", "update"))
    if momentum is not None:
        checks.check_decay("momentum", momentum, "0.9")
    if not callable(step_adaptation):
        checks.check_share("step_adaptation", step_adaptation, "0.3")
    is_traced = isinstance(step_adaptation, Tracer)
    if momentum_in == "update" and not is_traced and not schedules.is_known_zero(step_adaptation):
        raise ValueError(
            f"step_adaptation must be 0 with momentum_in='update', got {step_adaptation!r}: it would not "
            "see the momentum. Pass step_adaptation=0, or momentum_in='window'."
        )
    decay = chain.weight_decay(weight_decay, mask)
    window_momentum = momentum if momentum_in == "window" and momentum is not None else 0.0
    preconditioner = scale_by_mfac(
        num_grads,
        damping,
        normalize_by=normalize_by,
        relative_damping=relative_damping,
        power=power,
        window_momentum=window_momentum,
        nesterov=True,
        step_adaptation=schedules.resting_while_rising(step_adaptation, learning_rate),
        blocks=blocks,
        metric=metric,
        solver=solver,
        storage=storage,
        axis_name=axis_name,
        host_chunk=host_chunk,
    )
    average = chain.momentum_of_updates(momentum, axis_name) if momentum_in == "update" else []
    before, after = ([], decay) if decoupled_weight_decay else (decay, [])
    return optax.chain(
        *before, preconditioner, *average, *after, optax.scale_by_learning_rate(learning_rate)
    )
