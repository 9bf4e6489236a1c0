"""Solutions of the damped m x m systems, finite for any finite Gram matrix.

With G the window `(m, d)` of a block, K = G G^T and F = damping I + G^T G / n, the inverse of F acts on the
rows of G through K: F^-1 G^T w = n G^T (K + n damping I)^-1 w (the push-through identity). Nothing is
subtracted, so the digits of w survive small damping.
"""

import functools
import math

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jax import lax

from mfac_jax._src.linalg.batches import of_each
from mfac_jax._src.linalg.gram import matvec

# One step of iterative refinement halves the error of the solve. At m = 1024 it would add 5 % to the
# step of a 272k-parameter window on CPU, at 512 it is lost in the noise.
_MAX_REFINED = 512
# cuSOLVER takes 0.21 ms for one matrix of this size and 0.25 for a batch of two, but 1.03 and 1.66 at 1024
# (measured in pytorch/pytorch#57788).
_MAX_UNSPLIT = 256


@jax.jit  # outside of a user's jit, the conditional would be compiled at every call
def solve(gram: jax.Array, shift: jax.Array, rhs: jax.Array) -> jax.Array:
    """(K + shift I)^-1 rhs, finite for any finite Gram matrix.

    When gradients repeat and the shift is small against their squared norm, Cholesky breaks down, or
    its result is rounding noise. A jitter then takes the shift's place.
    """
    solution = lax.platform_dependent(
        *lax.stop_gradient((gram, shift, rhs)), cuda=solve_twice, rocm=solve_twice, default=_solve
    )
    return with_derivative(solution, gram, shift, rhs)


def _solve(gram: jax.Array, shift: jax.Array, rhs: jax.Array) -> jax.Array:
    system, scale = _balanced(gram, shift)
    factor = _cholesky(system)
    # The solve stands outside of the conditional: inside, XLA copies the factor into both branches.
    solution = _cholesky_solve(factor, scale * rhs)
    if gram.shape[-1] <= _MAX_REFINED:
        solution += _cholesky_solve(factor, scale * rhs - matvec(system, solution))
    solution *= scale
    terms = matvec(gram, rhs) * solution
    good = _is_sound(factor) & keeps_digits(terms, jnp.abs(terms))

    def with_jitter():
        jittered = scale * _cholesky_solve(_jittered_cholesky(system), scale * rhs)
        return jnp.where(good, solution, jittered)

    return lax.cond(jnp.all(good), lambda: solution, with_jitter)


def solve_twice(gram: jax.Array, shift: jax.Array, rhs: jax.Array) -> jax.Array:
    """What `solve` promises, without a branch: at each, a GPU waits for the host.

    All systems are solved as they are and with a jitter, in one batch. A GPU does both in little more than
    the time of one. Where even the jitter is not enough, c is rhs over twice the row sums.
    """
    system, scale = _balanced(gram, shift)
    identity = jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
    systems = jnp.concatenate([system, system + _least_jitter(system) * identity])
    roots = _root_of_inverse(systems)
    scaled = jnp.tile(scale * rhs, (2, 1))

    def inverse(x):
        return matvec(roots.mT, matvec(roots, x))

    solutions = inverse(scaled)
    solutions += inverse(scaled - matvec(systems, solutions))
    solution, jittered = jnp.split(solutions * jnp.tile(scale, (2, 1)), 2)
    is_sound, is_jittered_sound = jnp.split(_has_sound_pivots(1 / jnp.square(_diagonal(roots))), 2)
    terms = matvec(gram, rhs) * solution
    good = is_sound & keeps_digits(terms, jnp.abs(terms))
    row_sums = jnp.sum(jnp.abs(system), axis=-1)
    least = scale * scale * rhs / (2 * jnp.max(row_sums, axis=-1, keepdims=True))
    return jnp.where(good, solution, jnp.where(is_jittered_sound, jittered, least))


def _root_of_inverse(matrix: jax.Array) -> jax.Array:
    """A lower triangular R with R^T R = A^-1 for each A in `(blocks, m, m)`, which is that of Cholesky.

    With A = [[A1, X^T], [X, A2]] and Y = X R1^T, R is [[R1, 0], [-R2 Y R1, R2]], where R2 is that of
    A2 - Y Y^T: all products of matrices. R is not finite where A is not positive definite.
    """
    m = matrix.shape[-1]
    if m <= _MAX_UNSPLIT:
        return _inverse_of_triangles(_cholesky(matrix))
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    half = m // 2
    first = _root_of_inverse(matrix[:, :half, :half])
    below = product(matrix[:, half:, :half], first.mT)
    second = _root_of_inverse(matrix[:, half:, half:] - product(below, below.mT))
    corner = -product(second, product(below, first))
    return jnp.block([[first, jnp.zeros_like(corner.mT)], [corner, second]])


@jax.custom_jvp
def with_derivative(solution: jax.Array, gram: jax.Array, shift: jax.Array, rhs: jax.Array) -> jax.Array:
    """The solution as it is, with the derivative of (K + shift I)^-1 rhs, however it was found.

    Loops on the way to it have no derivative in reverse mode, and lose digits in forward mode.
    """
    del gram, shift, rhs
    return solution


