"""Conjugate gradients for several systems at once, in one loop: blocks of one or more systems each.

The systems share the loop and nothing else. Each has its own step lengths, and rests once it has converged.

`jax.scipy.sparse.linalg.cg` would take all blocks as one system. It reports neither the residual, nor the
iterations, nor that a matrix was not positive definite.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from mfac_jax._src.base import numerics

Blocks = list[Any]  # of trees of arrays; in a stacked block they have a first axis of independent systems
Product = Callable[[Blocks], Blocks]
Stacked = tuple[bool, ...]  # which blocks are


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
    """What `solve` found. Numbers are lists: `()` for each block, `(systems,)` if it is stacked.

    Attributes:
      blocks: x, finite.
      residuals: the norm of b - A x over that of b, as the recursion has it.
      iterations: products that the system took.
      indefinite: whether the system stopped because A was not positive definite, or not finite.
    """

    blocks: Blocks
    residuals: list[jax.Array]  # of the dtype of the blocks
    iterations: list[jax.Array]  # int32
    indefinite: list[jax.Array]  # bool


class _Loop(NamedTuple):
    """What an iteration hands to the next one. Numbers are those of all systems, block by block.

    Attributes:
      x: the solution so far.
      r: b - A x.
      p: the next direction.
      rz: r times the preconditioned r.
      iterations: as in `Solution`.
      indefinite: as in `Solution`.
      active: which systems go on.
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
    stacked: Stacked | None = None,
) -> Solution:
    """Solve (F + damping I) x = b for every system, where `product` multiplies by F >= 0.

    Every x on the way has a positive product with b, so a solution that stops early still descends.

    A system stops at a direction without positive curvature. If that is the first direction, the system
    takes one step along it, with the absolute value of the curvature; no step if that is not finite.

    Args:
      product: F times the blocks. It must not mix systems.
      rhs: b, of finite entries, of one dtype.
      limits: the damping, and when to stop.
      precondition: multiplies the blocks by a positive definite matrix near (F + damping I)^-1.
      stacked: which blocks hold several systems, along a first axis; None for no block.
    """
    stacked = stacked or (False,) * len(rhs)

    def iterate(loop: _Loop) -> _Loop:
        moved = _moved(loop, product(loop.p), limits, stacked)
        return _turned(loop, moved, precondition(moved.r), limits, stacked)

    scale, b = _scaled(rhs, stacked)
    first = _first(b, precondition(b), stacked)
    return _solution(scale, b, _repeat(iterate, first), stacked)


def _repeat(iterate: Callable[[_Loop], _Loop], loop: _Loop) -> _Loop:
    """Iterate until no system is active."""
    # Outside of jit a while_loop would be compiled anew for each new function that multiplies. In Python it
    # runs in what is compiled already.
    while not isinstance(loop.active, Tracer):
        if not jnp.any(loop.active):
            return loop
        loop = iterate(loop)
    return lax.while_loop(lambda loop: jnp.any(loop.active), iterate, loop)


@functools.partial(jax.jit, static_argnames="stacked")
def _scaled(rhs: Blocks, stacked: Stacked) -> tuple[jax.Array, Blocks]:
    """The largest entry of each system, and the right-hand sides divided by it."""
    # Squares of tiny or huge entries would leave the range of float32. The scale has no derivative: in the
    # end the solution is multiplied with it.
    scale = lax.stop_gradient(_largest(rhs, stacked))
    return scale, _each(lambda c, x: x / c, scale, stacked, rhs)


@functools.partial(jax.jit, static_argnames="stacked")
def _first(b: Blocks, z: Blocks, stacked: Stacked) -> _Loop:
    """Before the first iteration."""
    rz = _dot(b, z, stacked)
    nothing = jnp.zeros_like(rz, bool)
    return _Loop(
        jax.tree.map(jnp.zeros_like, b),
        b,
        z,
        rz,
        jnp.zeros_like(rz, jnp.int32),
        nothing,
        _dot(b, b, stacked) > 0,
    )


@functools.partial(jax.jit, static_argnames="stacked")
def _moved(loop: _Loop, Fp: Blocks, limits: Limits, stacked: Stacked) -> _Loop:
    """After a step along the direction; `active` are the systems for which it was a good one."""
    Ap = _added(Fp, limits.damping * jnp.ones_like(loop.rz), loop.p, stacked)
    curvature = _dot(loop.p, Ap, stacked)
    is_positive = (curvature > 0) & jnp.isfinite(curvature)
    is_first = loop.iterations == 0
    length = numerics.quotient(loop.rz, jnp.where(curvature == 0, 1, jnp.abs(curvature)))
    takes_step = loop.active & (is_positive | (is_first & (curvature != 0))) & jnp.isfinite(length)
    length = jnp.where(takes_step, length, 0)
    return loop._replace(
        x=_added(loop.x, length, loop.p, stacked),
        r=_added(loop.r, -length, Ap, stacked),
        iterations=loop.iterations + loop.active.astype(jnp.int32),
        indefinite=loop.indefinite | (loop.active & ~is_positive),
        active=loop.active & is_positive,
    )


