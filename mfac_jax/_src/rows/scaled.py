"""Rows of one-byte numbers with a scale for each group of entries.

A group is at most 256 entries along the axes before the last, as many of them as fit, and of a vector
neighbours. With a = max |x| over a group and q the largest number of the dtype (127 for int8),

    scale = a / q,   values = round(x / scale),   x ~ values * scale.

Of rows of gradients, int8 loses 0.7 % (byte text, ResNet-20), one scale for a whole leaf 1.6 %, stochastic
rounding 1.0 %, float8_e4m3fn 2.6 %, float8_e5m2 5.3 %.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax._src.base import numerics
from mfac_jax._src.rows.mesh import with_automatic_axes
from mfac_jax._src.rows.storages import Storage

DTYPES = tuple(map(jnp.dtype, (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)))
_LARGEST_GROUP = 256  # float32 scales take 1.6 % of the values
_SMALLEST_GROUP = 16  # of an axis that only small numbers divide, all is a group
_ROW, _PRODUCTS = slice(1, None), slice(0, 1)  # the axes of rows that results have
_ROWS_AT_A_TIME = 8  # added one by one: XLA for CPU takes 30 times as long for a sum over an axis of rows


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
        decode=lambda row: with_automatic_axes(_decode, row.values)(row),
        dots=_dots_on_mesh,
        combine=lambda c, rows: with_automatic_axes(_combine, rows.values, _ROW)(c, rows),
    )


def _row(dtype: jnp.dtype, leaf: jax.ShapeDtypeStruct) -> ScaledRow:
    of_scales = jnp.float64 if leaf.dtype == jnp.float64 else jnp.float32
    scales = jax.ShapeDtypeStruct(_groups_of(leaf.shape).scales, of_scales)
    return ScaledRow(jax.ShapeDtypeStruct(leaf.shape, dtype), scales)


@jax.jit
def _encode(x: jax.Array, rows: ScaledRow) -> ScaledRow:
    groups, dtype, largest = _groups_of(x.shape), rows.values.dtype, _largest(rows.values.dtype)
    size = jnp.max(jnp.abs(groups.cut(x)), axis=groups.axis + 1, initial=0)
    scales = numerics.narrow(size / largest, rows.scales.dtype).reshape(groups.scales)  # a NaN stays one
    used = groups.over(scales).astype(x.dtype)
    quotients = jnp.where(used > 0, x / jnp.where(used > 0, used, 1), 0)
    if dtype == jnp.int8:
        quotients = jnp.round(quotients)
    values = jnp.clip(quotients, -largest, largest).astype(dtype)
    return ScaledRow(values, scales)


@jax.jit
def _decode(row: ScaledRow) -> jax.Array:
    return row.values.astype(row.scales.dtype) * _groups_of(row.values.shape).over(row.scales)


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
    scales = _groups_of(x.shape).over(rows.scales.astype(dtype))
    products = rows.values.astype(dtype) * scales * x.astype(dtype)[None]
    return jnp.sum(products, axis=tuple(range(1, products.ndim)))


def _dots_in_turn(rows: ScaledRow, x: jax.Array, dtype: Any) -> jax.Array:
    """As `_dots_at_once`, a row at a time: XLA for CPU takes 20 times as long for all at once."""
    groups = _groups_of(x.shape)

    def of_groups(number):
        held, number = lax.optimization_barrier((rows.values, number))
        row = lax.dynamic_index_in_dim(held, number, 0, keepdims=False)
        return jnp.sum(groups.cut(row.astype(dtype) * x.astype(dtype)), axis=groups.axis + 1)

    products = lax.map(of_groups, jnp.arange(len(rows.values)))
    products *= rows.scales.astype(dtype).reshape(products.shape)
    return jnp.sum(products, axis=tuple(range(1, products.ndim)))


@jax.jit
def _combine(coefficients: jax.Array, rows: ScaledRow) -> jax.Array:
    scales = rows.scales.astype(coefficients.dtype)
    scales *= coefficients.reshape(-1, *[1] * (scales.ndim - 1))
    return lax.platform_dependent(scales, rows.values, cpu=_sum_in_turn, default=_sum_at_once)


def _sum_at_once(scales: jax.Array, values: jax.Array) -> jax.Array:
    """The sum over the rows of values times scales."""
    return jnp.sum(values.astype(scales.dtype) * _groups_of(values.shape[1:]).over(scales), axis=0)


def _sum_in_turn(scales: jax.Array, values: jax.Array) -> jax.Array:
    """As `_sum_at_once`, some rows at a time."""
    length = min(len(values), _ROWS_AT_A_TIME)
    groups = _groups_of(values.shape[1:])

    def add(total, held, start, number):
        for row in range(number):
            scale, x = (lax.dynamic_index_in_dim(y, start + row, 0, keepdims=False) for y in held)
            total += groups.over(scale) * x.astype(scale.dtype)
        return total

    def add_some(i, total):
        held, start = lax.optimization_barrier(((scales, values), rest + i * length))
        return add(total, held, start, length)

    rest = len(values) % length
    first = add(jnp.zeros_like(scales, shape=values.shape[1:]), (scales, values), 0, rest)
    return lax.fori_loop(0, len(values) // length, add_some, first)


class _Groups(NamedTuple):
    """How a leaf is cut into groups.

    Attributes:
      shape: of the leaf.
      axis: the one that is cut.
      parts: into how many.
      behind: the first axis behind the groups.
    """

    shape: tuple[int, ...]
    axis: int
    parts: int
    behind: int

    @property
    def scales(self) -> tuple[int, ...]:
        """The shape of the scales, an entry for each group."""
        if self.axis == self.behind:
            return self.shape
        ones = [1] * (self.behind - self.axis - 1)
        return (*self.shape[: self.axis], self.parts, *ones, *self.shape[self.behind :])

    def _cut_shape(self, size: int) -> tuple[int, ...]:
        return (*self.shape[: self.axis], self.parts, size, *self.shape[self.behind :])

    def cut(self, x: jax.Array) -> jax.Array:
        """`x` with the entries of a group as one axis, behind that of the parts."""
        size = math.prod(self.shape[self.axis : self.behind]) // self.parts
        return x.reshape(self._cut_shape(size))

    def over(self, scales: jax.Array) -> jax.Array:
        """Each scale at the entries of its group; an axis of rows in front stays."""
        ahead = scales.shape[: scales.ndim - len(self.shape)]
        size = math.prod(self.shape[self.axis : self.behind]) // self.parts
        apart = scales.reshape(*ahead, *self._cut_shape(1))
        return jnp.broadcast_to(apart, (*ahead, *self._cut_shape(size))).reshape(*ahead, *self.shape)


@functools.cache
def _groups_of(shape: tuple[int, ...]) -> _Groups:
    """The groups of a leaf; of a number, or of nothing, each entry is one."""
    if not shape or 0 in shape:
        return _Groups(shape, len(shape), 1, len(shape))
    behind = max(1, len(shape) - 1)
    axis, part, size = behind, 1, 1
    while axis > 0 and size == math.prod(shape[axis:behind]):  # all of the axes so far
        axis -= 1
        part = max(n for n in range(1, _LARGEST_GROUP // size + 1) if shape[axis] % n == 0)
        size *= part
    if size < _SMALLEST_GROUP:
        part = shape[axis]
    return _Groups(shape, axis, shape[axis] // part, behind)


def _largest(dtype: jnp.dtype) -> float:
    return float(jnp.iinfo(dtype).max if dtype == jnp.int8 else jnp.finfo(dtype).max)
