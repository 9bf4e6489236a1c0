"""CG-FAC: the natural gradient of K-FAC by conjugate gradients, as an optax transform."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from mfac_jax._src.base import checks, numerics, schedules, trees
from mfac_jax._src.cgfac import curvature_checks
from mfac_jax._src.cgfac.layers import Factors, LayerFactors, LayerFisher, empty_window, remember
from mfac_jax._src.cgfac.operators import Operator
from mfac_jax._src.linalg import conjugate_gradients
from mfac_jax._src.rows import mesh as _mesh

_MEMORY = 0.99  # of the running mean of squares: about a hundred gradients


class ScaleByCGFACState(NamedTuple):
    """State of `scale_by_cgfac`.

    Numbers `(leaves,)` are one for each leaf of the parameters, in the order of `jax.tree.leaves`; those
    of a layer stand at its kernel and at its bias.

    Attributes:
      grads_seen: gradients accepted so far; stops at the largest int32.
      grads_rejected: gradients refused because an entry, or one of the factors, was NaN or Inf; stops
        there too.
      solution: of the last systems, where the next ones start; without leaves where they start from zero.
      window: factors of the last batches, with a second axis of batches; without leaves where there is one.
      mean_squares: the running mean of the squared entries of the gradients, without its bias correction.
      residuals: the norm of what was left of each system, over that of its right-hand side.
      iterations: products that each system took; 0 for a leaf without factors.
      indefinite: whether a system was seen not to be positive definite, or not to be finite.
    """

    grads_seen: jax.Array  # () int32
    grads_rejected: jax.Array  # () int32
    solution: optax.Params | optax.EmptyState  # like the parameters, float32, float64 with a float64 leaf
    window: Any  # Factors of arrays (N, num_batches, ...) of their dtypes, or EmptyState
    mean_squares: jax.Array  # (leaves,), float32, float64 with a float64 leaf
    residuals: jax.Array  # (leaves,), of that dtype
    iterations: jax.Array  # (leaves,) int32
    indefinite: jax.Array  # (leaves,) bool


class _Solved(NamedTuple):
    """A leaf of a solution, with what the state says of it."""

    x: jax.Array
    residual: jax.Array
    iterations: jax.Array
    indefinite: jax.Array


def scale_by_cgfac(
    damping: optax.ScalarOrSchedule = 1e-2,
    *,
    tolerance: float | jax.Array = 0.1,
    max_iterations: int = 20,
    norm_constraint: float | jax.Array | None = None,
    num_batches: int = 1,
    factors: Factors | None = None,
    warm_start: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition gradients with K-FAC's Fisher matrix, by conjugate gradients (CG-FAC).

    The Fisher matrix has a block for each layer. With the layer's inputs :math:`a_n` and output gradients
    :math:`b_n` for the N examples of the batch, the update V of a kernel, with its bias as one more row,
    solves

    .. math::
      A V B + \lambda V = \nabla, \qquad
      A = \tfrac{1}{N} \sum_n a_n a_n^\top, \qquad B = \tfrac{1}{N} \sum_n b_n b_n^\top.

    Neither A, nor B, nor their Kronecker product is made: products come from the inputs and output
    gradients themselves. All layers advance in one loop, each with its own step lengths, until its error is
    within the tolerance. Where a batch has fewer examples than a layer has inputs or outputs, that side is
    solved in the space that the examples span: an iteration then costs O(N^3), and the layer itself is
    passed over three times.

    The Fisher matrix is that of the batch at hand, or of the last `num_batches`. Directions that these do
    not know meet the damping alone, so average updates (`optax.ema` after this transform), not gradients:
    an average of old gradients before it would be multiplied with 1 / damping.

    Of the paper there was only the abstract at hand. From there: K-FAC's natural gradient, by conjugate
    gradients, without making the Fisher matrix or its factors. Inferred: the systems as above, convolutions
    and biases as in K-FAC, the space of the examples, and everything about tolerances and starts.

    `update` takes the extra argument `curvature`, one of

    - a dict from the path of each kernel, as in 'Dense_0/kernel', to its `LayerFactors`, as
      `value_and_grad_with_factors` makes it from the same backward pass as the gradient. A leaf that it
      does not name, such as the scale of a normalisation or an embedding, has the Fisher matrix
      :math:`N s I`, with s the mean of its squared gradients over about a hundred steps: what a diagonal
      matrix would have on average, where gradients are mostly noise.
    - a function from a tree like the parameters to its product with a positive semidefinite matrix, such as
      `gauss_newton` and `empirical_fisher` make: one system for all parameters. With it, `preconditioner`
      may be a function that multiplies with a positive definite matrix near :math:`(F + \lambda I)^{-1}`,
      such as `functools.partial(mfac_jax.ihvp, state, damping=...)` with the state of M-FAC.

    A gradient with a NaN or an Inf is returned as it came, and leaves the state as it was but for
    `grads_rejected`. So do factors with one, but for updates of zeros. Whatever the curvature, updates of
    finite gradients are finite. A system that turns out not to be positive definite ends where it is, and
    leaves do not move whose numbers overflow; `indefinite` in the state reports both.

    On a mesh, under `jax.jit`, examples and parameters may be split over the devices in any way. In
    `jax.shard_map` and `jax.pmap` average the gradient and gather the factors first (`jax.lax.all_gather`
    with `tiled=True`).

    Args:
      damping: lambda, > 0, a number or a schedule over the gradients accepted, in units of the Fisher
        matrix of single examples. 1e-2 did on digits; larger is closer to gradient descent with rate
        1 / damping. Values of a schedule outside of 1.2e-38 to 1.3e30 are moved to the nearer end.
      tolerance: > 0, of the error of a solution relative to it: residuals are compared with the damping,
        below which there is no eigenvalue. 0.1: on digits 0.01 did no better, 0.5 took a third longer.
      max_iterations: an int >= 1, after which a solution is taken as it is. 20: systems took 8 on digits.
      norm_constraint: > 0, or None. Bound on the squared norm of the update in the damped Fisher matrix, of
        all layers together: with a larger :math:`\nabla^\top V` it is shortened until its norm is that.
      num_batches: batches whose factors the Fisher matrix is made of, an int >= 1; all but the newest were
        taken at earlier parameters. The state holds them, and the work grows with them. On digits, with a
        damping of 1e-3, four took two thirds of the steps of one. Until there are as many, the first batch
        stands for those that are to come.
      factors: what `curvature` will be, or its shapes, as `jax.eval_shape` of a step's function gives them:
        for `num_batches` above 1, where the state needs to know. All batches are then of that size.
      warm_start: whether a system starts at the last solution, at its best length, which takes a copy of
        the parameters. Worth it where gradients change slowly: with full batches it took 37 to 45 % fewer
        iterations, with batches of 64 as many as without.

    Returns:
      A transform whose state is a `ScaleByCGFACState`. It ignores `params`, and needs `curvature`.

    Raises:
      TypeError: `max_iterations` is not an int; a parameter or an update is not a real floating-point
        array; `curvature` is neither a dict of `LayerFactors` nor a function.
      ValueError: an argument is out of its range; `curvature` is missing; factors name no parameter, or do
        not have the sizes of the kernel or bias; updates do not have the tree of the parameters given to
        `init`; `preconditioner` comes with factors.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> params = {'kernel': jnp.ones((3, 2)), 'bias': jnp.zeros(2)}
      >>> x = jax.random.normal(jax.random.key(0), (8, 3))
      >>> loss = lambda p: jnp.mean(jnp.sum((x @ p['kernel'] + p['bias']) ** 2, axis=1))
      >>> tx = optax.chain(mfac_jax.scale_by_cgfac(damping=1.0), optax.scale(-0.5))
      >>> state = tx.init(params)
      >>> for _ in range(40):
      ...   value, grads, factors = mfac_jax.value_and_grad_with_factors(loss)(params)
      ...   updates, state = tx.update(grads, state, params, curvature=factors)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(value < 0.1)
      True

    References:
      Yingshi Chen, `An iterative K-FAC algorithm for Deep Learning <https://arxiv.org/abs/2101.00218>`_,
      2021.

      James Martens, Roger Grosse, `Optimizing Neural Networks with Kronecker-factored Approximate Curvature
      <https://arxiv.org/abs/1503.05671>`_, ICML 2015.

      Roger Grosse, James Martens, `A Kronecker-factored approximate Fisher matrix for convolution layers
      <https://arxiv.org/abs/1602.01407>`_, ICML 2016 (convolutions).

      Runa Eschenhagen, Alexander Immer, Richard Turner, Frank Schneider, Philipp Hennig,
      `Kronecker-Factored Approximate Curvature for Modern Neural Network Architectures
      <https://arxiv.org/abs/2311.00636>`_, NeurIPS 2023 (kernels used at several places; here their
      'expand').
    """
    if not callable(damping):
        checks.check_positive("damping", damping, "1e-2")
    checks.check_positive("tolerance", tolerance, "0.1")
    max_iterations = checks.check_size("max_iterations", max_iterations, "20")
    if norm_constraint is not None:
        checks.check_positive("norm_constraint", norm_constraint, "1.0")
    checks.check_bool("warm_start", warm_start)
    num_batches = checks.check_size("num_batches", num_batches, "4")
    if num_batches > 1 or factors is not None:
        curvature_checks.check_factors("factors", factors)

    def init(params: optax.Params) -> ScaleByCGFACState:
        trees.check_params(params)
        dtype, zeros = numerics.accumulation_dtype(params), _mesh.zeros_like_params(params)
        leaves, window = (len(jax.tree.leaves(params)),), optax.EmptyState()
        if factors is not None and num_batches > 1:
            is_known = leaves != (0,)  # optax.tree.map_params calls with a tree that has no leaves
            kept = curvature_checks.of_leaves(factors, params) if is_known else factors
            window = empty_window(kept, num_batches)
        return ScaleByCGFACState(
            grads_seen=zeros((), jnp.int32),
            grads_rejected=zeros((), jnp.int32),
            solution=optax.tree.zeros_like(params, dtype) if warm_start else optax.EmptyState(),
            window=window,
            mean_squares=zeros(leaves, dtype),
            residuals=zeros(leaves, dtype),
            iterations=zeros(leaves, jnp.int32),
            indefinite=zeros(leaves, jnp.bool_),
        )

    def update(updates, state, params=None, *, curvature: Any = None, preconditioner=None, **extra_args):
        del params, extra_args
        has_solution = not isinstance(state.solution, optax.EmptyState)
        checks.check_made_with("warm_start", warm_start, has_solution)
        is_window = not isinstance(state.window, optax.EmptyState)
        kept = jnp.shape(jax.tree.leaves(state.window)[0])[1] if is_window else 1
        checks.check_made_with("num_batches", num_batches, kept)
        trees.check_params(updates)
        curvature_checks.check_leaves(updates, len(state.mean_squares))
        curvature_checks.check_curvature(curvature, preconditioner, num_batches)
        is_mapping = isinstance(curvature, Mapping)
        newest = curvature_checks.of_leaves(curvature, updates) if is_mapping else {}
        finite, dtype = numerics.all_finite(updates), numerics.accumulation_dtype(updates)
        accept = finite & numerics.all_finite(jax.tree.leaves(newest))
        gradient = jax.tree.map(lambda g: numerics.bounded(jnp.where(accept, g, 0), dtype), updates)
        start = state.solution if warm_start else optax.tree.zeros_like(gradient)
        seen = jnp.asarray(optax.safe_increment(state.grads_seen))
        mean_squares = _MEMORY * state.mean_squares + (1 - _MEMORY) * _mean_squares(gradient, dtype)
        limits = (
            schedules.damping_at(damping, state.grads_seen, dtype),
            jnp.asarray(tolerance, dtype),
            max_iterations,
        )
        window = state.window
        if is_mapping:
            newest = jax.tree.map(lambda x: jnp.where(accept, x, 0), newest)
            if is_window:
                curvature_checks.check_window(newest, window)
                newest = window = remember(window, newest, state.grads_seen)
            corrected = mean_squares / (1 - _MEMORY ** seen.astype(dtype))
            solved = _with_automatic_axes(_solve_layers, gradient)(
                newest, gradient, start, corrected, *limits, num_batches
            )
        else:
            solved = _solve_whole(curvature, preconditioner, gradient, start, *limits)
        solved = [_finite(leaf) for leaf in solved]
        solution = jax.tree.unflatten(jax.tree.structure(updates), [leaf.x for leaf in solved])
        factor = 1 if norm_constraint is None else _shortened(gradient, solution, norm_constraint)
        new = jax.tree.map(
            lambda g, x: jnp.where(finite, numerics.narrow(factor * x, g.dtype), g), updates, solution
        )
        accepted = ScaleByCGFACState(
            grads_seen=seen,
            grads_rejected=state.grads_rejected,
            solution=solution if warm_start else optax.EmptyState(),
            window=window,
            mean_squares=mean_squares,
            residuals=jnp.stack([leaf.residual for leaf in solved]),
            iterations=jnp.stack([leaf.iterations for leaf in solved]),
            indefinite=jnp.stack([leaf.indefinite for leaf in solved]),
        )
        rejected = state._replace(grads_rejected=optax.safe_increment(state.grads_rejected))
        return new, jax.tree.map(lambda new, old: jnp.where(accept, new, old), accepted, rejected)

    return optax.GradientTransformationExtraArgs(init, update)


