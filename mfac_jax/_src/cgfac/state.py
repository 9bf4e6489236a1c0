"""The state of `scale_by_cgfac`: what it holds, its first value, and for which transform it was made."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import numerics
from mfac_jax._src.cgfac.window import Window, check_kept
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
    kinds = _kinds(len(jax.tree.leaves(params)), dtype)
    return ScaleByCGFACState(**{name: zeros(*kind) for name, kind in kinds.items()}, window=window)


def _kinds(leaves: int, dtype: Any) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every field but the window."""
    of_leaves = {
        "mean_squares": dtype,
        "residuals": dtype,
        "iterations": jnp.int32,
        "indefinite": jnp.bool_,
    }
    counts = dict.fromkeys(("grads_seen", "grads_rejected"), ((), jnp.int32))
    return {**counts, **{name: ((leaves,), dtype) for name, dtype in of_leaves.items()}}


def check_state(state: Any, updates: optax.Updates, num_batches: int) -> None:
    """Raise for anything but a state for these updates, of a transform with this `num_batches`."""
    if not isinstance(state, ScaleByCGFACState):
        raise TypeError(
            f"state must be a ScaleByCGFACState, as init returns it, got {type(state).__name__}. Restore a "
            "checkpoint into a state that init returned."
        )
    leaves, mean_squares = len(jax.tree.leaves(updates)), state.mean_squares
    if getattr(mean_squares, "ndim", 0) == 1 and len(mean_squares) != leaves:
        raise ValueError(
            f"updates must have the tree of the parameters given to init, but have {leaves} leaves, and "
            f"the state was made for {len(mean_squares)}. Call init again with the parameters that are "
            "trained now."
        )
    has_doubles = getattr(mean_squares, "dtype", None) == jnp.float64
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64) if has_doubles else jnp.dtype(jnp.float32)
    for name, kind in _kinds(leaves, dtype).items():
        _check_field(name, getattr(state, name), *kind)
    check_kept(state.window, num_batches)


def _check_field(name: str, found: Any, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise unless the field is an array of this shape and dtype, of JAX or NumPy."""
    kind = getattr(found, "shape", None), getattr(found, "dtype", None)
    if kind != (shape, dtype):
        got = repr(found) if kind[1] is None else f"{kind[0]} of {kind[1]}"
        raise ValueError(
            f"state.{name} must be an array {shape} of {jnp.dtype(dtype)}, got {got}. Restore the whole "
            "state that was saved, or call init again."
        )
