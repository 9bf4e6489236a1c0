"""Training of pruned networks: pruned weights stay at zero, and the optimizer sees only the survivors."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.pruning.masks import apply_masks, as_masks, check_masks, is_absent, placed


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`.

    Attributes:
      masks: True where a weight is kept; `optax.MaskedNode` at leaves that take no part.
      inner_state: of the optimizer inside.
    """

    masks: Any  # leaves like the parameters', bool
    inner_state: optax.OptState


def keep_pruned(inner: optax.GradientTransformation, masks: Any) -> optax.GradientTransformationExtraArgs:
    """Keep pruned weights at zero under any optimizer.

    `inner` sees gradients and parameters that are zero where a weight is pruned. So norms, moments and
    M-FAC's window are those of the survivors. The update of a pruned weight is minus the weight, whatever
    `inner` does (weight decay, momentum, noise): the weight is zero after the step.

    Put it outermost in a chain: what a later transform adds to a pruned weight stays until the next step.
    Around it, `optax.MultiSteps`, `optax.apply_if_finite` and `optax.lookahead` leave all weights as they
    are in some steps, so start from `apply_masks(params, masks)`. If updates have fewer digits than
    parameters (bfloat16 and float32), a weight that is not zero yet takes a few steps to become zero.

    The masks are in the state: `set_masks` changes them without compiling a step anew. A new state from
    `init` has the masks given here. To prune gradually, take the sparsity from an `optax.Schedule`. The
    cubic one of Zhu and Gupta, from s_0 to s_1 in n steps from t_0 on::

        s_t = s_1 + (s_0 - s_1) (1 - (t - t_0) / n)^3

    is `optax.polynomial_schedule(s_0, s_1, 3, n, t_0)`. Select new masks every few steps until t_0 + n, as
    in the example. Further training recovers some of the accuracy.

    Args:
      inner: any transform or chain.
      masks: a tree like the parameters, bool arrays or arrays of 0 and 1: True where a weight is kept. None
        at leaves that take no part. Start with `kernel_masks(params)`, which keeps all weights.

    Returns:
      A transform whose state is a `KeepPrunedState`. Its update needs `params`, and passes extra
      arguments on.

    Raises:
      TypeError: `inner` is no transform; a mask is no array of numbers or bools.
      ValueError: a value is neither 0 nor 1; no leaf has a mask; masks do not fit the parameters given to
        `init`, or the updates; `update` gets no `params`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, mfac_jax
      >>> params = {'kernel': jnp.arange(1.0, 9.0).reshape(4, 2), 'bias': jnp.zeros(2)}
      >>> loss_fn = lambda p: jnp.sum((p['kernel'] - 2) ** 2) + jnp.sum(p['bias'] ** 2)
      >>> masks = mfac_jax.pruning.kernel_masks(params)
      >>> tx = mfac_jax.pruning.keep_pruned(mfac_jax.mfac(num_grads=4), masks)
      >>> state = tx.init(params)
      >>> schedule = optax.polynomial_schedule(0.0, 0.75, 3, transition_steps=20, transition_begin=10)
      >>> @jax.jit
      ... def train_step(params, state):
      ...   updates, state = tx.update(jax.grad(loss_fn)(params), state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> for step in range(40):
      ...   if 10 < step <= 30 and step % 5 == 0:
      ...     grads = jax.tree.map(lambda g: g[None], jax.grad(loss_fn)(params))  # one, for brevity
      ...     params, masks = mfac_jax.pruning.prune(params, grads, schedule(step), masks=masks)
      ...     state = mfac_jax.pruning.set_masks(tx, state, masks)
      ...   params, state = train_step(params, state)
      >>> int(jnp.sum(params['kernel'] != 0)), mfac_jax.pruning.sparsity(masks)
      (2, 0.75)

    References:
      Michael Zhu, Suyog Gupta, `To prune, or not to prune: exploring the efficacy of pruning for model
      compression <https://arxiv.org/abs/1710.01878>`_, 2017.
    """
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(f"inner must be a transform of optax, got {inner!r}. Pass e.g. mfac_jax.mfac().")
    inner = optax.with_extra_args_support(inner)
    masks = as_masks(masks)

    def init(params: optax.Params) -> KeepPrunedState:
        if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params
            return KeepPrunedState(params, inner.init(params))
        own = jax.tree.map(mask_of_state, check_masks(params, masks), params, is_leaf=is_absent)
        return KeepPrunedState(own, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "keep_pruned needs params, to bring pruned weights back to zero, got None. Call "
                "update(updates, state, params)."
            )
        survivors = apply_masks(params, state.masks)
        updates, inner_state = inner.update(
            apply_masks(updates, state.masks), state.inner_state, survivors, **extra_args
        )

        def to_zero(mask, u, p):
            return u if is_absent(mask) else jnp.where(mask, u, -p.astype(u.dtype))

        updates = jax.tree.map(to_zero, state.masks, updates, params, is_leaf=is_absent)
        return updates, KeepPrunedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def mask_of_state(mask: Any, param: jax.Array) -> Any:
    """The mask as the state holds it: where the parameter lies, and absent as optax marks it.

    It is a copy, since the state may be donated while the user keeps the mask.
    """
    return optax.MaskedNode() if is_absent(mask) else placed(jnp.array(mask), param)
