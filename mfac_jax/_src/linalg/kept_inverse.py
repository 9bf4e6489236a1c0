"""The inverse of each damped Gram matrix, kept from step to step: O(m^2) operations, not O(m^3).

P is close to (K + shift I)^-1. When a row and column of K are replaced, two corrections of rank one follow:
the old row is eliminated, and the new one enters by its Schur complement. Rounding errors leave with the
rows that carry them. Every solution is refined against K itself until its residual is that of rounding.
Where it does not get there, K is near singular or the shift has moved too far. Cholesky then solves, and P
is made anew.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax._src.linalg import solve as cholesky
from mfac_jax._src.linalg.gram import matvec


class KeptInverse(NamedTuple):
    """Approximate inverses. Zeros stand for none: the next solution makes them anew.

    Attributes:
      matrix: P.
      shift: what they were made with.
    """

    matrix: jax.Array  # (blocks, m, m), of the dtype of the Gram matrices
    shift: jax.Array  # (blocks,)


def replace_row(kept: KeptInverse, row: jax.Array, index: jax.Array, accept: jax.Array) -> KeptInverse:
    """The inverses after `row` `(blocks, m)` has become row and column `index` of the Gram matrices.

    Unchanged where `accept` is false. The choice is part of the same operation, which saves an m x m array.
    """
    replaced = jax.vmap(_replace_row, (0, 0, 0, None))(*kept, row, index)
    return kept._replace(matrix=jnp.where(accept, replaced, kept.matrix))


def _replace_row(P: jax.Array, shift: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    is_new = jnp.arange(len(row), dtype=index.dtype) == index
    others = jnp.where(is_new, 0, row)
    gone = P[index]
    product = jnp.matmul(P, others, precision=lax.Precision.HIGHEST)
    inside = jnp.where(is_new, 0, product - gone * (product[index] / gone[index]))
    complement = row[index] + shift - jnp.sum(others * inside)
    entering = jnp.where(is_new, 1, -inside)
    without = jnp.where(is_new[:, None] | is_new[None], 0, P - gone[:, None] * gone[None] / gone[index])
    return without + entering[:, None] * entering[None] / complement


def solve(
    kept: KeptInverse, gram: jax.Array, shift: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, KeptInverse]:
    """(K + shift I)^-1 rhs, finite for any finite Gram matrix, and the inverses, made anew where needed."""
    shift = jnp.broadcast_to(shift, rhs.shape[:1])
    size = jnp.linalg.norm(gram, axis=(-2, -1)) + shift

    def is_good(found):
        solution, rest, _ = found
        terms = size * jnp.linalg.norm(solution, axis=-1) + jnp.linalg.norm(rhs, axis=-1)
        return jnp.linalg.norm(rest, axis=-1) <= jnp.finfo(gram.dtype).eps * terms

    def refine(found):
        solution, rest, _ = found
        solution += matvec(kept.matrix, rest)
        after = rhs - matvec(gram, solution) - shift[:, None] * solution
        return solution, after, jnp.linalg.norm(after, axis=-1) < jnp.linalg.norm(rest, axis=-1) / 2

    def is_worth_a_try(found):
        good, converges = is_good(found), found[-1]
        return ~jnp.all(good) & jnp.all(good | converges)

    found = refine((jnp.zeros_like(rhs), rhs, None))
    found = lax.while_loop(is_worth_a_try, refine, found)
    solution = found[0]
    good = jnp.all(is_good(found)) & jnp.all(cholesky.keeps_digits(gram, rhs, solution))

    def anew(_):
        root = cholesky.inverse_root(gram, shift[:, None])
        matrix = jnp.matmul(root.mT, root, precision=lax.Precision.HIGHEST)
        return cholesky.solve(gram, shift[:, None], rhs), KeptInverse(matrix, shift), jnp.array(True)

    # A loop of no or one turn, where a conditional would copy the inverse.
    return lax.while_loop(lambda carry: ~carry[-1], anew, (solution, kept, good))[:2]
