"""Which axes of a kernel are its inputs: what groups of a pattern lie along."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from mfac_jax._src.base.trees import NamedLeaf, leaf_name, named_leaves
from mfac_jax._src.pruning.masks import is_absent

InputAxes = Callable[[jax.tree_util.KeyPath], int | Sequence[int] | None]

Shape = tuple[int, ...]
_BIAS_OF = {"kernel": "bias", "weight": "bias", "w": "b"}


def input_axes(params: optax.Params, masks: Any, given: InputAxes | None) -> list[tuple[int, ...]]:
    """The input axes of each leaf with a mask, in their order; raises where they cannot be told.

    `given` says so for the leaves where it is not None. The rest is read from names and from the bias
    beside a kernel: its axes are the outputs.
    """
    leaves = named_leaves(params, is_absent)
    shapes = {leaf.names: leaf.leaf.shape for leaf in leaves if not is_absent(leaf.leaf)}
    kept = jax.tree.leaves(masks, is_leaf=is_absent)
    taking_part = [leaf for leaf, mask in zip(leaves, kept, strict=True) if not is_absent(mask)]
    return [_axes_of_leaf(leaf, shapes, given) for leaf in taking_part]


def _axes_of_leaf(
    leaf: NamedLeaf, shapes: dict[tuple[str, ...], Shape], given: InputAxes | None
) -> tuple[int, ...]:
    path, shape = leaf.path, leaf.leaf.shape
    said = None if given is None else given(path)
    if said is not None:
        return _checked(path, shape, said)
    if len(shape) < 2:
        return tuple(range(len(shape)))
    *module, name = leaf.names or ("",)
    bias = shapes.get((*module, _BIAS_OF.get(name, "")))
    axes = None
    if name != "weight" or jax.tree_util.GetAttrKey("weight") not in path:  # elsewhere (out, in)
        by_module = _in_attention(module, name, shapes)
        axes = by_module or _by_name(module, shape) if bias is None else _by_bias(shape, bias, by_module)
    if axes is None:
        raise ValueError(
            f"input_axes must say which axes of {leaf_name(path)}, {shape}, are inputs, since names and "
            "biases do not tell. Pass a function from a key path to axes, e.g. lambda path: -2 for kernels "
            "(in, out) and of convolutions, 0 for (in, heads, d), (0, 1) for (heads, d, out); or masks "
            "with None there."
        )
    return axes


def _checked(path: jax.tree_util.KeyPath, shape: Shape, said: int | Sequence[int]) -> tuple[int, ...]:
    """What the user says, as axes from 0 on."""
    axes = (said,) if isinstance(said, (int, np.integer)) else tuple(said)
    known = [int(axis) for axis in axes if isinstance(axis, (int, np.integer))]
    found = tuple(axis + len(shape) if axis < 0 else axis for axis in known)
    if (
        not found
        or len(found) < len(axes)
        or len(set(found)) < len(found)
        or not set(found) <= set(range(len(shape)))
    ):
        raise ValueError(
            f"input_axes must give different axes of {leaf_name(path)}, {shape}, got {said!r}. Pass e.g. "
            "-2."
        )
    return found


def _by_bias(shape: Shape, bias: Shape, by_module: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """The axes between those that stack layers, which the bias has too, and the outputs, its last axes.

    None if the bias does not fit, or fits in two ways of which the module tells none.
    """
    found = []
    for stacked in range(len(bias)):
        outputs = len(shape) - (len(bias) - stacked)
        if outputs > stacked and (bias[:stacked], bias[stacked:]) == (shape[:stacked], shape[outputs:]):
            found.append(tuple(range(stacked, outputs)))
    if by_module in found:
        return by_module
    if len(found) != 1:
        return None
    # With one axis of outputs the inputs of a convolution are the last, those before are its window.
    return found[0][-1:] if found[0][-1] == len(shape) - 2 else found[0]


def _in_attention(
    module: Sequence[str], name: str, shapes: dict[tuple[str, ...], Shape]
) -> tuple[int, ...] | None:
    """The axes in an attention of linen or nnx: of (in, heads, d), or of (heads, d, out) in `out`.

    None elsewhere, and where the kernels may be stacked ones of two axes.
    """
    query, out = (shapes.get((*module[:-1], other, name), ()) for other in ("query", "out"))
    n = len(query)
    if n < 3 or query[-2:] != out[-3:-1] or query[-3] == out[-3]:
        return None
    inputs = {"out": (n - 3, n - 2), "query": (n - 3,), "key": (n - 3,), "value": (n - 3,)}
    return inputs.get(module[-1]) if module else None


def _by_name(module: Sequence[str], shape: Shape) -> tuple[int, ...] | None:
    """The axes of a kernel without a bias: of two axes the first, of a convolution the last but one."""
    if len(shape) == 2:
        return (0,)
    name = next((name.lower() for name in reversed(module) if not name.isdigit()), "")
    return (len(shape) - 2,) if "conv" in name and "transpose" not in name else None
