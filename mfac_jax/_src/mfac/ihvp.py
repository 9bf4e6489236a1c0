"""Products of the inverse Fisher matrix that an optimizer's state holds with any vector."""

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base import checks, numerics, schedules
from mfac_jax._src.linalg.solve import solve
from mfac_jax._src.mfac.state import ScaleByMFACState, storage_of
from mfac_jax._src.mfac.transform import DAMPING
from mfac_jax._src.rows.storages import Storage
from mfac_jax._src.rows.window import make_plan


def ihvp(
    state: ScaleByMFACState,
    tree: optax.Params,
    damping: float | jax.Array = DAMPING,
    *,
    storage: Storage | None = None,
) -> optax.Params:
    r"""Multiply any vector with the inverse Fisher matrix that an optimizer's state holds.

    For influence functions, evaluation and tests. With G the window's m rows, for each block:

    .. math::
      F^{-1} x = \left(x - G^\top (G G^\top + m \lambda I)^{-1} G x\right) / \lambda

    The vector need not be in the window, so the subtraction cannot be avoided. Expect a relative error of
    about the unit roundoff times the condition number of F. The update of `scale_by_mfac` has no such loss.
    Where a metric is used, x and the product are in its coordinates.

    Args:
      state: that of `scale_by_mfac`; `optax.tree.get(state, 'ScaleByMFACState')` finds it in a chain's.
      tree: x, shaped like the parameters. Its products with the gradients, and x / lambda, must not
        overflow: scale it down if they do.
      damping: lambda, > 0, a number.
      storage: only for a state whose window is in a `Storage` of your own: that storage.

    Returns:
      :math:`F^{-1} x`, with the tree, shapes and dtypes of `tree`.

    Raises:
      TypeError: `state` is not a `ScaleByMFACState`; a leaf is not a real floating-point array.
      ValueError: `damping` is out of its range; `tree` does not fit the window; `storage` is another.

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
    checks.check_positive("damping", damping, str(DAMPING))
    leaves, gram = len(jax.tree.leaves(tree)), state.gram
    # A block for each leaf here, and sums over them: the state's own blocks may be traced.
    plan = make_plan("tree", tree, state.window, storage_of(state, storage), range(leaves))
    damping = schedules.damping_at(damping, state.grads_seen, gram.dtype)
    x = plan.own_parts(tree, state.window)
    like = jnp.zeros((max(1, leaves), gram.shape[1]), gram.dtype)
    blocks = state.block_of_leaf
    products = jnp.zeros_like(gram[:, 0]).at[blocks].add(plan.dots(state.window, x, like)[0])
    shift = jnp.full((len(gram), 1), gram.shape[1] * damping)
    coefficients = -solve(gram, shift, products) / damping
    inside = plan.whole(plan.combine(coefficients[blocks], state.window), tree)
    return jax.tree.map(
        lambda x, y: numerics.narrow(x.astype(y.dtype) / damping + y, x.dtype), tree, inside
    )
