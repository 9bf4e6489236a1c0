"""Rows of low rank: of each matrix two thin factors, in bfloat16.

They say enough of the Fisher matrix, and too little of a gradient. So what a row leaves out of one is not
lost: `mfac/remainder.py`.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from mfac_jax._src.base import checks, numerics
from mfac_jax._src.rows import chunks, contractions
from mfac_jax._src.rows.mesh import explicit_sharding, with_automatic_axes
from mfac_jax._src.rows.storages import Storage

_ROW, _PRODUCTS = slice(1, None), slice(0, 1)  # the axes of rows that results have
# Rows whose factors are float32 at a time. On accelerators, where loops would wait, all of a leaf that has
# no more than 128 MiB of them.
_AT_A_TIME, _AT_ONCE = 8, 2**25
_NAME = "low_rank"


class LowRankRow(NamedTuple):
    """A row of a leaf, or several with an axis in front: the product of the factors.

    Of leaves that no factors would make smaller `left` is the row itself, and `right` has no axes.

    Attributes:
      left: the leaf's first axes, then the rank.
      right: the rank, then the leaf's other axes.
    """

    left: jax.Array
    right: jax.Array


def low_rank(density: float = 1 / 16) -> Storage:
    """Keep rows of low rank: each matrix of a gradient as the product of two thin ones, in bfloat16.

    A leaf of n1 x n2 has the rank floor(density n1 n2 / (n1 + n2)), at least 1, and a row takes 2 density
    bytes an entry. Leaves of more axes are matrices, as near to a square as whole axes can be; vectors are
    kept whole. The factors are those of the largest singular values: from a fixed random start, by one
    power iteration (Halko et al.).

    Rows stand for the Fisher matrix alone. What they leave out of the gradients has a running mean of
    float32, with the momentum of the window. It is preconditioned with them, so no part of a gradient is
    lost. The state takes one more copy of the parameters for it.

    Args:
      density: in (0, 1], the share of a matrix's entries that its factors have. 1/16 is about rank 4 for
        matrices 100 wide, which 64 rows of worked with on text and ResNet-20 (docs/options.md).

    Returns:
      The storage, for `scale_by_mfac` and `mfac`. Not for `axis_name`.

    Raises:
      TypeError: `density` is no number.
      ValueError: it is not in (0, 1].

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> storage = mfac_jax.components.low_rank(1 / 16)
      >>> tx = mfac_jax.mfac(1e-2, num_grads=8, storage=storage)
      >>> state = mfac_jax.scale_by_mfac(num_grads=8, storage=storage).init(jnp.zeros((128, 128)))
      >>> print(state.window.left.shape, state.window.right.shape)
      (8, 128, 4) (8, 4, 128)

    References:
      Nathan Halko, Per-Gunnar Martinsson, Joel Tropp, `Finding Structure with Randomness: Probabilistic
      Algorithms for Constructing Approximate Matrix Decompositions <https://arxiv.org/abs/0909.4061>`_,
      SIAM Review, 2011.
    """
    checks.check_density("density", density, "1/16")
    return _of_density(float(density))


@functools.cache  # one object for each density: compiled functions take storages as static arguments
def _of_density(density: float) -> Storage:
    return Storage(
        name=f"{_NAME}({density!r})",
        row=functools.partial(_row, density),
        encode=lambda x, rows: with_automatic_axes(_encode, rows, _ROW)(x, rows),
        decode=_decode,
        dots=_dots_on_mesh,
        combine=_combine_on_mesh,
        shape=_shape,
        keeps_remainder=True,
        axes=_axes,
        dots_of_row=_dots_of_row_on_mesh,
    )


def by_name(name: str) -> Storage | None:
    """The storage of this name, if it is one of these."""
    start, _, rest = name.partition("(")
    return _of_density(float(rest.removesuffix(")"))) if start == _NAME and rest else None


def _row(density: float, leaf: jax.ShapeDtypeStruct) -> LowRankRow:
    shape = leaf.shape
    dtype = jnp.dtype(jnp.float64 if leaf.dtype == jnp.float64 else jnp.bfloat16)
    cut = _cut(shape)
    n1, n2 = math.prod(shape[:cut]), math.prod(shape[cut:])
    rank = max(1, int(density * n1 * n2 / max(1, n1 + n2)))
    left: Any = jax.ShapeDtypeStruct(shape, dtype)
    right: Any = jax.ShapeDtypeStruct((), dtype)
    if cut and rank * (n1 + n2) < n1 * n2:
        left = jax.ShapeDtypeStruct((*shape[:cut], rank), dtype)
        right = jax.ShapeDtypeStruct((rank, *shape[cut:]), dtype)
    return LowRankRow(left, right)


def _cut(shape: Sequence[int]) -> int:
    """Before which axis the columns of the matrix begin; 0 for a vector."""
    longer = {cut: max(math.prod(shape[:cut]), math.prod(shape[cut:])) for cut in range(1, len(shape))}
    return min(longer, key=lambda cut: longer[cut], default=0)


def _shape(row: LowRankRow) -> tuple[int, ...]:
    """The leaf's."""
    left, right = row
    return (*left.shape[:-1], *right.shape[1:]) if right.shape else left.shape


