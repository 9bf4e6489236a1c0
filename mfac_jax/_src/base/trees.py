"""Trees of parameters: what leaves are called, and checks that trees are what they should be."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax


def check_params(params: optax.Params) -> None:
    """Raise for parameters that are not real floating-point arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _check_floating("params", path, leaf)


def _check_floating(name: str, path, leaf) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be real floating-point arrays, but {leaf_name(path)} is "
            f"{dtype or type(leaf).__name__}. Leave it out with optax.masked or optax.partition, or "
            "convert it (a complex array into two real ones, a Python number with jnp.asarray)."
        )


def check_tree(
    name: str,
    tree: optax.Updates,
    like: optax.Params,
    of: str = "the parameters given to init",
    cure: str = "Call init again with the parameters that are trained now.",
) -> None:
    """Raise for a tree whose structure is another, or with leaves that are not real floats."""
    leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
    expected = dict(jax.tree_util.tree_leaves_with_path(like))
    if jax.tree.structure(tree) != jax.tree.structure(like):
        differing = [leaf_name(p) for p in [*leaves, *expected] if (p in leaves) != (p in expected)]
        found = f"but {differing[0]} is only in one of the two" if differing else "but its nodes differ"
        raise ValueError(f"{name} must have the tree of {of}, {found}. {cure}")
    for path, leaf in leaves.items():
        _check_floating(name, path, leaf)


def check_shapes(name: str, tree: optax.Updates, window: Sequence[jax.Array]) -> None:
    """Raise for a leaf with another shape than the rows `(m, *shape)` of its leaf of the window."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), rows in zip(leaves, window, strict=True):
        if leaf.shape != rows.shape[1:]:
            raise ValueError(
                f"{name} must have the shapes of the parameters given to init, but {leaf_name(path)} is "
                f"{leaf.shape} and was {rows.shape[1:]}. Call init again with the new parameters."
            )


def leaf_name(path) -> str:
    """What messages call the leaf at a key path."""
    return f"leaf {jax.tree_util.keystr(path) or '()'}"


def paths_and_leaves(tree: optax.Params) -> dict[str, Any]:
    """Leaves by their paths, as in 'dense/kernel'."""
    return {_joined(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def masked_paths(tree: optax.Params) -> list[str]:
    """The paths that optax.masked has hidden."""

    def is_masked(x) -> bool:
        return isinstance(x, optax.MaskedNode)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    return [_joined(path) for path, leaf in leaves if is_masked(leaf)]


def _joined(path) -> str:
    """Without the last entry that a variable of nnx, or a box of linen, adds."""
    entries = path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path
    return jax.tree_util.keystr(entries, simple=True, separator="/")
