"""Trees of parameters: what leaves are called, and checks that trees are what they should be."""

from collections.abc import Callable, Sequence
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
            f"{dtype or type(leaf).__name__}. In an optimizer leave it out with optax.masked or "
            "optax.partition; elsewhere split it off before, as eqx.partition(tree, eqx.is_inexact_array) "
            "and nnx.split(model, nnx.Param, ...) do, and pass the rest. Or convert it: a complex array into "
            "two real ones, a Python number with jnp.asarray."
        )


def check_tree(
    name: str,
    tree: optax.Updates,
    like: optax.Params,
    of: str = "the parameters given to init",
    cure: str = "Call init again with the parameters that are trained now.",
) -> None:
    """Raise where the tree has another structure, or a leaf that is no real floating-point array."""
    check_structure(name, tree, like, of, cure)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        _check_floating(name, path, leaf)


def check_structure(
    name: str,
    tree: Any,
    like: Any,
    of: str,
    cure: str,
    is_leaf: Callable[[Any], bool] | None = None,
) -> None:
    """Raise where two trees have different structures; the message names a leaf that only one has."""
    if jax.tree.structure(tree, is_leaf=is_leaf) == jax.tree.structure(like, is_leaf=is_leaf):
        return
    leaves, expected = (dict(jax.tree_util.tree_leaves_with_path(t, is_leaf=is_leaf)) for t in (tree, like))
    differing = [leaf_name(path) for path in [*leaves, *expected] if (path in leaves) != (path in expected)]
    found = f"but {differing[0]} is only in one of the two" if differing else "but its nodes differ"
    raise ValueError(f"{name} must have the tree of {of}, {found}. {cure}")


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


def key_names(path) -> list[str]:
    """The keys of a path as text, without the last one that a variable of nnx or a box of linen adds.

    A path that is this key alone keeps it: else the leaf would have no name.
    """
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def joined_path(path) -> str:
    """A key path as text, as in 'dense/kernel'."""
    return "/".join(key_names(path))


def paths_and_leaves(tree: optax.Params) -> dict[str, Any]:
    """Leaves by their paths, as in 'dense/kernel'."""
    return {joined_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def masked_paths(tree: optax.Params) -> list[str]:
    """The paths that optax.masked has hidden."""

    def is_masked(x) -> bool:
        return isinstance(x, optax.MaskedNode)

    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_masked)
    return [joined_path(path) for path, leaf in leaves if is_masked(leaf)]
