"""The M-FAC optimizer step as an optax transform, and products with the Fisher inverse it holds."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import checks, numerics, schedules, trees
from mfac_jax._src.linalg import gram as _gram
from mfac_jax._src.linalg import kept_inverse
from mfac_jax._src.mfac import metrics, step_length
from mfac_jax._src.rows import contractions, manual_axes
from mfac_jax._src.rows import mesh as _mesh
from mfac_jax._src.rows import window as _window
from mfac_jax._src.rows.manual_axes import AxisName
from mfac_jax._src.rows.window import Blocks

Normalization = Literal["window", "count"]
Metric = Literal["identity", "diagonal"]
Solver = Literal["cholesky", "inverse"]


class ScaleByMFACState(NamedTuple):
    """State of `scale_by_mfac`.

    Attributes:
      grads_seen: gradients accepted so far; stops at the largest int32.
      grads_rejected: gradients refused because an entry was NaN or Inf; stops there too.
      next_row: row of the window that the next gradient will take, in [0, num_grads).
      window: the last `num_grads` gradients, the parameter tree with a leading axis on every leaf.
        Rows are zero until they are first used. In the diagonal metric they are D g.
      second_moment: running mean of the squared gradients of the diagonal metric, without its bias
        correction; without leaves in the identity metric.
      gram: inner products of the rows of the window, one matrix a block.
      inverse: of the damped Gram matrices, as the solver keeps it; without leaves where that is Cholesky.
      coefficients: c of the last update G^T c, before the step factor.
      shift: what the last step added to the diagonal of each Gram matrix, n times the damping; zero
        before the first.
      mean_cosine: running mean of the cosine of a gradient and the update before it.
      log_step: logarithm of the factor that `step_adaptation` has brought the update's length to.
    """

    grads_seen: jax.Array  # () int32
    grads_rejected: jax.Array  # () int32
    next_row: jax.Array  # () int32
    window: optax.Params  # leaves (num_grads, *leaf.shape), of the dtype `storage`
    second_moment: optax.Params | optax.EmptyState  # leaves like the parameters', of the dtype of gram
    gram: jax.Array  # (blocks, num_grads, num_grads) float32, float64 with a float64 leaf
    inverse: kept_inverse.KeptInverse | optax.EmptyState
    coefficients: jax.Array  # (blocks, num_grads), of the dtype of gram
    shift: jax.Array  # (blocks,), of the dtype of gram
    mean_cosine: jax.Array  # (), of the dtype of gram
    log_step: jax.Array  # (), of the dtype of gram


def scale_by_mfac(
    num_grads: int = 64,
    damping: optax.ScalarOrSchedule = 1e-3,
    *,
    normalize_by: Normalization = "window",
    power: float = 1.0,
    relative_damping: bool = False,
    window_momentum: float = 0.0,
    nesterov: bool = False,
    step_adaptation: optax.ScalarOrSchedule = 0.0,
    blocks: Blocks = None,
    metric: Metric = "identity",
    solver: Solver = "cholesky",
    storage: Any = None,
    axis_name: AxisName = None,
    host_chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition gradients with the damped empirical Fisher matrix of a sliding window (M-FAC).

    With :math:`g_1, \dots, g_m` the last m gradients, the newest of them :math:`g_j` among them, as
    rows of :math:`G \in \mathbb{R}^{m \times d}`, the update is

    .. math::
      F^{-1} g_j, \qquad F = \lambda I + \tfrac{1}{n} \sum_i g_i g_i^\top,

    computed as :math:`n\, G^\top (G G^\top + n \lambda I)^{-1} e_j`: two passes over the window and
    one m x m solve. The published form subtracts two nearly equal vectors and loses its digits at
    the small damping it recommends; this one does not.

    State: m copies of the parameters and an m x m matrix. Donate it (`jax.jit(...,
    donate_argnums=...)`) and the window is updated in place.

    A gradient with a NaN or an Inf is returned as it came, for the caller to see, and leaves the
    state as it was but for `grads_rejected`. Finite gradients give finite updates, whatever their
    norm, also if they are zero or repeat; entries beyond 7e13 (2^46; 2^494 in float64) are clipped before
    they enter the window, so that sums of squares do not overflow.

    On a mesh, under `jax.jit`, the window is sharded as the parameters, and split further over mesh axes
    that they do not use; `state_shardings` has the rule. In `jax.shard_map` and `jax.pmap` pass
    `axis_name`.

    Args:
      num_grads: m, the gradients kept, any integer >= 1. The state takes m times the memory of the
        parameters; a step takes the time of reading it twice, and m^3 / 3 operations. The paper uses
        512 and 1024.
      damping: lambda, > 0, a number or a schedule over the gradients accepted. In units of a squared
        gradient norm over n: directions in which the mean squared gradient is below it are left as in
        gradient descent with rate 1 / lambda. The paper uses 1e-5 to 1e-7 with n = 512 or 1024. Values
        of a schedule outside of 1.2e-38 to 1.3e30 are moved to the nearer end, NaN to the upper.
      normalize_by: n. `'window'`, as in the paper: always m, so that the first steps are larger.
        `'count'`: the gradients seen, at most m.
      relative_damping: True measures the damping in units of the window: :math:`\lambda = \rho \bar s / n`
        with :math:`\rho` = `damping` and :math:`\bar s` the mean squared norm of its gradients, and returns
        :math:`((1 + \rho) \bar s / n)^p F^{-p} g_j`. Then a lone gradient comes out as it went in, and
        so does any gradient where :math:`\rho` is large: learning rates are those of gradient descent, at
        any scale of the loss (below :math:`\bar s` = 1e-30 it is taken as 1). `normalize_by` makes no
        difference.
      power: p in :math:`F^{-p} g_j`, in (0, 1]. 1 is the natural gradient, 1/2 full-matrix AdaGrad over the
        window (GGT). Powers other than 1 take an eigendecomposition of the m x m matrix, and rows
        whose norm is below about 1e-2 of the largest are damped more than they should be.
      window_momentum: beta in [0, 1). The vector preconditioned is the mean of the window's rows with
        weights proportional to beta^age, not the newest gradient alone. Unlike `optax.ema` after the
        transform it needs no buffer, and old gradients meet the newest Fisher matrix.
      nesterov: whether the newest gradient counts once more in that mean, with beta of the mean and
        1 - beta of the gradient, as in NAdam.
      step_adaptation: h in [0, 1], a number or a schedule over the gradients accepted; 0 leaves the length
        of the update as it is. Otherwise it is multiplied by a factor in [1/30, 30] that grows while the
        newest gradient still points along the last update, and shrinks when that update went too far. Up
        to 5 its logarithm moves by :math:`h (\cos(g_t, u_{t-1}) + 0.06)` a step, so that it also grows
        without a sign of either. Beyond, it moves by h times the mean of the last 20 or so cosines, as
        far as that mean is larger than unrelated gradients have it, drifts on while the gradients in the
        window shrink (back while they grow), and falls back slowly otherwise: noise does not drive it on.
        It knows nothing of the learning rate: where that jumps back up, as in warm restarts, pass 0.
        Values of a schedule outside of [0, 1] are moved to the nearer end, NaN to 0. From the Gram matrix
        alone: momentum that is added after the transform is not seen, and the steps then become too
        long; with `num_grads` = 1 nothing is seen and the factor stays one.
      metric: `'diagonal'` works in the metric of a running second moment. With :math:`v` the running mean
        of :math:`g^2` over about a hundred gradients, corrected for its bias as in Adam, and
        :math:`D = (\sqrt v + 10^{-8})^{-1/2}`, the window holds :math:`D g` and the update is :math:`D`
        times what comes out: with relative damping a gradient that is orthogonal to the others moves the
        parameters as in Adam. The identity in the damping treats all coordinates alike; in this metric that
        is right also for networks whose layers differ in scale. A row keeps the scale it entered with: v
        moves slowly against the window, and to scale all rows anew would be one more pass. One more copy of
        the parameters in the state. `'identity'`: as in the paper.
      solver: `'cholesky'`: m^3 / 3 operations a step. `'inverse'`: the inverse of the damped Gram matrix is
        kept in the state, one more m x m matrix a block, and corrected as rows are replaced: about ten
        readings of it. Each solution is refined until its residual is that of rounding; where it is not,
        since gradients are nearly parallel or the damping has moved by much, Cholesky solves and the
        inverse is made anew, for five times what Cholesky alone takes. For power 1. The default is simpler
        and as fast for small windows: on 2 CPU cores the solve took 2.4 and 1.1 ms at `num_grads` = 512, 9
        and 3 at 1,024, 55 and 10 at 2,048.
      storage: dtype of the window, `jnp.float32` or `jnp.bfloat16`, which halves it; None: the
        parameters'. The Gram matrix is that of the window as stored, in float32, so the system solved is
        that of the stored gradients.
      axis_name: inside of `jax.shard_map` or `jax.pmap`, the name or names of the mesh axes that parameters
        or the window are spread over; the updates are those of the whole. A leaf that varies along an axis
        is taken as a shard, and its inner products are added up over it: one sum of m numbers for all
        leaves spread alike. The window of a leaf that does not vary is split over the axis as
        `state_shardings` says, and its update gathered; gradients must then be equal along it
        (`jax.lax.pmean`). In pmap, and with `check_vma=False`, types do not tell: there all parameters
        must be replicated, and `init` has to run inside, with the same `axis_name`. A refused gradient is
        seen by every device in `grads_rejected`, and in the updates where its bad entry is.
      host_chunk: None: the window is in memory of the device. An integer >= 1: it is in pinned memory of
        the host, and comes to the device that many rows of a leaf at a time; num_grads need not be a
        multiple. A step then takes on the device, in place of num_grads copies of the parameters,
        `host_chunk` copies of the largest leaf and a few of the parameters. It reads the window twice over
        the link to the host: at 30 GB/s, 67 ms for each GB. That pays where the window does not fit
        otherwise, split over devices and in bfloat16, or where a gradient takes longer than that. Leaves
        without an axis of a multiple of 128 and another of a multiple of 8 (of a shard; all vectors and
        scalars) stay in memory of the device, because TPUs can write no row of theirs to the host. Not
        for `jax.pmap`, nor on TPUs for `optax.MultiSteps`; under `optax.inject_hyperparams` it belongs in
        `static_args`. Pass `out_shardings` to `jax.jit`, also on one device: otherwise JAX compiles the
        step once more at the second call.
      blocks: how F is split. `None`: one block, the paper's; every pair of parameters interacts.
        `'leaf'`: a block a leaf. A function from a leaf's key path (as in
        `jax.tree_util.tree_map_with_path`) to a hashable label: a block a label. Under
        `optax.inject_hyperparams` such a function, and `num_grads`, belong in `static_args`.

    Returns:
      A transform whose state is a `ScaleByMFACState`. It ignores `params` and extra arguments.

    Raises:
      TypeError: `num_grads` is not an int, or is traced; a parameter or an update is not a real
        floating-point array; another argument is not of its type.
      ValueError: an argument is out of its range or not among its choices; updates do not have the
        tree or the shapes of the parameters given to `init`; `axis_name` is not bound, or the window is
        split in another way than over its axes, or not in the memory that `host_chunk` says.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> tx = optax.chain(mfac_jax.scale_by_mfac(num_grads=8, damping=1.0), optax.scale(-0.5))
      >>> params = {'w': jnp.array([3.0, -2.0]), 'b': jnp.array(1.0)}
      >>> state = tx.init(params)
      >>> loss = lambda p: (jnp.sum(p['w'] ** 2) + p['b'] ** 2) / 2
      >>> for _ in range(20):
      ...   updates, state = tx.update(jax.grad(loss)(params), state)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss(params) < 0.1)
      True

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.

      Diederik Kingma, Jimmy Ba, `Adam: A Method for Stochastic Optimization
      <https://arxiv.org/abs/1412.6980>`_, ICLR 2015 (the running second moment and its bias correction).

      Naman Agarwal, Brian Bullins, Xinyi Chen, Elad Hazan, Karan Singh, Cyril Zhang, Yi Zhang,
      `Efficient Full-Matrix Adaptive Regularization <https://arxiv.org/abs/1806.02958>`_, ICML 2019
      (the power 1/2).
    """
    num_grads = checks.check_size("num_grads", num_grads, "64")
    host_chunk = None if host_chunk is None else checks.check_size("host_chunk", host_chunk, "8")
    _check_schedules(damping, step_adaptation)
    _check_options(normalize_by, power, blocks)
    checks.check_decay("window_momentum", window_momentum, "0.9")
    checks.check_bool("relative_damping", relative_damping)
    checks.check_bool("nesterov", nesterov)
    checks.check_choice("metric", metric, ("identity", "diagonal"))
    checks.check_solver(solver, power)
    storage = checks.check_storage(storage)
    checks.check_axis_name(axis_name)

    def init(params: optax.Params) -> ScaleByMFACState:
        trees.check_params(params)
        num_blocks = _window.number_of_blocks(_window.block_of_leaf(params, blocks))
        dtype, zeros = numerics.accumulation_dtype(params), _mesh.zeros_like_params(params)
        window = manual_axes.empty_rows(params, storage, axis_name, num_grads, host_chunk is not None)
        is_diagonal = metric == "diagonal"
        second_moment = (
            manual_axes.empty_rows(params, dtype, axis_name) if is_diagonal else optax.EmptyState()
        )
        shape = (num_blocks, num_grads, num_grads)
        none = kept_inverse.KeptInverse(zeros(shape, dtype), zeros((num_blocks,), dtype))
        return ScaleByMFACState(
            grads_seen=zeros((), jnp.int32),
            grads_rejected=zeros((), jnp.int32),
            next_row=zeros((), jnp.int32),
            window=window,
            second_moment=second_moment,
            gram=zeros(shape, dtype),
            inverse=optax.EmptyState() if solver == "cholesky" else none,
            coefficients=zeros((num_blocks, num_grads), dtype),
            shift=zeros((num_blocks,), dtype),
            mean_cosine=zeros((), dtype),
            log_step=zeros((), dtype),
        )

    def solve(gram, inverse, rho, n, weights):
        """Coefficients, and the inverse."""
        if isinstance(inverse, optax.EmptyState):
            return _gram.inverse_power(gram, rho, n, power, weights), inverse
        c, inverse = kept_inverse.solve(inverse, gram, n * rho, weights)
        return n * c, inverse

    def precondition(gram, inverse, newest, seen):
        """Coefficients of the update, the shift they were computed with, and the inverse."""
        rho = schedules.damping_at(damping, seen - 1, gram.dtype)
        weights = _window.weights_by_age(newest, seen, num_grads, window_momentum, nesterov, gram.dtype)
        weights = jnp.broadcast_to(weights, gram.shape[:-1])
        if not relative_damping:
            n = _normalizer(normalize_by, seen, num_grads, gram.dtype)
            c, inverse = solve(gram, inverse, rho, n, weights)
            return c, jnp.broadcast_to(n * rho, gram.shape[:1]), inverse
        energy = _gram.mean_square(gram, jnp.clip(seen, 1, num_grads))
        rho = jnp.minimum(rho, 2.0**126 / jnp.maximum(energy, 1))  # their product must not overflow
        c, inverse = solve(gram, inverse, rho * energy, jnp.ones((), gram.dtype), weights)
        return c * ((1 + rho) * energy)[:, None] ** power, rho * energy, inverse

    def adapted(state, gram, newest):
        """The mean cosine and the logarithm of the step factor, with the newest gradient in them."""
        if schedules.is_known_zero(step_adaptation):
            return state.mean_cosine, state.log_step
        rate = jnp.clip(jnp.nan_to_num(schedules.at(step_adaptation, state.grads_seen, gram.dtype)), 0, 1)
        last_update = state.coefficients.at[:, newest].set(0)  # that row is gone
        cosine = _gram.cosine_to_row(gram, newest, last_update)
        in_use = jnp.minimum(state.grads_seen, num_grads - 1) + 1
        statistics = step_length.StepStatistics(
            cosine,
            _gram.typical_cosine(gram),
            _gram.shrinkage(gram, _window.ages(newest, num_grads), in_use),
            state.grads_seen,
        )
        before = (state.mean_cosine, state.log_step)
        after = step_length.adapt(*before, statistics, rate)
        # Without a direction on both sides there is nothing to learn, not even the drift.
        is_known = jnp.any(last_update != 0) & jnp.any(gram[:, newest, newest] > 0)
        return jax.tree.map(lambda new, old: jnp.where(is_known, new, old), after, before)

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        is_identity = isinstance(state.second_moment, optax.EmptyState)
        checks.check_made_with("metric", metric, "identity" if is_identity else "diagonal")
        is_cholesky = isinstance(state.inverse, optax.EmptyState)
        checks.check_made_with("solver", solver, "cholesky" if is_cholesky else "inverse")
        layouts = _window.layouts("updates", updates, state.window, axis_name)
        manual_axes.check_named(updates, state.gram, axis_name)
        checks.check_memory(state.window, host_chunk)
        block_of_leaf = _window.block_of_leaf(updates, blocks)
        checks.check_sizes(state.gram, _window.number_of_blocks(block_of_leaf), num_grads)
        newest, seen = state.next_row, jnp.asarray(optax.safe_increment(state.grads_seen))

        # What is not finite becomes NaN, and a NaN anywhere in the gradient makes all products NaN: so
        # every device learns of it without a word more, and the row is written after it was read.
        x = _window.map_leaves(manual_axes.own_part, layouts, updates, state.window)
        second_moment, scale = state.second_moment, None
        if metric == "diagonal":
            second_moment = metrics.average(state.second_moment, x)
            scale = metrics.scale(second_moment, seen)
        row = contractions.as_row(x, scale, state.window)
        products = _window.products(
            state.window, row, block_of_leaf, layouts, state.coefficients, newest, host_chunk
        )
        finite = jnp.all(jnp.isfinite(products))
        window = contractions.write_row(state.window, row, newest, finite)
        gram = jnp.where(finite, _gram.replace_row(state.gram, products, newest), state.gram)

        inverse = state.inverse
        if solver == "inverse":
            inverse = kept_inverse.replace_row(inverse, products, newest, finite)
        coefficients, shift, inverse = precondition(gram, inverse, newest, seen)
        mean_cosine, log_step = adapted(state, gram, newest)
        preconditioned = _window.combine(
            coefficients * jnp.exp(log_step), window, block_of_leaf, host_chunk
        )
        if scale is not None:
            preconditioned = jax.tree.map(numerics.scaled, preconditioned, scale)
        preconditioned = _window.map_leaves(manual_axes.whole, layouts, preconditioned, updates)
        updates = jax.tree.map(
            lambda x, u: jnp.where(finite, numerics.narrow(u, x.dtype), x), updates, preconditioned
        )
        # These are already what they were where the gradient is refused; to choose again takes passes.
        large = {"window": window, "gram": gram, "inverse": inverse}
        before = state._replace(**dict.fromkeys(large))
        changed = before._replace(
            grads_seen=seen,
            next_row=(newest + 1) % num_grads,
            second_moment=second_moment,
            coefficients=coefficients,
            shift=shift,
            mean_cosine=mean_cosine,
            log_step=log_step,
        )
        rejected = before._replace(grads_rejected=optax.safe_increment(state.grads_rejected))
        settled = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, rejected)
        return updates, settled._replace(**large)

    return optax.GradientTransformationExtraArgs(init, update)


