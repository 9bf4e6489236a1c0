"""CG-FAC: the natural gradient of K-FAC by conjugate gradients, as an optax transform."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import checks, numerics, schedules, trees
from mfac_jax._src.base.accept import accept_or_refuse
from mfac_jax._src.base.forward_mode import forward_only
from mfac_jax._src.cgfac import curvature_checks, solve
from mfac_jax._src.cgfac.layers import Factors
from mfac_jax._src.cgfac.state import ScaleByCGFACState, check_state, first_state
from mfac_jax._src.cgfac.window import check_window, empty_window, remember
from mfac_jax._src.linalg.conjugate_gradients import Limits

DAMPING, TOLERANCE, MAX_ITERATIONS = 1e-2, 0.1, 20
_MEMORY = 0.99  # of the running mean of squares: about a hundred gradients


def scale_by_cgfac(
    damping: optax.ScalarOrSchedule = DAMPING,
    *,
    tolerance: float | jax.Array = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
    norm_constraint: float | jax.Array | None = None,
    num_batches: int = 1,
    factors: Factors | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients with K-FAC's Fisher matrix, by conjugate gradients (CG-FAC).

    The Fisher matrix has one block per layer. With a_n the layer's inputs and b_n its output gradients for
    the N examples of the batch, the layer's update V (a bias is its last row) solves::

        A V B + damping V = gradient,    A = sum_n a_n a_n^T / N,    B = sum_n b_n b_n^T / N

    Neither A nor B is formed. `update` needs the extra argument `curvature`, one of

    - a dict from the path of each kernel to its `LayerFactors`: see `value_and_grad_with_factors`. Any
      other leaf has the matrix N s I, with s a running mean of its squared gradients.
    - a function that multiplies a tree like the parameters by a positive semidefinite matrix F: see
      `gauss_newton`, `empirical_fisher`. All parameters are then one system. The extra argument
      `preconditioner` may be a function that multiplies by an approximate inverse of F + damping I.

    A gradient with a NaN or an Inf comes back unchanged; factors with one give updates of zeros. Either
    changes only `grads_rejected` in the state. In `jax.shard_map` and `jax.pmap`, first average the
    gradient and gather the factors (`jax.lax.all_gather` with `tiled=True`). Updates have derivatives in
    forward mode (`jax.jvp`, `jax.jacfwd`). Outside of jit, functions may be made anew at each step: nothing
    is compiled for them. A tree of arrays with a `__call__`, as modules have, is not taken for a function.

    Args:
      damping: > 0, a number or a schedule over accepted gradients. A larger one is closer to gradient
        descent with the rate 1 / damping. Directions that the batch does not span meet it alone: average
        updates (`optax.ema` after this transform), not gradients.
      tolerance: > 0, the largest relative error of a solution. On digits 0.01 trained no better than 0.1.
      max_iterations: >= 1, after which a solution is taken as it is. On digits, systems took 8.
      norm_constraint: > 0, or None. An update whose product with the gradient is larger is shortened, to
        this squared norm in the damped Fisher matrix.
      num_batches: how many of the last batches make the Fisher matrix, >= 1. State and work grow with it.
        On digits with a damping of 1e-3, four took two thirds of the steps of one.
      factors: needed if `num_batches` > 1: what `curvature` will be, or its shapes, from `jax.eval_shape`.

    Returns:
      A transform with the state `ScaleByCGFACState`. It ignores `params`, and needs `curvature`.

    Raises:
      TypeError: an argument, `curvature` or the state has a wrong type; a leaf is not a real floating-point
        array; an update is differentiated in reverse mode.
      ValueError: an argument is out of range; `curvature` is missing or does not fit the parameters; the
        state was made for another `num_batches`, or lacks a field; `preconditioner` comes with factors.

    Example:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> params, x = {'kernel': jnp.ones((3, 2))}, jax.random.normal(jax.random.key(0), (8, 3))
      >>> loss = lambda p: jnp.mean(jnp.sum((x @ p['kernel']) ** 2, axis=1))
      >>> tx = mfac_jax.scale_by_cgfac(damping=1.0)
      >>> value, grads, factors = mfac_jax.value_and_grad_with_factors(loss)(params)
      >>> updates, state = tx.update(grads, tx.init(params), curvature=factors)
      >>> bool(loss({'kernel': params['kernel'] - 0.1 * updates['kernel']}) < value)
      True

    References:
      Chen, `An iterative K-FAC algorithm for Deep Learning <https://arxiv.org/abs/2101.00218>`_, 2021. Only
      its abstract was available. It gives K-FAC, solved by matrix-free CG; the rest is our choice. K-FAC:
      Martens, Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, ICML 2015.

      Eschenhagen et al., `Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures
      <https://arxiv.org/abs/2311.00636>`_, NeurIPS 2023: kernels used at several places ('expand').
    """
    checks.check_positive("damping", damping, str(DAMPING), or_schedule=True)
    checks.check_positive("tolerance", tolerance, str(TOLERANCE))
    max_iterations = checks.check_size("max_iterations", max_iterations, str(MAX_ITERATIONS))
    if norm_constraint is not None:
        checks.check_positive("norm_constraint", norm_constraint, "1.0")
    num_batches = checks.check_size("num_batches", num_batches, "4")
    if num_batches > 1 or factors is not None:
        curvature_checks.check_factors("factors", factors)

    def init(params: optax.Params) -> Any:
        trees.check_params(params)
        if factors is None:
            return first_state(params, optax.EmptyState())
        # optax.tree.map_params calls with a tree that has no leaves, which no factors fit.
        has_leaves = bool(jax.tree.leaves(params))
        shown = curvature_checks.shown_factors(factors, params) if has_leaves else factors
        return first_state(params, empty_window(shown, num_batches))

    def update(updates, state, params=None, *, curvature: Any = None, preconditioner=None, **extra_args):
        del params, extra_args
        newest = _checked_factors(state, updates, curvature, preconditioner, num_batches)
        state = jax.tree.map(jnp.asarray, state)  # of NumPy's arrays, as checkpoints have them
        finite, dtype = numerics.all_finite(updates), state.mean_squares.dtype
        accept = finite & numerics.all_finite(newest)
        gradient = jax.tree.map(lambda g: numerics.bounded(jnp.where(accept, g, 0), dtype), updates)
        newest = jax.tree.map(lambda x: jnp.where(accept, x, 0), newest)
        seen = jnp.asarray(optax.safe_increment(state.grads_seen))
        mean_squares = _MEMORY * state.mean_squares + (1 - _MEMORY) * _mean_squares(gradient, dtype)
        limits = Limits(
            schedules.damping_at(damping, state.grads_seen, dtype),
            jnp.asarray(tolerance, dtype),
            jnp.asarray(max_iterations, jnp.int32),
        )
        window, known = remember(state.window, newest, state.grads_seen)
        if newest:
            unbiased = mean_squares / (1 - _MEMORY ** seen.astype(dtype))
            solved = solve.solve_layers(known, gradient, unbiased, limits, num_batches)
        else:
            solved = solve.solve_whole(curvature, preconditioner, gradient, limits)
        solved = [forward_only(solve.finite_or_zero(leaf), "scale_by_cgfac") for leaf in solved]
        solution = jax.tree.unflatten(jax.tree.structure(updates), [leaf.x for leaf in solved])
        length = 1 if norm_constraint is None else _shortening(gradient, solution, norm_constraint)
        new = jax.tree.map(
            lambda g, x: jnp.where(finite, numerics.narrow(length * x, g.dtype), g), updates, solution
        )
        changed = {"grads_seen": seen, "window": window, "mean_squares": mean_squares}
        after = state._replace(**changed, **solve.reports(solved, dtype))
        return new, accept_or_refuse(accept, state, after)

    return optax.GradientTransformationExtraArgs(init, update)


