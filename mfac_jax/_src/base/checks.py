"""Checks of arguments and trees, all made before anything is traced."""

import math
import operator
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


def static_hint(name: str, value: Any) -> str:
    """What a message adds where a number was expected by nobody: optax.inject_hyperparams makes arrays."""
    is_array = isinstance(value, jax.Array)
    return f" Under optax.inject_hyperparams pass static_args=('{name}',)." if is_array else ""


def check_size(name: str, value: int, example: str) -> int:
    """A Python int from any integer >= 1 that is known before tracing."""
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} is the size of an array and must be a Python int, got {value!r}."
            f"{static_hint(name, value)}"
        )
    return check_count(name, value, example)


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


def check_positive(name: str, value, example: str, *, or_schedule: bool = False) -> None:
    """Raise for anything but a finite number > 0. Of traced values only shape and dtype are known."""
    _check_number(name, value, "a finite number > 0", lambda x: 0 < x < math.inf, example, or_schedule)


def check_limit(name: str, value, example: str) -> None:
    """Raise for anything but a number > 0; infinity is one."""
    _check_number(name, value, "a number > 0, or math.inf", lambda x: x > 0, example)


def check_not_negative(name: str, value, example: str, *, or_schedule: bool = False) -> None:
    """Raise for anything but a finite number >= 0."""
    _check_number(name, value, "a finite number >= 0", lambda x: 0 <= x < math.inf, example, or_schedule)


def check_decay(name: str, value, example: str) -> None:
    """Raise for anything but a number in [0, 1)."""
    _check_number(name, value, "a finite number >= 0 and < 1", lambda x: 0 <= x < 1, example)


def check_step_adaptation(value) -> None:
    """Raise for anything but a schedule or a number in [0, 1]."""
    allowed = "a finite number >= 0 and <= 1"
    _check_number("step_adaptation", value, allowed, lambda x: 0 <= x <= 1, "0.3", or_schedule=True)


def check_density(name: str, value, example: str) -> None:
    """Raise for anything but a number in (0, 1]."""
    _check_number(name, value, "a finite number > 0 and <= 1", lambda x: 0 < x <= 1, example)


def _check_number(
    name: str, value, allowed: str, is_allowed, example: str, or_schedule: bool = False
) -> None:
    if or_schedule:
        if callable(value):
            return
        allowed += ", or a schedule"
    message = f"{name} must be {allowed}, got {value!r}. Pass e.g. {example}."
    dtype = type(value) if isinstance(value, (int, float)) else getattr(value, "dtype", bool)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if not is_real or np.shape(value) != ():
        raise TypeError(message)
    # Whole numbers of Python can be larger than any float.
    is_huge = isinstance(value, int) and abs(value) > sys.float_info.max
    if not isinstance(value, Tracer) and (is_huge or not is_allowed(float(value))):
        raise ValueError(message)


def check_mask(mask: Any) -> None:
    """Raise for anything but a function or a tree of bools.

    A bool alone would be of no use. It is what optax.inject_hyperparams makes of a function, which it takes
    for a schedule: then weight decay would act everywhere, or nowhere.
    """
    leaves = [] if callable(mask) else jax.tree.leaves(mask)
    wrong = [x for x in leaves if mask is x or not isinstance(x, (bool, np.bool_))]
    if wrong:
        raise TypeError(
            "mask must be a tree of bools like the parameters, or a function from them to one, got "
            f"{wrong[0]!r}. Pass e.g. lambda params: jax.tree.map(lambda p: p.ndim > 1, params). Under "
            "optax.inject_hyperparams pass static_args=('mask',)."
        )


def check_bool(name: str, value) -> None:
    """Raise for anything but True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.{static_hint(name, value)}")


def check_choice(name: str, value, allowed: Sequence[str | None], otherwise: str = "", cure="") -> None:
    """Raise for a value that is not one of the names (or None) in `allowed`."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        options = ", ".join(repr(option) for option in allowed)
        cure = cure or static_hint(name, value)
        raise ValueError(f"{name} must be one of {options}{otherwise}, got {value!r}.{cure}")


def check_own_name(argument: str, name: str, taken: Collection[str]) -> None:
    """Raise for a user's component that is called like one of the package: states could not tell them."""
    if name in taken:
        raise ValueError(
            f"{argument} must have a name of its own, got {name!r}, which the package uses. Pass "
            "another name to the component."
        )


def check_component(name: str, value: Any, known: Mapping[str, Any], kind: type) -> Any:
    """The component of a name, or a user's own."""
    if isinstance(value, kind):
        if value not in known.values():
            check_own_name(name, value.name, known)
        return value
    check_choice(name, value, tuple(known), f" or a mfac_jax.components.{kind.__name__}")
    return known[value]


def check_axis_name(axis_name: Any) -> None:
    """Raise for anything but a name or a sequence of names."""
    names = () if axis_name is None else (axis_name,) if isinstance(axis_name, str) else axis_name
    if not isinstance(names, (tuple, list)) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"axis_name must be None, a name or a tuple of names, got {axis_name!r}.")
    if axis_name is not None and (not names or len(set(names)) < len(names)):
        raise ValueError(f"axis_name must hold one name or more, each once, got {axis_name!r}.")
