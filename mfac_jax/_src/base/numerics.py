"""Dtypes of sums, and numbers that neither overflow nor hide a NaN."""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.core import Tracer


def accumulation_dtype(tree: optax.Params) -> jnp.dtype:
    """float64 where a leaf is float64, else float32: the dtype of every sum over parameters."""
    # Of NumPy's float64 arrays JAX makes float32 ones, unless x64 is enabled.
    is_double = any(jnp.result_type(leaf) == jnp.float64 for leaf in jax.tree.leaves(tree))
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def all_finite(tree: optax.Updates) -> jax.Array:
    """Whether no entry of the tree is NaN or Inf."""
    return jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def bounded(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` as `dtype`, Inf as NaN, and finite entries clipped: 2^34 of their squares can be added up."""
    limit = 2.0 ** (jnp.finfo(dtype).maxexp // 2 - 18)
    # 0 times Inf is NaN. A constant would be one for jax_debug_nans where all is finite.
    return jnp.where(jnp.isfinite(x), jnp.clip(x.astype(dtype), -limit, limit), (x * 0).astype(dtype))


def scaled(u: jax.Array, scale: jax.Array) -> jax.Array:
    """`u` times the scale of the metric, clipped so that it cannot overflow."""
    limit = 2.0 ** (jnp.finfo(u.dtype).maxexp // 2)
    return jnp.clip(u, -limit, limit) * scale


def root(x: jax.Array) -> jax.Array:
    """The square root, with the derivative zero at zero. A NaN stays one."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def square(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The squared norm of `x`."""
    return jnp.sum(jnp.square(x.astype(dtype)))


def narrow(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` as `dtype`, clipped to what it can hold: float16 ends at 65,504."""
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # of NumPy's arrays it may be float64, without x64
    limit = float(jnp.finfo(dtype).max)
    if limit < float(jnp.finfo(x.dtype).max):
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


@jax.custom_jvp
def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, whose derivative does not square y: below 1e-19 that would leave the range of float32."""
    return x / y


@quotient.defjvp
def _(primals, tangents):
    (x, y), (dx, dy) = primals, tangents
    found = quotient(x, y)
    return found, (dx - found * dy) / y


class Parts(NamedTuple):
    """A number, mantissa 2^exponent, that may be larger or smaller than its dtype can hold.

    Attributes:
      mantissa: in [0.5, 1), in the dtype of the computation.
      exponent: int32.
    """

    mantissa: jax.Array
    exponent: jax.Array

    @property
    def number(self) -> jax.Array:
        """The number, or the nearest that the dtype can hold."""
        return within_range(self.mantissa, self.exponent)


def parts(x: float | jax.Array, dtype: jnp.dtype) -> Parts:
    """The parts of a positive number of any size; of a Python number all digits of its exponent count."""
    if not isinstance(x, Tracer):
        mantissa, exponent = math.frexp(float(x))
        return Parts(jnp.asarray(mantissa, dtype), jnp.asarray(exponent, jnp.int32))
    x = x.astype(x.dtype if x.dtype == jnp.float64 else jnp.float32)
    info = jnp.finfo(x.dtype)
    # XLA for CPU takes subnormal numbers for zeros. Their bits count how often they hold the smallest one.
    bits = lax.bitcast_convert_type(x, f"uint{info.bits}")
    is_subnormal = bits < 2**info.nmant
    x = jnp.where(is_subnormal, bits.astype(x.dtype), x)
    exponent = exponent_of(x)
    mantissa = times_power(x, -exponent).astype(dtype)
    return Parts(mantissa, exponent + jnp.where(is_subnormal, info.minexp - info.nmant, 0))


def exponent_of(x: jax.Array) -> jax.Array:
    """The int32 e with 2^(e-1) <= |x| < 2^e; 0 for zero. Subnormal numbers count as zero on CPU."""
    return jnp.frexp(lax.stop_gradient(x))[1].astype(jnp.int32)


def largest_exponent(xs: Sequence[jax.Array]) -> jax.Array:
    """The exponent of the largest entry of all arrays; 0 if all are zero."""
    largest = [jnp.max(jnp.abs(lax.stop_gradient(x)), initial=0) for x in xs]
    return exponent_of(functools.reduce(jnp.maximum, largest))


def exponents_near_one(largest: jax.Array, shift: Parts) -> jax.Array:
    """Exponents that bring rows, or the root of the shift where that is larger, near one."""
    of_shift = (shift.exponent + exponent_of(shift.mantissa) + 1) // 2
    return jnp.where(largest > 0, jnp.maximum(exponent_of(largest), of_shift), of_shift)


def times_power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x 2^exponent without a rounding, where the dtype can hold it; exponents up to twice its range."""
    limit = jnp.finfo(x.dtype).maxexp - 2
    half = jnp.clip(exponent, -2 * limit, 2 * limit) // 2
    rest = jnp.clip(exponent - half, -limit, limit)
    one = jnp.ones((), x.dtype)
    return x * jnp.ldexp(one, half) * jnp.ldexp(one, rest)


@jax.jit  # what overflows on the way is no result, as jax_debug_infs sees it
def within_range(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """x 2^exponent, clipped to the largest number of the dtype; subnormal numbers on CPU too."""
    info = jnp.finfo(x.dtype)
    product = times_power(x, exponent)
    product = jnp.where(jnp.isfinite(x), jnp.clip(product, -float(info.max), float(info.max)), x)
    # XLA for CPU makes subnormal results zero, so they are put together from bits.
    units = jnp.round(times_power(lax.stop_gradient(x), exponent + info.nmant - info.minexp))
    is_subnormal = jnp.abs(units) <= 2**info.nmant
    bits = jnp.where(is_subnormal, jnp.abs(units), 0).astype(f"uint{info.bits}")
    tiny = lax.bitcast_convert_type(bits, x.dtype)
    return jnp.where(is_subnormal, jnp.where(jnp.signbit(x), -tiny, tiny), product)
