"""The inverse of each damped Gram matrix, kept from step to step: O(m^2) operations, not O(m^3).

P is close to (K + shift I)^-1. When a row and column of K are replaced, two corrections of rank one follow:
the old row is eliminated, and the new one enters by its Schur complement. Rounding errors leave with the
rows that carry them. Every solution is refined against K itself until each entry of its residual is that of
rounding; twice that will do where it gets no further. Else K is near singular or the shift has moved too
far. Cholesky then solves, and P is made anew.

Each entry of the residual is compared with the terms that it is the sum of. So a row and column of any
length may stand beside the others: to scale them changes neither this test nor a digit of P.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax._src.base.accept import select
from mfac_jax._src.linalg import solve as cholesky
from mfac_jax._src.linalg.gram import matvec

# On a GPU every look at a result waits for the host. So the first look comes after this many turns: enough
# where the shift has moved by less than 0.5 %, as 0.005^3 is rounding.
_TURNS_ON_GPU = 3


class KeptInverse(NamedTuple):
    """Approximate inverses. Zeros stand for none: the next solution makes them anew.

    Attributes:
      matrix: P.
      shift: what they were made with.
    """

    matrix: jax.Array  # (blocks, m, m), of the dtype of the Gram matrices
    shift: jax.Array  # (blocks,)


@jax.jit  # outside of a user's jit, a vmap fills a cache at every call
def replace_row(kept: KeptInverse, row: jax.Array, index: jax.Array, accept: jax.Array) -> KeptInverse:
    """The inverses after `row` `(blocks, m)` has become row and column `index` of the Gram matrices.

    Unchanged where `accept` is false. The choice is part of the same operation, which saves an m x m array.
    """
    kept, row = lax.stop_gradient((kept, row))  # a solution depends on K alone, not on what led to it
    replaced = jax.vmap(_replace_row, (0, 0, 0, None))(*kept, row, index)
    return kept._replace(matrix=jnp.where(accept, replaced, kept.matrix))


@jax.jit
def replace_row_on_cpu(
    kept: KeptInverse, row: jax.Array, index: jax.Array, accept: jax.Array
) -> KeptInverse:
    """As `replace_row` where `solve_on_cpu` uses the inverses. Old ones are found out by it later."""

    def unchanged(kept, *_):
        return kept

    return lax.platform_dependent(kept, row, index, accept, cpu=replace_row, default=unchanged)


def _replace_row(P: jax.Array, shift: jax.Array, row: jax.Array, index: jax.Array) -> jax.Array:
    is_new = jnp.arange(len(row), dtype=index.dtype) == index
    others = jnp.where(is_new, 0, row)
    gone = P[index]
    scaled = gone / jnp.where(gone[index] > 0, gone[index], 1)
    product = jnp.matmul(P, others, precision=lax.Precision.HIGHEST)
    inside = jnp.where(is_new, 0, product - scaled * product[index])
    complement = row[index] + shift - jnp.sum(others * inside)
    entering = jnp.where(is_new, 1, -inside)
    without = jnp.where(is_new[:, None] | is_new[None], 0, P - gone[:, None] * scaled[None])
    is_positive = (gone[index] > 0) & (complement > 0)
    added = entering[:, None] * (entering / jnp.where(is_positive, complement, 1))[None]
    return jnp.where(is_positive, without + added, 0)


class _Found(NamedTuple):
    """A solution on the way.

    Attributes:
      solution: c.
      product: K c.
      terms: of the absolute values of K and c.
      rest: the residual.
      error: its largest entry, in units of its terms.
      converges: whether that is less than half of what it was.
    """

    solution: jax.Array  # (blocks, m), like the next three
    product: jax.Array
    terms: jax.Array
    rest: jax.Array
    error: jax.Array  # (blocks,)
    converges: jax.Array  # (blocks,)


@jax.jit  # outside of a user's jit, the loops would be compiled at every call
def solve(
    kept: KeptInverse, gram: jax.Array, shift: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, KeptInverse]:
    """(K + shift I)^-1 rhs, finite for any finite Gram matrix, and the inverses, made anew where needed."""
    return _with_derivative(_solve, kept, gram, shift, rhs)


@jax.jit
def solve_on_cpu(
    kept: KeptInverse, gram: jax.Array, shift: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, KeptInverse]:
    """As `solve`, where that is faster than Cholesky: elsewhere Cholesky, and the inverses as they were."""

    def by_cholesky(kept, gram, shift, rhs):
        return cholesky.solve(gram, shift[:, None], rhs), kept

    def chosen(*operands):
        return lax.platform_dependent(*operands, cpu=_solve, default=by_cholesky)

    return _with_derivative(chosen, kept, gram, shift, rhs)


def _with_derivative(
    solve: Callable, kept: KeptInverse, gram: jax.Array, shift: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, KeptInverse]:
    shift = jnp.broadcast_to(shift, rhs.shape[:1])
    solution, kept = solve(*lax.stop_gradient((kept, gram, shift, rhs)))
    return cholesky.with_derivative(solution, gram, shift[:, None], rhs), kept


def _solve(
    kept: KeptInverse, gram: jax.Array, shift: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, KeptInverse]:
    m, magnitudes = gram.shape[-1], jnp.abs(gram)
    eps, tiny = float(jnp.finfo(gram.dtype).eps), float(jnp.finfo(gram.dtype).tiny)
    # With the exact inverse the error comes down to 0.5 eps at m = 4, 1.3 at 64, 4 at 1024, 5.5 at 2048.
    # Where it gets no further, as terms of one sign add up, twice as much will do: 6.7 at 1024.
    rounding = (1 + math.sqrt(m) / 8) * eps
    smallest = m * tiny / eps  # each of the m terms loses up to `tiny` where it leaves the normal numbers

    def refine(kept: KeptInverse, found: _Found) -> _Found:
        solution = found.solution + matvec(kept.matrix, found.rest)
        product, terms = matvec(gram, solution), matvec(magnitudes, jnp.abs(solution))
        rest = rhs - product - shift[:, None] * solution
        size = terms + shift[:, None] * jnp.abs(solution) + jnp.abs(rhs)
        errors = jnp.where(size < jnp.inf, jnp.abs(rest) / jnp.maximum(size, smallest), jnp.inf)
        error = jnp.max(errors, axis=-1)
        return _Found(solution, product, terms, rest, error, error < found.error / 2)

    def is_good(found: _Found) -> jax.Array:
        return found.error <= rounding

    def is_worth_a_try(found: _Found) -> jax.Array:
        return ~jnp.all(is_good(found)) & jnp.all(is_good(found) | found.converges)

    def is_solved(found: _Found) -> jax.Array:
        keeps_digits = cholesky.keeps_digits(rhs * found.product, jnp.abs(rhs) * found.terms)
        return jnp.all(found.error <= 2 * rounding) & jnp.all(keeps_digits)

    def anew(_):
        root = cholesky.inverse_root(gram, shift[:, None])
        matrix = jnp.matmul(root.mT, root, precision=lax.Precision.HIGHEST)
        return cholesky.solve(gram, shift[:, None], rhs), KeptInverse(matrix, shift), jnp.array(True)

    def finished(kept: KeptInverse, found: _Found) -> tuple[jax.Array, KeptInverse]:
        found = lax.while_loop(is_worth_a_try, functools.partial(refine, kept), found)
        return _unless_true(anew, (found.solution, kept, is_solved(found)))

    def finished_on_gpu(kept: KeptInverse, found: _Found) -> tuple[jax.Array, KeptInverse]:
        for _ in range(_TURNS_ON_GPU):
            found = select(is_worth_a_try(found), refine(kept, found), found)

        def rest(carry):
            return *finished(carry[1], found), jnp.array(True)

        return _unless_true(rest, (found.solution, kept, is_solved(found)))

    # All in the loop: what is read on both sides of its start would be computed twice.
    zero, unknown = jnp.zeros_like(rhs), jnp.full_like(shift, jnp.inf)
    start = _Found(zero, zero, zero, rhs, unknown, unknown > 0)
    return lax.platform_dependent(kept, start, cuda=finished_on_gpu, rocm=finished_on_gpu, default=finished)


def _unless_true(change: Callable, carry: tuple) -> tuple[jax.Array, KeptInverse]:
    """The first two of the carry, changed unless its last is true.

    A loop of no or one turn, where a conditional would copy the inverse.
    """
    return lax.while_loop(lambda carry: ~carry[-1], change, carry)[:2]
