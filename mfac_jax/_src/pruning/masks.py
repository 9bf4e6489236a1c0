"""Which weights are kept: masks, trees like the parameters.

A mask is a bool array shaped like its leaf, True where the weight is kept; None, or optax.MaskedNode,
stands at a leaf that takes no part.
"""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.rows import mesh as _mesh

_NO_KERNELS = {"bias", "biases", "scale", "scales", "embed", "embedding", "embeddings"}


def is_absent(node) -> bool:
    """Whether it stands at a leaf that takes no part."""
    return node is None or isinstance(node, optax.MaskedNode)


def kernel_masks(params: optax.Params) -> Any:
    """Masks that keep everything, of the leaves that are usually pruned: the kernels.

    A kernel is a floating-point leaf with two axes or more whose name, the last key of its path, has not
    bias, scale or embedding among its words.

    Args:
      params: arrays or `jax.ShapeDtypeStruct`, in any tree: of linen, nnx, Haiku, or a bare array.

    Returns:
      A tree like `params`: bool arrays of True at kernels, None elsewhere.

    Raises:
      ValueError: no leaf is a kernel.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> mfac_jax.pruning.kernel_masks({'bias': jnp.zeros(2), 'kernel': jnp.zeros((1, 2))})
      {'bias': None, 'kernel': Array([[ True,  True]], dtype=bool)}
    """

    def mask(path, leaf):
        if is_absent(leaf) or not _is_kernel(path, leaf):
            return None
        return jnp.ones(leaf.shape, bool, device=_mesh.named_sharding(leaf))

    masks = jax.tree_util.tree_map_with_path(mask, params, is_leaf=is_absent)
    if not jax.tree.leaves(masks):
        names = ", ".join(leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)[:10])
        raise ValueError(
            "params must have a kernel: a floating-point leaf with two axes or more whose name is not that "
            f"of a bias, scale or embedding; got {names or 'no leaf'}. Pass masks of your own: a tree like "
            "the parameters, with jnp.ones(leaf.shape, bool) at leaves to prune and None elsewhere."
        )
    return masks


def _is_kernel(path, leaf) -> bool:
    words = re.split(r"[^a-z]+", _names(path)[-1].lower()) if path else []
    is_floating = jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating)
    return is_floating and leaf.ndim >= 2 and _NO_KERNELS.isdisjoint(words)


def _names(path) -> list[str]:
    """The keys of a path, without the one by which nnx.State holds an array in its variable."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def check_masks(params: optax.Params, masks: Any) -> Any:
    """The masks as bool arrays, None where a leaf takes no part; refused where they do not fit `params`.

    Of traced masks the values are not known. A mask of a leaf that `params` leave out is left out too.
    """
    _check_same_tree(masks, params)
    masks = as_masks(masks)

    def checked(path, mask, param):
        if is_absent(mask) or is_absent(param):
            return None
        if mask.shape != jnp.shape(param):
            raise ValueError(
                f"masks must have the shapes of the parameters, but {leaf_name(path)} is {mask.shape} "
                f"for {jnp.shape(param)}. Make them anew, e.g. with kernel_masks(params)."
            )
        return mask

    return jax.tree_util.tree_map_with_path(checked, masks, params, is_leaf=is_absent)


def _check_same_tree(masks: Any, params: Any) -> None:
    """Refuse masks in another tree than that of the parameters, nodes that stand for no leaf included."""
    found, expected = (
        dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_absent)) for tree in (masks, params)
    )
    if jax.tree.structure(masks, is_leaf=is_absent) != jax.tree.structure(params, is_leaf=is_absent):
        differing = [leaf_name(p) for p in [*found, *expected] if (p in found) != (p in expected)]
        what = f"but {differing[0]} is only in one of the two" if differing else "but its nodes differ"
        raise ValueError(
            f"masks must have the tree of the parameters, with None at leaves that take no part, {what}. "
            "Make them with jax.tree.map over the parameters, or with kernel_masks(params)."
        )


def as_masks(masks: Any) -> Any:
    """The masks as bool arrays, None where a leaf takes no part; refused where they are no masks."""

    def as_bool(path, mask):
        if is_absent(mask):
            return None
        dtype = getattr(mask, "dtype", None)
        if dtype is None or not (jnp.issubdtype(dtype, jnp.bool_) or jnp.issubdtype(dtype, jnp.number)):
            raise TypeError(
                f"masks must be arrays of bools, or of 0 and 1, but {leaf_name(path)} is "
                f"{dtype or type(mask).__name__}. Pass an array, or None where a leaf takes no part."
            )
        if jnp.issubdtype(dtype, jnp.bool_):
            return jnp.asarray(mask)
        mask = jnp.asarray(mask)
        is_one, other = mask == 1, (mask != 0) & (mask != 1)
        if not isinstance(other, Tracer) and other.any():
            raise ValueError(
                f"masks must have no values but 0 (pruned) and 1 (kept), but {leaf_name(path)} has "
                f"{mask[other][0]}. Pass a comparison, e.g. mask > 0.5."
            )
        return is_one

    masks = jax.tree_util.tree_map_with_path(as_bool, masks, is_leaf=is_absent)
    if not jax.tree.leaves(masks):
        raise ValueError(
            "masks must have an array at one leaf or more, got None at all. Make them with "
            "kernel_masks(params)."
        )
    return masks


def apply_masks(params: optax.Params, masks: Any) -> Any:
    """Set what is pruned to zero.

    Args:
      params: arrays; also gradients or other trees like the parameters.
      masks: a tree like `params`, bool arrays or arrays of 0 and 1: True where an entry is kept. None at
        leaves that take no part.

    Returns:
      A tree like `params`, zero where it is pruned, whatever stood there.

    Raises:
      TypeError: a mask is no array of numbers or bools.
      ValueError: the tree or a shape differs, a value is neither 0 nor 1, or no leaf has a mask.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> print(mfac_jax.pruning.apply_masks(jnp.array([1.0, jnp.nan]), jnp.array([True, False])))
      [1. 0.]
    """
    return jax.tree.map(zero_pruned, check_masks(params, masks), params, is_leaf=is_absent)


def zero_pruned(mask: Any, x: Any) -> Any:
    """An array, zero where it is pruned, with any axes in front of those of the mask; or as it is."""
    return x if is_absent(mask) else jnp.where(mask, x, jnp.zeros((), jnp.asarray(x).dtype))


def placed(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array where `like` lies on a mesh."""
    sharding = _mesh.named_sharding(like)
    return x if sharding is None else jax.device_put(x, sharding)


