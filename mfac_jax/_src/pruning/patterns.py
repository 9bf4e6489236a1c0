"""What may be pruned together: single weights, N of M, or whole blocks.

A leaf is divided into groups of entries. A pattern lists the choices of a group: the sets of its entries
that may be pruned together.
"""

import itertools
import math
import re
from typing import NamedTuple

import jax
import numpy as np

from mfac_jax._src.rows.mesh import explicit_sharding, replicated

_MAX_CHOICES = 4096  # every group gets a score for each; 8:16 would have 12,870


class Pattern(NamedTuple):
    """What may be pruned together.

    Attributes:
      size: number of entries in a group.
      choices: `(choices, size)` bool, True at the entries that a choice prunes: the same number in each.
    """

    size: int
    choices: np.ndarray

    @property
    def together(self) -> int:
        """The number of entries in a choice: the most that a group can lose."""
        return int(self.choices[0].sum())

    @property
    def is_whole(self) -> bool:
        """Whether a group is pruned as a whole."""
        return self.together == self.size


def parse(pattern: str | None) -> Pattern:
    """The pattern that a name stands for.

    None: single entries. `'N:M'`: at most N of M stay. `'block:B'`: B entries go together, or none of them.
    """
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
            f"pattern {pattern!r} has {count} choices per group, but at most {_MAX_CHOICES} are supported, "
            "since each needs a score. Pass a smaller group, e.g. '2:4' or '4:8'."
        )
    choices = np.zeros((count, size), bool)
    for choice, entries in zip(choices, itertools.combinations(range(size), size - stay), strict=True):
        choice[list(entries)] = True
    return Pattern(size, choices)


def groups(leaf: jax.Array, size: int, inputs: tuple[int, ...]) -> jax.Array:
    """The entries of a leaf as groups `(groups, size)`, consecutive along its input axes taken as one.

    Groups of one entry are in the order of `ravel`.
    """
    explicit = explicit_sharding(leaf)
    if explicit is not None:
        # An array that is sharded in its type cannot be made flat. The ranking needs all entries anyway.
        leaf = jax.reshard(leaf, replicated(explicit.mesh, leaf.ndim))
    return leaf.transpose(_inputs_last(leaf.ndim, size, inputs)).reshape(-1, size)


def ungroup(grouped: jax.Array, shape: tuple[int, ...], inputs: tuple[int, ...]) -> jax.Array:
    """The leaf with this shape whose `groups` these are."""
    order = _inputs_last(len(shape), grouped.shape[1], inputs)
    return grouped.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))


def _inputs_last(ndim: int, size: int, inputs: tuple[int, ...]) -> list[int]:
    """The order of the axes, the inputs at the end if groups have several entries."""
    if size == 1:
        return list(range(ndim))
    return [*(axis for axis in range(ndim) if axis not in inputs), *inputs]
