"""Trees of parameters: what leaves are called, and checks that trees are what they should be."""

import collections
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

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
            "and nnx.split(model, nnx.Param, ...) do, and pass the rest. Or convert it: a complex array "
            "into two real ones, a Python number with jnp.asarray."
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


def check_shapes(name: str, tree: optax.Updates, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise for a leaf with another shape than that of the gradients in the window."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for (path, leaf), shape in zip(leaves, shapes, strict=True):
        if leaf.shape != shape:
            raise ValueError(
                f"{name} must have the shapes of the parameters given to init, but {leaf_name(path)} is "
                f"{leaf.shape} and was {shape}. Call init again with the new parameters."
            )


def leaf_name(path) -> str:
    """What messages call the leaf at a key path."""
    return f"leaf {jax.tree_util.keystr(path) or '()'}"


def is_function(x: Any) -> bool:
    """Whether it is callable, and no tree of arrays that happens to have a `__call__`, as modules do."""
    if isinstance(x, jax.tree_util.Partial) or not callable(x):
        return callable(x)
    return not any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(x))


class NamedLeaf(NamedTuple):
    """A leaf, and what it is called.

    Attributes:
      path: its keys, as JAX has them.
      names: its keys as text, without the one that a variable of nnx or a box of linen adds.
      leaf: itself.
    """

    path: tuple[Any, ...]
    names: tuple[str, ...]
    leaf: Any


def named_leaves(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[NamedLeaf]:
    """All leaves, in the order of `jax.tree.leaves`."""
    return list(_walk(tree, (), (), is_leaf))


def _walk(node: Any, path, names: tuple[str, ...], is_leaf) -> Iterator[NamedLeaf]:
    children = jax.tree_util.tree_leaves_with_path(node, is_leaf=lambda x: x is not node)
    if (is_leaf and is_leaf(node)) or (children and not children[0][0]):
        yield NamedLeaf(path, names, node)
        return
    for keys, child in children:
        # A path that is this key alone keeps it: else the leaf would have no name.
        is_boxed = path and len(children) == 1 and keys == _KEY_IN_BOX and _is_box(node)
        drops = is_boxed and jax.tree_util.all_leaves([child], is_leaf=is_leaf)
        own = () if drops else tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        yield from _walk(child, (*path, *keys), (*names, *own), is_leaf)


_KEY_IN_BOX = (jax.tree_util.GetAttrKey("value"),)


def _is_box(node: Any) -> bool:
    """Whether it is a variable of nnx, or what linen puts around a parameter with names of axes."""
    return any(
        base.__module__.partition(".")[0] == "flax"
        and base.__name__ in ("Variable", "VariableState", "AxisMetadata")
        for base in type(node).__mro__
    )


def unique_paths(leaves: Sequence[NamedLeaf]) -> list[str]:
    """A path for each leaf, as in 'dense/kernel'; where two would have the same, as JAX writes it."""
    full = [jax.tree_util.keystr(leaf.path) for leaf in leaves]
    joined = ["/".join(leaf.names) for leaf in leaves]
    counts = collections.Counter([*joined, *{x for x, y in zip(full, joined, strict=True) if x != y}])
    names = [
        short if counts[short] == 1 and (short or not leaf.path) else long
        for leaf, short, long in zip(leaves, joined, full, strict=True)
    ]
    twice = [name for name, count in collections.Counter(names).items() if count > 1]
    if twice:
        raise ValueError(
            f"params must have a path for each leaf, but {twice[0]} is that of two. Register the node with "
            "functions that give each child a key of its own."
        )
    return names


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def paths_and_leaves(tree: optax.Params) -> dict[str, Any]:
    """Leaves by their paths, as in 'dense/kernel', but for those that optax.masked has hidden."""
    leaves = named_leaves(tree, _is_masked)  # what is hidden changes no name of the others
    named = zip(unique_paths(leaves), leaves, strict=True)
    return {path: leaf.leaf for path, leaf in named if not _is_masked(leaf.leaf)}


def path_finder(tree: optax.Params) -> Callable[[str], str | None]:
    """What a path of the whole tree is called in this one, of which optax.masked may have hidden parts.

    The function returns None for a path that is hidden, and a path that it does not know as it is.
    """
    leaves = named_leaves(tree, _is_masked)
    paths = unique_paths(leaves)
    full = {jax.tree_util.keystr(leaf.path): path for leaf, path in zip(leaves, paths, strict=True)}
    hidden = [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if _is_masked(leaf.leaf)]
    shown = {*paths} - {path for path, _ in hidden}

    def is_hidden(path: str) -> bool:
        return any(
            f"{path}/".startswith(f"{other}/")
            or re.match(rf"{re.escape(jax.tree_util.keystr(leaf.path))}([\[.<]|$)", path)
            for other, leaf in hidden
        )

    def found(path: str) -> str | None:
        here = path if path in shown else full.get(path, path)
        return None if here not in shown and is_hidden(here) else here

    return found
