"""The window: factors of the last batches, for `num_batches` above 1."""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.cgfac.layers import Factors, LayerFactors

Window = Factors | optax.EmptyState  # nothing for one batch: its factors are those at hand


def empty_window(factors: Factors, num_batches: int) -> Window:
    """Zeros `(N, num_batches, ...)` for each array of the factors, which may be shapes.

    The batches come second, so that the examples stay the axis that may be sharded.
    """
    if num_batches == 1:
        return optax.EmptyState()

    def zeros(x):
        return jnp.zeros((x.shape[0], num_batches, *x.shape[1:]), jnp.result_type(x))

    return jax.tree.map(zeros, dict(factors))


def num_batches_in(window: Window) -> int:
    """How many batches the window was made for."""
    return 1 if isinstance(window, optax.EmptyState) else jax.tree.leaves(window)[0].shape[1]


def check_window(window: Window, factors: Factors) -> None:
    """Raise for factors that do not have the shapes that the window was made for."""
    if isinstance(window, optax.EmptyState):
        return

    def shapes(of_layer: LayerFactors, batch_axis: int):
        arrays = of_layer.inputs, of_layer.output_grads
        return [(x.shape[0], *x.shape[1 + batch_axis :]) for x in arrays]

    made = {kernel: shapes(of_layer, 1) for kernel, of_layer in window.items()}
    found = {kernel: shapes(of_layer, 0) for kernel, of_layer in factors.items()}
    if found != made:
        raise ValueError(
            f"curvature must have the shapes of the factors given to scale_by_cgfac, {made}, got {found}. "
            "Leave out the last batch of an epoch if it is smaller, or make the transform again."
        )


def remember(window: Window, factors: Factors, step: jax.Array) -> tuple[Window, Factors]:
    """The window with the factors in the place of the oldest ones, and the factors of all its batches.

    At step 0 they fill all places: until other batches come, the first stands for them.
    """
    if isinstance(window, optax.EmptyState):
        return window, factors

    def put(rows, x):
        x = x.astype(rows.dtype)
        written = lax.dynamic_update_index_in_dim(rows, x, step % rows.shape[1], 1)
        return jnp.where(step == 0, jnp.expand_dims(x, 1), written)

    written = {kernel: jax.tree.map(put, kept, factors[kernel]) for kernel, kept in window.items()}
    return written, written