def _axes(row: LowRankRow) -> list[tuple[int | None, ...]]:
    """The rank lies along no axis of the leaf."""
    left, right = (len(factor.shape) for factor in row)
    if not right:
        return [tuple(range(left)), ()]
    return [(*range(left - 1), None), (None, *range(left - 1, left + right - 2))]


@jax.jit
def _encode(x: jax.Array, rows: LowRankRow) -> LowRankRow:
    left, right = rows
    if right.ndim == 1:
        return LowRankRow(numerics.narrow(x, left.dtype), jnp.ones((), right.dtype))
    largest = jnp.max(jnp.abs(x), initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    found = _factors(x / scale, left.ndim - 2, left.shape[-1])
    factors = found._replace(right=found.right * scale)
    return jax.tree.map(lambda factor: numerics.narrow(factor, left.dtype), factors)


def _factors(x: jax.Array, cut: int, rank: int) -> LowRankRow:
    """An orthonormal basis of nearly the largest singular vectors, and the matrix in it.

    The matrix has the axes of x before the cut as rows. They are contracted as they are: made one, they
    would have to be gathered where they are sharded.
    """
    of_rows, of_columns = tuple(range(cut)), tuple(range(cut, x.ndim))

    def of_basis(basis):
        return _product(basis, x, (of_rows, of_rows))

    def times(start):
        return _orthonormal(_product(x, start, (of_columns, tuple(range(len(of_columns))))))

    start = jax.random.normal(jax.random.key(0), (*x.shape[cut:], rank), x.dtype)
    basis = times(_orthonormal(jnp.moveaxis(of_basis(times(start)), 0, -1)))
    return LowRankRow(basis, of_basis(basis))


def _orthonormal(x: jax.Array) -> jax.Array:
    """The columns, along the last axis, made orthonormal by a Cholesky factor: no gather on a mesh.

    Where they depend on each other, up to rounding, some become smaller instead.
    """
    others, rank = tuple(range(x.ndim - 1)), x.shape[-1]
    square = _product(x, x, (others, others))
    info, eye = jnp.finfo(x.dtype), jnp.eye(rank, dtype=x.dtype)
    floor = 8 * rank * float(info.eps) * jnp.trace(square) + 2.0 ** (info.minexp // 4)
    factor = jnp.linalg.cholesky(square + floor * eye)
    inverse = lax.linalg.triangular_solve(factor, eye, left_side=True, lower=True)
    return _product(x, inverse, ((x.ndim - 1,), (1,)))


def _product(x: jax.Array, y: jax.Array, contracted: tuple[tuple[int, ...], tuple[int, ...]]) -> jax.Array:
    return jnp.tensordot(x, y, contracted, precision=lax.Precision.HIGHEST)


def _decode(row: LowRankRow) -> jax.Array:
    dtype = jnp.float64 if row.left.dtype == jnp.float64 else jnp.float32
    left, right = (factor.astype(dtype) for factor in row)
    return jnp.tensordot(left, right, 1, precision=lax.Precision.HIGHEST) if right.ndim else left


def _dots_on_mesh(rows: LowRankRow, x: jax.Array, dtype: Any) -> jax.Array:
    if rows.right.ndim == 1:
        return contractions.dots(rows.left, x, dtype)
    dots = functools.partial(_dots, dtype=dtype)
    return with_automatic_axes(dots, rows.left, _PRODUCTS)(rows, x)


@functools.partial(jax.jit, static_argnames="dtype")
def _dots(rows: LowRankRow, x: jax.Array, dtype: Any) -> jax.Array:
    of_columns = tuple(range(rows.left.ndim - 2, x.ndim))

    def at_once(rows, x):
        left, right = _as_floats(rows, dtype)
        through = _product(right, x.astype(dtype), (tuple(range(2, right.ndim)), of_columns))
        return jnp.sum(left * jnp.moveaxis(through, 1, -1), axis=tuple(range(1, left.ndim)))

    def in_turn(rows, x):
        def of_some(numbers):
            return at_once(_some(rows, numbers), x)

        return chunks.dots_in_chunks(of_some, jnp.arange(len(rows.left)), _AT_A_TIME)

    return lax.platform_dependent(rows, x, cpu=in_turn, default=at_once if _is_small(rows) else in_turn)


def _dots_of_row_on_mesh(rows: LowRankRow, row: LowRankRow, dtype: Any) -> jax.Array:
    if rows.right.ndim == 1:
        return contractions.dots(rows.left, row.left, dtype)
    dots = functools.partial(_dots_of_row, dtype=dtype)
    return with_automatic_axes(dots, rows.left, _PRODUCTS)(rows, row)


@functools.partial(jax.jit, static_argnames="dtype")
def _dots_of_row(rows: LowRankRow, row: LowRankRow, dtype: Any) -> jax.Array:
    """<A B, C D> = <C^T A, D B^T>: products of thin matrices alone."""
    left, right = (tuple(range(1, factor.ndim)) for factor in row)

    def at_once(rows, row):
        rows, row = (_as_floats(factors, dtype) for factors in (rows, row))
        of_left = _product(rows.left, row.left, (left, tuple(axis - 1 for axis in left)))
        of_right = _product(rows.right, row.right, (tuple(axis + 1 for axis in right), right))
        return jnp.sum(of_left * of_right, axis=(1, 2))

    def in_turn(rows, row):
        def of_some(numbers):
            return at_once(_some(rows, numbers), row)

        return chunks.dots_in_chunks(of_some, jnp.arange(len(rows.left)), _AT_A_TIME)

    def decoded(rows, row):
        return _dots(rows, _decode(row), dtype)

    # XLA for GPU (jax 0.10.2) finds no tiles for some products of two thin matrices, and fails.
    return lax.platform_dependent(rows, row, cpu=in_turn, tpu=in_turn, default=decoded)


def _is_small(rows: LowRankRow) -> bool:
    return sum(factor.size for factor in rows) <= _AT_ONCE


def _as_floats(rows: LowRankRow, dtype: Any) -> LowRankRow:
    return jax.tree.map(lambda factor: factor.astype(dtype), rows)


def _some(rows: LowRankRow, numbers: jax.Array) -> LowRankRow:
    """The rows of these numbers, one after the other. Without the barrier XLA would convert all."""
    held, start = lax.optimization_barrier((rows, numbers[0]))
    return jax.tree.map(lambda factor: lax.dynamic_slice_in_dim(factor, start, len(numbers)), held)


def _combine_on_mesh(coefficients: jax.Array, rows: LowRankRow) -> jax.Array:
    left, right = map(explicit_sharding, rows)
    if rows.right.ndim == 1:
        return contractions.combine(coefficients, rows.left)
    if left is None or right is None:
        return _combine(coefficients, rows)
    spec = PartitionSpec(*left.spec[1:-1], *right.spec[2:])
    combine: Any = jax.sharding.auto_axes(_combine, out_sharding=spec)
    return combine(coefficients, rows)


@jax.jit
def _combine(coefficients: jax.Array, rows: LowRankRow) -> jax.Array:
    shape, last = (*rows.left.shape[1:-1], *rows.right.shape[2:]), rows.left.ndim - 1

    def at_once(coefficients, rows):
        left, right = _as_floats(rows, coefficients.dtype)
        left *= coefficients.reshape(-1, *[1] * last)
        return _product(left, right, ((0, last), (0, 1)))

    def in_turn(coefficients, rows):
        def of_some(own, numbers):
            return at_once(own, _some(rows, numbers))

        total = jnp.zeros(shape, coefficients.dtype)
        numbers = jnp.arange(len(rows.left))
        return chunks.combine_in_chunks(of_some, total, coefficients, numbers, _AT_A_TIME)

    default = at_once if _is_small(rows) else in_turn
    return lax.platform_dependent(coefficients, rows, cpu=in_turn, default=default)
