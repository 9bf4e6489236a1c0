"""Contractions of rows `(m, *shape)` with a leaf `(*shape)`, or with each other.

Only this file knows precision and how sums are split. Contractions ask for full precision: the TF32 and
bfloat16 products that are the default on GPU and TPU would cost the Gram matrix its digits.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax._src.rows import mesh as _mesh

# On CPU a matrix-vector product adds each row up in one running sum per lane. So its relative error grows
# with the columns (same signs, float32): 1e-6 at 2^16, 5e-6 at 272k, 1e-5 at 2^19, 7e-4 at 10 M.
# Multiply-and-sum adds partial sums (1e-6 at 10 M), and takes 1.1 to 4 times as long. A product of two
# matrices does too; with rows in 4 parts it takes 1.1 to 1.5 times as long.
_MAX_DOT_COLUMNS = 300_000
_PARTS = (4, 3, 2)  # the fastest first: 4.4 M columns in 94, 94, 109 ms; multiply-and-sum 130 to 190
_GRAM_COLUMNS = 2**11  # of a product of matrices on CPU: a chunk of 256 rows is 2 MiB and stays in cache
_ROWS_AT_A_TIME = 8  # added one by one: XLA for CPU takes 30 times as long for a sum over an axis of rows


@functools.partial(jax.jit, static_argnames="dtype")
def dots(rows: jax.Array, x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`(m,)` inner products of the rows `(m, *shape)` of a window leaf with `x` `(*shape)`."""
    axes = tuple(range(1, rows.ndim))

    def contracted(rows, x):
        contracted_axes = (axes, tuple(axis - 1 for axis in axes))
        return _dot_general(rows.astype(dtype), x.astype(dtype), contracted_axes, PartitionSpec(None))

    def summed(rows, x):
        return jnp.sum(rows.astype(dtype) * x.astype(dtype)[None], axis=axes)

    # A program may be compiled for a mesh that is not here.
    alone = jax.device_count() == 1 and _mesh.explicit_sharding(rows) is None
    is_long = x.size > _MAX_DOT_COLUMNS
    default = summed if is_long else contracted
    # Where there are several devices rows may be sharded. To make them parts would gather them, and a loop
    # over them would exchange their products one by one.
    parts = next((parts for parts in _PARTS if x.size % parts == 0), None)
    on_cpu = default
    if rows.dtype == jnp.bfloat16:
        on_cpu = summed  # a product would make a float32 copy of the rows
    elif rows.dtype == jnp.float16 and alone:
        on_cpu = functools.partial(sums_in_turn, dtype=dtype, axes=range(x.ndim))  # here a sum would too
    elif is_long and parts and rows.dtype == dtype and alone:
        on_cpu = functools.partial(_dots_in_parts, dtype=dtype, parts=parts)
    if on_cpu is default:
        return default(rows, x)
    return lax.platform_dependent(rows, x, cpu=on_cpu, default=default)


def sums_in_turn(rows: jax.Array, x: jax.Array, dtype: jnp.dtype, axes: Sequence[int]) -> jax.Array:
    """The sums over these axes of `x` of each row times `x`, a row at a time: none is copied as floats."""

    def of_row(number):
        held, number = lax.optimization_barrier((rows, number))  # see `combine_in_turn`
        row = lax.dynamic_index_in_dim(held, number, 0, keepdims=False)
        return jnp.sum(row.astype(dtype) * x.astype(dtype), axis=tuple(axes))

    return lax.map(of_row, jnp.arange(len(rows)))


def _dots_in_parts(rows: jax.Array, x: jax.Array, dtype: jnp.dtype, parts: int) -> jax.Array:
    """As `dots`: all parts of the rows with all parts of `x`, of which those that belong together count."""
    flat = rows.reshape(len(rows) * parts, -1), x.astype(dtype).reshape(parts, -1)
    products = _dot_general(*flat, ((1,), (1,)), PartitionSpec(None, None))
    return jnp.trace(products.reshape(-1, parts, parts), axis1=1, axis2=2)


