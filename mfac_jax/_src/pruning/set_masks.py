"""New masks in the state of an optimizer, which then holds nothing of the weights they prune."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.base.fields import CURE
from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.mfac import metrics, step_length
from mfac_jax._src.mfac.metric import Metric
from mfac_jax._src.mfac.solvers import CHOLESKY, SOLVERS
from mfac_jax._src.mfac.state import Kinds, ScaleByMFACState
from mfac_jax._src.mfac.state_checks import Holder, as_state, check_fields, kind_of, storage_of
from mfac_jax._src.pruning.keep_pruned import KeepPrunedState, mask_of_state
from mfac_jax._src.pruning.masks import as_masks, check_masks, is_absent, placed, zero_pruned
from mfac_jax._src.rows import host_memory, storages
from mfac_jax._src.rows.storages import Storage
from mfac_jax._src.rows.window import gram


def set_masks(
    tx: optax.GradientTransformation,
    opt_state: optax.OptState,
    masks: Any,
    *,
    storage: Storage | None = None,
) -> Any:
    """Give the state of an optimizer with `keep_pruned` in it new masks.

    Whatever the state holds of a pruned weight becomes zero: momentum, second moments, averages, and the
    gradients in M-FAC's window. Its Gram matrix is computed anew, as if the window had seen only the
    survivors. The rest of M-FAC's state stays, e.g. what it has learned about the step length. A weight
    that is kept again starts from zero.

    The window is copied, unless this runs under `jax.jit` with the state donated. On a mesh, call it
    outside of `jax.shard_map`. Windows in host memory are not supported. With an `nnx.Optimizer`, pass
    `nnx.as_pure(optimizer.opt_state)` and `nnx.as_pure(masks)`, and store the result by
    `nnx.update(optimizer.opt_state, nnx.state(state))`.

    Args:
      tx: the whole optimizer.
      opt_state: its state, with that of `keep_pruned` at any depth.
      masks: as in `keep_pruned`, at the same leaves.
      storage: only for a window in a `Storage` of your own: that storage.

    Returns:
      The state, with the tree, shapes and dtypes of `opt_state`.

    Raises:
      TypeError: a mask is no array of numbers or bools.
      ValueError: there is no `keep_pruned` in the state; the masks do not fit those in it; a window is in
        host memory, in another storage or in a metric of your own; inside of `jax.shard_map` or
        `jax.pmap`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> tx = mfac_jax.pruning.keep_pruned(mfac_jax.scale_by_mfac(2), jnp.array([True, True]))
      >>> state = tx.init(jnp.ones(2))
      >>> _, state = tx.update(jnp.array([3.0, 1.0]), state, jnp.ones(2))
      >>> state = mfac_jax.pruning.set_masks(tx, state, jnp.array([True, False]))
      >>> print(state.masks, state.inner_state.gram[0, 0, 0])
      [ True False] 9.0
    """
    masks = as_masks(masks)
    _check_state(opt_state, masks, storage)

    def forgotten(leaf, mask):
        fits = not is_absent(leaf) and not is_absent(mask)
        # Others, such as the row means of a factored second moment, mix kept and pruned entries.
        fits = fits and leaf.shape[leaf.ndim - mask.ndim :] == mask.shape
        return zero_pruned(mask, leaf) if fits else leaf

    def mask_of(leaf, mask):
        return leaf if is_absent(leaf) or is_absent(mask) else mask

    # The state with masks in the places of the arrays that have one.
    try:
        masks_of = optax.tree.map_params(tx, mask_of, opt_state, masks, is_leaf=is_absent)
    except (ValueError, TypeError) as error:
        raise ValueError(f"opt_state must be that of tx: {error} {CURE}") from None
    zeroed = optax.tree.map_params(tx, forgotten, opt_state, masks, is_leaf=is_absent)

    def settled(node, before, masks_of):
        if isinstance(node, ScaleByMFACState):
            if not _metric_of(node).elementwise:
                node = node._replace(metric=before.metric)  # its entries do not belong to single weights
            return _of_survivors(node, before.window, masks_of.window, storage)
        if not isinstance(node, KeepPrunedState):
            return node
        inner = (node.inner_state, before.inner_state, masks_of.inner_state)
        inner_state = jax.tree.map(settled, *inner, is_leaf=_is_known)
        return KeepPrunedState(_replaced(node.masks, masks), inner_state)

    return jax.tree.map(settled, zeroed, opt_state, masks_of, is_leaf=_is_known)


def _is_known(node) -> bool:
    return isinstance(node, (KeepPrunedState, ScaleByMFACState))


def _of_survivors(
    state: ScaleByMFACState, window: Any, masks: Any, storage: Storage | None
) -> ScaleByMFACState:
    """The state of M-FAC as if it had seen only the gradients of the survivors.

    `masks` is like the window, with masks in the places of its arrays, or these arrays where there is none.
    """
    storage = storage_of(state, storage)

    def survivors(rows, masks):
        mask = storages.main_array(masks)
        if mask.dtype != bool:
            return rows
        return storages.map_rows(storage, lambda gradients: zero_pruned(mask, gradients), rows)

    leaves = map(survivors, *(storages.split(storage, tree) for tree in (window, masks)))
    structure = jax.tree.structure(storages.first_tree(storage, window))
    window = storages.join(storage, structure, list(leaves))
    products = gram(window, storage, state.block_of_leaf, state.gram)
    nothing = jax.tree.map(jnp.zeros_like, state.solver)  # the next step computes it anew
    return state._replace(window=window, gram=placed(products, state.gram), solver=nothing)


def _replaced(old: Any, new: Any) -> Any:
    """The new masks at the leaves that have one."""

    def replaced(mask, other):
        return mask if is_absent(mask) else mask_of_state(other, mask)

    return jax.tree.map(replaced, old, new, is_leaf=is_absent)


def _states(opt_state: optax.OptState, kind: type) -> list[Any]:
    """All states of a kind, at any depth."""
    found: list[Any] = []

    def visit(node):
        if isinstance(node, kind):
            found.append(node)
        if isinstance(node, KeepPrunedState):
            jax.tree.map(visit, node.inner_state, is_leaf=_is_known)

    jax.tree.map(visit, opt_state, is_leaf=_is_known)
    return found


def _check_state(opt_state: optax.OptState, masks: Any, storage: Storage | None) -> None:
    """Raise if the state cannot take these masks."""
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
        metric = kind_of(as_state(state), "metric")
        if metrics.by_name(metric) is None:
            known = ", ".join(map(repr, metrics.METRICS))
            raise ValueError(
                f"opt_state must hold M-FAC's window in a metric of {known}, got "
                f"{metric!r}: in another one, an entry of a row may not belong to one weight. Start anew "
                "with keep_pruned(inner, masks).init(params)."
            )
        _check_fields(state, storage_of(state, storage))
        if host_memory.is_on_host(state.window):
            raise ValueError(
                "opt_state must hold M-FAC's window in device memory, got one in host memory. Use "
                "host_chunk=None, or start anew with keep_pruned(inner, masks).init(params)."
            )
    _check_leaves([keeper.masks for keeper in keepers], masks)


def _metric_of(state: ScaleByMFACState) -> Metric:
    """The metric of a state that was checked."""
    found = metrics.by_name(kind_of(state, "metric"))
    assert found is not None
    return found


def _check_fields(state: ScaleByMFACState, storage: Storage) -> None:
    """Raise for a field that `init` would have made otherwise, as far as the state alone tells."""
    solver, fields = kind_of(state, "solver"), [*state._fields[1:]]
    if kind_of(state, "step_adaptation") != "adapted":
        fields.remove("step_length")
    if solver not in SOLVERS:
        fields.remove("solver")
    known = SOLVERS.get(solver, CHOLESKY)
    kinds = Kinds(_metric_of(state), known, storage, step_length.adapted(0.0))
    tree = storages.first_tree(storage, state.window)
    check_fields(state, fields, "a function that calls set_masks", Holder(storage, tree, kinds=kinds))


def _check_leaves(olds: list[Any], masks: Any) -> None:
    """Raise if the new masks are not at the leaves where an old one is.

    There may be several old trees: `optax.partition` gives each of its optimizers some of the leaves.
    """
    taken = set()
    for old in olds:
        taken |= {path for path, _ in jax.tree_util.tree_leaves_with_path(check_masks(old, masks))}
        for path, mask in jax.tree_util.tree_leaves_with_path(old):
            if path not in taken:
                raise ValueError(
                    f"masks must be at the leaves where they were, but {leaf_name(path)} has None, and had "
                    f"{mask.shape}. Pass jnp.ones({mask.shape}, bool) to keep all of it."
                )
    for path, mask in jax.tree_util.tree_leaves_with_path(masks):
        if path not in taken:
            raise ValueError(
                f"masks must be at the leaves where they were, but {leaf_name(path)} has {mask.shape}, "
                "and had None. Give keep_pruned a mask of jnp.ones for it."
            )
