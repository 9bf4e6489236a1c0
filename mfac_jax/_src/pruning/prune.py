"""Pruning by the Optimal Brain Surgeon: `prune`, and the two halves of its steps."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mfac_jax._src.base import checks, trees
from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.pruning import masks as _masks
from mfac_jax._src.pruning import obs, patterns
from mfac_jax._src.pruning.obs import Update

_DAMPING = 1e-2
_GRADIENT_TERM = 0.3
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
    per_leaf: bool = False,
    update: Update = "joint",
    gradient_term: float | jax.Array | None = None,
    step_limit: float | jax.Array | None = None,
    num_steps: int | None = None,
    spacing: Literal["geometric", "linear"] = "geometric",
) -> tuple[optax.Params, Any]:
    r"""Prune a trained network: choose weights, set them to zero, and move the others to make up for them.

    Optimal Brain Surgeon on the quadratic model of the loss around the parameters w,

    .. math::
      q(\delta) = \eta\, g^\top \delta + \tfrac{1}{2} \delta^\top F \delta, \qquad
      F = \lambda I + \tfrac{1}{m} \sum_k g_k g_k^\top, \qquad g = \tfrac{1}{m} \sum_k g_k,

    with F and g over the weights that are not pruned yet. Each step chooses the weights (or groups of a
    pattern) Q whose removal costs least when all others follow,
    :math:`\tfrac{1}{2} w_Q^\top ([F^{-1}]_{QQ})^{-1} w_Q`, which is :math:`w_i^2 / (2 [F^{-1}]_{ii})` for
    a single one, and moves the survivors S, those of leaves that take no part in pruning included:

    - `'joint'`: to the minimum of q where all of Q is zero,
      :math:`\delta_S = -F_{SS}^{-1} (\eta g_S - F_{SQ} w_Q) = G_S^\top (G_S G_S^\top + m \lambda I)^{-1}
      (G_Q w_Q - \eta 1)`, the gradients as rows of G;
    - `'independent'`: by the sum of what each pruned weight alone would ask for, as published:
      :math:`\delta = -F^{-1} (v + \eta g), v_i = w_i / [F^{-1}]_{ii}` on Q.

    The model is local: several steps with new gradients do better than one. On a ResNet-20, with the
    gradient term, 64 gradients of batches of 32 did as well as 512 of single images
    (`collect_gradients(..., per_example=True)`), in an eighth of the memory. Batch statistics fit the
    pruned network better when they are estimated again.

    Where gradients are zero F is a multiple of the identity, and magnitudes decide. `params` are never
    changed in place; with an error there is no result.

    Args:
      params: w, real floating-point arrays, finite.
      grads_or_fn: m gradients at `params`, stacked, leaves `(m, *shape)`, for one step; or a function from
        parameters to such gradients, called once a step.
      sparsity: share of the weights that are zero in the end, of all leaves that take part, in [0, 1).
        Exactly round(sparsity * weights) are, also with ties; with a pattern, the nearest number that
        whole groups give.
      damping: :math:`\lambda` > 0, in units of a squared gradient. With single
        examples of cross-entropy 1e-2, the default, was best of 1e-3 to 1e-1 on a ResNet-20; the paper
        takes 1e-5 with gradients of batches.
      masks: which weights are kept: a tree like `params`, bool arrays or arrays of 0 and 1, with None at
        leaves that take no part. What is pruned in them stays so. Default: `kernel_masks(params)`.
      pattern: None: single weights. `'N:M'`, such as `'2:4'`: at most N of M consecutive weights along the
        inputs (axis -2 of a kernel) are kept; a sparsity below 1 - N / M leaves some groups whole.
        `'block:B'`, such as `'block:4'`: B consecutive weights along the inputs go together.
      per_leaf: whether each leaf is pruned to the sparsity, or those that cost least, wherever they are.
      update: how the survivors follow, `'joint'` or `'independent'`.
      gradient_term: :math:`\eta` >= 0. Default: with gradients 0, as for a network at a minimum of its
        loss; with a function 0.3, since a network that is pruned in part is at none: the survivors then
        learn from the data that the gradients are of. Pruning 75 % of a ResNet-20 it won 10 points of
        accuracy with batch statistics as they were, 5 with statistics estimated again. It needs their mean
        to mean something: 512 gradients of single images, or 64 of batches, did there; with 64 of single
        images and batch statistics as they were, accuracy fell to 0.21 at 50 %. Take means of batches then.
      step_limit: the longest move of the survivors, as a multiple of the norm of the weights that go.
        Default: with gradients math.inf, no limit; with a function 0.5, which changed nothing at the
        default damping on a ResNet-20 and two networks for digits. With a damping of 1e-5 one of these,
        pruned of 75 %, kept an accuracy of 0.95 with that limit and 0.44 without.
      num_steps: recomputations of the gradients. Default: 16 with a function; 1 with gradients.
      spacing: `'geometric'`: each step prunes the same share of the survivors. `'linear'`: the same number.

    Returns:
      The pruned parameters, and masks like `masks`, bool arrays.

    Raises:
      TypeError: a leaf is no real floating-point array, or a mask no array of numbers.
      ValueError: an argument is out of range; the sparsity is below that of the masks or above that of the
        pattern; groups do not divide a leaf; no leaf is a kernel; trees or shapes differ; parameters or
        gradients (by their indices) are not finite, before or after.

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
      Babak Hassibi, David Stork, `Second Order Derivatives for Network Pruning: Optimal Brain Surgeon
      <https://papers.nips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html>`_, NIPS 1992.
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021 (the update
      `'independent'`, and recomputation).
    """
    found = patterns.parse_pattern(pattern)
    if gradient_term is None:
        gradient_term = _GRADIENT_TERM if callable(grads_or_fn) else 0.0
    if step_limit is None:
        step_limit = _STEP_LIMIT if callable(grads_or_fn) else math.inf
    _check_options(damping, update, gradient_term, step_limit)
    checks.check_choice("spacing", spacing, ("geometric", "linear"))
    checks.check_bool("per_leaf", per_leaf)
    params, masks = _checked(params, masks)
    patterns.check_request(masks, sparsity, found, per_leaf=per_leaf)
    steps = _check_steps(num_steps, callable(grads_or_fn))
    for target in _targets(_masks.sparsity(masks), float(sparsity), steps, spacing):
        grads = grads_or_fn(params) if callable(grads_or_fn) else grads_or_fn
        model = obs.quadratic_model(params, grads, damping, masks)
        costs = jax.tree.unflatten(jax.tree.structure(masks), obs.costs(model, found.size, found.choices))
        before, masks = masks, patterns.select(costs, masks, target, found, per_leaf=per_leaf)
        if _masks.sparsity(masks) > _masks.sparsity(before):  # else there is nothing to make up for
            params = _moved(params, model, masks, update, gradient_term, step_limit)
    return params, masks


def obs_scores(
    params: optax.Params, grads: optax.Params, damping: float | jax.Array = _DAMPING, *, masks: Any = None
) -> Any:
    r"""What it costs to prune single weights, all others following: :math:`w_i^2 / (2 [F^{-1}]_{ii})`.

    Args:
      params: w, as for `prune`.
      grads: stacked gradients, as for `prune`.
      damping: as for `prune`.
      masks: as for `prune`; F is that of the weights they keep.

    Returns:
      The increase of the loss in the quadratic model: a tree like `params`, None at leaves that take no
      part; meaningless where a weight is pruned already.

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
    scores = obs.costs(obs.quadratic_model(params, grads, damping, masks), 1, np.ones((1, 1), bool))
    leaves, structure = jax.tree.flatten(masks)
    return structure.unflatten(
        _masks.placed(patterns.ungroup(score, mask.shape), mask)
        for score, mask in zip(scores, leaves, strict=True)
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
    r"""Prune what masks say, and move the other weights to make up for it: a step of `prune`.

    Args:
      params: as for `prune`.
      grads: stacked gradients, as for `prune`.
      masks: which weights are kept.
      damping: as for `prune`.
      masks_before: which were kept before, at the same leaves, at least those that `masks` keep. Default:
        all.
      update: as for `prune`.
      gradient_term: as for `prune`.
      step_limit: as for `prune`. Default: no limit.

    Returns:
      Parameters, zero where they are pruned.

    Raises:
      TypeError: as `prune`.
      ValueError: as `prune`.

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
    """The parameters, zero where they are pruned, and the masks; refused where they are none."""
    trees.check_params(params)
    _check_finite(params, ". Prune parameters of a training that went well.")
    params = jax.tree.map(jnp.asarray, params)
    masks = _masks.kernel_masks(params) if masks is None else _placed_masks(params, masks)

    def zero_pruned(mask, w):
        return w if _masks.is_absent(mask) else _masks.placed(_masks.zero_pruned(mask, w), w)

    return jax.tree.map(zero_pruned, masks, params, is_leaf=_masks.is_absent), masks


def _placed_masks(params: optax.Params, masks: Any) -> Any:
    """The masks, checked, where the parameters are on a mesh."""

    def placed(mask, w):
        return mask if _masks.is_absent(mask) else _masks.placed(mask, w)

    return jax.tree.map(placed, _masks.check_masks(params, masks), params, is_leaf=_masks.is_absent)


def _check_fewer(masks: Any, before: Any) -> None:
    """Refuse masks that keep what was pruned before, or are at other leaves."""

    def check(path, new, old):
        if _masks.is_absent(new) != _masks.is_absent(old):
            raise ValueError(
                f"masks and masks_before must be at the same leaves, but {leaf_name(path)} is in one of "
                "the two. Pass jnp.ones(leaf.shape, bool) where nothing is pruned."
            )
        back = None if _masks.is_absent(new) else new & ~old
        if back is not None and not isinstance(back, Tracer) and back.any():
            raise ValueError(
                f"masks must keep no weight that masks_before prune, but {leaf_name(path)} has "
                f"{int(back.sum())}. Pass masks & masks_before."
            )

    jax.tree_util.tree_map_with_path(check, masks, before, is_leaf=_masks.is_absent)


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
            f"num_steps must be 1 with gradients that are given, got {num_steps}: later steps need "
            "gradients of the parameters as they are then. Pass a function from parameters to stacked "
            "gradients."
        )
    return num_steps


def _check_finite(params: optax.Params, cure: str) -> None:
    for path, w in jax.tree_util.tree_leaves_with_path(params):
        is_finite = jnp.all(jnp.isfinite(w))
        if not isinstance(is_finite, Tracer) and not is_finite:
            raise ValueError(f"params must be finite, but {leaf_name(path)} has a NaN or an Inf{cure}")


def _targets(start: float, end: float, steps: int, spacing: str) -> list[float]:
    """The sparsities of the steps."""
    shares = np.arange(1, steps) / steps
    if spacing == "linear":
        return [*(start + (end - start) * shares).tolist(), end]
    return [*(1 - (1 - start) ** (1 - shares) * (1 - end) ** shares).tolist(), end]


def _moved(params, model: obs.Model, masks: Any, update: Update, gradient_term, step_limit) -> optax.Params:
    """The parameters after the step to the new masks; refused where they are not finite."""
    leaves = obs.follow(model, obs.at_leaves(masks, params), update, gradient_term, step_limit)
    params = jax.tree.unflatten(
        jax.tree.structure(params), map(_masks.placed, leaves, jax.tree.leaves(params))
    )
    _check_finite(params, " after pruning. Pass a larger damping, or a step_limit.")
    return params
