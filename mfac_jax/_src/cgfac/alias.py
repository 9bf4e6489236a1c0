"""The CG-FAC optimizer: a chain of preconditioner, momentum, weight decay and learning rate."""

import jax
import optax

from mfac_jax._src.base import chain
from mfac_jax._src.base.foreign_arguments import explain_foreign_arguments
from mfac_jax._src.cgfac.layers import Factors
from mfac_jax._src.cgfac.transform import DAMPING, MAX_ITERATIONS, TOLERANCE, scale_by_cgfac


@explain_foreign_arguments(
    b2="The Fisher matrix takes the place of a second moment.",
    nesterov="Its momentum is a mean of updates, without Nesterov's term.",
)
def cgfac(
    learning_rate: optax.ScalarOrSchedule = 0.1,
    damping: optax.ScalarOrSchedule = DAMPING,
    momentum: float | None = 0.9,
    weight_decay: optax.ScalarOrSchedule | None = None,
    mask: optax.MaskOrFn = None,
    *,
    tolerance: float | jax.Array = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    norm_constraint: float | jax.Array | None = 1.0,
    num_batches: int = 1,
    factors: Factors | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Train with CG-FAC: natural gradient descent on K-FAC's Fisher matrix, by conjugate gradients.

    With v the update of `scale_by_cgfac`::

        u = mean of the v of all steps so far, weighted by momentum^age
        new params = params - learning_rate (u + weight_decay params)

    The chain is `scale_by_cgfac`, `optax.ema`, `optax.add_decayed_weights`, `optax.scale_by_learning_rate`,
    without those whose argument is None. `update` needs the extra argument `curvature`: see
    `scale_by_cgfac`.

    Args:
      learning_rate: a number or a schedule. 1 is the whole natural gradient, but the Fisher matrix of one
        batch is too noisy for it. On digits, 0.1 with a warm-up and a decay to zero worked.
      damping: > 0; see `scale_by_cgfac`.
      momentum: in [0, 1), or None for none.
      weight_decay: >= 0, a number or a schedule, or None; decoupled, as in AdamW. Needs `params` in
        `update`.
      mask: where weight decay acts: a tree of bools, or a function from parameters to one. Needs
        `weight_decay`.
      tolerance: see `scale_by_cgfac`.
      max_iterations: see `scale_by_cgfac`.
      norm_constraint: see `scale_by_cgfac`. 1.0 shortens the first steps. Without it, one of two seeds on
        digits took twice as long.
      num_batches: see `scale_by_cgfac`.
      factors: see `scale_by_cgfac`.

    Returns:
      The chain; its state holds a `ScaleByCGFACState`.

    Raises:
      TypeError: as `scale_by_cgfac`; a number or `mask` has a wrong type.
      ValueError: as `scale_by_cgfac`; `learning_rate`, `momentum` or `weight_decay` is out of range; `mask`
        comes without `weight_decay`; `update` with weight decay gets no `params`.

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
    rate = chain.scaled_by(learning_rate, "0.1")
    preconditioner = scale_by_cgfac(
        damping,
        tolerance=tolerance,
        max_iterations=max_iterations,
        norm_constraint=norm_constraint,
        num_batches=num_batches,
        factors=factors,
    )
    rest = [*chain.momentum_of_updates(momentum, None), *chain.weight_decay(weight_decay, mask)]
    return chain.chained(preconditioner, after=[*rest, rate])