def sparsity(masks: Any) -> float:
    """The share of entries that are pruned, of all leaves that take part.

    Args:
      masks: as in `apply_masks`; not traced.

    Returns:
      A number in [0, 1].

    Raises:
      TypeError: a mask is no array of numbers or bools.
      ValueError: a value is neither 0 nor 1, or no leaf has a mask.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> mfac_jax.pruning.sparsity({'bias': None, 'kernel': jnp.array([[1, 0, 0, 0]])})
      0.75
    """
    return _share_pruned(*np.sum([[leaf.entries, leaf.kept] for leaf in _count(masks)], axis=0))


def sparsity_by_leaf(masks: Any) -> dict[str, float]:
    """The share of entries that are pruned in each leaf that takes part.

    Args:
      masks: as in `sparsity`.

    Returns:
      From the leaf's path, its keys joined by slashes, to a number in [0, 1].

    Raises:
      TypeError: as in `sparsity`.
      ValueError: as in `sparsity`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> mfac_jax.pruning.sparsity_by_leaf({'dense': {'bias': None, 'kernel': jnp.array([[1, 0, 0, 0]])}})
      {'dense/kernel': 0.75}
    """
    return {leaf.name: _share_pruned(leaf.entries, leaf.kept) for leaf in _count(masks)}


def pruning_report(masks: Any) -> str:
    """A table of what is pruned in each leaf that takes part, and in all of them.

    Args:
      masks: as in `sparsity`.

    Returns:
      Lines of text, for `print`.

    Raises:
      TypeError: as in `sparsity`.
      ValueError: as in `sparsity`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> masks = {'first': jnp.array([[1, 0], [0, 0]]), 'last': jnp.ones((1, 2)), 'bias': None}
      >>> print(mfac_jax.pruning.pruning_report(masks))
      leaf   shape  entries  kept  sparsity
      first  2 x 2        4     1    0.7500
      last   1 x 2        2     2    0.0000
      total               6     3    0.5000
    """
    leaves = _count(masks)
    entries, kept = np.sum([[leaf.entries, leaf.kept] for leaf in leaves], axis=0)
    rows = [("leaf", "shape", "entries", "kept", "sparsity")]
    for leaf in [*leaves, _Count("total", (), entries, kept)]:
        share = f"{_share_pruned(leaf.entries, leaf.kept):.4f}"
        shape = " x ".join(map(str, leaf.shape))
        rows.append((leaf.name, shape, f"{leaf.entries:,}", f"{leaf.kept:,}", share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


class _Count(NamedTuple):
    """How many entries a leaf has, and keeps."""

    name: str
    shape: tuple[int, ...]
    entries: int
    kept: int


def _count(masks: Any) -> list[_Count]:
    """Of each leaf that takes part."""
    leaves = jax.tree_util.tree_leaves_with_path(as_masks(masks))
    kept = jax.device_get([jnp.count_nonzero(mask) for _, mask in leaves])
    return [
        _Count("/".join(_names(path)) or "()", mask.shape, mask.size, int(count))
        for (path, mask), count in zip(leaves, kept, strict=True)
    ]


def _share_pruned(entries: int, kept: int) -> float:
    return float((entries - kept) / max(1, entries))
