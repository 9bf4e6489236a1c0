"""What M-FAC's state holds, how it starts, and what a refused gradient leaves."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax._src.base import numerics
from mfac_jax._src.base.accept import accept_or_refuse
from mfac_jax._src.mfac.metric import Metric
from mfac_jax._src.mfac.solvers import Solver
from mfac_jax._src.mfac.step_length import StepLength
from mfac_jax._src.rows import memory, zeros
from mfac_jax._src.rows import mesh as _mesh
from mfac_jax._src.rows.blocks import number_of_blocks
from mfac_jax._src.rows.manual_axes import ManualAxes
from mfac_jax._src.rows.storages import Storage


class ScaleByMFACState(NamedTuple):
    """State of `scale_by_mfac`.

    Attributes:
      made_with: the kinds that give the fields their meaning, as in 'metric=diagonal', without leaves. It
        stands first, so that a library that restores another structure names it first.
      grads_seen: gradients accepted so far; stops at the largest int32.
      grads_rejected: gradients refused because an entry was NaN or Inf, or the state has other blocks than
        the transform; stops there too.
      next_row: row of the window that the next gradient will take, in [0, num_grads).
      window: the last `num_grads` gradients in the metric's coordinates, the parameter tree with a leading
        axis on every leaf. Rows are zero until they are first used.
      remainder: running mean of what the rows leave out of the gradients, for a storage that keeps it, as
        `components.low_rank` does; without leaves for others.
      metric: the metric's state: a `second_moment` for the diagonal metric, no leaves for the identity.
      gram: inner products of the rows of the window, one matrix for each block.
      solver: the solver's state: the inverse, where it is kept; without leaves for Cholesky.
      coefficients: c of the last update G^T c, before the step factor.
      shift: what the last step added to the diagonal of each Gram matrix; zero before the first.
      step_length: what `step_adaptation` has learned: a `mean_cosine`, or without leaves where it is 0.
      log_step: logarithm of the factor on the update's length.
      block_of_leaf: the number of each leaf's block, in the order of `jax.tree.leaves`.
    """

    made_with: dict[str, tuple[()]]
    grads_seen: jax.Array  # () int32
    grads_rejected: jax.Array  # () int32
    next_row: jax.Array  # () int32
    window: Any  # leaves (num_grads, *leaf.shape), of the dtype `storage`
    remainder: Any  # leaves like the parameters', of the dtype of gram
    metric: Any
    gram: jax.Array  # (blocks, num_grads, num_grads) float32, float64 with a float64 leaf
    solver: Any
    coefficients: jax.Array  # (blocks, num_grads), of the dtype of gram
    shift: jax.Array  # (blocks,), of the dtype of gram
    step_length: Any
    log_step: jax.Array  # (), of the dtype of gram
    block_of_leaf: jax.Array  # (leaves,) int32, of one entry where there is no leaf


class Kinds(NamedTuple):
    """The components that a state is made of."""

    metric: Metric
    solver: Solver
    storage: Storage
    step_adaptation: StepLength

    def names(self) -> dict[str, tuple[()]]:
        """The record of them in the state.

        Keys of a dict, not leaves: they are known under jit, cost nothing, and stand in the messages of
        libraries that restore a checkpoint into another structure.
        """
        return {f"{kind}={component.name}": () for kind, component in self._asdict().items()}


def first_state(
    params: optax.Params,
    kinds: Kinds,
    blocks: Sequence[int],
    num_grads: int,
    axes: ManualAxes,
    on_host: bool,
) -> ScaleByMFACState:
    """The state before the first gradient."""
    dtype, zeros_on_mesh = numerics.accumulation_dtype(params), _mesh.zeros_like_params(params)

    def new(shape: tuple[int, ...]) -> jax.Array:
        return zeros_on_mesh(shape, dtype)

    num_blocks = number_of_blocks(blocks)
    with memory.enough_for_window(params, num_grads, kinds.storage, axes, on_host):
        window = zeros.empty_window(params, kinds.storage, num_grads, axes, on_host)
    return ScaleByMFACState(
        made_with=kinds.names(),
        grads_seen=zeros_on_mesh((), jnp.int32),
        grads_rejected=zeros_on_mesh((), jnp.int32),
        next_row=zeros_on_mesh((), jnp.int32),
        window=window,
        remainder=zeros.empty_row(params, dtype, axes) if kinds.storage.keeps_remainder else (),
        metric=kinds.metric.init(lambda: zeros.empty_row(params, dtype, axes)),
        gram=new((num_blocks, num_grads, num_grads)),
        solver=kinds.solver.init(new, num_blocks, num_grads),
        coefficients=new((num_blocks, num_grads)),
        shift=new((num_blocks,)),
        step_length=kinds.step_adaptation.init(new),
        log_step=new(()),
        block_of_leaf=zeros_on_mesh((max(1, len(blocks)),), jnp.int32) + labels(blocks),
    )


def labels(blocks: Sequence[int]) -> np.ndarray:
    """At least one: checkpoint libraries refuse arrays without entries."""
    return np.asarray([*blocks] or [0], np.int32)


# Fields that a step leaves as they were where the gradient is refused. To choose once more between old and
# new would take another pass over them.
_LARGE = ("window", "gram", "solver")


def settled(accept: jax.Array, before: ScaleByMFACState, after: ScaleByMFACState) -> ScaleByMFACState:
    """The state after a gradient; where it was refused as before, but for `grads_rejected`."""
    large = {name: getattr(after, name) for name in _LARGE}
    small_before, small_after = (state._replace(**dict.fromkeys(_LARGE)) for state in (before, after))
    return accept_or_refuse(accept, small_before, small_after)._replace(**large)
