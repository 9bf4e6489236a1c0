"""Rows of one-byte numbers with a scale for each group of entries.

A group goes along whole axes, one where it is long enough: so each row or column of a matrix has a scale.
With a = max |x| over a group and q the largest number of the dtype (127 for int8),

    scale = a / q,   values = round(x / scale),   x ~ values * scale.

Of rows of gradients, int8 loses 1.2 % (byte text; ResNet-20 0.9 %), with stochastic rounding 1.7 %, with
one scale for a whole leaf 1.6 %; float8_e4m3fn loses 2.6 %, float8_e5m2 5.2 %.
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax._src.base import numerics
from mfac_jax._src.rows import contractions
from mfac_jax._src.rows.manual_axes import whole_shape
from mfac_jax._src.rows.mesh import Split, with_automatic_axes
from mfac_jax._src.rows.storages import Storage

DTYPES = tuple(map(jnp.dtype, (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)))
_SMALLEST_GROUP = 128  # float32 scales take at most 3 % of the values
_ROW, _PRODUCTS = slice(1, None), slice(0, 1)  # the axes of rows that results have


class ScaledRow(NamedTuple):
    """A row of a leaf, or several with an axis in front.

    Attributes:
      values: of the leaf's shape.
      scales: with the leaf's axes, shorter where groups lie.
    """

    values: jax.Array
    scales: jax.Array


@functools.cache  # one object for each dtype: compiled functions take storages as static arguments
def scaled(dtype: jnp.dtype) -> Storage:
    """Rows of the dtype with scales."""
    return Storage(
        name=dtype.name,
        row=functools.partial(_row, dtype),
        encode=lambda x, rows: with_automatic_axes(_encode, rows, _ROW)(x, rows),
        encode_part=_encode_part,
        decode=_decode,
        dots=_dots_on_mesh,
        combine=lambda c, rows: with_automatic_axes(_combine, rows.values, _ROW)(c, rows),
    )


def _row(dtype: jnp.dtype, leaf: jax.ShapeDtypeStruct) -> ScaledRow:
    grouped = grouped_axes(leaf.shape)
    shape = [1 if axis in grouped else length for axis, length in enumerate(leaf.shape)]
    of_scales = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    values: Any = jax.ShapeDtypeStruct(leaf.shape, dtype)
    scales: Any = jax.ShapeDtypeStruct(shape, of_scales)
    return ScaledRow(values, scales)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
@functools.partial(jax.jit, static_argnames="shared")
def _encode(x: jax.Array, rows: ScaledRow, shared: tuple[str, ...] = ()) -> ScaledRow:
    dtype, largest = rows.values.dtype, _largest(rows.values.dtype)
    grouped = _grouped(rows)
    size = jnp.max(jnp.abs(x), axis=grouped, keepdims=True, initial=0)
    size += jnp.sum(0 * x, axis=grouped, keepdims=True)  # XLA for CPU may lose a NaN in a maximum
    size = _largest_of_parts(size, shared) if shared else size
    scales = numerics.narrow(size / largest, rows.scales.dtype)
    used = scales.astype(x.dtype)
    quotients = jnp.where(used > 0, x / jnp.where(used > 0, used, 1), 0)
    if dtype == jnp.int8:
        quotients = jnp.round(quotients)
    return ScaledRow(jnp.clip(quotients, -largest, largest).astype(dtype), scales)


@_encode.defjvp
def _refuse_derivatives(shared: tuple[str, ...], primals: Any, tangents: Any) -> Any:
    """Bytes have no derivative: what is rounded to them would be taken for a constant."""
    del shared, tangents
    raise ValueError(
        "storage must be jnp.float32 where a step is differentiated, got "
        f"{primals[1].values.dtype.name!r}, whose rows of one byte have no derivative. Or cut gradients "
        "off by jax.lax.stop_gradient."
    )


def _largest_of_parts(size: jax.Array, shared: tuple[str, ...]) -> jax.Array:
    """The maximum over the devices; NaN where one has a NaN, which a maximum may lose."""
    found = lax.pmax(jnp.where(jnp.isnan(size), jnp.inf, size), shared)
    return jnp.where(jnp.isinf(found), jnp.nan, found)


def _encode_part(x: jax.Array, rows: ScaledRow, along: Split) -> ScaledRow:
    """As `_encode`, of the part of a leaf that this device has: groups may go on on other devices."""
    grouped = grouped_axes(whole_shape(along, x.shape))
    return _encode(x, rows, tuple(name for axis in grouped for name in along[axis]))


def _decode(row: ScaledRow) -> jax.Array:
    return row.values.astype(row.scales.dtype) * row.scales


def _dots_on_mesh(rows: ScaledRow, x: jax.Array, dtype: Any) -> jax.Array:
    dots = functools.partial(_dots, dtype=dtype)
    return with_automatic_axes(dots, rows.values, _PRODUCTS)(rows, x)


@functools.partial(jax.jit, static_argnames="dtype")  # a bare loop would be compiled at every call
def _dots(rows: ScaledRow, x: jax.Array, dtype: Any) -> jax.Array:
    default = functools.partial(_dots_at_once, dtype=dtype)
    return lax.platform_dependent(
        rows, x, cpu=functools.partial(_dots_in_turn, dtype=dtype), default=default
    )


def _dots_at_once(rows: ScaledRow, x: jax.Array, dtype: Any) -> jax.Array:
    products = rows.values.astype(dtype) * rows.scales.astype(dtype) * x.astype(dtype)[None]
    return jnp.sum(products, axis=tuple(range(1, products.ndim)))


def _dots_in_turn(rows: ScaledRow, x: jax.Array, dtype: Any) -> jax.Array:
    """As `_dots_at_once`, a row at a time: XLA for CPU takes 20 times as long for all at once."""
    sums = contractions.sums_in_turn(rows.values, x, dtype, _grouped(rows))
    products = sums.reshape(rows.scales.shape) * rows.scales.astype(dtype)
    return jnp.sum(products, axis=tuple(range(1, products.ndim)))


@jax.jit
def _combine(coefficients: jax.Array, rows: ScaledRow) -> jax.Array:
    scales = rows.scales.astype(coefficients.dtype)
    scales *= coefficients.reshape(-1, *[1] * (scales.ndim - 1))
    return lax.platform_dependent(
        scales, rows.values, cpu=contractions.combine_in_turn, default=_sum_at_once
    )


def _sum_at_once(scales: jax.Array, values: jax.Array) -> jax.Array:
    """The sum over the rows of values times scales."""
    return jnp.sum(values.astype(scales.dtype) * scales, axis=0)


def _grouped(rows: ScaledRow) -> tuple[int, ...]:
    """The axes of the leaf that a group goes along, which on a device may be parts of longer ones."""
    return tuple(axis for axis, length in enumerate(rows.scales.shape[1:]) if length == 1)


@functools.cache
def grouped_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes that a group goes along: as few as make it 128 entries long, with the fewest entries.

    All, where the leaf is no larger. Axes stay whole: cut ones would have to be exchanged on a mesh, and
    XLA for TPU would write their scales out, one for each entry.
    """
    numbers = range(1, len(shape))
    sets = [axes for number in numbers for axes in itertools.combinations(range(len(shape)), number)]
    sizes = {axes: math.prod(shape[axis] for axis in axes) for axes in sets}
    long = [axes for axes in sets if sizes[axes] >= _SMALLEST_GROUP]
    return min(long, key=lambda axes: (len(axes), sizes[axes]), default=tuple(range(len(shape))))


def _largest(dtype: jnp.dtype) -> float:
    return float(jnp.iinfo(dtype).max if dtype == jnp.int8 else jnp.finfo(dtype).max)