def _finite(leaf: _Solved) -> _Solved:
    """Zeros where a number has overflowed, and reported as indefinite."""
    finite = jnp.all(jnp.isfinite(leaf.x))
    residual = jnp.nan_to_num(leaf.residual)
    return _Solved(jnp.where(finite, leaf.x, 0), residual, leaf.iterations, leaf.indefinite | ~finite)


def _mean_squares(gradient: optax.Updates, dtype: jnp.dtype) -> jax.Array:
    """Of the entries of each leaf, `(leaves,)`."""
    squares = [numerics.square(g, dtype) / max(1, g.size) for g in jax.tree.leaves(gradient)]
    return jnp.asarray(squares, dtype)


def _solve_whole(
    operator: Operator,
    preconditioner: Operator | None,
    gradient: optax.Updates,
    start: optax.Updates,
    damping: jax.Array,
    tolerance: jax.Array,
    max_iterations: int,
) -> list[_Solved]:
    """One system for all leaves."""
    curvature_checks.check_operator("curvature", operator, gradient)
    if preconditioner is not None:
        curvature_checks.check_operator("preconditioner", preconditioner, gradient)

    def on_block(operator: Operator) -> conjugate_gradients.Product:
        def product(blocks):
            return [jax.tree.map(lambda y, x: y.astype(x.dtype), operator(blocks[0]), blocks[0])]

        return product

    preconditioning = {} if preconditioner is None else {"precondition": on_block(preconditioner)}
    limits = (damping, tolerance, max_iterations)
    found = conjugate_gradients.solve(on_block(operator), [gradient], [start], *limits, **preconditioning)
    leaves = jax.tree.leaves(found.blocks[0])
    return [_Solved(x, found.residuals[0], found.iterations[0], found.indefinite[0]) for x in leaves]


