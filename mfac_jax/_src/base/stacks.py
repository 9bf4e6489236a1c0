"""Gradients that are stacked on a leading axis of each leaf."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mfac_jax._src.base import numerics
from mfac_jax._src.base.trees import check_tree


def check_stacked(grads: optax.Params) -> np.ndarray | None:
    """The largest entry of each gradient in each leaf `(leaves, m)`; None if they are traced.

    Raises for anything but a stack of finite gradients; of traced ones only shapes and dtypes count.
    """
    check_tree("grads", grads, grads)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    if not leaves:
        raise ValueError("grads must have at least one leaf, got a tree without leaves.")
    shapes = ", ".join(f"{jax.tree_util.keystr(path) or '()'}: {g.shape}" for path, g in leaves)
    if len({g.shape[:1] for _, g in leaves}) > 1 or not leaves[0][1].shape or not len(leaves[0][1]):
        raise ValueError(
            f"grads must have one leading axis of the same length >= 1 on all leaves, got {shapes}. "
            "Stack them with jnp.stack, or use collect_gradients."
        )
    arrays = [g for _, g in leaves]
    if any(isinstance(g, Tracer) for g in arrays):
        return None
    with jax.ensure_compile_time_eval():  # gradients that are known in a traced function
        largest = np.asarray(_largest(arrays))
    bad = np.flatnonzero(~np.all(np.isfinite(largest), axis=0))
    if len(bad):
        raise ValueError(
            f"grads must be finite, but those with the indices {bad.tolist()[:10]} have a NaN or an Inf. "
            "Leave them out, or look at the batches that they belong to."
        )
    return largest


@jax.jit
def _largest(leaves: Sequence[jax.Array]) -> jax.Array:
    """The largest absolute value of each gradient in each leaf, `(leaves, m)`; NaN if one is there."""
    rows = [jnp.max(jnp.abs(g), axis=tuple(range(1, g.ndim)), initial=0) for g in leaves]
    dtype = numerics.accumulation_dtype(leaves)
    return jnp.stack([x.astype(dtype) for x in rows])


def products_fit(largest: np.ndarray | None, damping: float | jax.Array) -> bool:
    """Whether products of the gradients, and their sums, are sure to be far from the ends of float32."""
    if largest is None or isinstance(damping, Tracer):
        return False
    numbers = np.append(largest, float(damping) ** 0.5)
    return bool(np.all((numbers == 0) | ((numbers > 2.0**-40) & (numbers < 2.0**40))))