@functools.partial(jax.jit, static_argnames="stacked")
def _turned(before: _Loop, moved: _Loop, z: Blocks, limits: Limits, stacked: Stacked) -> _Loop:
    """With the next direction, from the preconditioned residual."""
    damping, tolerance, max_iterations = limits
    # No eigenvalue is below the damping, so the error is at most |r| / damping. It is compared with the
    # solution, whose norm is at least |x| minus the error.
    smallest = jnp.sqrt(_dot(moved.x, moved.x, stacked))
    has_converged = (
        jnp.sqrt(_dot(moved.r, moved.r, stacked)) <= tolerance / (1 + tolerance) * damping * smallest
    )
    rz = _dot(moved.r, z, stacked)
    goes_on = moved.active & ~has_converged & (rz > 0)
    ratio = jnp.where(goes_on, numerics.quotient(rz, jnp.where(goes_on, before.rz, 1)), 0)
    active = goes_on & (moved.iterations < max_iterations)
    return moved._replace(p=_added(z, ratio, before.p, stacked), rz=rz, active=active)


@functools.partial(jax.jit, static_argnames="stacked")
def _solution(scale: jax.Array, b: Blocks, last: _Loop, stacked: Stacked) -> Solution:
    left, size = _dot(last.r, last.r, stacked), _dot(b, b, stacked)
    # Nothing is left of a system that is solved exactly. The derivative of the root is not finite there.
    residuals = jnp.where(left > 0, jnp.sqrt(jnp.where(left > 0, left, 1)), 0)
    residuals = residuals / jnp.sqrt(jnp.where(size > 0, size, 1))
    blocks = _each(lambda c, x: c * x, scale, stacked, last.x)
    numbers = (_of_blocks(x, stacked, blocks) for x in (residuals, last.iterations, last.indefinite))
    return Solution(blocks, *numbers)


def _of_blocks(numbers: jax.Array, stacked: Stacked, blocks: Blocks) -> list[jax.Array]:
    """The numbers of all systems as those of each block: `()`, or `(systems,)` if it is stacked."""
    sizes = [len(jax.tree.leaves(x)[0]) if many else 1 for many, x in zip(stacked, blocks, strict=True)]
    ends = itertools.accumulate(sizes)
    return [
        numbers[end - size : end] if many else numbers[end - 1]
        for many, size, end in zip(stacked, sizes, ends, strict=True)
    ]


def _each(
    function: Callable[..., jax.Array], numbers: jax.Array, stacked: Stacked, *blocks: Blocks
) -> Blocks:
    """The function of the systems' numbers, which broadcast, and of the arrays of the blocks."""

    def of_block(c, *trees):
        def of_leaves(*xs):
            return function(c.reshape(c.shape + (1,) * (xs[0].ndim - c.ndim)) if c.ndim else c, *xs)

        return jax.tree.map(of_leaves, *trees)

    of_blocks = _of_blocks(numbers, stacked, blocks[0])
    return [of_block(*of_one) for of_one in zip(of_blocks, *blocks, strict=True)]


def _each_system(function: Callable[..., jax.Array], stacked: Stacked, *blocks: Blocks) -> list[jax.Array]:
    """For each block `(leaves, systems)` numbers, from a function of arrays and of the axes of a system."""

    def of_block(many, *trees):
        def of_leaves(*xs):
            return function(*xs, tuple(range(many, xs[0].ndim))).reshape(-1)

        return jnp.stack(jax.tree.leaves(jax.tree.map(of_leaves, *trees)))

    return [of_block(*of_one) for of_one in zip(stacked, *blocks, strict=True)]


def _dot(us: Blocks, vs: Blocks, stacked: Stacked) -> jax.Array:
    # Multiply and sum: a dot of arrays that are split over an explicit mesh axis would need a sharding.
    products = _each_system(lambda u, v, axes: jnp.sum(u * v, axes), stacked, us, vs)
    return jnp.concatenate([of_leaves.sum(0) for of_leaves in products])


def _largest(blocks: Blocks, stacked: Stacked) -> jax.Array:
    """The largest absolute value of each system; one if all are zero."""
    of_blocks = _each_system(lambda x, axes: jnp.max(jnp.abs(x), axes, initial=0), stacked, blocks)
    largest = jnp.concatenate([of_leaves.max(0) for of_leaves in of_blocks])
    return jnp.where(largest > 0, largest, 1)


def _added(us: Blocks, factors: jax.Array, vs: Blocks, stacked: Stacked) -> Blocks:
    """u + factor v; u where the factor is zero, even if v is not finite."""
    return _each(lambda c, u, v: jnp.where(c == 0, u, u + c * v), factors, stacked, us, vs)