@with_derivative.defjvp
def _derivative(primals, tangents):
    """(K + shift I)^-1 (d rhs - (dK + d shift I) c)."""
    solution, gram, shift, _ = primals
    _, d_gram, d_shift, d_rhs = tangents

    def product(x):
        return matvec(gram, x) + shift * x

    def inverse(_, b):
        system, scale = _balanced(*lax.stop_gradient((gram, shift)))
        return scale * _cholesky_solve(_sound_cholesky(system), scale * b)

    rest = d_rhs - matvec(d_gram, solution) - d_shift * solution
    return solution, lax.custom_linear_solve(product, rest, inverse, symmetric=True)


@jax.custom_jvp
def inverse_root(gram: jax.Array, shift: jax.Array) -> jax.Array:
    """A `(blocks, m, m)` with A^T A = (K + diag(shift))^-1, as finite as `solve`.

    `shift` is `(blocks, m)`, or `(blocks, 1)` if all rows have the same.
    """
    system, scale = _balanced(gram, shift)
    return _inverse_of_triangles(_sound_cholesky(system)) * scale[..., None, :]


@inverse_root.defjvp
def _derivative_of_root(primals, tangents):
    """-A (dK + d diag(shift)) A^T A / 2: of all roots near A, only A^T A counts."""
    (gram, shift), (d_gram, d_shift) = primals, tangents
    root = inverse_root(gram, shift)
    d_system = d_gram + d_shift[..., None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
    factors = (root, d_system, root.mT, root)
    product = functools.reduce(functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST), factors)
    return root, -product / 2


def _sound_cholesky(system: jax.Array) -> jax.Array:
    """Cholesky factors of matrices with their diagonal near one, with a jitter for blocks that need one."""
    factor = _cholesky(system)
    good = _is_sound(factor)
    return lax.cond(
        jnp.all(good),
        lambda: factor,
        lambda: jnp.where(good[..., None], factor, _jittered_cholesky(system)),
    )


def _balanced(gram: jax.Array, shift: jax.Array) -> tuple[jax.Array, jax.Array]:
    """S (K + shift I) S and the diagonal of S, powers of two that bring the diagonal near one exactly."""
    system = gram + shift[..., None] * jnp.eye(gram.shape[-1], dtype=gram.dtype)[None]
    diagonal = _diagonal(system)
    _, exponent = jnp.frexp(diagonal)
    scale = jnp.ldexp(jnp.ones_like(diagonal), -(exponent // 2))
    return system * scale[..., :, None] * scale[..., None, :], scale


def keeps_digits(terms: jax.Array, magnitudes: jax.Array) -> jax.Array:
    """Whether a solution's rows do not cancel to noise, for each block, `(blocks, 1)`.

    The terms `(blocks, m)` add up to rhs^T K c, which is g.u / n of the update, and positive. With repeated
    gradients it is a small sum of large terms: rounding of some 10 eps of their magnitudes can turn the
    sign of the whole update.
    """
    magnitude = jnp.sum(magnitudes, axis=-1, keepdims=True)
    return jnp.sum(terms, axis=-1, keepdims=True) >= 50 * _eps(terms) * magnitude


def _jittered_cholesky(matrix: jax.Array) -> jax.Array:
    """Sound Cholesky factors of matrices with their diagonal near one, after adding a jitter to it.

    Twice the row sums is always enough; a NaN ends the loop as it is.
    """
    m = matrix.shape[-1]
    identity = jnp.eye(m, dtype=matrix.dtype)[None]

    def retry(carry):
        jitter, _ = carry
        factor = _cholesky(matrix + jitter * identity)
        return jnp.where(_is_sound(factor)[..., None], jitter, 16 * jitter), factor

    def is_worth_a_try(carry):
        jitter, factor = carry
        return ~jnp.all(_is_sound(factor)) & jnp.all(jitter < 256 * m)

    start = jnp.full((*matrix.shape[:-2], 1, 1), _least_jitter(matrix), matrix.dtype)
    return lax.while_loop(is_worth_a_try, retry, (start, jnp.zeros_like(matrix)))[1]


def _least_jitter(matrix: jax.Array) -> float:
    """The larger the jitter, the less the coefficients of repeated gradients cancel.

    m^2 eps keeps their sum right to about 10 %.
    """
    m = matrix.shape[-1]
    return max(8 * m, m**2) * _eps(matrix)


def _is_sound(factor: jax.Array) -> jax.Array:
    """Whether the pivots of each Cholesky factor, `(blocks, 1)`, are sound."""
    return _has_sound_pivots(jnp.square(_diagonal(factor)))


def _has_sound_pivots(pivots: jax.Array) -> jax.Array:
    """Whether the pivots of each block, `(blocks, 1)`, are all numbers and above the rounding noise."""
    noise = 2 * math.sqrt(pivots.shape[-1]) * _eps(pivots)
    return jnp.min(pivots, axis=-1, keepdims=True) >= noise


def _diagonal(matrix: jax.Array) -> jax.Array:
    return jnp.diagonal(matrix, axis1=-2, axis2=-1)


def _eps(x: jax.Array) -> float:
    return float(jnp.finfo(x.dtype).eps)


def _cholesky(matrix: jax.Array) -> jax.Array:
    # Transposed, the symmetric matrix is in LAPACK's order as it stands and need not be copied.
    return of_each(lambda A: lax.linalg.cholesky(A.mT, symmetrize_input=False), matrix)


def _inverse_of_triangles(factor: jax.Array) -> jax.Array:
    identity = jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return of_each(lambda L: jax.scipy.linalg.solve_triangular(L, identity, lower=True), factor)


def _cholesky_solve(factor: jax.Array, rhs: jax.Array) -> jax.Array:
    return of_each(lambda L, b: jax.scipy.linalg.cho_solve((L, True), b), factor, rhs)
