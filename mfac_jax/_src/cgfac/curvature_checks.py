"""Checks of the curvature that `scale_by_cgfac` is given."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import trees
from mfac_jax._src.cgfac.layers import Factors, LayerFactors


def check_curvature(curvature: Any, preconditioner: Any, num_batches: int) -> None:
    """Raise for a curvature of another kind, and for arguments that its kind does not take."""
    if curvature is None:
        raise ValueError(
            "curvature must be given, as in tx.update(grads, state, params, curvature=factors), got None. "
            "mfac_jax.value_and_grad_with_factors(loss) returns the factors with the gradient."
        )
    is_function = trees.is_function(curvature) and not isinstance(curvature, Mapping)
    if not is_function:
        check_factors("curvature", curvature)
    if preconditioner is not None and not (is_function and trees.is_function(preconditioner)):
        raise ValueError(
            "preconditioner must be a function, and needs a curvature that is a function, got "
            f"{type(preconditioner).__name__} for a curvature that is a {type(curvature).__name__}. Leave "
            "it out, or pass a function such as mfac_jax.gauss_newton returns as curvature."
        )
    if num_batches > 1 and is_function:
        raise ValueError(
            f"num_batches must be 1 if the curvature is a function, got {num_batches}. Make the function "
            "that of several batches instead."
        )


def check_factors(name: str, factors: Any) -> None:
    """Raise for anything but a dict of factors."""
    is_mapping = isinstance(factors, Mapping)
    if not is_mapping or not all(isinstance(of_layer, LayerFactors) for of_layer in factors.values()):
        allowed = ", or a function" if name == "curvature" else ", or to their shapes"
        raise TypeError(
            f"{name} must be a dict from paths of kernels to LayerFactors{allowed}, got "
            f"{_described(factors)}. mfac_jax.value_and_grad_with_factors(loss) returns it; jax.eval_shape "
            "of that, its shapes."
        )


def _described(factors: Any) -> str:
    """What a message says of something that is not a dict of factors."""
    if isinstance(factors, Mapping):
        kinds = {path: type(x).__name__ for path, x in factors.items()}
        return f"a dict to {kinds}"
    if callable(factors):
        return f"a tree of arrays, {type(factors).__name__} (if it multiplies, pass lambda v: operator(v))"
    return f"a {type(factors).__name__}"


def check_product(name: str, product: Any, like: optax.Updates) -> None:
    """Raise for a product that is no tree like the updates."""
    found, expected = (jax.tree.map(jnp.shape, tree) for tree in (product, like))
    if found != expected:
        raise ValueError(
            f"{name} must return a tree like the parameters, of the shapes {expected}, got {found}. Make "
            "the function for the parameters that are updated."
        )


def shown_factors(factors: Factors, tree: optax.Params) -> dict[str, LayerFactors]:
    """The factors of the leaves that `optax.masked` has not hidden; raise if they do not fit the tree.

    Paths are those that the leaves have in this tree.
    """
    leaves, found = trees.paths_and_leaves(tree), trees.path_finder(tree)
    shown = [
        (path, dataclasses.replace(of_layer, bias=of_layer.bias and found(of_layer.bias)))
        for kernel, of_layer in factors.items()
        if (path := found(kernel)) is not None
    ]
    if not shown:
        raise ValueError(
            "curvature must have the factors of a layer that is updated, got none. The loss multiplies no "
            "such kernel with something that has a batch axis. Make LayerFactors by hand, or pass a "
            "function such as mfac_jax.gauss_newton returns."
        )
    taken = [path for kernel, of_layer in shown for path in (kernel, of_layer.bias) if path is not None]
    for path in taken:
        if path not in leaves:
            raise ValueError(
                f"curvature must name parameters, but {path!r} is none of {', '.join(map(repr, leaves))}. "
                "Make the factors with the parameters that are updated."
            )
        if taken.count(path) > 1:
            raise ValueError(
                f"curvature must name a parameter once, but {path!r} is in two layers. Leave one out."
            )
    for kernel, of_layer in shown:
        _check_arrays(kernel, of_layer)
        _check_layout(kernel, of_layer, leaves[kernel].shape)
        _check_sizes(kernel, of_layer, leaves)
    return dict(shown)


def _check_arrays(kernel: str, factors: LayerFactors) -> None:
    """Raise for arrays that are no rows of examples."""
    stack = int(factors.is_stacked)
    for name, x in zip(("inputs", "output_grads"), factors.arrays, strict=True):
        if not jnp.issubdtype(getattr(x, "dtype", bool), jnp.floating):
            raise TypeError(
                f"{name} of {kernel!r} must be a floating-point array, got {getattr(x, 'dtype', x)!r}. "
                "Pass what value_and_grad_with_factors returned, or e.g. jnp.asarray(rows, jnp.float32)."
            )
        if x.ndim < 2 + stack or not x.shape[stack]:
            of_one = (*x.shape[:stack], 1, x.shape[-1] if x.ndim else 1)
            raise ValueError(
                f"{name} of {kernel!r} must have a {('first', 'second')[stack]} axis of one or more "
                f"examples, got the shape {x.shape}. A batch of one has the shape {of_one}."
            )


def _check_layout(kernel: str, factors: LayerFactors, shape: tuple[int, ...]) -> None:
    """Raise for a layout that is not one of this kernel, and for an unknown side of the bias."""
    if factors.bias_side not in ("inputs", "outputs"):
        raise ValueError(
            f"bias_side of {kernel!r} must be 'inputs' or 'outputs', got {factors.bias_side!r}. It is "
            "'outputs' for a bias that is added to x @ kernel."
        )
    layout = factors.layout
    if layout is None:
        return
    axes = sorted((*layout.stack, *layout.inputs, *layout.outputs))
    if math.prod(layout.shape) != math.prod(shape) or axes != list(range(len(layout.shape))):
        raise ValueError(
            f"layout of {kernel!r} must have a shape of the kernel's size, and each axis of it once, got "
            f"{layout} for {shape}. Leave it out if the kernel's first axes are those of the inputs."
        )


def _check_sizes(kernel: str, factors: LayerFactors, leaves: Mapping[str, Any]) -> None:
    """Raise for factors that do not have the sizes of the kernel and the bias."""
    a, b, shape, layout = factors.inputs, factors.output_grads, leaves[kernel].shape, factors.layout
    found: tuple[int, ...] = (a.shape[-1], b.shape[-1])
    if layout is None:
        sizes = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(len(shape) + 1)]
    else:
        groups = (layout.inputs, layout.outputs, *([layout.stack] * 2 if layout.stack else ()))
        sizes = [tuple(math.prod(layout.shape[axis] for axis in group) for group in groups)]
        found += (a.shape[0], b.shape[0]) if layout.stack else ()
    if found not in sizes:
        raise ValueError(
            f"curvature must fit the kernels, but the factors of {kernel!r} have {a.shape[-1]} inputs and "
            f"{b.shape[-1]} outputs, and the kernel is {shape}. Its first axes must be those of the inputs."
        )
    if factors.bias is None:
        return
    side = factors.bias_side
    stack, size = found[2:3], found[side == "outputs"]
    if math.prod(leaves[factors.bias].shape) != math.prod(stack) * size:
        raise ValueError(
            f"curvature must fit the biases, but the factors of {kernel!r} have {size} {side}, and "
            f"{factors.bias!r} is {leaves[factors.bias].shape}. Name another bias, or None."
        )
