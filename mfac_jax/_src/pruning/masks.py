"""Which weights are kept: masks, trees like the parameters.

A mask is a bool array shaped like its leaf, True where the weight is kept. Where a leaf takes no part, None
or `optax.MaskedNode` stands in its place.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from mfac_jax._src.base.trees import NamedLeaf, check_structure, leaf_name, named_leaves
from mfac_jax._src.rows.mesh import named_sharding

_NOT_KERNELS = {"bias", "biases", "scale", "scales", "embed", "embedding", "embeddings"}


def is_absent(node) -> bool:
    """Whether the node stands in place of a leaf that takes no part."""
    return node is None or isinstance(node, optax.MaskedNode)


def kernel_masks(params: optax.Params) -> Any:
    """Make masks that keep all weights, for the leaves that people usually prune: the kernels.

    A kernel is a floating-point leaf with at least two axes. The last key of its path must not contain the
    words bias, scale or embedding.

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

    def mask(named: NamedLeaf):
        if is_absent(named.leaf) or not _is_kernel(named):
            return None
        return jnp.ones(named.leaf.shape, bool, device=named_sharding(named.leaf))

    structure = jax.tree.structure(params, is_leaf=is_absent)
    masks = jax.tree.unflatten(structure, [mask(named) for named in named_leaves(params, is_absent)])
    if not jax.tree.leaves(masks):
        names = ", ".join(leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)[:10])
        raise ValueError(
            "params must have a kernel: a floating-point leaf with at least two axes that is not named as "
            f"a bias, scale or embedding; got {names or 'no leaf'}. Pass masks of your own: a tree like "
            "the parameters, with jnp.ones(leaf.shape, bool) at leaves to prune and None elsewhere."
        )
    return masks


def _is_kernel(named: NamedLeaf) -> bool:
    words = re.split(r"[^a-z]+", named.names[-1].lower()) if named.names else []
    is_floating = jnp.issubdtype(getattr(named.leaf, "dtype", bool), jnp.floating)
    return is_floating and named.leaf.ndim >= 2 and _NOT_KERNELS.isdisjoint(words)


def check_masks(params: optax.Params, masks: Any) -> Any:
    """The masks as bool arrays, None where a leaf takes no part; raises if they do not fit `params`.

    The values of traced masks are not checked. Where `params` have no leaf, the mask becomes None.
    """
    check_structure(
        "masks",
        masks,
        params,
        "the parameters, with None at leaves that take no part",
        "Make them with jax.tree.map over the parameters, or with kernel_masks(params).",
        is_leaf=is_absent,
    )
    masks = as_masks(masks)

    def checked(path, mask, param):
        if is_absent(mask) or is_absent(param):
            return None
        if mask.shape != jnp.shape(param):
            raise ValueError(
                f"masks must have the shapes of the parameters, but {leaf_name(path)} is {mask.shape} "
                f"for {jnp.shape(param)}. Make new ones, e.g. with kernel_masks(params)."
            )
        return mask

    return jax.tree_util.tree_map_with_path(checked, masks, params, is_leaf=is_absent)


def as_masks(masks: Any) -> Any:
    """The masks as bool arrays, None where a leaf takes no part; raises for anything else."""
    masks = jax.tree_util.tree_map_with_path(_as_bool, masks, is_leaf=is_absent)
    if not jax.tree.leaves(masks):
        raise ValueError(
            "masks must have an array at one leaf at least, got None everywhere. Make them with "
            "kernel_masks(params)."
        )
    return masks


def _as_bool(path, mask):
    """One mask as a bool array."""
    if is_absent(mask):
        return None
    dtype = getattr(mask, "dtype", None)
    if dtype is None or not (jnp.issubdtype(dtype, jnp.bool_) or jnp.issubdtype(dtype, jnp.number)):
        raise TypeError(
            f"masks must be arrays of bools, or of 0 and 1, but {leaf_name(path)} is "
            f"{dtype or type(mask).__name__}. Pass an array, or None where a leaf takes no part."
        )
    mask = jnp.asarray(mask)
    if mask.dtype == bool:
        return mask
    is_one, other = mask == 1, (mask != 0) & (mask != 1)
    if not isinstance(other, Tracer) and other.any():
        raise ValueError(
            f"masks must have no values but 0 (pruned) and 1 (kept), but {leaf_name(path)} has "
            f"{mask[other][0]}. Pass a comparison, e.g. mask > 0.5."
        )
    return is_one


def apply_masks(params: optax.Params, masks: Any) -> Any:
    """Set pruned entries to zero.

    Args:
      params: arrays; also gradients or other trees like the parameters.
      masks: a tree like `params`, bool arrays or arrays of 0 and 1: True where an entry is kept. None at
        leaves that take no part.

    Returns:
      A tree like `params`, zero where it is pruned, even if a NaN was there.

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
    """The array with zeros where it is pruned, or unchanged without a mask.

    The array may have more axes than the mask, in front of those of the mask.
    """
    # Not a product: 0 times NaN is NaN.
    return x if is_absent(mask) else jnp.where(mask, x, jnp.zeros((), jnp.asarray(x).dtype))


def placed(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array, moved to where `like` lies on a mesh."""
    sharding = named_sharding(like)
    return x if sharding is None else jax.device_put(x, sharding)
