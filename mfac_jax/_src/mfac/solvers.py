"""How the m x m systems are solved from step to step: the seam, and the solvers of the package."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax

from mfac_jax._src.linalg import kept_inverse
from mfac_jax._src.linalg.solve import solve

Zeros = Callable[[tuple[int, ...]], jax.Array]  # of a shape: zeros of the Gram matrix's dtype and mesh


class Solver(NamedTuple):
    """Solves the damped m x m systems your way: pass it as `solver` to `scale_by_mfac`.

    K is the stack of Gram matrices `(blocks, m, m)`.

    Attributes:
      name: recorded in the state. A state is refused by a solver of another name.
      init: `(zeros, blocks, m)` to the solver's state; `zeros(shape)` makes its arrays. A state of zeros
        has to mean that nothing is known: `set_masks` puts it back to that.
      replace_row: `(state, row, index, accept)` to the state after row and column `index` of each K have
        become `row` `(blocks, m)`; unchanged where `accept` is false.
      solve: `(state, K, shift, rhs)` to (K + shift I)^-1 rhs `(blocks, m)` and the state; `shift` is
        `(blocks,)`. The solution has to be finite for any finite K. It runs for a refused gradient too,
        with zeros as `rhs`, and has to leave its state as it is then.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> def solve(state, K, shift, rhs):
      ...   system = K + shift[:, None, None] * jnp.eye(K.shape[-1])
      ...   return jnp.linalg.solve(system, rhs[..., None])[..., 0], state
      >>> lu = mfac_jax.components.Solver(
      ...   name='lu',
      ...   init=lambda zeros, blocks, m: (),
      ...   replace_row=lambda state, row, index, accept: state,
      ...   solve=solve,
      ... )
      >>> tx = mfac_jax.scale_by_mfac(num_grads=1, damping=1.0, solver=lu)
      >>> updates, state = tx.update(jnp.array([2.0, 0.0]), tx.init(jnp.zeros(2)))
      >>> print(updates)
      [0.4 0. ]
    """

    name: str
    init: Callable[[Zeros, int, int], Any]
    replace_row: Callable[[Any, jax.Array, jax.Array, jax.Array], Any]
    solve: Callable[[Any, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


# A factorisation a step: m^3 / 3 operations, nothing to keep.
CHOLESKY = Solver(
    name="cholesky",
    init=lambda zeros, blocks, m: (),
    replace_row=lambda state, row, index, accept: state,
    solve=lambda state, gram, shift, rhs: (solve(gram, shift[:, None], rhs), state),
)

# About ten readings of an m x m matrix a step, which is kept in the state.
KEPT_INVERSE = Solver(
    name="inverse",
    init=lambda zeros, blocks, m: kept_inverse.KeptInverse(zeros((blocks, m, m)), zeros((blocks,))),
    replace_row=kept_inverse.replace_row,
    solve=kept_inverse.solve,
)
# The inverse in the state, but used on CPU alone: elsewhere it stays as it is, and Cholesky solves.
_KEPT_ON_CPU = KEPT_INVERSE._replace(
    replace_row=kept_inverse.replace_row_on_cpu, solve=kept_inverse.solve_on_cpu
)
# On CPU Cholesky takes 10 ms at 1,024 rows, the kept inverse 4; at 512 they take 2.4 and 1.1, and a reading
# of 100,000 columns 8.
_MANY_ROWS = 1024
SolverName = Literal["auto", "cholesky", "inverse"]
SOLVERS = {solver.name: solver for solver in (CHOLESKY, KEPT_INVERSE)}


def auto_solver(num_grads: int) -> Solver:
    """The solver that suits windows of this many rows. It is the same on all platforms, as states move."""
    return _KEPT_ON_CPU if num_grads >= _MANY_ROWS else CHOLESKY
