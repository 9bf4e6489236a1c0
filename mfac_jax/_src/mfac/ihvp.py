"""Products of the inverse Fisher matrix that an optimizer's state holds with any vector."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base import checks, numerics, schedules
from mfac_jax._src.linalg.solve import solve
from mfac_jax._src.mfac.state import ScaleByMFACState
from mfac_jax._src.mfac.state_checks import Holder, as_state, check_fields, on_device, storage_of
from mfac_jax._src.mfac.transform import DAMPING
from mfac_jax._src.rows.manual_axes import (
    AxisName,
    ManualAxes,
    bound_axes,
    check_named,
    check_param_specs,
    shards,
)
from mfac_jax._src.rows.storages import Storage
from mfac_jax._src.rows.window import make_plan

_READ = ("grads_seen", "window", "gram", "block_of_leaf")


def ihvp(
    state: ScaleByMFACState,
    tree: optax.Params,
    damping: float | jax.Array = DAMPING,
    *,
    storage: Storage | None = None,
    axis_name: AxisName = None,
    param_specs: Any = None,
) -> optax.Params:
    """Multiply any vector with the inverse Fisher matrix that an optimizer's state holds.

    For influence functions, evaluation and tests. With G the window's m rows, for each block::

        F^-1 x = (x - G^T (G G^T + m damping I)^-1 G x) / damping

    The vector need not be in the window, so the subtraction cannot be avoided. Expect a relative error of
    about the unit roundoff times the condition number of F. The update of `scale_by_mfac` has no such loss.
    Where a metric is used, x and the product are in its coordinates.

    Args:
      state: that of `scale_by_mfac`; `optax.tree.get(state, 'ScaleByMFACState')` finds it in a chain's.
      tree: x, shaped like the parameters, of any size. Entries of the product that its dtype cannot hold
        become its largest number.
      damping: > 0, a number of any size.
      storage: only for a state whose window is in a `Storage` of your own: that storage.
      axis_name: in `jax.shard_map` and `jax.pmap`: as in `scale_by_mfac`.
      param_specs: as in `scale_by_mfac`.

    Returns:
      The product F^-1 x, with the tree, shapes and dtypes of `tree`.

    Raises:
      TypeError: `state` is not a `ScaleByMFACState`; a leaf is not a real floating-point array.
      ValueError: `damping` is out of its range; `tree` does not fit the window; `storage` is another;
        it is not declared which parameters are shards.

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
    checks.check_positive("damping", damping, str(DAMPING))
    checks.check_axis_name(axis_name)
    axes = ManualAxes(axis_name, param_specs)
    check_param_specs(axes)
    storage = storage_of(as_state(state), storage)
    check_fields(state, _READ, "mfac_jax.ihvp", Holder(storage, tree, local=bool(bound_axes(axis_name))))
    state = on_device(state)
    leaves, gram = len(jax.tree.leaves(tree)), state.gram
    # A block for each leaf here, and sums over them: the state's own blocks may be traced.
    plan = make_plan("tree", tree, state.window, storage, range(leaves), axes)
    check_named("tree", tree, gram, axis_name)
    parts = numerics.parts(damping, gram.dtype)
    x, exponents = _near_one(tree, state.block_of_leaf, gram, shards("tree", tree, axes))
    own = plan.own_parts(x, state.window)
    like = jnp.zeros((max(1, leaves), gram.shape[1]), gram.dtype)
    blocks = state.block_of_leaf
    products = jnp.zeros_like(gram[:, 0]).at[blocks].add(plan.dots(state.window, own, like)[0])
    # The Gram matrix holds no product below the smallest number of its dtype: neither need the shift.
    shift = gram.shape[1] * schedules.damping_at(parts.number, state.grads_seen, gram.dtype)
    coefficients = solve(gram, jnp.full((len(gram), 1), shift), products)
    inside = plan.whole(plan.combine(coefficients[blocks], state.window), tree)

    def product(given, x, y, exponent):
        whole = numerics.within_range((x - y) / parts.mantissa, exponent - parts.exponent)
        return numerics.narrow(whole, given.dtype)

    return jax.tree.map(product, tree, x, inside, jax.tree.unflatten(jax.tree.structure(tree), exponents))


def _near_one(
    tree: optax.Params, blocks: jax.Array, gram: jax.Array, spread: Sequence[tuple[str, ...]]
) -> tuple[optax.Params, Sequence[jax.Array]]:
    """The tree with each block over a power of two that brings it near one, and that of each leaf.

    `spread` are the manual axes that each leaf is a shard along: all its shards have one power.
    """
    leaves, structure = jax.tree.flatten(tree)
    leaves = [x.astype(gram.dtype) for x in leaves]
    if not leaves:
        return tree, []
    largest = [jnp.max(jnp.abs(x), initial=0) for x in leaves]
    largest = [lax.pmax(x, axes) if axes else x for x, axes in zip(largest, spread, strict=True)]
    of_blocks = jnp.zeros_like(gram[:, 0, 0]).at[blocks].max(jnp.stack(largest))
    exponents = numerics.exponent_of(of_blocks)[blocks]
    scaled = [numerics.times_power(x, -e) for x, e in zip(leaves, exponents, strict=True)]
    return structure.unflatten(scaled), list(exponents)
