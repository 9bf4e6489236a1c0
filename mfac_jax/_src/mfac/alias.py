"""The M-FAC optimizers: chains of preconditioner, momentum, weight decay and learning rate."""

from typing import Any, Literal

import jax.numpy as jnp
import optax

from mfac_jax._src.base import chain, checks, schedules
from mfac_jax._src.base.foreign_arguments import explain_foreign_arguments
from mfac_jax._src.mfac.metric import Metric
from mfac_jax._src.mfac.metrics import MetricName
from mfac_jax._src.mfac.solvers import Solver, SolverName
from mfac_jax._src.mfac.step_length import StepLength
from mfac_jax._src.mfac.transform import NUM_GRADS, scale_by_mfac
from mfac_jax._src.rows.blocks import Blocks
from mfac_jax._src.rows.manual_axes import AxisName

STORAGE = jnp.dtype(jnp.int8)  # not `jnp.int8`, which optax.inject_hyperparams would take for a schedule


@explain_foreign_arguments(
    b2="The metric keeps a second moment of its own, without a setting.",
    nesterov="Its momentum always has Nesterov's term.",
)
def mfac(
    learning_rate: optax.ScalarOrSchedule = 1e-2,
    num_grads: int = NUM_GRADS,
    damping: optax.ScalarOrSchedule = 1.0,
    momentum: float | None = 0.9,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: optax.MaskOrFn = None,
    *,
    metric: MetricName | Literal["auto"] | Metric = "auto",
    step_adaptation: optax.ScalarOrSchedule | StepLength = 0.3,
    blocks: Blocks = None,
    solver: SolverName | Solver = "auto",
    storage: Any = STORAGE,
    axis_name: AxisName = None,
    param_specs: Any = None,
    host_chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train with M-FAC: second-order steps from gradients alone, in place of `optax.adamw`.

    With P the metric, g_i the gradients in the window, g their Nesterov momentum, s the mean squared norm
    of the P g_i, and a the step factor::

        F = damping s I + sum_i (P g_i)(P g_i)^T,    u = a (1 + damping) s P F^-1 P g
        new params = params - learning_rate (u + weight_decay params)

    A gradient unlike the others in the window moves the parameters as in Adam, so learning rates are those
    of Adam. The chain is `scale_by_mfac`, `optax.add_decayed_weights`, `optax.scale_by_learning_rate`. A
    gradient with a NaN or an Inf makes a non-finite update and leaves the state as it was.

    Args:
      learning_rate: a number or a schedule. 1e-2 with a warm-up and a decay to zero worked, untuned, on
        networks trained from scratch, 3e-3 on a pretrained one: docs/results.
      num_grads: gradients in the window, >= 1. 32 do as well as 64, and so do 16 where gradients
        are noisy (docs/options.md).
      damping: > 0, a number or a schedule. 0.1 to 1 is the useful range; smaller is bolder. 1 suits the
        rotated metric, 0.2 the diagonal one.
      momentum: in [0, 1), over the gradients of the window, or None for none.
      weight_decay: >= 0, a number or a schedule, or None; decoupled, as in AdamW. Needs `params` in
        `update`.
      mask: a tree of bools, or a function from parameters to one: where weight decay acts.
      metric: see `scale_by_mfac`. 'auto' is 'rotated', but 'diagonal' with `axis_name`: devices hold parts
        of matrices there.
      step_adaptation: see `scale_by_mfac`; 0 for none. It rests while a schedule given as `learning_rate`
        rises. `optax.inject_hyperparams` hides that schedule: pass one that is 0 in the warm-up.
      blocks: see `scale_by_mfac`.
      solver: see `scale_by_mfac`.
      storage: see `scale_by_mfac`. int8 ends where float32 does: the window takes 8 copies of the
        parameters. A step that is differentiated needs `jnp.float32`; so do, within `jax.shard_map`, shards
        that no `param_specs` declares.
      axis_name: see `scale_by_mfac`.
      param_specs: see `scale_by_mfac`.
      host_chunk: see `scale_by_mfac`.

    Returns:
      The chain; its state holds a `ScaleByMFACState`.

    Raises:
      TypeError: as `scale_by_mfac`; `learning_rate`, `momentum`, `weight_decay` or `mask` has a wrong type.
      ValueError: as `scale_by_mfac`; `learning_rate`, `momentum` or `weight_decay` is out of range; `mask`
        comes without `weight_decay`; `update` with weight decay gets no `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> tx = mfac_jax.mfac(learning_rate=optax.cosine_decay_schedule(0.2, 100))
      >>> params = jnp.array([3.0, -2.0])
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(100):
      ...   updates, state = update(2 * params, state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(jnp.sum(params ** 2) < 0.01)
      True

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """
    rate = chain.scaled_by(learning_rate, "1e-2")
    checks.check_positive("damping", damping, "1.0", or_schedule=True)
    chain.check_momentum(momentum)
    if not isinstance(step_adaptation, StepLength):
        checks.check_step_adaptation(step_adaptation)
        step_adaptation = schedules.resting_while_rising(step_adaptation, learning_rate)
    decay = chain.weight_decay(weight_decay, mask)
    if metric == "auto":
        metric = "rotated" if axis_name is None else "diagonal"
    preconditioner = scale_by_mfac(
        num_grads,
        damping,
        relative_damping=True,
        window_momentum=0.0 if momentum is None else momentum,
        nesterov=True,
        step_adaptation=step_adaptation,
        blocks=blocks,
        metric=metric,
        solver=solver,
        storage=storage,
        axis_name=axis_name,
        param_specs=param_specs,
        host_chunk=host_chunk,
    )
    return chain.chained(preconditioner, after=[*decay, rate])


@explain_foreign_arguments(
    b2="The Fisher matrix takes the place of a second moment.",
    nesterov="Its momentum is a mean of updates, without Nesterov's term.",
)
def mfac_published(
    learning_rate: optax.ScalarOrSchedule = 1e-3,
    num_grads: int = 512,
    damping: optax.ScalarOrSchedule = 1e-5,
    momentum: float | None = 0.9,
    weight_decay: optax.ScalarOrSchedule | None = 3e-3,
    mask: optax.MaskOrFn = None,
    *,
    blocks: Blocks = None,
    solver: SolverName | Solver = "auto",
    storage: Any = None,
    axis_name: AxisName = None,
    param_specs: Any = None,
    host_chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train with M-FAC as its paper does, to reproduce it; `mfac` trains better.

    With m = `num_grads` and g_i the gradients in the window, after weight decay::

        g = gradient + weight_decay params,    F = damping I + sum_i g_i g_i^T / m
        u = mean of the F^-1 g of all steps so far, weighted by momentum^age
        new params = params - learning_rate u

    The defaults are the authors' settings for ResNet-20. One thing differs from their code: the average of
    updates is divided by the sum of its weights. The chain is `optax.add_decayed_weights`, `scale_by_mfac`,
    `optax.ema`, `optax.scale_by_learning_rate`.

    Args:
      learning_rate: a number or a schedule. Where gradients are small the step is that of gradient descent
        with the rate `learning_rate / damping`.
      num_grads: m >= 1. The authors use 512 and 1024.
      damping: > 0, in units of a squared gradient, a number or a schedule. The authors use 1e-5 to 1e-7.
      momentum: in [0, 1), of the updates, or None for none.
      weight_decay: >= 0, a number or a schedule, or None; added to the gradient. Needs `params` in
        `update`.
      mask: a tree of bools, or a function from parameters to one: where weight decay acts.
      blocks: see `scale_by_mfac`.
      solver: see `scale_by_mfac`.
      storage: see `scale_by_mfac`.
      axis_name: see `scale_by_mfac`.
      param_specs: see `scale_by_mfac`.
      host_chunk: see `scale_by_mfac`.

    Returns:
      The chain; its state holds a `ScaleByMFACState`.

    Raises:
      TypeError: as `mfac`.
      ValueError: as `mfac`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> tx = mfac_jax.mfac_published(num_grads=8, weight_decay=None)
      >>> params = jnp.array([3.0, -2.0])
      >>> updates, state = tx.update(2 * params, tx.init(params))
      >>> print(updates)
      [-0.00092308  0.00061538]

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """
    rate = chain.scaled_by(learning_rate, "1e-3")
    checks.check_positive("damping", damping, "1e-5", or_schedule=True)
    preconditioner = scale_by_mfac(
        num_grads,
        damping,
        blocks=blocks,
        solver=solver,
        storage=storage,
        axis_name=axis_name,
        param_specs=param_specs,
        host_chunk=host_chunk,
    )
    return chain.chained(
        preconditioner,
        before=chain.weight_decay(weight_decay, mask),
        after=[*chain.momentum_of_updates(momentum, axis_name), rate],
    )
