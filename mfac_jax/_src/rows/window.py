"""The window as a whole: its leaves grouped into blocks, on one device or split over manual mesh axes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base import numerics, trees
from mfac_jax._src.rows import contractions, manual_axes
from mfac_jax._src.rows.blocks import Blocks, block_of_leaf, number_of_blocks
from mfac_jax._src.rows.manual_axes import AxisName, Layout


def blocks_of_state(gram: jax.Array, tree: optax.Params, blocks: Blocks) -> list[int]:
    """The index of each leaf's block, after a check that the state with these Gram matrices has as many."""
    found = block_of_leaf(tree, blocks)
    if number_of_blocks(found) != len(gram):
        raise ValueError(
            f"blocks must split the tree into the {len(gram)} block(s) of the state, got "
            f"{number_of_blocks(found)}. Pass the value of blocks given to scale_by_mfac."
        )
    return found


def layouts(name: str, tree: optax.Params, window: optax.Params, axis_name: AxisName) -> list[Layout]:
    """How each leaf of the window lies on manual axes, after a check that the tree fits the window."""
    trees.check_tree(name, tree, window)
    if axis_name is None:
        trees.check_shapes(name, tree, window)
        return [Layout.local(x.ndim) for x in jax.tree.leaves(tree)]
    manual_axes.check_bound(axis_name)
    return manual_axes.layouts(tree, window, axis_name)


def map_leaves(
    function: Callable[..., jax.Array], layouts: Sequence[Layout], tree: optax.Params, *rest: Any
):
    """`function(leaf, *others, split)` for every leaf of the trees."""
    leaves, structure = jax.tree.flatten(tree)
    others = [jax.tree.leaves(other) for other in rest]
    splits = [layout.split for layout in layouts]
    return jax.tree.unflatten(structure, map(function, leaves, *others, splits))


def products(
    window: optax.Params,
    tree: optax.Params,
    block_of_leaf: Sequence[int],
    layouts: Sequence[Layout],
    like: jax.Array,
    newest: jax.Array | None = None,
    host_chunk: int | None = None,
) -> jax.Array:
    """G x for each block, `(blocks, m)` as `like`; with x itself as the row `newest`, where that is given.

    One sum over the mesh for all leaves that are spread over the same axes.
    """
    partial: dict[tuple[str, ...], dict[int, list[jax.Array]]] = {}
    leaves = (jax.tree.leaves(t) for t in (window, tree))
    for block, layout, rows, x in zip(block_of_leaf, layouts, *leaves, strict=True):
        product, square = contractions.dots(rows, x, like.dtype, host_chunk), numerics.square(x, like.dtype)
        partial.setdefault(layout.summed, {}).setdefault(block, []).append(jnp.append(product, square))
    total = jnp.zeros_like(like)
    for axes, group in partial.items():
        stacked = jnp.stack(list(map(_sum, group.values())))
        product, square = stacked[:, :-1], stacked[:, -1:]
        if newest is not None:
            product = jnp.where(jnp.arange(like.shape[-1]) == newest, square, product)
        total = total.at[jnp.asarray(list(group))].add(lax.psum(product, axes) if axes else product)
    return total


def _sum(leaves: Sequence[jax.Array]) -> jax.Array:
    """The sum of vectors of one length, as one operation.

    Additions XLA would repeat for every entry of the Gram matrix: with 1,000 leaves and m = 1024 a step
    took 3.4 s in place of 0.1. It makes additions of the sum of a stack too, where it sees that it is one.
    """
    return jnp.sum(jnp.concatenate(leaves).reshape(len(leaves), -1), axis=0)


def gram(window: optax.Params, block_of_leaf: Sequence[int], like: jax.Array) -> jax.Array:
    """The Gram matrices of the whole window, `(blocks, m, m)` as `like`."""
    total = jnp.zeros_like(like)
    for block, rows in zip(block_of_leaf, jax.tree.leaves(window), strict=True):
        total = total.at[block].add(contractions.gram(rows, like.dtype))
    return total


def combine(
    coefficients: jax.Array,
    window: optax.Params,
    block_of_leaf: Sequence[int],
    host_chunk: int | None = None,
) -> optax.Params:
    """G^T c, each leaf with the coefficients of its block, on each device for its part of the window.

    The barrier makes the leaves wait for each other: under automatic mesh axes XLA for TPU would merge the
    coefficients' broadcasts over leaves that are sharded in different ways, and exchange whole leaves.
    """
    rows, structure = jax.tree.flatten(window)
    combined = []
    for block, leaf in zip(block_of_leaf, rows, strict=True):
        y = contractions.combine(coefficients[block], leaf, host_chunk)
        if not manual_axes.varying(y):
            y, coefficients = lax.optimization_barrier((y, coefficients))
        combined.append(y)
    return jax.tree.unflatten(structure, combined)


def weights_by_age(newest, seen, num_grads: int, momentum, nesterov: bool, dtype) -> jax.Array:
    """Weights `(m,)` proportional to momentum^age over the rows in use; they add up to one."""
    age = ages(newest, num_grads)
    momentum = jnp.asarray(momentum, dtype)
    decayed = momentum ** age.astype(dtype)
    weights = jnp.where(age < jnp.maximum(seen, 1), decayed, 0)
    weights /= jnp.sum(weights)
    return momentum * weights + (1 - momentum) * (age == 0) if nesterov else weights


def ages(newest: jax.Array, num_grads: int) -> jax.Array:
    """The age of every row `(m,)`, zero for the newest."""
    return (newest - jnp.arange(num_grads, dtype=newest.dtype)) % num_grads
