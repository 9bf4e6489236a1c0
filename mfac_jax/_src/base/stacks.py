"""Gradients that are stacked on a leading axis of each leaf."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mfac_jax._src.base.trees import check_params


def check_stacked(grads: optax.Params) -> None:
    """Raise for anything but a stack of finite gradients; of traced ones only shapes and dtypes count."""
    check_params(grads)
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
        return
    if not _all_finite(arrays):
        bad = np.flatnonzero(~np.asarray(_finite_rows(arrays)))
        raise ValueError(
            f"grads must be finite, but those with the indices {bad.tolist()[:10]} have a NaN or an Inf. "
            "Leave them out, or look at the batches that they belong to."
        )


@jax.jit
def _all_finite(leaves: Sequence[jax.Array]) -> jax.Array:
    """Whether all entries are finite."""
    # 0 times NaN or Inf is NaN. This takes a third of the time of isfinite at each entry.
    return jnp.isfinite(functools.reduce(jnp.add, [jnp.sum(g * 0) for g in leaves]))


@jax.jit
def _finite_rows(leaves: Sequence[jax.Array]) -> jax.Array:
    """Which of the stacked gradients are finite, `(m,)`."""
    finite = [jnp.all(jnp.isfinite(g), axis=tuple(range(1, g.ndim))) for g in leaves]
    return jnp.all(jnp.stack(finite), axis=0)
