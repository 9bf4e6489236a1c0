"""What the m x m Gram matrices say of the rows, and how a row of them is replaced.

All functions take a stack of Gram matrices K = G G^T `(blocks, m, m)` and vectors `(blocks, m)`.
"""

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax._src.base.numerics import root


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


def cosines_of_rows(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean square and variance of the cosines of different rows of G, all blocks together.

    Without zero rows. Where there are no two: one and zero, as for rows that are alike.
    """
    gram = jnp.sum(_with_largest_one(gram), axis=0)
    squares = jnp.diagonal(gram)
    inverse = jnp.where(squares > 0, lax.rsqrt(jnp.where(squares > 0, squares, 1)), 0)
    cosines = inverse[:, None] * gram * inverse[None]
    is_pair = (squares > 0)[:, None] & (squares > 0)[None] & ~jnp.eye(len(squares), dtype=bool)
    pairs = jnp.sum(is_pair).astype(gram.dtype)

    def mean(values):
        return jnp.sum(jnp.where(is_pair, values, 0)) / jnp.maximum(pairs, 1)

    variance = mean(jnp.square(cosines - mean(cosines)))
    return jnp.where(pairs > 0, mean(jnp.square(cosines)), 1), variance


def shrinkage(gram: jax.Array, age: jax.Array, count: jax.Array) -> jax.Array:
    """How far the `count` rows in use shrink, in [-1, 1], negative where they grow; all blocks together.

    Let x be the difference of the mean log |row|^2 of the older and the newer half, less its standard
    error. The result is 1 - e^-x, so single large rows hardly count. `age` is 0 for the newest row. Rows of
    zeros are left out; where no row of a half is left, the result is 0.
    """
    squares = jnp.sum(jnp.diagonal(_with_largest_one(gram), axis1=-2, axis2=-1), axis=0)
    logarithms = jnp.log(jnp.where(squares > 0, squares, 1))

    def mean_and_variance(chosen):
        chosen = chosen & (squares > 0)
        number = jnp.maximum(jnp.sum(chosen), 1).astype(gram.dtype)
        mean = jnp.sum(logarithms, where=chosen) / number
        deviations = jnp.sum(jnp.square(logarithms - mean), where=chosen)
        return mean, deviations / (number * jnp.maximum(number - 1, 1)), jnp.any(chosen)

    newer, newer_variance, has_newer = mean_and_variance(2 * age < count)
    older, older_variance, has_older = mean_and_variance((2 * age >= count) & (age < count))
    standard_error = root(newer_variance + older_variance)
    excess = jnp.maximum(jnp.abs(older - newer) - standard_error, 0)
    shrunk = -jnp.sign(older - newer) * jnp.expm1(-excess)
    return jnp.where(has_newer & has_older, shrunk, 0)


def _with_largest_one(gram: jax.Array) -> jax.Array:
    """The Gram matrices over their largest entry: products of norms would overflow otherwise."""
    largest = jnp.max(jnp.diagonal(gram, axis1=-2, axis2=-1))
    return gram / jnp.where(largest > 0, largest, 1)


def matvec(matrix: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("bij,bj->bi", matrix, x, precision=lax.Precision.HIGHEST)
