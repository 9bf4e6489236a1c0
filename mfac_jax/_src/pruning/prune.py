"""One call from a trained network to a pruned one, and its two halves: the scores and the update."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.tree_util import Partial

from mfac_jax._src.base import checks
from mfac_jax._src.base.trees import check_params, check_structure, leaf_name
from mfac_jax._src.pruning import obs, patterns
from mfac_jax._src.pruning.inputs import InputAxes
from mfac_jax._src.pruning.inputs import input_axes as input_axes_of
from mfac_jax._src.pruning.masks import check_masks, is_absent, kernel_masks, placed, zero_pruned
from mfac_jax._src.pruning.obs import Update
from mfac_jax._src.pruning.report import sparsity as sparsity_of
from mfac_jax._src.pruning.select import check_request, select

# Best of 1e-3 to 1e-1 on a ResNet-20, with gradients of single examples of a cross-entropy. The paper takes
# 1e-5 with gradients of batches.
_DAMPING = 1e-2
# A partly pruned network is no longer at a minimum, so its survivors gain from a step along the gradient.
# At 75 % on a ResNet-20 it won 10 points of accuracy with the batch statistics as they were, and 5 with new
# ones. The mean gradient needs enough data: with 64 single images accuracy fell to 0.21 at 50 %, while 64
# batches of 32 did as well as 512 single images.
_GRADIENT_TERM = 0.3
# It changed nothing at the default damping, on a ResNet-20 and two networks for digits. With a damping of
# 1e-5 one of these, pruned to 75 %, kept an accuracy of 0.95 with this limit and 0.44 without.
_STEP_LIMIT = 0.5
_NUM_STEPS = 16


def prune(
    params: optax.Params,
    grads_or_fn: optax.Params | Callable[[optax.Params], optax.Params],
    sparsity: float | jax.Array,
    *,
    damping: float | jax.Array = _DAMPING,
    masks: Any = None,
    pattern: str | None = None,
    input_axes: InputAxes | None = None,
    update: Update = "joint",
    gradient_term: float | jax.Array | None = None,
    step_limit: float | jax.Array | None = None,
    num_steps: int | None = None,
) -> tuple[optax.Params, Any]:
    """Prune a trained network: set the cheapest weights to zero, and move the others to make up for them.

    This is the Optimal Brain Surgeon. With the m gradients g_k as rows of G, it models the loss around the
    parameters w by q, and a set Q of weights has a cost::

        q(delta) = gradient_term g^T delta + delta^T F delta / 2,    g = sum_k g_k / m
        F = damping I + sum_k g_k g_k^T / m,    cost of Q = w_Q^T ([F^-1]_QQ)^-1 w_Q / 2

    over the weights that are not pruned yet. Each step prunes the cheapest weights, or groups of a pattern,
    over all leaves together. Then all survivors S move, in leaves without a mask too. Where gradients are
    zero, magnitudes decide. The model is local: several steps with new gradients do better than one. If the
    network has batch statistics, estimate them again at the end.

    Args:
      params: w, real floating-point arrays, finite.
      grads_or_fn: m stacked gradients at `params`, leaves `(m, *shape)`, for one step; or a function from
        parameters to such gradients, called once per step.
      sparsity: share of weights that are zero in the end, over all leaves with a mask, in [0, 1). The
        number is exactly round(sparsity * weights), or the nearest that the groups of a pattern give.
      damping: > 0, in units of a squared gradient. Take less with gradients of batches.
      masks: which weights are kept, a tree like `params`: bool arrays or arrays of 0 and 1, None at leaves
        that take no part. Pruned weights stay pruned. Default: `kernel_masks(params)`.
      pattern: None: single weights. `'N:M'`, e.g. `'2:4'`: at most N of M consecutive weights along the
        inputs stay. `'block:B'`: B consecutive weights along the inputs go together.
      input_axes: with a pattern, a function from a key path to the axes that are inputs, taken as one; or
        None, to read it from names and biases: axis -2 of (in, out) and of convolutions, `in` of (in,
        heads, d), `heads` and `d` of (heads, d, out). Needed where these do not tell.
      update: `'joint'`: the survivors move to the minimum of q where Q is zero, by
        G_S^T (G_S G_S^T + m damping I)^-1 (G_Q w_Q - gradient_term). `'independent'`, as published: each
        weight moves them as if alone, by -F^-1 (v + gradient_term g), with v_i = w_i / [F^-1]_ii on Q.
      gradient_term: >= 0, the pull of the mean gradient. Default: 0 with gradients, 0.3 with a function,
        since a partly pruned network is no longer at a minimum. It needs the mean of enough data.
      step_limit: the longest move of the survivors, relative to the norm of the weights that go. Default:
        no limit with gradients, 0.5 with a function, which guards against a small damping.
      num_steps: how often gradients are computed; each step prunes the same share of the survivors.
        Default: 16 with a function; 1 with gradients.

    Returns:
      The pruned parameters, and masks like `masks`, bool arrays. `params` do not change.

    Raises:
      TypeError: a leaf is no real floating-point array, or a mask no array of numbers.
      ValueError: an argument is out of range; masks and pattern do not allow the sparsity; groups do not
        divide a leaf; no leaf is a kernel; trees or shapes differ; parameters or gradients are not finite.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> inputs = jnp.array([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0], [1.0, 0.0, 1.0]])
      >>> loss_fn = lambda w, batch: jnp.mean((batch @ w - batch.sum(1, keepdims=True)) ** 2)
      >>> grads_fn = lambda w: mfac_jax.collect_gradients(loss_fn, w, [inputs], 3, per_example=True)
      >>> w = jnp.array([[0.2], [1.1], [0.9]])
      >>> w, masks = mfac_jax.pruning.prune(w, grads_fn, sparsity=1 / 3, num_steps=1)
      >>> print(masks.ravel())
      [False  True  True]

    References:
      B. Hassibi, D. Stork, `Second Order Derivatives for Network Pruning: Optimal Brain Surgeon
      <https://papers.nips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html>`_, NIPS 1992.
      E. Frantar, E. Kurtic, D. Alistarh, `M-FAC: Efficient Matrix-Free Approximations of Second-Order
      Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021 (the update `'independent'`).
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((params, grads_or_fn, masks, sparsity))):
        raise TypeError(
            "prune needs params, gradients, masks and sparsity that are not traced, since its choices "
            "depend on them. Call it outside of jax.jit; obs_scores and obs_update can be traced."
        )
    found = patterns.parse(pattern)
    grads_fn = _as_function(grads_or_fn, params)
    if gradient_term is None:
        gradient_term = 0.0 if grads_fn is None else _GRADIENT_TERM
    if step_limit is None:
        step_limit = math.inf if grads_fn is None else _STEP_LIMIT
    _check_options(damping, update, gradient_term, step_limit)
    params, masks = _checked(params, masks)
    inputs = _inputs(params, masks, found, input_axes)
    check_request(masks, sparsity, found, inputs)
    steps = _check_steps(num_steps, grads_fn is not None)
    for target in _targets(sparsity_of(masks), float(sparsity), steps):
        grads: Any = grads_or_fn if grads_fn is None else grads_fn(params)
        model = obs.quadratic_model(params, grads, damping, masks)
        costs = obs.costs(model, found.size, found.choices, inputs)
        costs = jax.tree.unflatten(jax.tree.structure(masks), costs)
        before, masks = masks, select(costs, masks, target, found, inputs)
        if sparsity_of(masks) > sparsity_of(before):  # else there is nothing to make up for
            params = _moved(params, model, masks, update, gradient_term, step_limit)
    return params, masks


def obs_scores(
    params: optax.Params, grads: optax.Params, damping: float | jax.Array = _DAMPING, *, masks: Any = None
) -> Any:
    """Compute what it costs to prune each weight alone.

    That is w_i^2 / (2 [F^-1]_ii), with F as in `prune`.

    Args:
      params: w, as for `prune`.
      grads: stacked gradients, as for `prune`.
      damping: as for `prune`.
      masks: as for `prune`; F is that of the weights they keep.

    Returns:
      A tree like `params` with the increase of the loss in the quadratic model, None at leaves that take no
      part. The score of a weight that is already pruned has no meaning.

    Raises:
      TypeError: as `prune`.
      ValueError: as `prune`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> w, grads = jnp.array([[1.0, 1.0]]), jnp.array([[[1.0, 0.0]]])
      >>> print(mfac_jax.pruning.obs_scores(w, grads, damping=1.0))
      [[1.  0.5]]
    """
    checks.check_positive("damping", damping, str(_DAMPING))
    params, masks = _checked(params, masks)
    scores = obs.scores(obs.quadratic_model(params, grads, damping, masks))
    leaves, structure = jax.tree.flatten(masks)
    return structure.unflatten(
        placed(score.reshape(mask.shape), mask) for score, mask in zip(scores, leaves, strict=True)
    )


def obs_update(
    params: optax.Params,
    grads: optax.Params,
    masks: Any,
    damping: float | jax.Array = _DAMPING,
    *,
    masks_before: Any = None,
    update: Update = "joint",
    gradient_term: float | jax.Array = 0.0,
    step_limit: float | jax.Array = math.inf,
) -> optax.Params:
    """Prune by masks of your own, and move the other weights to make up for it: one step of `prune`.

    Args:
      params: as for `prune`.
      grads: stacked gradients, as for `prune`.
      masks: which weights are kept.
      damping: as for `prune`.
      masks_before: which weights were kept before, at the same leaves; they include those that `masks`
        keep. Default: all.
      update: as for `prune`.
      gradient_term: as for `prune`.
      step_limit: as for `prune`. Default: no limit.

    Returns:
      The parameters, zero where they are pruned.

    Raises:
      TypeError: as `prune`.
      ValueError: as `prune`; `masks` keep a weight that `masks_before` prune.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> w, grads = jnp.array([[1.0, 1.0]]), jnp.array([[[1.0, 1.0]]])
      >>> print(mfac_jax.pruning.obs_update(w, grads, jnp.array([[1, 0]]), damping=1e-3))
      [[1.999001 0.      ]]
    """
    _check_options(damping, update, gradient_term, step_limit)
    masks = _placed_masks(params, masks)
    if masks_before is None:
        masks_before = jax.tree.map(jnp.ones_like, masks)
    params, masks_before = _checked(params, masks_before)
    _check_fewer(masks, masks_before)
    model = obs.quadratic_model(params, grads, damping, masks_before)
    return _moved(params, model, masks, update, gradient_term, step_limit)


def _checked(params: optax.Params, masks: Any) -> tuple[optax.Params, Any]:
    """The parameters, zero where they are pruned, and the masks; raises if they cannot be pruned."""
    check_params(params)
    _check_finite(params, ". Prune parameters of a training that went well.")
    params = jax.tree.map(jnp.asarray, params)
    masks = kernel_masks(params) if masks is None else _placed_masks(params, masks)

    def without_pruned(mask, w):
        return w if is_absent(mask) else placed(zero_pruned(mask, w), w)

    return jax.tree.map(without_pruned, masks, params, is_leaf=is_absent), masks


def _as_function(grads_or_fn: Any, params: optax.Params) -> Callable[..., Any] | None:
    """The function from parameters to gradients; None for gradients.

    Gradients may have `__call__`, as modules of equinox do, and a function may hold arrays, as a Partial
    does. So a tree of arrays is one of gradients if it has the shapes of the parameters, or their type.
    The structures do not tell: JAX takes those of different dataclasses for equal.
    """
    if not callable(grads_or_fn):
        return None
    leaves = jax.tree.leaves(grads_or_fn)
    if jax.tree_util.all_leaves([grads_or_fn]) or not leaves:
        return grads_or_fn
    has_shapes = [np.shape(g)[1:] for g in leaves] == [np.shape(w) for w in jax.tree.leaves(params)]
    has_type = type(grads_or_fn) is type(params) and not isinstance(params, Partial)
    return None if has_shapes or has_type else grads_or_fn


def _inputs(
    params: optax.Params, masks: Any, pattern: patterns.Pattern, given: InputAxes | None
) -> list[tuple[int, ...]]:
    """The input axes of each mask, which only groups of several entries ask for."""
    if given is not None and (pattern.size == 1 or not callable(given)):
        raise ValueError(
            "input_axes must be None, or with a pattern a function from a key path to axes, got "
            f"{given!r} with groups of {pattern.size}. Pass e.g. input_axes=lambda path: -2."
        )
    if pattern.size == 1:
        return [()] * len(jax.tree.leaves(masks))
    return input_axes_of(params, masks, given)


def _placed_masks(params: optax.Params, masks: Any) -> Any:
    """The checked masks, moved to where the parameters are on a mesh."""

    def moved(mask, w):
        return mask if is_absent(mask) else placed(mask, w)

    return jax.tree.map(moved, check_masks(params, masks), params, is_leaf=is_absent)


def _check_fewer(masks: Any, before: Any) -> None:
    """Raise if the masks keep what was pruned before, or are at other leaves."""
    cure = "Pass jnp.ones(leaf.shape, bool) where nothing is pruned."
    check_structure("masks", masks, before, "masks_before", cure)
    leaves = jax.tree_util.tree_leaves_with_path(masks)
    for (path, new), old in zip(leaves, jax.tree.leaves(before), strict=True):
        back = new & ~old
        if not isinstance(back, Tracer) and back.any():
            raise ValueError(
                f"masks must keep no weight that masks_before prune, but {leaf_name(path)} has "
                f"{int(back.sum())}. Pass masks & masks_before."
            )


def _check_options(damping, update, gradient_term, step_limit) -> None:
    checks.check_positive("damping", damping, str(_DAMPING))
    checks.check_choice("update", update, ("joint", "independent"))
    checks.check_not_negative("gradient_term", gradient_term, str(_GRADIENT_TERM))
    checks.check_limit("step_limit", step_limit, str(_STEP_LIMIT))


def _check_steps(num_steps: int | None, is_function: bool) -> int:
    """The number of steps; more than one needs new gradients for each."""
    if num_steps is None:
        return _NUM_STEPS if is_function else 1
    num_steps = checks.check_count("num_steps", num_steps, str(_NUM_STEPS))
    if num_steps > 1 and not is_function:
        raise ValueError(
            f"num_steps must be 1 with given gradients, got {num_steps}: later steps need gradients at the "
            "parameters they start from. Pass a function from parameters to stacked gradients."
        )
    return num_steps


def _check_finite(params: optax.Params, cure: str) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(_finite_leaves(params))
    for path, is_finite in leaves:
        if not isinstance(is_finite, Tracer) and not is_finite:
            raise ValueError(f"params must be finite, but {leaf_name(path)} has a NaN or an Inf{cure}")


@jax.jit
def _finite_leaves(params: optax.Params) -> Any:
    """Whether all entries of a leaf are finite, for each leaf."""
    return jax.tree.map(lambda w: jnp.all(jnp.isfinite(w)), params)


def _targets(start: float, end: float, steps: int) -> list[float]:
    """The sparsities after each step: every step prunes the same share of the survivors."""
    shares = np.arange(1, steps) / steps
    return [*(1 - (1 - start) ** (1 - shares) * (1 - end) ** shares).tolist(), end]


def _moved(params, model: obs.Model, masks: Any, update: Update, gradient_term, step_limit) -> optax.Params:
    """The parameters after the step to the new masks; raises if they are not finite."""
    leaves = obs.follow(model, obs.at_leaves(masks, params), update, gradient_term, step_limit)
    params = jax.tree.unflatten(jax.tree.structure(params), map(placed, leaves, jax.tree.leaves(params)))
    _check_finite(params, " after pruning. Pass a larger damping, or a step_limit.")
    return params
