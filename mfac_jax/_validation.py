"""Checks of arguments and trees, all made before anything is traced."""

import math
import operator
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer


def check_num_grads(num_grads: int) -> int:
    """A Python int from any integer >= 1 that is known before tracing."""
    if isinstance(num_grads, jax.Array):
        raise TypeError(
            f"num_grads is the size of the window and must be a Python int, got {num_grads!r}. Under "
            "optax.inject_hyperparams pass static_args=('num_grads',)."
        )
    try:
        size = operator.index(num_grads)
    except TypeError:
        raise TypeError(f"num_grads must be an int >= 1, got {num_grads!r}. Pass e.g. 64.") from None
    if isinstance(num_grads, bool) or size < 1:
        raise ValueError(f"num_grads must be an int >= 1, got {num_grads!r}. Pass e.g. 64.")
    return size


def check_scalar(
    name: str, value, lower: float, upper: float = math.inf, *, includes_lower: bool = False
) -> None:
    """Refuse a number outside (lower, upper), or [lower, upper); let traced values pass."""
    if isinstance(value, Tracer):
        return
    allowed = f"a finite number {'>=' if includes_lower else '>'} {lower:g}"
    allowed += f" and < {upper:g}" if upper < math.inf else ""
    if isinstance(value, bool) or np.ndim(value) != 0 or not _is_real(value):
        raise TypeError(f"{name} must be {allowed}, got {value!r}.")
    number = float(value)
    above = number >= lower if includes_lower else number > lower
    if not (above and number < upper):  # NaN fails both
        raise ValueError(f"{name} must be {allowed}, got {value!r}.")


def _is_real(value) -> bool:
    return jnp.issubdtype(jnp.result_type(value), jnp.floating) or jnp.issubdtype(
        jnp.result_type(value), jnp.integer
    )


def check_choice(name: str, value, allowed: Sequence) -> None:
    if value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}, got {value!r}.")


def check_params(params: optax.Params) -> None:
    """Refuse parameters that are not real floating-point arrays."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        _check_floating("params", path, leaf)


def _check_floating(name: str, path, leaf) -> None:
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must be real floating-point arrays, but {_leaf_name(path)} is "
            f"{dtype or type(leaf).__name__}. Leave it out with optax.masked or optax.partition, or "
            "convert it (a complex array into two real ones, a Python number with jnp.asarray)."
        )


def check_like_window(name: str, tree: optax.Updates, window: optax.Params) -> None:
    """Refuse a tree whose structure or shapes are not those the window was made for."""
    structure, expected = jax.tree.structure(tree), jax.tree.structure(window)
    if structure != expected:
        raise ValueError(
            f"{name} must have the tree of the parameters given to init, {expected}, got {structure}. "
            "Call init again with the parameters that are trained now."
        )
    rows = jax.tree.leaves(window)
    for (path, leaf), row in zip(jax.tree_util.tree_leaves_with_path(tree), rows, strict=True):
        if jnp.shape(leaf) != row.shape[1:]:
            raise ValueError(
                f"{name} must have the shapes of the parameters given to init, but {_leaf_name(path)} is "
                f"{jnp.shape(leaf)} and was {row.shape[1:]}. Call init again with the new parameters."
            )
        _check_floating(name, path, leaf)


def _leaf_name(path) -> str:
    return f"leaf {jax.tree_util.keystr(path) or '()'}"
