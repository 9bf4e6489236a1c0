"""Which weights are pruned: the cheapest choices of a pattern, up to a sparsity."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfac_jax._src.base import checks
from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.pruning.masks import placed
from mfac_jax._src.pruning.patterns import Pattern, groups, ungroup


def check_request(
    masks: Any, sparsity: float | jax.Array, pattern: Pattern, inputs: Sequence[tuple[int, ...]]
) -> None:
    """Raise if the masks do not suit the pattern, or the sparsity cannot be reached from them.

    `inputs` are the input axes of each mask.
    """
    checks.check_decay("sparsity", sparsity, "0.9")
    for (path, mask), axes in zip(jax.tree_util.tree_leaves_with_path(masks), inputs, strict=True):
        _check_divides(leaf_name(path), mask, pattern, axes)
        if pattern.is_whole and pattern.size > 1:
            _check_whole_blocks(leaf_name(path), mask, pattern, axes)
    count = _count(sparsity, masks, pattern)
    if count.target > count.most:
        raise ValueError(
            f"sparsity can be at most {pattern.together / pattern.size:g} with this pattern, got "
            f"{sparsity}. Pass less, or a pattern that keeps fewer weights of a group."
        )
    # An earlier request may have been rounded up by half a group, and must not fail when it is repeated.
    if count.pruned - count.target > pattern.together / 2:
        raise ValueError(
            f"sparsity must be at least that of the masks, got {sparsity}, where masks already have "
            f"{count.pruned / count.entries:.6g} ({count.pruned} of {count.entries}). Pass more, or other "
            "masks."
        )


def _check_divides(name: str, mask: jax.Array, pattern: Pattern, inputs: tuple[int, ...]) -> None:
    """Raise if the groups of the pattern do not divide the inputs of a leaf."""
    length = math.prod(mask.shape[axis] for axis in inputs)
    if length % pattern.size:
        which = f"axis {inputs[0]}" if len(inputs) == 1 else f"axes {inputs}"
        raise ValueError(
            f"pattern has groups of {pattern.size}, which must divide the inputs of each leaf, but {which} "
            f"of {name}, {mask.shape}, has {length} entries. Pass masks with None there, or another "
            "pattern."
        )


def _check_whole_blocks(name: str, mask: jax.Array, pattern: Pattern, inputs: tuple[int, ...]) -> None:
    """Raise if a block of the mask is pruned in part, as another pattern does."""
    blocks = groups(mask, pattern.size, inputs)
    if jnp.any(jnp.any(blocks, axis=1) & ~jnp.all(blocks, axis=1)):
        raise ValueError(
            f"masks must prune whole blocks of {pattern.size} with this pattern, but {name} has one that "
            "is pruned in part. Pass masks that were made with this pattern, None, or pattern=None."
        )


class _Count(NamedTuple):
    """How many entries there are, are pruned now, are to be pruned in all, and can be pruned at most."""

    entries: int
    pruned: int
    target: int
    most: int


def _count(sparsity: float | jax.Array, masks: Any, pattern: Pattern) -> _Count:
    kept = jax.tree.leaves(masks)
    entries, pruned = sum(k.size for k in kept), sum(k.size - int(jnp.count_nonzero(k)) for k in kept)
    target, most = round(float(sparsity) * entries), entries // pattern.size * pattern.together
    return _Count(entries, pruned, target, most)


def select(
    scores: Any, masks: Any, sparsity: float, pattern: Pattern, inputs: Sequence[tuple[int, ...]]
) -> Any:
    """Prune the cheapest choices, until the masks have the sparsity.

    Every group can be pruned once, by its cheapest choice among those that contain what is pruned in it
    already. Groups are pruned in the order of this cost, equal ones in the order of leaves and groups. In
    the end exactly round(sparsity * entries) are pruned, or the nearest number that whole groups can give.
    N:M at its limit prunes every group. A group that has lost more than M - N entries already stays as it
    is.

    Args:
      scores: a tree like `masks`: at each leaf `(groups, choices)`, the costs of the choices; no NaN.
      masks: from `check_masks`; what they prune stays pruned.
      sparsity: of all entries that take part.
      pattern: from `parse`; `check_request` must have accepted it with these masks and this sparsity.
      inputs: the input axes of each mask.

    Returns:
      Masks like `masks`.
    """
    count = _count(sparsity, masks, pattern)
    needed = None if count.target == count.most else max(0, count.target - count.pruned)
    leaves, structure = jax.tree.flatten(masks)
    choices = jnp.asarray(pattern.choices)
    found = [
        _cheapest(s, mask, choices, axes)
        for s, mask, axes in zip(jax.tree.leaves(scores), leaves, inputs, strict=True)
    ]
    chosen = _first([choice.cost for choice in found], [choice.number for choice in found], needed)
    new = [
        placed(_without(mask, goes, choice.entries, axes), mask)
        for mask, goes, choice, axes in zip(leaves, chosen, found, inputs, strict=True)
    ]
    return structure.unflatten(new)


class _Cheapest(NamedTuple):
    """The cheapest choice of each group.

    Attributes:
      cost: of the choice, `(groups,)`.
      number: of entries that it removes, `(groups,)`.
      entries: which it removes, `(groups, size)`.
    """

    cost: jax.Array
    number: jax.Array
    entries: jax.Array


@functools.partial(jax.jit, static_argnames="inputs")
def _cheapest(scores: jax.Array, mask: jax.Array, choices: jax.Array, inputs: tuple[int, ...]) -> _Cheapest:
    """The cheapest choices that contain what is pruned already; a group without one removes nothing."""
    kept = groups(mask, choices.shape[1], inputs)
    # A product counts, for each group and choice, the pruned entries that the choice leaves out.
    contains_pruned = (~kept).astype(jnp.float32) @ (~choices.T).astype(jnp.float32) == 0
    cost = jnp.min(jnp.where(contains_pruned, scores, jnp.inf), axis=1)
    # Not argmin: a score may be Inf itself, and then one that is not allowed would look as cheap.
    choice = jnp.argmax(contains_pruned & (scores == cost[:, None]), axis=1)
    entries = kept & jnp.any(contains_pruned, axis=1, keepdims=True) & choices[choice]
    return _Cheapest(cost, jnp.sum(entries, axis=1), entries)


@jax.jit
def _first(costs: Sequence[jax.Array], numbers: Sequence[jax.Array], needed: int | None) -> list[jax.Array]:
    """Which groups of each leaf go `(groups,)`: all, or the cheapest, in one ranking of all leaves.

    They are as many as remove nearest to `needed` entries.
    """
    cost, removed = jnp.concatenate(costs), jnp.concatenate(numbers)
    order = jnp.lexsort((cost, removed == 0))  # stable
    sums = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(removed[order])])
    count = len(order) if needed is None else jnp.argmin(jnp.abs(sums - needed))
    goes = jnp.zeros(len(order), bool).at[order].set(jnp.arange(len(order)) < count)
    return jnp.split(goes, np.cumsum([len(leaf) for leaf in costs])[:-1])


@functools.partial(jax.jit, static_argnames="inputs")
def _without(mask: jax.Array, goes: jax.Array, entries: jax.Array, inputs: tuple[int, ...]) -> jax.Array:
    """The mask after the groups that go have lost these entries."""
    return ungroup(groups(mask, entries.shape[1], inputs) & ~(goes[:, None] & entries), mask.shape, inputs)
