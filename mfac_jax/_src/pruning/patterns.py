"""Which weights go: the cheapest, of a pattern that says what is pruned together.

Scores are for choices: sets of entries of a group that may be pruned together.
"""

import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mfac_jax._src.base import checks
from mfac_jax._src.base.trees import leaf_name
from mfac_jax._src.pruning import masks as _masks
from mfac_jax._src.rows import mesh as _mesh

_MAX_CHOICES = 4096  # each takes a score a group: 8:16 would have 12,870


class Pattern(NamedTuple):
    """What may be pruned together.

    Attributes:
      size: entries of a group.
      choices: each a set of entries of a group, all of the same number, `(choices, size)` bool.
    """

    size: int
    choices: np.ndarray

    @property
    def together(self) -> int:
        """Entries of a choice: what can be pruned in a group."""
        return int(self.choices[0].sum())

    @property
    def is_whole(self) -> bool:
        """Whether groups are pruned whole."""
        return self.together == self.size


def parse_pattern(pattern: str | None) -> Pattern:
    """None: entries alone. `'N:M'`: at most N of M stay. `'block:B'`: B go together, or none of them."""
    message = (
        "pattern must be None, 'N:M' with 0 < N < M (at most N of M consecutive weights stay), or "
        f"'block:B' with B > 1 (B consecutive weights go together), got {pattern!r}. Pass e.g. '2:4'."
    )
    if pattern is None:
        return Pattern(1, np.ones((1, 1), bool))
    found = re.fullmatch(r"(block|[0-9]+):([0-9]+)", pattern) if isinstance(pattern, str) else None
    if found is None:
        raise ValueError(message)
    size = int(found[2])
    if found[1] == "block":
        if size < 2:
            raise ValueError(message)
        return Pattern(size, np.ones((1, size), bool))
    stay = int(found[1])
    if not 0 < stay < size:
        raise ValueError(message)
    if (count := math.comb(size, stay)) > _MAX_CHOICES:
        raise ValueError(
            f"pattern {pattern!r} has {count} choices a group, and may have at most {_MAX_CHOICES}: each "
            "gets a score. Pass a smaller group, e.g. '2:4' or '4:8'."
        )
    choices = np.zeros((count, size), bool)
    for choice, entries in zip(choices, itertools.combinations(range(size), size - stay), strict=True):
        choice[list(entries)] = True
    return Pattern(size, choices)


def groups(leaf: jax.Array, size: int) -> jax.Array:
    """The entries of a leaf in groups `(groups, size)`, consecutive along the axis of a kernel's inputs.

    That is the last but one, or the only one. Groups of one entry are in the order of `ravel`.
    """
    explicit = _mesh.explicit_sharding(leaf)
    if explicit is not None:  # such arrays cannot be made flat; all are ranked together anyway
        leaf = jax.reshard(leaf, _mesh.replicated(explicit.mesh, leaf.ndim))
    return _inputs_last(leaf, size).reshape(-1, size)