@jax.jit
def combine(coefficients: jax.Array, rows: jax.Array) -> jax.Array:
    """`coefficients` `(m,)` times the rows `(m, *shape)` of a window leaf, summed: `(*shape)`."""

    def contracted(coefficients, rows):
        spec = PartitionSpec(*jax.typeof(rows).sharding.spec[1:])
        return _dot_general(coefficients, rows.astype(coefficients.dtype), ((0,), (0,)), spec)

    def summed(coefficients, rows):
        c = coefficients.reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.sum(c * rows.astype(c.dtype), axis=0)

    # For a product XLA for TPU may copy the window into another layout (TPU7x, 512 rows on a device).
    cpu = combine_in_turn if rows.dtype in (jnp.bfloat16, jnp.float16) else contracted
    return lax.platform_dependent(coefficients, rows, cpu=cpu, tpu=summed, default=contracted)


@functools.partial(jax.jit, static_argnames="dtype")  # a bare loop would be compiled at every call
def gram(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`(m, m)` inner products of the rows `(m, *shape)` with each other."""

    def contracted(rows):
        axes = tuple(range(1, rows.ndim))
        rows = rows.astype(dtype)
        return _dot_general(rows, rows, (axes, axes), PartitionSpec(None, None))

    if math.prod(rows.shape[1:]) <= _GRAM_COLUMNS:
        return contracted(rows)
    return lax.platform_dependent(
        rows, cpu=functools.partial(_gram_in_chunks, dtype=dtype), default=contracted
    )


def _gram_in_chunks(rows: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """As `gram`, for some columns at a time: on CPU twice as fast, and with smaller rounding errors."""
    flat = rows.reshape(len(rows), -1)
    chunks, rest = divmod(flat.shape[1], _GRAM_COLUMNS)

    def product(columns):
        columns = columns.astype(dtype)
        return jnp.matmul(columns, columns.T, precision=lax.Precision.HIGHEST)

    def add(i, total):
        return total + product(lax.dynamic_slice_in_dim(flat, i * _GRAM_COLUMNS, _GRAM_COLUMNS, 1))

    return lax.fori_loop(0, chunks, add, product(flat[:, flat.shape[1] - rest :]))


def mix(matrix: jax.Array, rows: jax.Array) -> jax.Array:
    """`matrix` `(k, m)` times the rows `(m, *shape)`: `(k, *shape)`."""
    spec = PartitionSpec(None, *jax.typeof(rows).sharding.spec[1:])
    return _dot_general(matrix, rows.astype(matrix.dtype), ((1,), (0,)), spec)


def column_squares(rows: jax.Array) -> jax.Array:
    """The sums of the squares over the rows `(m, *shape)`: `(*shape)`."""
    length = min(len(rows), _ROWS_AT_A_TIME)
    chunks, rest = divmod(len(rows), length)

    def add(i, total):
        for row in range(length):
            total += jnp.square(lax.dynamic_index_in_dim(rows, i * length + row, 0, keepdims=False))
        return total

    return lax.fori_loop(0, chunks, add, jnp.sum(jnp.square(rows[len(rows) - rest :]), axis=0))


def combine_in_turn(coefficients: jax.Array, rows: jax.Array) -> jax.Array:
    """As `combine`, of rows of short numbers on CPU: some are added at a time, and none is copied.

    Behind their first axis, coefficients may have those of the rows too, of length one where all are alike.
    Without the barrier XLA would make all rows float32 before the loop.
    """
    length = min(len(rows), _ROWS_AT_A_TIME)

    def add(total, rows, start, number):
        for row in range(number):
            c, x = (
                lax.dynamic_index_in_dim(y, start + row, 0, keepdims=False) for y in (coefficients, rows)
            )
            total += c * x.astype(c.dtype)
        return total

    def add_some(i, total):
        held, start = lax.optimization_barrier((rows, first + i * length))
        return add(total, held, start, length)

    first = length + len(rows) % length
    return lax.fori_loop(0, len(rows) // length - 1, add_some, add(0, rows, 0, first))


def _dot_general(a: jax.Array, b: jax.Array, contracted, spec: PartitionSpec) -> jax.Array:
    """A contraction; where mesh axes are explicit, with the sharding of the result that it then needs.

    Axes are contracted as they are: made one, they would have to be gathered where they are sharded.
    """
    dimensions, precision = (contracted, ((), ())), lax.Precision.HIGHEST
    explicit = _mesh.explicit_sharding(a) or _mesh.explicit_sharding(b)
    if explicit is None:
        return lax.dot_general(a, b, dimensions, precision=precision)
    with jax.sharding.use_abstract_mesh(explicit.mesh.abstract_mesh):
        sharding = NamedSharding(explicit.mesh, spec)
        return lax.dot_general(a, b, dimensions, precision=precision, out_sharding=sharding)
