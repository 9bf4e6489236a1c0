"""The static algorithm: the inverse of the damped Fisher matrix of a fixed set of gradients."""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from mfac_jax._src.base import checks, numerics
from mfac_jax._src.base.stacks import check_stacked, products_fit
from mfac_jax._src.base.trees import check_tree
from mfac_jax._src.rows.blocks import Blocks
from mfac_jax._src.static.blocks import Coordinates, Narrow, Wide, make, places

FisherBlocks = Blocks | int

_PART = 128  # rows and columns of the inverse that are computed at a time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FisherInverse:
    """Multiply by the inverse of the damped Fisher matrix of fixed gradients, and read its entries.

    It is a pytree, and passes through `jax.jit`.

    With G the m gradients g_i as rows::

        F = damping I + sum_i g_i g_i^T / m,    F^-1 = (I - W^T W) / damping
        W = L^-1 G,    L L^T = G G^T + m damping I

    for all parameters together, or for each of several blocks that do not interact. `from_gradients` makes
    it in two matrix products, where the published recursion takes m steps. It holds W, which is as large as
    the gradients. A block with at most m entries holds its own inverse instead.

    Gradients may repeat. If the damping is smaller than the rounding errors of their products, the size of
    these errors takes its place. With gradients of zeros F^-1 = I / damping.

    Gradients, damping and vectors may have any size: they are scaled by powers of two. What the result's
    dtype cannot hold becomes its largest number. Subnormal entries (below 1.2e-38 in float32) of gradients
    and vectors may count as zeros.

    Attributes:
      damping_parts: mantissa and exponent of the damping, which may be beyond the dtype of the
        computations: float64 if a gradient has it, else float32.
      stacks: the blocks.
      structure: the structure of the parameters.
      shapes: the shapes of their leaves.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> fisher = mfac_jax.FisherInverse.from_gradients(jnp.array([[1.0, 0.0, 0.0]]), damping=1.0)
      >>> print(fisher.ihvp(jnp.array([1.0, 1.0, 0.0])), fisher.diagonal(), fisher.entry(0, 0))
      [0.5 1.  0. ] [0.5 1.  1. ] 0.5

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """

    damping_parts: numerics.Parts
    stacks: tuple[Narrow | Wide, ...]
    structure: Any = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @property
    def damping(self) -> jax.Array:
        """The damping, or the nearest number that the dtype of the computations can hold."""
        return self.damping_parts.number

    @classmethod
    def from_gradients(
        cls, grads: optax.Params, damping: float | jax.Array, *, blocks: FisherBlocks = None
    ) -> "FisherInverse":
        """Compute the inverse from gradients that are stacked on a leading axis of each leaf.

        Args:
          grads: leaves `(m, *shape)`, real floating-point arrays; `collect_gradients` makes them. For d
            parameters this costs O(d m^2) operations, and a copy of the gradients.
          damping: > 0, in units of a squared gradient. The paper prunes with 1e-5 to 1e-7.
          blocks: None: one block. `'leaf'`: one block per leaf. A function from the key path of a leaf to a
            hashable label: one block per label. An int B >= 1: blocks of B consecutive entries of each
            leaf, in the order of `ravel`; the last one may be smaller.

        Returns:
          The inverse.

        Raises:
          TypeError: a leaf is not a real floating-point array; `damping` is not a number.
          ValueError: the leading axes differ or are empty; a gradient is not finite (by its index);
            `damping` or `blocks` is out of range; there is no leaf.
        """
        largest = check_stacked(grads)
        checks.check_positive("damping", damping, "1e-5")
        blocks = _checked_blocks(blocks)
        leaves, structure = jax.tree.flatten(grads)
        parts = numerics.parts(damping, numerics.accumulation_dtype(grads))
        stacks = make(leaves, parts, places(grads, blocks), not products_fit(largest, damping))
        return cls(parts, stacks, structure, tuple(g.shape[1:] for g in leaves))

    def ihvp(self, tree: optax.Params) -> optax.Params:
        """Compute the product F^-1 x with one vector, or with a batch of them.

        Args:
          tree: x, shaped like the parameters; or a batch, with one more axis in front of every leaf.

        Returns:
          The product, with the tree, shapes and dtypes of `tree`.

        Raises:
          TypeError: a leaf is not a real floating-point array.
          ValueError: the tree or a shape is not that of the parameters.
        """
        is_batch = self._check_vectors(tree)
        return (jax.vmap(self._product) if is_batch else self._product)(tree)

    @jax.jit
    def _product(self, tree: optax.Params) -> optax.Params:
        leaves = jax.tree.leaves(tree)
        products = self._of_leaves(
            lambda stack: stack.ihvp([leaves[i] for i in stack.place.leaves], self.damping_parts)
        )
        return jax.tree.map(lambda x, y: numerics.narrow(y, x.dtype), tree, products)

    @jax.jit
    def diagonal(self) -> optax.Params:
        """Compute the diagonal: a tree like the parameters, with positive entries."""
        return self._of_leaves(lambda stack: stack.diagonal(self.damping_parts))

    def _of_leaves(self, function: Callable[[Narrow | Wide], Sequence[jax.Array]]) -> optax.Params:
        """The tree that the function gives, one stack after another."""
        found = {
            leaf: y
            for stack in self.stacks
            for leaf, y in zip(stack.place.leaves, function(stack), strict=True)
        }
        # Leaves without entries are in no stack.
        nothing = jnp.zeros((0,), self.damping_parts.mantissa.dtype)
        leaves = [found[i] if i in found else nothing.reshape(shape) for i, shape in enumerate(self.shapes)]
        return jax.tree.unflatten(self.structure, leaves)

    def entry(self, i: int, j: int) -> jax.Array:
        """Compute the entry in row i and column j, in O(m) operations.

        Args:
          i: index among all entries of the parameters, in the order of `jax.tree.leaves` and `ravel`.
          j: another.

        Raises:
          TypeError: an index is not an int.
          IndexError: an index is out of range.
        """
        return self.submatrix([i, j])[0, 1]

    def submatrix(self, indices: Sequence[int] | np.ndarray) -> jax.Array:
        """Compute the entries of some rows and the same columns, `(k, k)`, in O(k^2 m) operations.

        Args:
          indices: k ints, each as in `entry`; known before tracing.

        Raises:
          TypeError: the indices are not a sequence of ints.
          IndexError: an index is out of range.
        """
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        indices = _check_indices(indices, int(ends[-1]))
        # A part at a time, filled up with the first entry: one program, whatever the number of indices.
        parts = max(1, -(-len(indices) // _PART))
        padded = np.pad(indices, (0, parts * _PART - len(indices)))
        leaf = np.searchsorted(ends, padded, side="right")
        offset = padded - np.concatenate([[0], ends])[leaf]
        parts = [
            tuple(
                stack.place.coordinates(leaf[i : i + _PART], offset[i : i + _PART]) for stack in self.stacks
            )
            for i in range(0, len(padded), _PART)
        ]
        entries = [[self._entries(rows, columns) for columns in parts] for rows in parts]
        count = len(indices)
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(entries)):
            return jnp.block(entries)[:count, :count]
        # On the device this would take a program for each number of indices, as `jnp.asarray` does.
        return jax.device_put(np.block(entries)[:count, :count])

    @jax.jit
    def _entries(self, rows: Sequence[Coordinates], columns: Sequence[Coordinates]) -> jax.Array:
        """The entries in these rows and columns, which are given for each stack."""
        parts = [
            stack.entries(of_rows, of_columns, self.damping_parts)
            for stack, of_rows, of_columns in zip(self.stacks, rows, columns, strict=True)
        ]
        return functools.reduce(operator.add, parts)

    def _check_vectors(self, tree: optax.Params) -> bool:
        """Whether the tree is a batch; raises if it is neither that nor a vector."""
        # No memory: one number, seen as leaves of the shapes that gradients have.
        like = jax.tree.unflatten(
            self.structure, [np.broadcast_to(np.float32(0), (1, *s)) for s in self.shapes]
        )
        check_tree("tree", tree, like, "the gradients", "Pass a tree like the parameters.")
        shapes = tuple(x.shape for x in jax.tree.leaves(tree))
        if shapes == self.shapes:
            return False
        if shapes != tuple((*shapes[0][:1], *shape) for shape in self.shapes):
            raise ValueError(
                f"tree must have the shapes of the parameters, {self.shapes}, or one more axis of the same "
                f"length in front of each, got {shapes}."
            )
        return True


def _checked_blocks(blocks: Any) -> Any:
    """The blocks, a number of them as a Python int; raises for anything else."""
    if hasattr(blocks, "__index__"):
        return checks.check_count("blocks", blocks, "1000")
    if not callable(blocks):
        checks.check_choice("blocks", blocks, (None, "leaf"), ", an int or a function of a path")
    return blocks


def _check_indices(indices: Sequence[int] | np.ndarray, entries: int) -> np.ndarray:
    """The indices as an array; raises if one is out of range."""
    try:
        array = np.asarray(indices)
    except (ValueError, jax.errors.TracerArrayConversionError):  # of different lengths, or traced
        array = np.asarray(None)
    if not array.size:  # NumPy makes an empty list one of floats
        array = array.astype(int)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(
            f"indices must be a sequence of ints that are known before tracing, got {indices!r}. Pass e.g. "
            "[0, 5]."
        )
    if np.any((array < 0) | (array >= entries)):
        raise IndexError(
            f"indices must be at least 0 and below {entries}, the number of parameters, got {indices!r}."
        )
    return array
