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
# On CPU: rows whose factors are float32 at a time. On accelerators all of a leaf are: loops would wait.
_AT_A_TIME = 8
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
    """Rows of low rank: each matrix of a gradient as the product of two thin ones, in bfloat16.

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


def _matrices(rows: LowRankRow) -> LowRankRow:
    """Several rows, with the leaf's axes on each side as one."""
    (m, *_, rank), right = rows.left.shape, rows.right
    return LowRankRow(rows.left.reshape(m, -1, rank), right.reshape(m, rank, -1))


@jax.jit
def _encode(x: jax.Array, rows: LowRankRow) -> LowRankRow:
    left, right = rows
    if right.ndim == 1:
        return LowRankRow(numerics.narrow(x, left.dtype), jnp.ones((), right.dtype))
    largest = jnp.max(jnp.abs(x), initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    matrix = (x / scale).reshape(math.prod(left.shape[1:-1]), -1)
    found = _factors(matrix, left.shape[-1])
    factors = LowRankRow(found.left.reshape(left.shape[1:]), (found.right * scale).reshape(right.shape[1:]))
    return jax.tree.map(lambda factor: numerics.narrow(factor, left.dtype), factors)


def _factors(matrix: jax.Array, rank: int) -> LowRankRow:
    """An orthonormal basis of nearly the largest singular vectors, and the matrix in it."""
    start = jax.random.normal(jax.random.key(0), (matrix.shape[1], rank), matrix.dtype)
    basis = _orthonormal(_product(matrix, start))
    basis = _orthonormal(_product(matrix, _orthonormal(_product(matrix.T, basis))))
    return LowRankRow(basis, _product(basis.T, matrix))


def _orthonormal(x: jax.Array) -> jax.Array:
    """The columns made orthonormal by a Cholesky factor, which a mesh computes without a gather.

    Where they depend on each other, up to rounding, some become smaller instead.
    """
    square = _product(x.T, x)
    info, rank = jnp.finfo(x.dtype), x.shape[1]
    floor = 8 * rank * float(info.eps) * jnp.trace(square) + 2.0 ** (info.minexp // 4)
    factor = jnp.linalg.cholesky(square + floor * jnp.eye(rank, dtype=x.dtype))
    return lax.linalg.triangular_solve(factor, x, left_side=False, lower=True, transpose_a=True)


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)


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
    rows = _matrices(rows)
    matrix = x.astype(dtype).reshape(rows.left.shape[1], -1)

    def at_once(rows, matrix):
        left, right = _as_floats(rows, dtype)
        through = jnp.einsum("ab,mrb->mar", matrix, right, precision=lax.Precision.HIGHEST)
        return jnp.sum(left * through, axis=(1, 2))

    def in_turn(rows, matrix):
        def of_some(numbers):
            return at_once(_some(rows, numbers), matrix)

        return chunks.dots_in_chunks(of_some, jnp.arange(len(rows.left)), _AT_A_TIME)

    return lax.platform_dependent(rows, matrix, cpu=in_turn, default=at_once)


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
    shape = (*rows.left.shape[1:-1], *rows.right.shape[2:])
    rows = _matrices(rows)

    def at_once(coefficients, rows):
        left, right = _as_floats(rows, coefficients.dtype)
        left *= coefficients[:, None, None]
        return jnp.einsum("mar,mrb->ab", left, right, precision=lax.Precision.HIGHEST)

    def in_turn(coefficients, rows):
        def of_some(own, numbers):
            return at_once(own, _some(rows, numbers))

        total = jnp.zeros((rows.left.shape[1], rows.right.shape[2]), coefficients.dtype)
        numbers = jnp.arange(len(rows.left))
        return chunks.combine_in_chunks(of_some, total, coefficients, numbers, _AT_A_TIME)

    return lax.platform_dependent(coefficients, rows, cpu=in_turn, default=at_once).reshape(shape)
