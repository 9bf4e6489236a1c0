"""Checks of what `scale_by_cgfac` is given as curvature, all made before anything is traced."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import optax

from mfac_jax._src.base import trees
from mfac_jax._src.cgfac.layers import Factors, LayerFactors
from mfac_jax._src.cgfac.operators import Operator


def check_curvature(curvature: Any, preconditioner: Any, num_batches: int) -> None:
    """Refuse what is no curvature, and what is not for its kind."""
    if curvature is None:
        raise ValueError(
            "curvature must be given, as in tx.update(grads, state, params, curvature=factors), got None. "
            "mfac_jax.value_and_grad_with_factors(loss) makes the factors beside the gradient."
        )
    is_function = callable(curvature) and not isinstance(curvature, Mapping)
    if not is_function:
        check_factors("curvature", curvature)
    if preconditioner is not None and not (is_function and callable(preconditioner)):
        raise ValueError(
            "preconditioner must be a function, for a curvature that is a function too, got "
            f"{type(preconditioner).__name__} for a curvature that is a {type(curvature).__name__}."
        )
    if num_batches > 1 and is_function:
        raise ValueError(
            f"num_batches must be 1 for a curvature that is a function, got {num_batches}. The function "
            "may be that of several batches."
        )


def check_factors(name: str, factors: Any) -> None:
    """Refuse what is no dict of factors."""
    is_mapping = isinstance(factors, Mapping)
    if not is_mapping or not all(isinstance(of_layer, LayerFactors) for of_layer in factors.values()):
        allowed = ", or a function" if name == "curvature" else ", or to their shapes"
        raise TypeError(
            f"{name} must be a dict from paths of kernels to LayerFactors{allowed}, got {factors!r}. "
            "mfac_jax.value_and_grad_with_factors(loss) makes it; jax.eval_shape of that, its shapes."
        )


def check_operator(name: str, operator: Operator, tree: optax.Params) -> None:
    """Refuse a function whose product with the tree is no tree like it."""
    product = jax.eval_shape(operator, tree)
    found, expected = (jax.tree.map(lambda x: x.shape, t) for t in (product, tree))
    if found != expected:
        raise ValueError(
            f"{name} must give a tree like the parameters, of the shapes {expected}, got {found}. Make the "
            "function for the parameters that are updated."
        )


def check_leaves(updates: optax.Updates, made: int) -> None:
    """Refuse updates with another number of leaves than the state was made for."""
    found = len(jax.tree.leaves(updates))
    if found != made:
        raise ValueError(
            f"updates must have the tree of the parameters given to init, got {found} leaves in place of "
            f"{made}. Call init again with the parameters that are trained now."
        )


def of_leaves(factors: Factors, tree: optax.Params) -> dict[str, LayerFactors]:
    """The factors of the leaves that `optax.masked` has not hidden, after a check that they fit."""
    leaves, hidden = trees.paths_and_leaves(tree), trees.masked_paths(tree)

    def is_hidden(path: str | None) -> bool:
        return path is not None and any(f"{path}/".startswith(f"{other}/") for other in hidden)

    seen = {
        kernel: dataclasses.replace(of_layer, bias=None) if is_hidden(of_layer.bias) else of_layer
        for kernel, of_layer in factors.items()
        if not is_hidden(kernel)
    }
    if not seen:
        raise ValueError(
            "curvature must have the factors of a layer, got none of those that are updated: no product of "
            "such a kernel with something that has a batch axis was found in the loss. Make them by hand, "
            "or pass a function such as mfac_jax.gauss_newton makes."
        )
    taken = [path for kernel, of_layer in seen.items() for path in (kernel, of_layer.bias) if path]
    for path in taken:
        if path not in leaves:
            raise ValueError(
                f"curvature must name parameters, but {path!r} is none of {', '.join(map(repr, leaves))}."
            )
        if taken.count(path) > 1:
            raise ValueError(f"curvature must name a parameter once, but {path!r} is in two layers.")
    for kernel, of_layer in seen.items():
        _check_sizes(kernel, of_layer, leaves)
    return seen


def _check_sizes(kernel: str, factors: LayerFactors, leaves: Mapping[str, Any]) -> None:
    """Refuse factors that are not those of the kernel and the bias."""
    a, b, shape = factors.inputs, factors.output_grads, leaves[kernel].shape
    for name, x in (("inputs", a), ("output_grads", b)):
        if x.ndim < 2 or not x.shape[0]:
            raise ValueError(
                f"{name} of {kernel!r} must have an axis of examples before that of their entries, got the "
                f"shape {x.shape}. A batch of one has the shape (1, {x.shape[-1] if x.ndim else 1})."
            )
    sizes = [(math.prod(shape[:k]), math.prod(shape[k:])) for k in range(len(shape) + 1)]
    if (a.shape[-1], b.shape[-1]) not in sizes:
        raise ValueError(
            f"curvature must fit the kernels, but {kernel!r} is {shape}, its leading axes those of the "
            f"inputs, and its factors have {a.shape[-1]} inputs and {b.shape[-1]} outputs."
        )
    if factors.bias is not None and math.prod(leaves[factors.bias].shape) != b.shape[-1]:
        raise ValueError(
            f"curvature must fit the biases, but {factors.bias!r} is {leaves[factors.bias].shape}, and the "
            f"factors of {kernel!r} have {b.shape[-1]} outputs."
        )


def check_window(factors: Factors, window: Factors) -> None:
    """Refuse factors that are not like those that the window was made for."""

    def shapes(of_layer: LayerFactors, batch_axis: int):
        arrays = of_layer.inputs, of_layer.output_grads
        return [(x.shape[0], *x.shape[1 + batch_axis :]) for x in arrays]

    made = {kernel: shapes(of_layer, 1) for kernel, of_layer in window.items()}
    found = {kernel: shapes(of_layer, 0) for kernel, of_layer in factors.items()}
    if found != made:
        raise ValueError(
            f"curvature must have the shapes of the factors given to scale_by_cgfac, {made}, got {found}. "
            "Leave out the last batch of an epoch where it is smaller, or make the transform anew."
        )
