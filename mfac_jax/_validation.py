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
    return check_count("num_grads", num_grads, "64")


def check_count(name: str, value: int, example: str) -> int:
    """A Python int from any integer >= 1."""
    message = f"{name} must be an int >= 1, got {value!r}. Pass e.g. {example}."
    try:
        count = operator.index(value)
    except TypeError:
        raise TypeError(message) from None
    if isinstance(value, bool) or count < 1:
        raise ValueError(message)
    return count


def check_positive(name: str, value, example: str) -> None:
    """Refuse what is not a finite number > 0. Of traced values only shape and dtype are known."""
    _check_number(name, value, "a finite number > 0", lambda x: 0 < x < math.inf, example)


def check_not_negative(name: str, value, example: str) -> None:
    """Refuse what is not a finite number >= 0."""
    _check_number(name, value, "a finite number >= 0", lambda x: 0 <= x < math.inf, example)


def check_decay(name: str, value, example: str) -> None:
    """Refuse what is not a number in [0, 1)."""
    _check_number(name, value, "a finite number >= 0 and < 1", lambda x: 0 <= x < 1, example)


def check_share(name: str, value, example: str) -> None:
    """Refuse what is not a number in [0, 1]."""
    _check_number(name, value, "a finite number >= 0 and <= 1", lambda x: 0 <= x <= 1, example)


def is_known_zero(number_or_schedule: optax.ScalarOrSchedule) -> bool:
    """Whether it is a number, and known to be zero before tracing."""
    return (
        not callable(number_or_schedule)
        and not isinstance(number_or_schedule, Tracer)
        and float(number_or_schedule) == 0
    )


def check_power(power) -> None:
    """Refuse what is not a number in (0, 1]."""
    _check_number("power", power, "a finite number > 0 and <= 1", lambda x: 0 < x <= 1, "1.0")


def _check_number(name: str, value, allowed: str, is_allowed, example: str) -> None:
    message = f"{name} must be {allowed}, got {value!r}. Pass e.g. {example}."
    dtype = type(value) if isinstance(value, (int, float)) else getattr(value, "dtype", bool)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not is_real or np.shape(value) != ():
        raise TypeError(message)
    if not isinstance(value, Tracer) and not is_allowed(float(value)):
        raise ValueError(message)


def check_bool(name: str, value) -> None:
    """Refuse what is not True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_choice(name: str, value, allowed: Sequence[str | None], otherwise: str = "") -> None:
    """Refuse a value that is not one of the names (or None) in `allowed`."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {options}{otherwise}, got {value!r}.")


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
    check_like_params(
        name, tree, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), window)
    )


def check_like_params(name: str, tree: optax.Updates, params: optax.Params) -> None:
    """Refuse a tree whose structure or shapes are not those of the parameters given to init."""
    leaves = dict(jax.tree_util.tree_leaves_with_path(tree))
    expected = dict(jax.tree_util.tree_leaves_with_path(params))
    if jax.tree.structure(tree) != jax.tree.structure(params):
        differing = [_leaf_name(p) for p in [*leaves, *expected] if (p in leaves) != (p in expected)]
        found = f"but {differing[0]} is only in one of the two" if differing else "but its nodes differ"
        raise ValueError(
            f"{name} must have the tree of the parameters given to init, {found}. Call init again with the "
            "parameters that are trained now."
        )
    for path, leaf in leaves.items():
        if np.shape(leaf) != expected[path].shape:
            raise ValueError(
                f"{name} must have the shapes of the parameters given to init, but {_leaf_name(path)} is "
                f"{np.shape(leaf)} and was {expected[path].shape}. Call init again with the new parameters."
            )
        _check_floating(name, path, leaf)


def check_sizes(gram: jax.Array, num_blocks: int, num_grads: int) -> None:
    """Refuse a state that was made by a transform with other options."""
    if gram.shape != (num_blocks, num_grads, num_grads):
        raise ValueError(
            f"state must be that of a transform with num_grads={num_grads} and {num_blocks} block(s), got "
            f"num_grads={gram.shape[1]} and {gram.shape[0]} block(s). After changing them call init again."
        )


def _leaf_name(path) -> str:
    return f"leaf {jax.tree_util.keystr(path) or '()'}"
