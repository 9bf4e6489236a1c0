"""Which axes of a kernel are its inputs: what groups of a pattern lie along."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

from mfac_jax._src.base.trees import key_names, leaf_name
from mfac_jax._src.pruning.masks import is_absent

InputAxes = Callable[[jax.tree_util.KeyPath], int | Sequence[int] | None]

Shape = tuple[int, ...]


def input_axes(params: optax.Params, masks: Any, given: InputAxes | None) -> list[tuple[int, ...]]:
    """The input axes of each leaf with a mask, in their order; raises where they cannot be told.

    `given` says so for the leaves where it is not None. The rest is read from names and from the bias
    beside a kernel: its axes are the outputs.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_absent)
    shapes = {_place(path): x.shape for path, x in leaves if not is_absent(x)}
    kept = jax.tree.leaves(masks, is_leaf=is_absent)
    taking_part = [path for (path, _), mask in zip(leaves, kept, strict=True) if not is_absent(mask)]
    return [_axes_of_leaf(path, shapes, given) for path in taking_part]


def _place(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
    return tuple(key_names(path))


def _axes_of_leaf(
    path: jax.tree_util.KeyPath, shapes: dict[tuple[str, ...], Shape], given: InputAxes | None
) -> tuple[int, ...]:
    shape, said = shapes[_place(path)], None if given is None else given(path)
    if said is not None:
        return _checked(path, shape, said)
    if len(shape) < 2:
        return tuple(range(len(shape)))
    *module, name = _place(path) or ("",)
    bias = next((shapes[b] for b in ((*module, "bias"), (*module, "b")) if b in shapes), None)
    axes = None
    if name != "weight" or jax.tree_util.GetAttrKey("weight") not in path:  # elsewhere (out, in)
        axes = _by_name(module, shape, shapes) if bias is None else _by_bias(module, shape, bias)
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
    found = tuple(axis + len(shape) if axis < 0 else int(axis) for axis in axes)
    if not found or len(set(found)) < len(found) or not set(found) <= set(range(len(shape))):
        raise ValueError(
            f"input_axes must give different axes of {leaf_name(path)}, {shape}, got {said!r}. Pass e.g. "
            "-2."
        )
    return found


def _by_bias(module: Sequence[str], shape: Shape, bias: Shape) -> tuple[int, ...] | None:
    """The axes between those that stack layers, which the bias has too, and the outputs, its last axes.

    None if the bias does not fit, or fits in two ways.
    """
    found = []
    for stacked in range(len(bias)):
        outputs = len(shape) - (len(bias) - stacked)
        if outputs > stacked and (bias[:stacked], bias[stacked:]) == (shape[:stacked], shape[outputs:]):
            found.append(tuple(range(stacked, outputs)))
    if len(found) != 1:
        return None
    # With one axis of outputs the inputs of a convolution are the last, those before are its window.
    is_window = len(shape) - found[0][-1] == 2 and not _is_attention_output(module)
    return found[0][-1:] if is_window else found[0]


def _by_name(
    module: Sequence[str], shape: Shape, shapes: dict[tuple[str, ...], Shape]
) -> tuple[int, ...] | None:
    """The axes of a kernel without a bias: of two axes the first, else what the module's name tells."""
    n = len(shape)
    if n == 2:
        return (0,)
    names = [name for name in module if not name.isdigit()]
    if not names:
        return None
    siblings = {place[len(module) - 1] for place in shapes if place[: len(module) - 1] == (*module[:-1],)}
    if {"query", "key", "value", "out"} <= siblings:
        if _is_attention_output(module):
            return (n - 3, n - 2)
        return (n - 3,) if module[-1] in {"query", "key", "value"} else None
    return (n - 2,) if "conv" in names[-1].lower() else None


def _is_attention_output(module: Sequence[str]) -> bool:
    return bool(module) and module[-1] == "out"
