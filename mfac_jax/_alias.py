"""The optimizer people call: weight decay, M-FAC, momentum and learning rate in one chain."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

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
    """M-FAC"""
    parts = [
        scale_by_mfac(
            num_grads,
            damping,
            normalize_by=normalize_by,
            power=power,
            window_momentum=window_momentum,
            blocks=blocks,
        )
    ]
    if momentum is not None:
        parts.append(_skip_not_finite(optax.ema(momentum)))
    if weight_decay is not None:
        parts.insert(
            len(parts) if decoupled_weight_decay else 0,
            optax.add_decayed_weights(weight_decay, mask),
        )
    return optax.chain(*parts, optax.scale_by_learning_rate(learning_rate))


def _skip_not_finite(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, but updates with a NaN or an Inf pass it by and leave its state as it was."""

    def update(updates, state, params=None):
        finite = jnp.isfinite(optax.tree.norm(updates, ord=jnp.inf))
        return lax.cond(
            finite,
            lambda: inner.update(updates, state, params),
            lambda: (updates, state),
        )

    return optax.GradientTransformation(inner.init, update)
