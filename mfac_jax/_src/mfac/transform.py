"""One step of M-FAC, as an optax transform."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import checks, numerics, schedules, trees
from mfac_jax._src.base.foreign_arguments import explain_foreign_arguments
from mfac_jax._src.linalg.gram import cosine_of, replace_row
from mfac_jax._src.mfac import damping as damping_rules
from mfac_jax._src.mfac import remainder, step_length
from mfac_jax._src.mfac.metric import Metric
from mfac_jax._src.mfac.metrics import METRICS, MetricName
from mfac_jax._src.mfac.momentum import weights_by_age
from mfac_jax._src.mfac.solvers import SOLVERS, Solver, SolverName, auto_solver
from mfac_jax._src.mfac.state import Kinds, ScaleByMFACState, first_state, settled
from mfac_jax._src.mfac.state_checks import (
    Holder,
    as_state,
    check_fields,
    check_made_with,
    check_sizes,
    has_blocks,
    on_device,
)
from mfac_jax._src.mfac.step_length import StepLength, StepView
from mfac_jax._src.rows import host_memory, storage_kinds, storages
from mfac_jax._src.rows.blocks import Blocks, block_of_leaf
from mfac_jax._src.rows.manual_axes import (
    AxisName,
    ManualAxes,
    bound_axes,
    check_named,
    check_param_specs,
)
from mfac_jax._src.rows.window import Plan, make_plan, write_row

NUM_GRADS = 32
DAMPING = 1e-3  # absolute: in units of a squared gradient


@explain_foreign_arguments(b2="A metric keeps a second moment of its own, without a setting.")
def scale_by_mfac(
    num_grads: int = NUM_GRADS,
    damping: optax.ScalarOrSchedule = DAMPING,
    *,
    relative_damping: bool = False,
    window_momentum: float | jax.Array = 0.0,
    nesterov: bool = False,
    step_adaptation: optax.ScalarOrSchedule | StepLength = 0.0,
    blocks: Blocks = None,
    metric: MetricName | Metric = "identity",
    solver: SolverName | Solver = "auto",
    storage: Any = None,
    axis_name: AxisName = None,
    param_specs: Any = None,
    host_chunk: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Precondition gradients with the inverse Fisher matrix of the last gradients (M-FAC).

    It needs nothing but gradients, and stands in a chain where `optax.scale_by_adam` would. With G the last
    m = `num_grads` gradients as rows, g the newest of them, and e the unit vector of its row::

        u = F^-1 g = m G^T (G G^T + m damping I)^-1 e,    F = damping I + G^T G / m

    That is the paper's formula. `mfac` passes `damping=1.0, relative_damping=True, window_momentum=0.9,
    nesterov=True, step_adaptation=0.3, metric='rotated', storage=jnp.int8`.

    A step reads the window twice. Donate the state (`jax.jit(..., donate_argnums=...)`) to update it in
    place. A gradient with a NaN or an Inf is returned as it came, and changes only `grads_rejected`. Finite
    gradients give finite updates; entries beyond 7e13 (2^494 in float64) are clipped.

    Args:
      num_grads: m >= 1, the gradients kept. The state takes m copies of the parameters.
      damping: > 0, in units of a squared gradient, or a schedule over the gradients accepted. Smaller is
        bolder. The paper uses 1e-5 to 1e-7.
      relative_damping: measure the damping in units of the window's mean squared gradient, and return a
        lone gradient as it came. Learning rates then do not depend on the scale of the loss.
      window_momentum: beta in [0, 1). Precondition the mean of the rows weighted by beta^age.
      nesterov: count the newest gradient once more in that mean, as NAdam does.
      step_adaptation: a speed in [0, 1], or a schedule. Above 0 a factor, mostly in [1, 6], multiplies the
        update. It is learned from the cosine of each gradient and the update before it (docs/options.md).
        Or a `components.StepLength`.
      blocks: None for one Fisher matrix of all parameters; 'leaf' for one per leaf; or a function from a
        leaf's key path to the label of its block.
      metric: 'identity', as in the paper; 'diagonal', a running second moment as in Adam; 'rotated', one in
        the eigenbases of each matrix, as in SOAP (docs/options.md); or a `components.Metric`.
      solver: 'cholesky'; 'inverse', which keeps the inverse of the m x m system, O(m^2) operations in place
        of O(m^3); 'auto', the inverse on CPU from m = 1024 on; or a `components.Solver`.
      storage: None for the parameters' dtype, `jnp.float32`, `jnp.bfloat16`, `jnp.int8`,
        `jnp.float8_e4m3fn`, `jnp.float8_e5m2`; or a `components.Storage`, e.g. `components.low_rank()`.
      axis_name: in `jax.shard_map` and `jax.pmap`, the mesh axes that parameters or window are spread over.
        Under `jax.jit` alone leave it out: `state_shardings` says where the window lies.
      param_specs: how the parameters are spread, as `in_specs` has it. Needed in `jax.pmap`, with
        `check_vma=False`, and for shards with rows of one byte (docs/options.md).
      host_chunk: None for a window in memory of the device. An int keeps it in pinned memory of the host,
        and brings that many rows of a leaf to the device at a time. Not for `jax.pmap`.

    Returns:
      A transform whose state is a `ScaleByMFACState`. `update` also takes a state of NumPy arrays. Of
      `params`, if they are given, it reads shapes and dtypes alone: the state has to fit them.

    Raises:
      TypeError: an argument, a parameter or an update has a wrong type; a size is traced.
      ValueError: an argument is out of its range; updates or the state do not fit the transform; the window
        does not fit into memory (from `init` outside of jit).

    Example:
      >>> import jax.numpy as jnp, optax, mfac_jax
      >>> tx = optax.chain(mfac_jax.scale_by_mfac(num_grads=8, damping=1.0), optax.scale(-0.5))
      >>> params = {'w': jnp.array([3.0, -2.0])}
      >>> updates, state = tx.update(params, tx.init(params))  # the gradient of half the squared norm
      >>> print(updates['w'])
      [-0.5714286  0.3809524]

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """
    checks.check_positive("damping", damping, str(DAMPING), or_schedule=True)
    checks.check_decay("window_momentum", window_momentum, "0.9")
    checks.check_bool("relative_damping", relative_damping)
    checks.check_bool("nesterov", nesterov)
    checks.check_axis_name(axis_name)
    axes = ManualAxes(axis_name, param_specs)
    check_param_specs(axes)
    if not callable(blocks):
        # Under inject_hyperparams a function is taken for a schedule: what it returns comes here.
        cure = " Under optax.inject_hyperparams pass static_args=('blocks',)."
        checks.check_choice(
            "blocks", blocks, (None, "leaf"), ", or a function of a leaf's key path", cure=cure
        )
    num_grads = checks.check_size("num_grads", num_grads, str(NUM_GRADS))
    solvers = {"auto": auto_solver(num_grads), **SOLVERS}
    kinds = Kinds(
        metric=checks.check_component("metric", metric, METRICS, Metric),
        solver=checks.check_component("solver", solver, solvers, Solver),
        storage=storage_kinds.as_storage(storage),
        step_adaptation=_as_step_length(step_adaptation),
    )
    _check_axes(kinds, axis_name)
    settings = _Settings(
        num_grads=num_grads,
        damping=damping,
        relative_damping=relative_damping,
        window_momentum=window_momentum,
        nesterov=nesterov,
        blocks=blocks,
        kinds=kinds,
        axes=axes,
        host_chunk=None if host_chunk is None else checks.check_size("host_chunk", host_chunk, "8"),
    )

    def init(params: optax.Params) -> ScaleByMFACState:
        trees.check_params(params)
        labels = block_of_leaf(params, blocks)
        return first_state(params, kinds, labels, settings.num_grads, axes, host_chunk is not None)

    def update(updates, state, params=None, **extra_args):
        del extra_args
        plan, is_known = _plan_of(settings, updates, state, params)
        return _step(settings, plan, is_known, updates, on_device(state))

    return optax.GradientTransformationExtraArgs(init, update)


