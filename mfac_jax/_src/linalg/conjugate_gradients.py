"""Conjugate gradients for several systems at once, in one loop: one for each block of a tree.

The blocks share the products, and nothing else: each has its own step lengths, and rests once it has
converged. In place of `jax.scipy.sparse.linalg.cg`, which takes all blocks as one system, and says neither
how far it came, nor in how many iterations, nor that the operator was not positive definite.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Blocks = Sequence[Any]  # of trees of arrays
Product = Callable[[Blocks], Blocks]


class Solution(NamedTuple):
    """What `solve` found.

    Attributes:
      blocks: x, finite.
      residuals: the norm of b - A x over that of b, as the recursion has it.
      iterations: products that the block took.
      indefinite: whether the block ended because A was seen not to be positive definite, or not finite.
    """

    blocks: Blocks
    residuals: jax.Array  # (blocks,), of the dtype of the blocks
    iterations: jax.Array  # (blocks,) int32
    indefinite: jax.Array  # (blocks,) bool


class _Loop(NamedTuple):
    """What an iteration hands to the next one.

    Attributes:
      x: the solution so far.
      r: b - A x.
      p: the next direction.
      rz: r times the preconditioned r.
      iterations: as in `Solution`.
      indefinite: as in `Solution`.
      active: which blocks go on.
    """

    x: Blocks
    r: Blocks
    p: Blocks
    rz: jax.Array
    iterations: jax.Array
    indefinite: jax.Array
    active: jax.Array


def solve(
    product: Product,
    rhs: Blocks,
    start: Blocks,
    damping: jax.Array,
    tolerance: jax.Array,
    max_iterations: int,
    precondition: Product = lambda blocks: blocks,
) -> Solution:
    """Solve (F + damping I) x = b for every block, with `product` F, positive semidefinite.

    A block ends when the error of x, relative to the solution, is at most `tolerance`: as no eigenvalue is
    below the damping, an error is at most the residual over the damping. `start` is taken at the length
    that suits it best, so it is never worse than zero, and every x that follows has a positive product with
    b.

    Where a direction of no positive curvature turns up the block ends. If it is the first one, the step
    along it has the length that the absolute value of its curvature gives; where that is not finite, there
    is none.

    Args:
      product: F times the blocks. It must not mix them.
      rhs: b, of finite entries, of one dtype.
      start: like b.
      damping: > 0.
      tolerance: > 0.
      max_iterations: >= 1, after which a block ends as it is.
      precondition: a positive definite matrix near (F + damping I)^-1 times the blocks.
    """
    scale = _largest(rhs)
    b, x = _divided(rhs, scale), _divided(start, _largest(start))

    def damped(v):
        return _added(product(v), damping * jnp.ones_like(scale), v)

    def has_converged(x, r):
        return jnp.sqrt(_dot(r, r)) <= tolerance / (1 + tolerance) * damping * jnp.sqrt(_dot(x, x))

    Ax = damped(x)
    curvature = _dot(x, Ax)
    length = jnp.where(curvature > 0, _dot(b, x) / curvature, 0)  # NaN > 0 is false
    x, r = _times(length, x), _added(b, -length, Ax)

    def iterate(loop: _Loop) -> _Loop:
        Ap = damped(loop.p)
        curvature = _dot(loop.p, Ap)
        is_positive = (curvature > 0) & jnp.isfinite(curvature)
        is_first = loop.iterations == 0
        length = loop.rz / jnp.abs(curvature)
        length = jnp.where(loop.active & (is_positive | is_first) & jnp.isfinite(length), length, 0)
        x, r = _added(loop.x, length, loop.p), _added(loop.r, -length, Ap)
        z = precondition(r)
        rz = _dot(r, z)
        indefinite = loop.indefinite | (loop.active & ~is_positive)
        active = loop.active & is_positive & ~has_converged(x, r) & (rz > 0)
        p = _added(z, jnp.where(active, rz / loop.rz, 0), loop.p)
        iterations = loop.iterations + loop.active
        active &= iterations < max_iterations
        return _Loop(x, r, p, rz, iterations, indefinite, active)

    z = precondition(r)
    nothing = jnp.zeros_like(scale, bool)
    first = _Loop(x, r, z, _dot(r, z), jnp.zeros_like(scale, jnp.int32), nothing, ~has_converged(x, r))
    last = lax.while_loop(lambda loop: jnp.any(loop.active), iterate, first)
    size = jnp.sqrt(_dot(b, b))
    residuals = jnp.where(size > 0, jnp.sqrt(_dot(last.r, last.r)) / size, 0)
    return Solution(_times(scale, last.x), residuals, last.iterations, last.indefinite)


def _each_block(function: Callable[[Any], jax.Array], blocks: Blocks) -> jax.Array:
    """`(blocks,)` numbers."""
    return jnp.stack([function(block) for block in blocks])


def _dot(us: Blocks, vs: Blocks) -> jax.Array:
    products = jax.tree.map(lambda u, v: jnp.sum(u * v), list(us), list(vs))
    return _each_block(lambda block: jnp.stack(jax.tree.leaves(block)).sum(), products)


def _largest(blocks: Blocks) -> jax.Array:
    """The largest absolute value of each block, one where all are zero."""

    def of_block(block):
        return jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(block)]).max()

    largest = _each_block(of_block, blocks)
    return jnp.where(largest > 0, largest, 1)


def _times(factors: jax.Array, blocks: Blocks) -> Blocks:
    return [jax.tree.map(lambda x, c=c: c * x, block) for c, block in zip(factors, blocks, strict=True)]


def _divided(blocks: Blocks, divisors: jax.Array) -> Blocks:
    return [jax.tree.map(lambda x, c=c: x / c, block) for c, block in zip(divisors, blocks, strict=True)]


def _added(us: Blocks, factors: jax.Array, vs: Blocks) -> Blocks:
    """u + factor v; u where the factor is zero, whatever v is."""
    return [
        jax.tree.map(lambda x, y, c=c: jnp.where(c == 0, x, x + c * y), u, v)
        for u, c, v in zip(us, factors, vs, strict=True)
    ]
