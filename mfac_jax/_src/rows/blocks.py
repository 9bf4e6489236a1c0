"""Blocks of leaves: parts of the tree whose Fisher matrices do not interact."""

from collections.abc import Callable, Hashable, Sequence
from typing import Literal

import jax
import optax

Blocks = Literal["leaf"] | Callable[[jax.tree_util.KeyPath], Hashable] | None


def block_of_leaf(tree: optax.Params, blocks: Blocks) -> list[int]:
    """The index of each leaf's block; blocks are numbered in the order of their first leaf."""
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    if blocks is None:
        return [0] * len(paths)
    labels = range(len(paths)) if blocks == "leaf" else [blocks(path) for path in paths]
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return [numbers[label] for label in labels]


def number_of_blocks(block_of_leaf: Sequence[int]) -> int:
    """The number of blocks; a tree without leaves has one, which is empty."""
    return max(block_of_leaf, default=0) + 1
