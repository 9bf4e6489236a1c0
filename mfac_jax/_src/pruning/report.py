"""How much is pruned: in all, in each leaf, and as a table."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mfac_jax._src.base.trees import named_leaves, unique_paths
from mfac_jax._src.pruning.masks import as_masks, is_absent


def sparsity(masks: Any) -> float:
    """Compute the share of entries that are pruned, over all leaves that take part.

    Args:
      masks: as in `apply_masks`; not traced.

    Returns:
      A number in [0, 1].

    Raises:
      TypeError: a mask is no array of numbers or bools.
      ValueError: a value is neither 0 nor 1, or no leaf has a mask.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> mfac_jax.pruning.sparsity({'bias': None, 'kernel': jnp.array([[1, 0, 0, 0]])})
      0.75
    """
    return _total(_counts(masks)).sparsity


def sparsity_by_leaf(masks: Any) -> dict[str, float]:
    """Compute the share of entries that are pruned in each leaf that takes part.

    Args:
      masks: as in `sparsity`.

    Returns:
      A dict from the path of a leaf, its keys joined by slashes, to a number in [0, 1]. Leaves whose joined
      keys are the same, such as `{'a/b': ..}` and `{'a': {'b': ..}}`, have theirs as JAX writes it.

    Raises:
      TypeError: as in `sparsity`.
      ValueError: as in `sparsity`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> mfac_jax.pruning.sparsity_by_leaf({'dense': {'bias': None, 'kernel': jnp.array([[1, 0, 0, 0]])}})
      {'dense/kernel': 0.75}
    """
    return {leaf.name: leaf.sparsity for leaf in _counts(masks)}


def pruning_report(masks: Any) -> str:
    """Make a table that says how much is pruned in each leaf and in all of them.

    Args:
      masks: as in `sparsity`.

    Returns:
      Lines of text, for `print`.

    Raises:
      TypeError: as in `sparsity`.
      ValueError: as in `sparsity`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> masks = {'first': jnp.array([[1, 0], [0, 0]]), 'last': jnp.ones((1, 2)), 'bias': None}
      >>> print(mfac_jax.pruning.pruning_report(masks))
      leaf   shape  entries  kept  sparsity
      first  2 x 2        4     1    0.7500
      last   1 x 2        2     2    0.0000
      total               6     3    0.5000
    """
    leaves = _counts(masks)
    rows = [("leaf", "shape", "entries", "kept", "sparsity")]
    for leaf in [*leaves, _total(leaves)]:
        shape = " x ".join(map(str, leaf.shape))
        rows.append((leaf.name, shape, f"{leaf.entries:,}", f"{leaf.kept:,}", f"{leaf.sparsity:.4f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    # Words to the left, numbers to the right.
    line = "  ".join(f"{{:{side}{width}}}" for side, width in zip("<<>>>", widths, strict=True))
    return "\n".join(line.format(*row) for row in rows)


class _Count(NamedTuple):
    """How many entries a leaf has and keeps."""

    name: str
    shape: tuple[int, ...]
    entries: int
    kept: int

    @property
    def sparsity(self) -> float:
        return (self.entries - self.kept) / max(1, self.entries)


def _counts(masks: Any) -> list[_Count]:
    """The count of each leaf that takes part."""
    leaves = named_leaves(as_masks(masks), is_absent)
    named = zip(unique_paths(leaves), leaves, strict=True)
    taking_part = [(path or "()", leaf.leaf) for path, leaf in named if not is_absent(leaf.leaf)]
    kept = jax.device_get([jnp.count_nonzero(mask) for _, mask in taking_part])  # one wait for all
    return [
        _Count(path, mask.shape, mask.size, int(count))
        for (path, mask), count in zip(taking_part, kept, strict=True)
    ]


def _total(leaves: Sequence[_Count]) -> _Count:
    return _Count("total", (), sum(leaf.entries for leaf in leaves), sum(leaf.kept for leaf in leaves))
