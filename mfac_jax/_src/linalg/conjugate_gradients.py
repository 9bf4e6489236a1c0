"""Conjugate gradients for several systems at once, in one loop: one system per block.

The blocks share the loop and nothing else. Each has its own step lengths, and rests once it has converged.

`jax.scipy.sparse.linalg.cg` would take all blocks as one system. It reports neither the residual, nor the
iterations, nor that a matrix was not positive definite.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Blocks = Sequence[Any]  # of trees of arrays
Product = Callable[[Blocks], Blocks]


class Limits(NamedTuple):
    """What is added to the matrices, and when a block stops.

    Attributes:
      damping: > 0, added to the diagonal. No eigenvalue is then below it.
      tolerance: > 0, the largest error of a solution, relative to the solution.
      max_iterations: >= 1. A block stops after so many, converged or not.
    """

    damping: jax.Array  # () of the dtype of the blocks
    tolerance: jax.Array  # () of that dtype
    max_iterations: jax.Array  # () int32


class Solution(NamedTuple):
    """What `solve` found.

    Attributes:
      blocks: x, finite.
      residuals: the norm of b - A x over that of b, as the recursion has it.
      iterations: products that the block took.
      indefinite: whether the block stopped because A was not positive definite, or not finite.
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
    limits: Limits,
    precondition: Product = lambda blocks: blocks,
) -> Solution:
    """Solve (F + damping I) x = b for every block, where `product` multiplies by F >= 0.

    Every x on the way has a positive product with b, so a solution that stops early still descends.

    A block stops at a direction without positive curvature. If that is the first direction, the block takes
    one step along it, with the absolute value of the curvature; no step if that is not finite.

    Args:
      product: F times the blocks. It must not mix them.
      rhs: b, of finite entries, of one dtype.
      limits: the damping, and when to stop.
      precondition: multiplies the blocks by a positive definite matrix near (F + damping I)^-1.
    """
    damping, tolerance, max_iterations = limits
    scale = _largest(rhs)  # squares of tiny or huge entries would leave the range of float32
    b = _divided(rhs, scale)

    def has_converged(x, r):
        # No eigenvalue is below the damping, so the error is at most |r| / damping. It is compared with the
        # solution, whose norm is at least |x| minus the error.
        return jnp.sqrt(_dot(r, r)) <= tolerance / (1 + tolerance) * damping * jnp.sqrt(_dot(x, x))

    def iterate(loop: _Loop) -> _Loop:
        Ap = _added(product(loop.p), damping * jnp.ones_like(scale), loop.p)
        curvature = _dot(loop.p, Ap)
        is_positive = (curvature > 0) & jnp.isfinite(curvature)
        is_first = loop.iterations == 0
        length = loop.rz / jnp.abs(curvature)
        length = jnp.where(loop.active & (is_positive | is_first) & jnp.isfinite(length), length, 0)
        x, r = _added(loop.x, length, loop.p), _added(loop.r, -length, Ap)
        z = precondition(r)
        rz = _dot(r, z)
        active = loop.active & is_positive & ~has_converged(x, r) & (rz > 0)
        p = _added(z, jnp.where(active, rz / loop.rz, 0), loop.p)
        iterations = loop.iterations + loop.active.astype(jnp.int32)
        indefinite = loop.indefinite | (loop.active & ~is_positive)
        return _Loop(x, r, p, rz, iterations, indefinite, active & (iterations < max_iterations))

    size = jnp.sqrt(_dot(b, b))
    zero, z = jax.tree.map(jnp.zeros_like, b), precondition(b)
    nothing = jnp.zeros_like(scale, bool)
    first = _Loop(zero, b, z, _dot(b, z), jnp.zeros_like(scale, jnp.int32), nothing, size > 0)
    last = lax.while_loop(lambda loop: jnp.any(loop.active), iterate, first)
    residuals = jnp.where(size > 0, jnp.sqrt(_dot(last.r, last.r)) / size, 0)
    return Solution(_times(scale, last.x), residuals, last.iterations, last.indefinite)


def _each_block(function: Callable[[Any], jax.Array], blocks: Blocks) -> jax.Array:
    """`(blocks,)` numbers."""
    return jnp.stack([function(block) for block in blocks])


def _dot(us: Blocks, vs: Blocks) -> jax.Array:
    # Multiply and sum: a dot of arrays that are split over an explicit mesh axis would need a sharding.
    products = jax.tree.map(lambda u, v: jnp.sum(u * v), list(us), list(vs))
    return _each_block(lambda block: jnp.stack(jax.tree.leaves(block)).sum(), products)


def _largest(blocks: Blocks) -> jax.Array:
    """The largest absolute value of each block; one if all are zero."""

    def of_block(block):
        return jnp.stack([jnp.max(jnp.abs(x), initial=0) for x in jax.tree.leaves(block)]).max()

    largest = _each_block(of_block, blocks)
    return jnp.where(largest > 0, largest, 1)


def _times(factors: jax.Array, blocks: Blocks) -> Blocks:
    return [jax.tree.map(lambda x, c=c: c * x, block) for c, block in zip(factors, blocks, strict=True)]


def _divided(blocks: Blocks, divisors: jax.Array) -> Blocks:
    return [jax.tree.map(lambda x, c=c: x / c, block) for c, block in zip(divisors, blocks, strict=True)]


def _added(us: Blocks, factors: jax.Array, vs: Blocks) -> Blocks:
    """u + factor v; u where the factor is zero, even if v is not finite."""
    return [
        jax.tree.map(lambda x, y, c=c: jnp.where(c == 0, x, x + c * y), u, v)
        for u, c, v in zip(us, factors, vs, strict=True)
    ]
