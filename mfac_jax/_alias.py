"""The optimizer people call: weight decay, M-FAC, momentum and learning rate in one chain."""

import jax
import jax.numpy as jnp
import optax

from mfac_jax import _validation
from mfac_jax._transform import Blocks, Normalization, scale_by_mfac


def mfac(
    learning_rate: optax.ScalarOrSchedule,
    num_grads: int = 64,
    damping: optax.ScalarOrSchedule = 1e-3,
    momentum: float | None = 0.9,
    weight_decay: float | None = None,
    mask: optax.MaskOrFn = None,
    *,
    decoupled_weight_decay: bool = True,
    normalize_by: Normalization = "window",
    power: float = 1.0,
    window_momentum: float = 0.0,
    blocks: Blocks = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The M-FAC optimizer: natural gradient descent on the Fisher matrix of the last gradients.

    With :math:`F_t` the damped empirical Fisher matrix of the last `num_grads` gradients,
    :math:`\eta` the learning rate, :math:`\beta` the momentum and :math:`\omega` the weight decay,

    .. math::
      u_t = F_t^{-1} g_t, \qquad
      v_t = \beta v_{t-1} + (1 - \beta) u_t, \qquad
      \theta_{t+1} = \theta_t - \eta \left(v_t / (1 - \beta^t) + \omega \theta_t\right).

    The chain is `scale_by_mfac`, `optax.ema`, `optax.add_decayed_weights`,
    `optax.scale_by_learning_rate`; what is None is left out. A gradient with a NaN or an Inf makes a
    non-finite update and leaves Fisher matrix and momentum as they were.

    Args:
      learning_rate: :math:`\eta`, a number or a schedule. The update is that of gradient descent with
        rate `learning_rate / damping` where gradients are small against the damping, and shorter where
        they are large.
      num_grads: gradients in the window, any integer >= 1; see `scale_by_mfac`. The authors' code has
        1024 by default and takes only multiples of 32 up to there; 64 needs 16 times less memory.
      damping: see `scale_by_mfac`. The authors' default is 1e-5.
      momentum: :math:`\beta` in [0, 1), or None for none. Of the preconditioned gradient, in one
        buffer like the parameters. The authors use 0 or 0.9, without the division by
        :math:`1 - \beta^t`.
      weight_decay: :math:`\omega` >= 0, or None. Needs `params` in `update`. The authors use 3e-3 to
        1e-4, coupled.
      mask: a tree of bools, or a function from parameters to one: where weight decay acts.
      decoupled_weight_decay: True adds :math:`\omega \theta` to the update, as in AdamW. False, as
        the authors do, adds it to the gradient before it enters the window.
      normalize_by: see `scale_by_mfac`.
      power: see `scale_by_mfac`.
      window_momentum: see `scale_by_mfac`. In place of `momentum`, not beside it: both together were
        20 to 100 times worse in training loss on a small network.
      blocks: see `scale_by_mfac`.

    Returns:
      The chain; its state holds a `ScaleByMFACState`.

    Raises:
      TypeError: as `scale_by_mfac`; `momentum`, `weight_decay` or `decoupled_weight_decay` has a wrong
        type.
      ValueError: as `scale_by_mfac`; `momentum` or `weight_decay` is out of its range; `update` with
        weight decay gets no `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> tx = mfac_jax.mfac(learning_rate=0.3, num_grads=8, damping=1.0)
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
    if not isinstance(decoupled_weight_decay, bool):
        raise TypeError(f"decoupled_weight_decay must be True or False, got {decoupled_weight_decay!r}.")
    preconditioner = scale_by_mfac(
        num_grads,
        damping,
        normalize_by=normalize_by,
        power=power,
        window_momentum=window_momentum,
        blocks=blocks,
    )
    chain: list[optax.GradientTransformation] = [preconditioner]
    if momentum is not None:
        _validation.check_decay("momentum", momentum, "0.9")
        chain.append(_skip_not_finite(optax.ema(momentum)))
    if weight_decay is not None:
        _validation.check_not_negative("weight_decay", weight_decay, "1e-4")
        decay = optax.add_decayed_weights(weight_decay, mask)
        chain.insert(len(chain) if decoupled_weight_decay else 0, decay)
    return optax.chain(*chain, optax.scale_by_learning_rate(learning_rate))


def _skip_not_finite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, but updates with a NaN or an Inf pass it by and leave its state as it was."""

    def update(updates, state, params=None):
        finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates)]))
        accepted = inner.update(updates, state, params)
        return jax.tree.map(lambda new, old: jnp.where(finite, new, old), accepted, (updates, state))

    return optax.GradientTransformation(inner.init, update)
