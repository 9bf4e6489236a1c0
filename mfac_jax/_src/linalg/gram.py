"""What the m x m Gram matrices say of the rows, and how a row of them is replaced.

All functions take a stack of Gram matrices K = G G^T `(blocks, m, m)` and vectors `(blocks, m)`.
"""

import jax
import jax.numpy as jnp
from jax import lax


def replace_row(gram: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    """The Gram matrices with `row` as their row and column `index`."""
    is_new = jnp.arange(gram.shape[-1], dtype=index.dtype) == index
    return jnp.where(is_new[:, None], row[:, None, :], jnp.where(is_new, row[:, :, None], gram))


def mean_square(gram: jax.Array, count: jax.Array) -> jax.Array:
    """Mean squared norm of the `count` rows in use `(blocks,)`."""
    return jnp.trace(gram, axis1=-2, axis2=-1) / count.astype(gram.dtype)


def cosine_of(
    products: jax.Array, square: jax.Array, gram: jax.Array, coefficients: jax.Array
) -> jax.Array:
    """Cosine of x and G^T c, all blocks together, from G x and |x|^2; zero where one of them is zero."""
    scale = jnp.max(jnp.abs(coefficients))
    unit = coefficients / jnp.where(scale > 0, scale, 1)
    size, length = jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1)), jnp.sum(square)
    size, length = (jnp.where(x > 0, x, 1) for x in (size, length))
    product = jnp.sum(products / jnp.sqrt(size) / jnp.sqrt(length) * unit)
    squares = jnp.sum(square / length) * jnp.sum(unit * matvec(gram / size, unit))
    cosine = product * lax.rsqrt(jnp.where(squares > 0, squares, 1))
    return jnp.clip(jnp.where(squares > 0, cosine, 0), -1, 1)


def matvec(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bij,bj->bi", matrix, x, precision=lax.Precision.HIGHEST)