def _with_automatic_axes(
    solve: Callable[..., list[_Solved]], gradient: optax.Updates
) -> Callable[..., list[_Solved]]:
    """The function, where axes of a mesh are explicit with XLA to choose shardings inside of it."""
    shardings = [_mesh.explicit_sharding(g) for g in jax.tree.leaves(gradient)]
    if all(sharding is None for sharding in shardings):
        return solve
    scalar: Any = PartitionSpec()
    specs: list[Any] = [scalar if sharding is None else sharding.spec for sharding in shardings]
    found = [_Solved(spec, scalar, scalar, scalar) for spec in specs]

    def automatic(*arguments):
        *arrays, max_iterations, num_batches = arguments
        bound = functools.partial(solve, max_iterations=max_iterations, num_batches=num_batches)
        solved: Any = jax.sharding.auto_axes(bound, out_sharding=found)(*arrays)
        return solved

    return automatic


@functools.partial(jax.jit, static_argnames=("max_iterations", "num_batches"))
def _solve_layers(  # jit: a bare loop is compiled at every call
    factors: Factors,
    gradient: optax.Updates,
    start: optax.Updates,
    mean_squares: jax.Array,
    damping: jax.Array,
    tolerance: jax.Array,
    max_iterations: int,
    num_batches: int,
) -> list[_Solved]:
    """A system for each layer; leaves without factors in closed form."""
    grads, starts = trees.paths_and_leaves(gradient), trees.paths_and_leaves(start)
    layers = {
        kernel: LayerFisher.of(of_layer, damping.dtype, num_batches) for kernel, of_layer in factors.items()
    }
    matrices = {kernel: _matrix(grads, kernel, factors[kernel]) for kernel in layers}
    coordinates = [layer.coordinates(matrices[kernel]) for kernel, layer in layers.items()]
    found = conjugate_gradients.solve(
        lambda blocks: [layer.product(V) for layer, V in zip(layers.values(), blocks, strict=True)],
        coordinates,
        [layer.coordinates(_matrix(starts, kernel, factors[kernel])) for kernel, layer in layers.items()],
        damping,
        tolerance,
        max_iterations,
    )
    solved = {}
    num_examples = max(len(of_layer.inputs) for of_layer in factors.values())
    for number, (path, g) in enumerate(grads.items()):  # in the order of the tree; layers replace theirs
        x = g / (num_examples * mean_squares[number] + damping)
        solved[path] = _Solved(x, jnp.zeros_like(damping), jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    for number, (kernel, layer) in enumerate(layers.items()):
        outside = layer.outside(matrices[kernel], coordinates[number])
        V = layer.vectors(found.blocks[number]) + outside / damping
        of_layer = _Solved(V, found.residuals[number], found.iterations[number], found.indefinite[number])
        bias = factors[kernel].bias
        if bias is not None:
            solved[bias] = of_layer._replace(x=V[-1].reshape(grads[bias].shape))
            V = V[:-1]
        solved[kernel] = of_layer._replace(x=V.reshape(grads[kernel].shape))
    return list(solved.values())


def _matrix(leaves: Mapping[str, jax.Array], kernel: str, factors: LayerFactors) -> jax.Array:
    """The layer's part of the leaves, `(in, out)`, with its bias as last row."""
    V = leaves[kernel].reshape(factors.inputs.shape[-1], -1)
    if factors.bias is None:
        return V
    return jnp.concatenate([V, leaves[factors.bias].reshape(1, -1)])


def _shortened(gradient: optax.Updates, solution: optax.Updates, limit) -> jax.Array:
    """The factor that brings the squared norm of the solution in the damped Fisher matrix to the limit."""
    products = jax.tree.map(lambda g, x: jnp.sum(g * x), gradient, solution)  # a dot of shards has no type
    squared = optax.tree.sum(products)
    return jnp.where(squared > limit, jnp.sqrt(limit / squared), 1)
