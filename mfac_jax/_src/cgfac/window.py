"""The window: factors of the last batches, for `num_batches` above 1."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.cgfac.layers import Factors, LayerFactors

Window = Factors | optax.EmptyState  # nothing for one batch: its factors are those at hand


def _of_arrays(function: Callable[..., Any], factors: Factors, *more: Factors) -> dict[str, Any]:
    """The function of each array, those of `more`, and the axis of the batches in a window of them.

    The batches come after the examples, so that the examples stay the axis that may be sharded.
    """
    return {
        kernel: jax.tree.map(
            lambda *arrays, axis=1 + of_layer.is_stacked: function(*arrays, axis),
            of_layer,
            *(others[kernel] for others in more),
        )
        for kernel, of_layer in factors.items()
    }


def empty_window(factors: Factors, num_batches: int) -> Window:
    """Zeros `(N, num_batches, ...)` for each array of the factors, which may be shapes."""
    if num_batches == 1:
        return optax.EmptyState()

    def zeros(x, axis):
        return jnp.zeros((*x.shape[:axis], num_batches, *x.shape[axis:]), x.dtype)

    return _of_arrays(zeros, factors)


def num_batches_in(window: Window) -> int:
    """How many batches the window was made for."""
    if isinstance(window, optax.EmptyState):
        return 1
    of_layer = next(iter(window.values()))
    return of_layer.inputs.shape[1 + of_layer.is_stacked]


def check_window(window: Window, factors: Factors) -> None:
    """Raise for factors that are not like those that the window was made for."""
    if isinstance(window, optax.EmptyState):
        return
    one = _of_arrays(
        lambda x, axis: jax.ShapeDtypeStruct((*x.shape[:axis], *x.shape[axis + 1 :]), x.dtype), window
    )
    made, found = ({path: _kind(of_layer) for path, of_layer in those.items()} for those in (one, factors))
    if found != made:
        raise ValueError(
            f"curvature must have the shapes of the factors given to scale_by_cgfac, {made}, got {found}. "
            "Leave out the last batch of an epoch if it is smaller, or make the transform again."
        )


def _kind(factors: LayerFactors) -> dict[str, Any]:
    """What the factors of two batches have in common."""
    return {name: getattr(x, "shape", x) for name, x in vars(factors).items() if x is not None}


def remember(window: Window, factors: Factors, step: jax.Array) -> tuple[Window, Factors]:
    """The window with the factors in the place of the oldest ones, and the factors of all its batches.

    At step 0 they fill all places: until other batches come, the first stands for them.
    """
    if isinstance(window, optax.EmptyState):
        return window, factors

    def put(rows, x, axis):
        x = x.astype(rows.dtype)
        written = lax.dynamic_update_index_in_dim(rows, x, step % rows.shape[axis], axis)
        return jnp.where(step == 0, jnp.expand_dims(x, axis), written)

    written = _of_arrays(put, window, factors)
    return written, written
