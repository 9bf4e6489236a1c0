"""The window: factors of the last batches, for `num_batches` above 1."""

import dataclasses
from collections.abc import Callable, Mapping
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
        return jnp.zeros((*x.shape[:axis], num_batches, *x.shape[axis:]), jnp.result_type(x))

    return _of_arrays(zeros, factors)


def check_kept(window: Any, num_batches: int) -> None:
    """Raise unless the window is one of so many batches."""
    kept = {1}
    if not isinstance(window, optax.EmptyState):
        is_window = isinstance(window, Mapping) and all(
            isinstance(x, LayerFactors) for x in window.values()
        )
        arrays = [(x, 1 + of.is_stacked) for of in window.values() for x in of.arrays] if is_window else []
        is_floating = [jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating) for x, _ in arrays]
        if not arrays or not all(is_floating) or any(x.ndim < axis + 2 for x, axis in arrays):
            raise ValueError(
                "state.window must be a dict of LayerFactors, or an optax.EmptyState for one batch, got "
                f"{window!r}. Restore the whole state that was saved, or call init again."
            )
        kept = {x.shape[axis] for x, axis in arrays}
    if kept != {num_batches}:
        raise ValueError(
            f"state must be that of a transform with num_batches={num_batches}, got num_batches="
            f"{' and '.join(map(str, sorted(kept)))}. After changing it call init again."
        )


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
    values = {field.name: getattr(factors, field.name) for field in dataclasses.fields(factors)}
    return {name: getattr(x, "shape", x) for name, x in values.items() if x is not None}


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