def ungroup(grouped: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The leaf of the shape from what `groups` made of it."""
    size = grouped.shape[1]
    exchanged = shape[:-2] + shape[:-3:-1] if size > 1 else shape
    return _inputs_last(grouped.reshape(exchanged), size)


def _inputs_last(leaf: jax.Array, size: int) -> jax.Array:
    """The leaf with its last two axes exchanged, where groups have several entries."""
    return jnp.swapaxes(leaf, -2, -1) if size > 1 and leaf.ndim > 1 else leaf


def check_request(
    masks: Any, sparsity: float | jax.Array, pattern: Pattern, *, per_leaf: bool = False
) -> None:
    """Refuse a sparsity that cannot be reached from the masks, and masks that do not suit the pattern."""
    checks.check_decay("sparsity", sparsity, "0.9")
    leaves = jax.tree_util.tree_leaves_with_path(masks)
    for path, mask in leaves:
        _check_divides(leaf_name(path), mask, pattern)
        if pattern.is_whole and pattern.size > 1:
            _check_whole_blocks(leaf_name(path), mask, pattern)
    kept = [mask for _, mask in leaves]
    ranked = [([mask], leaf_name(path)) for path, mask in leaves] if per_leaf else [(kept, "masks")]
    for together, name in ranked:
        count = _count(sparsity, together, pattern)
        if count.target > count.most:
            raise ValueError(
                f"sparsity can be at most {pattern.together / pattern.size:g} with this pattern, got "
                f"{sparsity}. Pass less, or a pattern that keeps fewer weights of a group."
            )
        # What was asked for may have been rounded up by half a group.
        if count.pruned - count.target > pattern.together / 2:
            raise ValueError(
                f"sparsity must be at least that of the masks, got {sparsity}, where {name} has "
                f"{count.pruned / count.entries:.6g} already ({count.pruned} of {count.entries}). Pass "
                "more, or other masks."
            )


def _check_divides(name: str, mask: jax.Array, pattern: Pattern) -> None:
    """Refuse a pattern whose groups do not divide the input axis of a leaf."""
    axis = max(0, mask.ndim - 2)
    length = mask.shape[axis] if mask.ndim else 1
    if length % pattern.size:
        raise ValueError(
            f"pattern has groups of {pattern.size}, which must divide the input axis of each leaf, but "
            f"axis {axis} of {name}, {mask.shape}, is {length} long. Pass masks with None there, or "
            "another pattern."
        )


def _check_whole_blocks(name: str, mask: jax.Array, pattern: Pattern) -> None:
    """Refuse a mask that was made by another pattern."""
    blocks = groups(mask, pattern.size)
    if jnp.any(jnp.any(blocks, axis=1) & ~jnp.all(blocks, axis=1)):
        raise ValueError(
            f"masks must prune whole blocks of {pattern.size} with this pattern, but {name} has one that "
            "is pruned in part. Pass masks that were made by it, None, or pattern=None."
        )


class _Count(NamedTuple):
    """How many entries there are, are pruned, are to be pruned in all, and can be."""

    entries: int
    pruned: int
    target: int
    most: int


def _count(sparsity: float | jax.Array, kept: Sequence[jax.Array], pattern: Pattern) -> _Count:
    entries, pruned = sum(k.size for k in kept), int(sum(jnp.sum(~k) for k in kept))
    target, most = round(float(sparsity) * entries), entries // pattern.size * pattern.together
    return _Count(entries, pruned, target, most)


def select(scores: Any, masks: Any, sparsity: float, pattern: Pattern, *, per_leaf: bool = False) -> Any:
    """Masks with the cheapest choices pruned too, until the sparsity is that asked for.

    A group can be pruned once, by the cheapest of its choices that contain what is pruned in it already.
    Groups go in the order of that cost, among equals in the order of leaves and groups, so that exactly
    round(sparsity * entries) are pruned in the end. Where groups have several entries it is the nearest
    number that they can give; N:M at its limit prunes every group, also where more than M - N of one are
    pruned already, which stay so.

    Args:
      scores: a tree like `masks`: at each leaf `(groups, choices)`, what a choice would cost; no NaN.
      masks: of `check_masks`.
      sparsity: of all entries that take part, or of each leaf; what is pruned already stays so.
      pattern: of `parse_pattern`; `check_request` has found that it suits masks and sparsity.
      per_leaf: whether each leaf is pruned to the sparsity, or all of them together.

    Returns:
      Masks like `masks`.
    """
    leaves, structure = jax.tree.flatten(masks)
    kept = [groups(mask, pattern.size) for mask in leaves]
    choices = jnp.asarray(pattern.choices)
    found = [_cheapest(s, k, choices) for s, k in zip(jax.tree.leaves(scores), kept, strict=True)]
    for together in [[i] for i in range(len(kept))] if per_leaf else [[*range(len(kept))]]:
        count = _count(sparsity, [kept[i] for i in together], pattern)
        needed = None if count.target == count.most else max(0, count.target - count.pruned)
        cost, removed = (jnp.concatenate([found[i][part] for i in together]) for part in (0, 1))
        ends = np.cumsum([len(kept[i]) for i in together])
        for i, chosen in zip(together, jnp.split(_first(cost, removed, needed), ends[:-1]), strict=True):
            kept[i] &= ~(chosen[:, None] & found[i].entries)
    new = [_masks.placed(ungroup(k, mask.shape), mask) for k, mask in zip(kept, leaves, strict=True)]
    return jax.tree.unflatten(structure, new)


class _Cheapest(NamedTuple):
    """The cheapest choice of each group.

    Attributes:
      cost: of it `(groups,)`.
      number: of the entries that it removes `(groups,)`.
      entries: that it removes `(groups, size)`.
    """

    cost: jax.Array
    number: jax.Array
    entries: jax.Array


@jax.jit
def _cheapest(scores: jax.Array, kept: jax.Array, choices: jax.Array) -> _Cheapest:
    """Among the choices that contain what is pruned already; without one, a group has nothing to remove."""
    contains_pruned = (~kept).astype(jnp.float32) @ (~choices.T).astype(jnp.float32) == 0
    cost = jnp.min(jnp.where(contains_pruned, scores, jnp.inf), axis=1)
    # A score may be Inf itself: the first that costs as much, of those that are allowed.
    choice = jnp.argmax(contains_pruned & (scores == cost[:, None]), axis=1)
    entries = kept & jnp.any(contains_pruned, axis=1, keepdims=True) & choices[choice]
    return _Cheapest(cost, jnp.sum(entries, axis=1), entries)


@jax.jit
def _first(cost: jax.Array, removed: jax.Array, needed: int | None) -> jax.Array:
    """Which groups go `(groups,)`: the cheapest, removing the number of entries nearest to `needed`."""
    order = jnp.lexsort((cost, removed == 0))  # stable
    sums = jnp.concatenate([jnp.zeros(1, int), jnp.cumsum(removed[order])])
    number = len(order) if needed is None else jnp.argmin(jnp.abs(sums - needed))
    return jnp.zeros(len(order), bool).at[order].set(jnp.arange(len(order)) < number)