def ihvp(
    state: ScaleByMFACState,
    tree: optax.Params,
    damping: float | jax.Array = 1e-3,
    *,
    normalize_by: Normalization = "window",
    power: float = 1.0,
    blocks: Blocks = None,
) -> optax.Params:
    r"""Multiply any vector with the inverse Fisher matrix that an optimizer's state holds.

    .. math::
      F^{-1} x = \left(x - G^\top (G G^\top + n \lambda I)^{-1} G x\right) / \lambda

    For influence functions, evaluation and tests. `x` need not be in the window, so the subtraction
    cannot be avoided: expect a relative error of about the unit roundoff times the condition number
    of F, where the update of `scale_by_mfac` has no such loss.

    Args:
      state: the state of `scale_by_mfac`; `optax.tree.get(state, 'ScaleByMFACState')` finds it in the
        state of a chain.
      tree: x, shaped like the parameters; real floating-point arrays. Its products with the gradients, and
        x / lambda, must not overflow: scale it down if they do.
      damping: lambda, > 0, a number.
      normalize_by: n, as in `scale_by_mfac`. With `'count'` and an empty window, n is 1.
      power: p in :math:`F^{-p} x`, as in `scale_by_mfac`.
      blocks: as given to `scale_by_mfac`.

    Returns:
      :math:`F^{-p} x`, with the tree, shapes and dtypes of `tree`.

    Raises:
      TypeError: `state` is not a `ScaleByMFACState`; a leaf is not a real floating-point array.
      ValueError: an argument is out of its range; `tree` does not fit the window; `blocks` does not
        give as many blocks as the state holds.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> tx = mfac_jax.scale_by_mfac(num_grads=1, damping=1.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> _, state = tx.update(jnp.array([1.0, 0.0]), state)
      >>> print(mfac_jax.ihvp(state, jnp.array([1.0, 1.0]), damping=1.0))
      [0.5 1. ]

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """
    if not isinstance(state, ScaleByMFACState):
        raise TypeError(
            f"state must be a ScaleByMFACState, got {type(state).__name__}. In the state of a chain, "
            "optax.tree.get(state, 'ScaleByMFACState') finds it."
        )
    checks.check_positive("damping", damping, "1e-3")
    _check_options(normalize_by, power, blocks)
    layouts = _window.layouts("tree", tree, state.window, None)
    block_of_leaf = _window.blocks_of_state(state.gram, tree, blocks)
    gram = state.gram
    damping = schedules.damping_at(damping, state.grads_seen, gram.dtype)
    x = _window.map_leaves(manual_axes.own_part, layouts, tree, state.window)
    coefficients = _gram.outside_inverse_power(
        gram,
        damping,
        _normalizer(normalize_by, state.grads_seen, gram.shape[1], gram.dtype),
        power,
        _window.products(state.window, x, block_of_leaf, layouts, state.coefficients),
    )
    inside = _window.combine(coefficients, state.window, block_of_leaf)
    inside = _window.map_leaves(manual_axes.whole, layouts, inside, tree)
    outside = damping**-power
    return jax.tree.map(
        lambda x, y: numerics.narrow(outside * x.astype(y.dtype) + y, x.dtype), tree, inside
    )


def _check_schedules(damping, step_adaptation) -> None:
    """Check the numbers that may be schedules, where they are numbers."""
    if not callable(damping):
        checks.check_positive("damping", damping, "1e-3")
    if not callable(step_adaptation):
        checks.check_share("step_adaptation", step_adaptation, "0.3")


def _check_options(normalize_by, power, blocks) -> None:
    """Check the options that `scale_by_mfac` and `ihvp` share."""
    checks.check_choice("normalize_by", normalize_by, ("window", "count"))
    checks.check_power(power)
    if not callable(blocks):
        checks.check_choice("blocks", blocks, (None, "leaf"), ", or a function of a leaf's key path")


def _normalizer(normalize_by: Normalization, seen: jax.Array, num_grads: int, dtype) -> jax.Array:
    n = num_grads if normalize_by == "window" else jnp.clip(seen, 1, num_grads)
    return jnp.asarray(n, dtype)
