"""The state of `scale_by_cgfac`: what it holds, its first value, and for which transform it was made."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import numerics
from mfac_jax._src.cgfac.window import Window, num_batches_in
from mfac_jax._src.rows import mesh


class ScaleByCGFACState(NamedTuple):
    """State of `scale_by_cgfac`.

    Arrays of shape `(leaves,)` have one number per leaf of the parameters, in the order of
    `jax.tree.leaves`. A layer's number stands at its kernel and at its bias.

    Attributes:
      grads_seen: gradients accepted so far; stops at the largest int32.
      grads_rejected: gradients rejected because of a NaN or an Inf, in them or in the factors; stops there
        too.
      window: factors of the last batches, with the batches on a second axis; empty for a single batch.
      mean_squares: running mean of the squared entries of the gradients, before its bias correction.
      residuals: norm of each system's residual, over that of its right-hand side.
      iterations: products that each system took; 0 for a leaf without factors.
      indefinite: whether a system was not positive definite, or not finite.
    """

    grads_seen: jax.Array  # () int32
    grads_rejected: jax.Array  # () int32
    window: Window  # arrays (N, num_batches, ...) of the dtypes of the factors
    mean_squares: jax.Array  # (leaves,), float32, float64 with a float64 leaf
    residuals: jax.Array  # (leaves,), of that dtype
    iterations: jax.Array  # (leaves,) int32
    indefinite: jax.Array  # (leaves,) bool


def first_state(params: optax.Params, window: Window) -> ScaleByCGFACState:
    """The state before the first gradient."""
    dtype, zeros = numerics.accumulation_dtype(params), mesh.zeros_like_params(params)
    leaves = (len(jax.tree.leaves(params)),)
    return ScaleByCGFACState(
        grads_seen=zeros((), jnp.int32),
        grads_rejected=zeros((), jnp.int32),
        window=window,
        mean_squares=zeros(leaves, dtype),
        residuals=zeros(leaves, dtype),
        iterations=zeros(leaves, jnp.int32),
        indefinite=zeros(leaves, jnp.bool_),
    )


def check_state(state: ScaleByCGFACState, updates: optax.Updates, num_batches: int) -> None:
    """Raise if the state was made with another `num_batches`, or for another number of leaves."""
    kept = num_batches_in(state.window)
    if kept != num_batches:
        raise ValueError(
            f"state must be that of a transform with num_batches={num_batches}, got num_batches={kept}. "
            "After changing it call init again."
        )
    found, made = len(jax.tree.leaves(updates)), len(state.mean_squares)
    if found != made:
        raise ValueError(
            f"updates must have the tree of the parameters given to init, but have {found} leaves, and the "
            f"state was made for {made}. Call init again with the parameters that are trained now."
        )