class _Settings(NamedTuple):
    """What a step depends on beside the state: the arguments of `scale_by_mfac`, and its components."""

    num_grads: int
    damping: optax.ScalarOrSchedule
    relative_damping: bool
    window_momentum: float | jax.Array
    nesterov: bool
    blocks: Blocks
    kinds: Kinds
    axes: ManualAxes
    host_chunk: int | None


def _step(
    settings: _Settings, plan: Plan, has_blocks: Any, updates: optax.Updates, state: ScaleByMFACState
) -> tuple[optax.Updates, ScaleByMFACState]:
    """The update and the state after a gradient; `has_blocks` tells whether the state's are the plan's."""
    metric, solver, storage, step_adaptation = settings.kinds
    newest, seen = state.next_row, jnp.asarray(optax.safe_increment(state.grads_seen))

    # What is not finite becomes NaN, and a NaN anywhere in the gradient makes all products NaN. So every
    # device learns of it without extra communication, and the row is written after the reading.
    own = plan.own_parts(updates, state.window)
    gradient = jax.tree.map(lambda x: numerics.bounded(x, state.gram.dtype), own)
    metric_state, coordinates = metric.update(state.metric, gradient, seen)
    exact = coordinates.into(gradient)
    row = plan.encode(exact, state.window)
    inner, square = plan.dots_of_row(state.window, row, state.coefficients)
    is_newest = jnp.arange(settings.num_grads, dtype=newest.dtype)[None] == newest
    products = jnp.where(is_newest, square[:, None], inner)
    accept = jnp.all(jnp.isfinite(products)) & has_blocks
    window = write_row(state.window, row, newest, accept)
    gram = jnp.where(accept, replace_row(state.gram, products, newest), state.gram)

    # The update is a combination of the rows: all that decides about it is m x m.
    solver_state = solver.replace_row(state.solver, products, newest, accept)
    shift, gain = _system(settings, gram, seen)
    # A refused gradient asks for nothing, so no solver has a reason to change its state for it.
    weights = jnp.where(accept, _weights(settings, gram, newest, seen), 0)
    solution, solver_state = solver.solve(solver_state, gram, shift, weights)
    coefficients = gain[:, None] * solution
    # The row that the new one replaces is part of the last update still.
    cosine = cosine_of(inner, square, state.gram, state.coefficients)
    view = StepView(gram, state.coefficients, cosine, newest, state.grads_seen, state.log_step)
    step_state, log_step = step_adaptation.update(state.step_length, view)

    factor = jnp.exp(log_step)
    if storage.keeps_remainder:
        left_out = jax.tree.map(jnp.subtract, exact, plan.decode(row))
        mean, vector = remainder.next_mean(state.remainder, left_out, seen, *_momentum(settings))
        inside = jnp.where(accept, plan.dots(window, vector, coefficients)[0], 0)
        correction, solver_state = solver.solve(solver_state, gram, shift, inside)
        outside = remainder.outside(shift, gain)
        within = plan.combine((coefficients - outside[:, None] * correction) * factor, window)
        combined = plan.add(within, outside * factor, vector)
    else:
        mean, combined = state.remainder, plan.combine(coefficients * factor, window)
    preconditioned = plan.whole(coordinates.out_of(combined), updates)
    after = state._replace(
        grads_seen=seen,
        next_row=(newest + 1) % settings.num_grads,
        window=window,
        remainder=mean,
        metric=metric_state,
        gram=gram,
        solver=solver_state,
        coefficients=coefficients,
        shift=shift,
        step_length=step_state,
        log_step=log_step,
    )
    return _chosen(accept, has_blocks, updates, preconditioned), settled(accept, state, after)


