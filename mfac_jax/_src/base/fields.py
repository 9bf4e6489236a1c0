"""A part of a state beside what `init` would make it: its nodes, shapes and dtypes."""

from typing import Any

import jax

CURE = "Restore a checkpoint into tx.init(params), with its shapes and dtypes, or call init again."


def shape_of(x: Any) -> tuple[int, ...]:
    """Of an array; () for anything else."""
    return tuple(getattr(x, "shape", ()))


def dtype_of(x: Any) -> Any:
    """None for what is no array; variables of nnx have that of theirs."""
    return getattr(x, "dtype", None)


def _is_array(x: Any) -> bool:
    return dtype_of(x) is not None


def check_field(name: str, found: Any, expected: Any, arrays: bool = True) -> None:
    """Raise for another structure, shape or dtype, by the name of the first leaf that differs.

    Without `arrays`, any arrays at the same places will do.
    """
    trees = (found, expected)
    leaves, wanted = (dict(jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)) for tree in trees)
    for path, want in wanted.items():
        x = leaves.get(path)
        if x is None or (arrays and (shape_of(x), dtype_of(x)) != (want.shape, want.dtype)):
            place = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{place} must be {_spelled(want)}, got {_spelled(x)}. {CURE}")
    extra = [path for path in leaves if path not in wanted]
    if extra:
        place = jax.tree_util.keystr(extra[0])
        raise ValueError(f"{name} must have no leaf {place}, got {_spelled(leaves[extra[0]])}. {CURE}")
    structure, wanted = (jax.tree.structure(tree, is_leaf=_is_array) for tree in trees)
    if structure != wanted:
        raise ValueError(f"{name} must be {wanted}, got {structure}. {CURE}")


def _spelled(x: Any) -> str:
    """A leaf for a message."""
    if x is None:
        return "nothing there"
    return type(x).__name__ if dtype_of(x) is None else f"{dtype_of(x)} of shape {shape_of(x)}"