def _checked_factors(
    state: ScaleByCGFACState, updates: optax.Updates, curvature: Any, preconditioner: Any, num_batches: int
) -> Any:
    """The factors for the updates, none if the curvature is a function; raise if anything does not fit."""
    trees.check_params(updates)
    check_state(state, updates, num_batches)
    curvature_checks.check_curvature(curvature, preconditioner, num_batches)
    is_mapping = isinstance(curvature, Mapping)
    factors = curvature_checks.shown_factors(curvature, updates) if is_mapping else {}
    check_window(state.window, factors)
    return factors


def _mean_squares(gradient: optax.Updates, dtype: jnp.dtype) -> jax.Array:
    """Mean squared entry of each leaf, `(leaves,)`."""
    squares = [numerics.square(g, dtype) / max(1, g.size) for g in jax.tree.leaves(gradient)]
    return jnp.asarray(squares, dtype)


def _shortening(gradient: optax.Updates, solution: optax.Updates, limit) -> jax.Array:
    """The factor that brings the squared norm of the solution in the damped Fisher matrix to the limit."""
    # The solution x has (F + damping I) x = g, so this squared norm is g . x.
    # Multiply and sum: a dot of arrays that are split over an explicit mesh axis would need a sharding.
    products = jax.tree.map(lambda g, x: jnp.sum(g * x), gradient, solution)
    squared = jnp.asarray(optax.tree.sum(products))
    limit, is_longer = jnp.asarray(limit, squared.dtype), squared > limit
    return jnp.where(is_longer, jnp.sqrt(numerics.quotient(limit, jnp.where(is_longer, squared, 1))), 1)