def _plan_of(
    settings: _Settings, updates: optax.Updates, state: Any, params: optax.Params | None
) -> tuple[Plan, Any]:
    """The plan of a step, and whether the state has its blocks; raises for what does not fit."""
    kinds = settings.kinds
    check_made_with(as_state(state), kinds)
    is_local = bool(bound_axes(settings.axes.names))
    holder = Holder(kinds.storage, updates, params, kinds, is_local)
    check_fields(state, state._fields[1:], "tx.update", holder)
    blocks = block_of_leaf(updates, settings.blocks)
    place = (settings.axes, settings.host_chunk)
    plan = make_plan("updates", updates, state.window, kinds.storage, blocks, *place)
    check_named("updates", updates, state.gram, settings.axes.names)
    host_memory.check_memory(state.window, settings.host_chunk)
    check_sizes(state, blocks, settings.num_grads)
    return plan, has_blocks(state, updates, blocks)


def _system(settings: _Settings, gram: jax.Array, seen: jax.Array) -> damping_rules.System:
    """The damped system after `seen` gradients."""
    damping = schedules.damping_at(settings.damping, seen - 1, gram.dtype)
    if settings.relative_damping:
        return damping_rules.relative(gram, damping, jnp.clip(seen, 1, settings.num_grads))
    return damping_rules.absolute(gram, damping)


def _momentum(settings: _Settings) -> tuple[float | jax.Array, bool]:
    return settings.window_momentum, settings.nesterov


def _weights(settings: _Settings, gram: jax.Array, newest: jax.Array, seen: jax.Array) -> jax.Array:
    """Which mean of the rows is preconditioned, `(blocks, m)`."""
    weights = weights_by_age(newest, seen, settings.num_grads, *_momentum(settings), gram.dtype)
    return jnp.broadcast_to(weights, gram.shape[:-1])


def _chosen(accept: jax.Array, has_blocks: Any, updates: optax.Updates, preconditioned: optax.Updates):
    """The preconditioned updates; the gradient as it came where it was refused.

    NaN if the state has other blocks: that cannot be overlooked.
    """

    def choose(x, u):
        refused = x if has_blocks is True else jnp.where(has_blocks, x, jnp.nan)
        return jnp.where(accept, numerics.narrow(u, x.dtype), refused)

    return jax.tree.map(choose, updates, preconditioned)


def _check_axes(kinds: Kinds, axis_name: AxisName) -> None:
    """Raise for components that need more than the part of a leaf that a device has on manual axes."""
    if axis_name is None:
        return
    if not kinds.metric.elementwise:
        raise ValueError(
            f"metric must be elementwise with axis_name={axis_name!r}, got {kinds.metric.name!r}, which "
            "sees whole leaves. Leave axis_name out and use jax.jit, or give the Metric elementwise=True."
        )
    if not storages.takes_parts(kinds.storage):
        raise ValueError(
            f"storage must have one array for a row, or encode_part, with axis_name={axis_name!r}, got "
            f"{kinds.storage.name!r}. Leave axis_name out and use jax.jit, or pass jnp.int8."
        )


def _as_step_length(step_adaptation: optax.ScalarOrSchedule | StepLength) -> StepLength:
    """The rule; none where it is known to be 0 before tracing."""
    if isinstance(step_adaptation, StepLength):
        checks.check_own_name("step_adaptation", step_adaptation.name, step_length.NAMES)
        return step_adaptation
    checks.check_step_adaptation(step_adaptation)
    if schedules.is_known_zero(step_adaptation):
        return step_length.NONE
    return step_length.adapted(step_adaptation)
