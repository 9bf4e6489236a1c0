"""Pruning through training: pruned weights stay at zero, and the optimizer knows the survivors only."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.mfac.transform import ScaleByMFACState
from mfac_jax._src.pruning import masks as _masks
from mfac_jax._src.rows import host_memory
from mfac_jax._src.rows import window as _window
from mfac_jax._src.rows.blocks import Blocks


class KeepPrunedState(NamedTuple):
    """State of `keep_pruned`.

    Attributes:
      masks: True where a weight is kept; `optax.MaskedNode` at leaves that take no part.
      inner_state: of the optimizer inside.
    """

    masks: Any  # leaves like the parameters', bool
    inner_state: optax.OptState


def keep_pruned(inner: optax.GradientTransformation, masks: Any) -> optax.GradientTransformationExtraArgs:
    r"""Keep pruned weights at zero under any optimizer.

    `inner` sees gradients and parameters that are zero where a weight is pruned: norms, moments and
    M-FAC's window are those of the survivors. The update of a pruned weight is minus the weight, so that
    it is zero after the step, whatever `inner` does (weight decay, momentum, noise) and whatever it was.

    It belongs outermost: in `optax.chain(keep_pruned(inner, masks), later)` what `later` adds to a pruned
    weight stands until the next step takes it away, and what `later` scales comes to zero no more.
    `optax.MultiSteps`, `optax.apply_if_finite` and `optax.lookahead` may stand around it, and leave pruned
    weights where they are in steps without an update: start from `apply_masks(params, masks)`. Where
    updates have fewer digits than the parameters (bfloat16 gradients, float32 parameters) minus the weight
    is rounded, and a weight that is not zero yet becomes so in a few steps.

    The masks are in the state: `set_masks` changes them, and a compiled step is not compiled anew. A new
    state from `init` has those given here.

    The sparsity at a step is an `optax.Schedule`. With :math:`s_0` at first, :math:`s_1` in the end, from
    step :math:`t_0` on and for n steps, the cubic one of Zhu and Gupta,

    .. math::
      s_t = s_1 + (s_0 - s_1) \left(1 - \frac{t - t_0}{n}\right)^3,

    is `optax.polynomial_schedule(s_0, s_1, 3, n, t_0)`; a linear one has 1 for the 3, and
    `optax.constant_schedule(s_1)` prunes at once. Choose new masks every so many steps, the last time at
    :math:`t_0 + n`, as in the example; further training recovers some of the accuracy.

    Args:
      inner: any transform or chain.
      masks: a tree like the parameters, bool arrays or arrays of 0 and 1: True where a weight is kept. None
        at leaves that take no part. `kernel_masks(params)` keeps all of the kernels, to begin with.

    Returns:
      A transform whose state is a `KeepPrunedState`. Its update needs `params`, and passes extra
      arguments on.

    Raises:
      TypeError: a mask is no array of numbers or bools.
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
      ...   if 10 < step <= 30 and step % 5 == 0:  # every 5 steps
      ...     grads = jax.tree.map(lambda g: g[None], jax.grad(loss_fn)(params))  # one, for a short example
      ...     params, masks = mfac_jax.pruning.prune(params, grads, schedule(step), masks=masks)
      ...     state = mfac_jax.pruning.set_masks(tx, state, masks)
      ...   params, state = train_step(params, state)
      >>> int(jnp.sum(params['kernel'] != 0)), mfac_jax.pruning.sparsity(masks)
      (2, 0.75)

    References:
      Michael Zhu, Suyog Gupta, `To prune, or not to prune: exploring the efficacy of pruning for model
      compression <https://arxiv.org/abs/1710.01878>`_, 2017 (the cubic schedule).
    """
    inner = optax.with_extra_args_support(inner)
    masks = _masks.as_masks(masks)

    def init(params: optax.Params) -> KeepPrunedState:
        if not jax.tree.leaves(params):  # the placeholder of optax.tree.map_params
            return KeepPrunedState(params, inner.init(params))
        own = jax.tree.map(_own, _masks.check_masks(params, masks), params, is_leaf=_masks.is_absent)
        return KeepPrunedState(own, inner.init(params))

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError(
                "keep_pruned needs params, to bring pruned weights back to zero, got None. Call "
                "update(updates, state, params)."
            )
        survivors = _masks.apply_masks(params, state.masks)
        updates, inner_state = inner.update(
            _masks.apply_masks(updates, state.masks), state.inner_state, survivors, **extra_args
        )

        def to_zero(mask, u, p):
            return u if _masks.is_absent(mask) else jnp.where(mask, u, -p.astype(u.dtype))

        updates = jax.tree.map(to_zero, state.masks, updates, params, is_leaf=_masks.is_absent)
        return updates, KeepPrunedState(state.masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _own(mask, param):
    """A copy of the mask, which may be donated, where the parameter is; as optax marks absent leaves."""
    return optax.MaskedNode() if _masks.is_absent(mask) else _masks.placed(jnp.array(mask), param)


def set_masks(
    tx: optax.GradientTransformation, opt_state: optax.OptState, masks: Any, *, blocks: Blocks = None
) -> Any:
    """The state of an optimizer with `keep_pruned` in it, after the masks have changed.

    Whatever the state holds of a pruned weight is set to zero: momentum, second moments, averages, and the
    gradients in M-FAC's window, whose Gram matrix is made anew, as if it had only ever seen the gradients
    of the survivors. The rest of M-FAC's state stays: what it has learned about the length of a step, and
    coefficients and shift of the last one. A weight that is taken back starts from zero.

    The window is copied, unless this runs under `jax.jit` with the state donated. On a mesh call it outside
    of `jax.shard_map`; windows in memory of the host are not supported. With an `nnx.Optimizer`, pass
    `nnx.as_pure(optimizer.opt_state)` and `nnx.as_pure(masks)`, and take over the state by
    `nnx.update(optimizer.opt_state, nnx.state(state))`.

    Args:
      tx: the whole optimizer.
      opt_state: its state. What `keep_pruned` holds in it is found in any nesting.
      masks: as in `keep_pruned`, at the same leaves.
      blocks: as given to `scale_by_mfac` or `mfac`. A block for each leaf is seen without it.

    Returns:
      The state, with the tree, shapes and dtypes of `opt_state`.

    Raises:
      TypeError: a mask is no array of numbers or bools.
      ValueError: there is no `keep_pruned` in the state; the masks do not fit those in it; `blocks` does
        not give as many blocks as the state has; a window is in memory of the host; inside of
        `jax.shard_map` or `jax.pmap`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> tx = mfac_jax.pruning.keep_pruned(mfac_jax.scale_by_mfac(2), jnp.array([True, True]))
      >>> state = tx.init(jnp.ones(2))
      >>> _, state = tx.update(jnp.array([3.0, 1.0]), state, jnp.ones(2))
      >>> state = mfac_jax.pruning.set_masks(tx, state, jnp.array([True, False]))
      >>> print(state.masks, state.inner_state.gram[0, 0, 0])
      [ True False] 9.0
    """
    masks = _masks.as_masks(masks)
    _check_states(opt_state, masks)

    def zero_pruned(leaf, mask):
        fits = not _masks.is_absent(leaf) and not _masks.is_absent(mask)
        fits = fits and leaf.shape[leaf.ndim - mask.ndim :] == mask.shape
        return _masks.zero_pruned(mask, leaf) if fits else leaf

    opt_state = optax.tree.map_params(tx, zero_pruned, opt_state, masks, is_leaf=_masks.is_absent)

    def settled(node):
        if isinstance(node, ScaleByMFACState):
            return _with_gram_of_window(node, blocks)
        if not isinstance(node, KeepPrunedState):
            return node
        inner_state = jax.tree.map(settled, node.inner_state, is_leaf=_is_known)
        return KeepPrunedState(_replaced(node.masks, masks), inner_state)

    return jax.tree.map(settled, opt_state, is_leaf=_is_known)


def _is_known(node) -> bool:
    return isinstance(node, (KeepPrunedState, ScaleByMFACState))


def _with_gram_of_window(state: ScaleByMFACState, blocks: Blocks) -> ScaleByMFACState:
    leaves = len(jax.tree.leaves(state.window))
    # As many labels as leaves are numbered as the leaves are.
    blocks = "leaf" if blocks is None and 1 < leaves == len(state.gram) else blocks
    block_of_leaf = _window.blocks_of_state(state.gram, state.window, blocks)
    gram = _window.gram(state.window, block_of_leaf, state.gram)
    none = jax.tree.map(jnp.zeros_like, state.inverse)  # made anew by the next step
    return state._replace(gram=_masks.placed(gram, state.gram), inverse=none)


def _replaced(old: Any, new: Any) -> Any:
    """The new masks where there are old ones."""

    def replaced(mask, other):
        return mask if _masks.is_absent(mask) else _own(other, mask)

    return jax.tree.map(replaced, old, new, is_leaf=_masks.is_absent)


def _states(opt_state: optax.OptState, kind: type) -> list[Any]:
    """All states of a kind, in any nesting."""
    found: list[Any] = []

    def visit(node):
        if isinstance(node, kind):
            found.append(node)
        if isinstance(node, KeepPrunedState):
            jax.tree.map(visit, node.inner_state, is_leaf=_is_known)

    jax.tree.map(visit, opt_state, is_leaf=_is_known)
    return found


def _check_states(opt_state: optax.OptState, masks: Any) -> None:
    """Refuse a state that cannot take these masks."""
    if jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            "set_masks cannot run inside of jax.shard_map or jax.pmap, where a device sees a part of the "
            "window. Call it outside, on the whole state."
        )
    keepers = _states(opt_state, KeepPrunedState)
    if not keepers:
        raise ValueError(
            "opt_state must hold the state of keep_pruned, and has none. Wrap the optimizer before init: "
            "tx = keep_pruned(inner, masks)."
        )
    for state in _states(opt_state, ScaleByMFACState):
        if any(host_memory.is_on_host(rows) for rows in jax.tree.leaves(state.window)):
            raise ValueError(
                "opt_state must hold M-FAC's window in memory of the device, got one on the host. Use "
                "host_chunk=None, or start anew with keep_pruned(inner, masks).init(params)."
            )
    taken = set()
    for keeper in keepers:
        fitting = _masks.check_masks(keeper.masks, masks)
        taken |= {path for path, _ in jax.tree_util.tree_leaves_with_path(fitting)}
        for path, old in jax.tree_util.tree_leaves_with_path(keeper.masks):
            if path not in taken:
                raise ValueError(
                    f"masks must be at the leaves where they were, but {leaf_name(path)} has None, and had "
                    f"{old.shape}. Pass jnp.ones({old.shape}, bool) to keep all of it."
                )
    for path, mask in jax.tree_util.tree_leaves_with_path(masks):
        if path not in taken:
            raise ValueError(
                f"masks must be at the leaves where they were, but {leaf_name(path)} has {mask.shape}, "
                "and had None. Give keep_pruned a mask of jnp.ones for it."
            )
