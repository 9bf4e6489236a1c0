"""What is known of a value of a program that computes a gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax._src.cgfac.terms import CannotFollowError, Place, Sum, Unknown, strides_of


class Known(NamedTuple):
    """A value of the program, and what it was computed from.

    Attributes:
      value: the array.
      has_data: whether anything but parameters and constants went into it.
      has_grad: whether the cotangent of the loss went into it.
      tracked: what the value is as a sum of products; None where nobody asks.
      root: a number of the value. Other shapes or dtypes of it, and its transposes, have the same number.
      strides: for each axis, how far its entries are apart in the value that first had the number; None if
        this is that value.
      spread: an array of fewer entries, and its axes here, if the value repeats it; or None.
    """

    value: Any
    has_data: bool = False
    has_grad: bool = False
    tracked: Sum | Unknown | None = None
    root: int | None = None
    strides: tuple[int, ...] | None = None
    spread: tuple[Any, tuple[int, ...]] | None = None

    @property
    def places(self) -> tuple[Place, ...]:
        strides = strides_of(self.value.shape) if self.strides is None else self.strides
        return tuple(Place(0, stride) for stride in strides)

    @property
    def is_zero(self) -> bool:
        """Whether it is seen to be zero."""
        if self.spread is not None and not self.spread[1]:
            return _is_zero(self.spread[0])
        return _is_zero(self.value) or self.tracked == Sum()


def _is_zero(x: Any) -> bool:
    return not isinstance(x, jax.Array) and jnp.ndim(x) == 0 and bool(x == 0)


def is_data_first(left: Known, right: Known) -> bool:
    """Which factor of a product is which; raise if it is not one of data with a cotangent."""
    data, grad = (left, right) if right.has_grad else (right, left)
    if data.has_grad or not grad.has_grad or not data.has_data:
        raise CannotFollowError(
            "it is multiplied with parameters or constants, not with data (such as in a penalty)"
        )
    return data is left
