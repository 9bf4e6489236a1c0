"""The static algorithm: the inverse of the damped Fisher matrix of a fixed set of gradients.

With the gradients of a block as rows of G `(m, d)`, A any root with A^T A = (G G^T + m damping I)^-1, and
W = A G, everything comes from W:

    F^-1 = (I - W^T W) / damping,    F = damping I + G^T G / m.

A block that has at most m entries has its own inverse instead, `(d, d)`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax._src.base import checks, numerics, stacks, trees
from mfac_jax._src.linalg import gram as _gram
from mfac_jax._src.rows import contractions
from mfac_jax._src.rows.blocks import block_of_leaf

FisherBlocks = Literal["leaf"] | Callable[[jax.tree_util.KeyPath], Hashable] | int | None


class _Place(NamedTuple):
    """Which entries of the tree a stack of blocks of one size has.

    Attributes:
      leaves: their numbers, in the order of `jax.tree.leaves`.
      shapes: of these leaves.
      size: entries of a block, where a leaf is cut into several; None where there is one block.
    """

    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    size: int | None

    @property
    def entries(self) -> int:
        """Of all leaves."""
        return sum(map(math.prod, self.shapes))

    @property
    def block_size(self) -> int:
        """Entries of a block; the last one of a leaf may have fewer, and then has zeros at its end."""
        return self.entries if self.size is None else self.size

    def flat(self, xs: Sequence[jax.Array]) -> jax.Array:
        """The entries of the leaves, `(blocks, block_size)`."""
        flat = jnp.concatenate([x.ravel() for x in xs])
        padding = -flat.size % max(1, self.block_size)
        return jnp.pad(flat, (0, padding)).reshape(-1 if flat.size else 1, self.block_size)

    def unflat(self, blocks: jax.Array) -> list[jax.Array]:
        """The leaves from what `flat` made of them."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = jnp.split(blocks.ravel()[: self.entries], ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Narrow:
    """Blocks with at most as many entries as there are gradients.

    Attributes:
      place: where they are.
      inverse: F^-1 of each, `(blocks, block_size, block_size)`.
    """

    place: _Place = dataclasses.field(metadata={"static": True})
    inverse: jax.Array

    @classmethod
    def make(cls, place: _Place, grads: Sequence[jax.Array], damping: jax.Array) -> "_Narrow":
        m = len(grads[0])
        rows = jax.vmap(place.flat, out_axes=1)(list(grads)).astype(damping.dtype)  # (blocks, m, size)
        fisher = jax.vmap(lambda G: contractions.gram(G.T, damping.dtype))(rows)
        root = _gram.inverse_root(fisher, m * damping)
        return cls(place, m * jnp.einsum("bki,bkj->bij", root, root, precision=jax.lax.Precision.HIGHEST))

    def ihvp(self, xs: Sequence[jax.Array], damping: jax.Array) -> list[jax.Array]:
        del damping
        x = self.place.flat(xs).astype(self.inverse.dtype)
        product = jnp.einsum("bij,bj->bi", self.inverse, x, precision=jax.lax.Precision.HIGHEST)
        return self.place.unflat(product)

    def diagonal(self, damping: jax.Array) -> list[jax.Array]:
        del damping
        return self.place.unflat(jnp.diagonal(self.inverse, axis1=-2, axis2=-1))

    def submatrix(self, positions: np.ndarray, damping: jax.Array) -> jax.Array:
        """The entries at pairs of positions among those of the leaves, one after another."""
        del damping
        block, i = np.divmod(positions, self.place.block_size)
        same = block[:, None] == block
        return jnp.where(same, self.inverse[block[:, None], i[:, None], i], 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Wide:
    """Blocks with more entries than there are gradients.

    Attributes:
      place: where they are.
      rows: W, `(blocks, m, block_size)` where a leaf is cut, else `(1, m, *shape)` for each leaf.
    """

    place: _Place = dataclasses.field(metadata={"static": True})
    rows: tuple[jax.Array, ...]

    @classmethod
    def make(cls, place: _Place, grads: Sequence[jax.Array], damping: jax.Array) -> "_Wide":
        if place.size is None:
            rows = [g[None].astype(damping.dtype) for g in grads]
        else:
            rows = [jax.vmap(place.flat, out_axes=1)(list(grads)).astype(damping.dtype)]
        m = len(grads[0])
        gram = _total(_each_block(lambda G: contractions.gram(G, damping.dtype), G) for G in rows)
        root = _gram.inverse_root(gram, m * damping)
        return cls(place, tuple(_each_block(contractions.mix, root, G) for G in rows))

    def _split(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        return [x[None] for x in xs] if self.place.size is None else [self.place.flat(xs)]

    def _join(self, ys: Sequence[jax.Array]) -> list[jax.Array]:
        return [y[0] for y in ys] if self.place.size is None else self.place.unflat(ys[0])

    def ihvp(self, xs: Sequence[jax.Array], damping: jax.Array) -> list[jax.Array]:
        xs = [x.astype(damping.dtype) for x in self._split(xs)]
        dots = lambda W, x: contractions.dots(W, x, damping.dtype)  # noqa: E731
        inner = _total(_each_block(dots, W, x) for W, x in zip(self.rows, xs, strict=True))
        inside = [_each_block(contractions.combine, inner, W) for W in self.rows]
        return self._join([(x - y) / damping for x, y in zip(xs, inside, strict=True)])

    def diagonal(self, damping: jax.Array) -> list[jax.Array]:
        """At least the rounding noise, where a coordinate lies in the span of the gradients."""
        noise = jnp.finfo(damping.dtype).eps
        squares = [_each_block(contractions.column_squares, W) for W in self.rows]
        return self._join([jnp.maximum(1 - s, noise) / damping for s in squares])

    def submatrix(self, positions: np.ndarray, damping: jax.Array) -> jax.Array:
        """The entries at pairs of positions among those of the leaves, one after another."""
        if self.place.size is None:
            same, columns = np.ones((len(positions),) * 2, bool), self._columns_of_leaves(positions)
        else:
            block, i = np.divmod(positions, self.place.size)
            same, columns = block[:, None] == block, self.rows[0][block, :, i]
        inside = jnp.matmul(columns, columns.T, precision=jax.lax.Precision.HIGHEST)
        equal = positions[:, None] == positions
        return jnp.where(same, equal - inside, 0) / damping

    def _columns_of_leaves(self, positions: np.ndarray) -> jax.Array:
        """W at the positions, `(positions, m)`."""
        starts = np.cumsum([0, *map(math.prod, self.place.shapes)])
        leaf = np.searchsorted(starts, positions, side="right") - 1
        columns = jnp.zeros((len(positions), self.rows[0].shape[1]), self.rows[0].dtype)
        for number, (rows, shape) in enumerate(zip(self.rows, self.place.shapes, strict=True)):
            chosen = np.flatnonzero(leaf == number)
            if len(chosen):
                index = np.unravel_index(positions[chosen] - starts[number], shape) if shape else ()
                # One gather, its first axis the positions: `rows[0]` would copy the leaf.
                columns = columns.at[chosen].set(rows[(0, slice(None), *index)])
        return columns


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def _each_block(function: Callable[..., jax.Array], *stacks: jax.Array) -> jax.Array:
    """`function` for each block of the stacks; without a batch axis where there is one, which is faster."""
    if len(stacks[0]) == 1:
        return function(*(stack[0] for stack in stacks))[None]
    return jax.vmap(function)(*stacks)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FisherInverse:
    r"""The inverse of the damped Fisher matrix of fixed gradients, as a pytree.

    With gradients :math:`g_1, \dots, g_m`

    .. math::
      F = \lambda I + \tfrac{1}{m} \sum_i g_i g_i^\top, \qquad
      F^{-1} = \tfrac{1}{\lambda} \left(I - W^\top W\right), \qquad
      W = L^{-1} G, \quad L L^\top = G G^\top + m \lambda I,

    of all parameters together or for each of several blocks, which do not interact. It is made by
    `from_gradients` in two products of matrices, where the published recursion over the gradients takes m
    steps, and holds W, as large as the gradients. A block with at most m entries holds its own inverse.

    Gradients that repeat are no obstacle; where the damping is below the rounding of their products, that
    rounding takes its place. With gradients of zeros :math:`F^{-1} = I / \lambda`.

    Attributes:
      damping: :math:`\lambda`, of the dtype that everything is computed in: float64 where a gradient is,
        else float32.
      stacks: the blocks.
      structure: of the tree of parameters.
      shapes: of its leaves.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> fisher = mfac_jax.FisherInverse.from_gradients(jnp.array([[1.0, 0.0, 0.0]]), damping=1.0)
      >>> print(fisher.ihvp(jnp.array([1.0, 1.0, 0.0])), fisher.diagonal(), fisher.entry(0, 0))
      [0.5 1.  0. ] [0.5 1.  1. ] 0.5

    References:
      Elias Frantar, Eldar Kurtic, Dan Alistarh, `M-FAC: Efficient Matrix-Free Approximations of
      Second-Order Information <https://arxiv.org/abs/2107.03356>`_, NeurIPS 2021.
    """

    damping: jax.Array
    stacks: tuple[_Narrow | _Wide, ...]
    structure: Any = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[int, ...], ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_gradients(
        cls, grads: optax.Params, damping: float | jax.Array, *, blocks: FisherBlocks = None
    ) -> "FisherInverse":
        r"""From gradients that are stacked on a leading axis of each leaf.

        Args:
          grads: leaves `(m, *shape)`, real floating-point arrays; `collect_gradients` makes them. The cost
            is :math:`O(d m^2)` operations for d parameters, and one copy of them.
          damping: :math:`\lambda` > 0, in units of a squared gradient. The paper prunes with 1e-5 to 1e-7.
          blocks: None: one block. `'leaf'`: a block a leaf. A function from a leaf's key path to a hashable
            label: a block a label. An int B >= 1: blocks of B consecutive entries of each leaf, in the
            order of `ravel`, the last of a leaf with what is left.

        Returns:
          The inverse.

        Raises:
          TypeError: a leaf is not a real floating-point array; `damping` is not a number.
          ValueError: the leading axes differ or are empty; a gradient is not finite (by its index);
            `damping` or `blocks` is out of range; there is no leaf.
        """
        stacks.check_stacked(grads)
        checks.check_positive("damping", damping, "1e-5")
        if isinstance(blocks, int):
            checks.check_count("blocks", blocks, "1000")
        elif not callable(blocks):
            checks.check_choice("blocks", blocks, (None, "leaf"), ", an int or a function of a path")
        leaves, structure = jax.tree.flatten(grads)
        places = _places(grads, blocks)
        damping = jnp.asarray(damping, numerics.accumulation_dtype(grads))
        made = _make(leaves, damping, places)
        return cls(damping, made, structure, tuple(g.shape[1:] for g in leaves))

    def ihvp(self, tree: optax.Params) -> optax.Params:
        r"""The product :math:`F^{-1} x` with one vector, or with a batch of them.

        Args:
          tree: x, shaped like the parameters, or every leaf with one more axis in front, of one length.

        Returns:
          The product, with the tree, shapes and dtypes of `tree`.

        Raises:
          TypeError: a leaf is not a real floating-point array.
          ValueError: the tree or a shape is another.
        """
        is_batch = self._check_vectors(tree)
        return (jax.vmap(self._product) if is_batch else self._product)(tree)

    @jax.jit
    def _product(self, tree: optax.Params) -> optax.Params:
        leaves = jax.tree.leaves(tree)
        products = self._of_leaves(
            lambda stack: stack.ihvp([leaves[i] for i in stack.place.leaves], self.damping)
        )
        return jax.tree.map(lambda x, y: numerics.narrow(y, x.dtype), tree, products)

    @jax.jit
    def diagonal(self) -> optax.Params:
        """The diagonal, a tree like the parameters, all of it > 0."""
        return self._of_leaves(lambda stack: stack.diagonal(self.damping))

    def _of_leaves(self, function: Callable[[_Narrow | _Wide], Sequence[jax.Array]]) -> optax.Params:
        """A tree of what the function gives for the leaves of each stack."""
        found = {
            leaf: y
            for stack in self.stacks
            for leaf, y in zip(stack.place.leaves, function(stack), strict=True)
        }
        return jax.tree.unflatten(self.structure, [found[i] for i in range(len(found))])

    def entry(self, i: int, j: int) -> jax.Array:
        """The entry of row i and column j, in O(m) operations.

        Args:
          i: index among all entries of the parameters, in the order of `jax.tree.leaves` and `ravel`.
          j: another.

        Raises:
          TypeError: an index is not an int.
          IndexError: an index is out of range.
        """
        return self.submatrix([i, j])[0, 1]

    def submatrix(self, indices: Sequence[int] | np.ndarray) -> jax.Array:
        """The entries of some rows and the same columns, `(k, k)`, in O(k m + k^2 m) operations.

        Args:
          indices: k of them, each as in `entry`; known before tracing.

        Raises:
          TypeError: the indices are not a sequence of ints.
          IndexError: an index is out of range.
        """
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        indices = _check_indices(indices, int(ends[-1]))
        leaf = np.searchsorted(ends, indices, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        entries = jnp.zeros((len(indices),) * 2, self.damping.dtype)
        for stack in self.stacks:
            within = np.cumsum([0, *map(math.prod, stack.place.shapes)])
            positions = np.full(len(indices), -1)
            for first, number in zip(within[:-1], stack.place.leaves, strict=True):
                positions = np.where(leaf == number, indices - starts[number] + first, positions)
            chosen = np.flatnonzero(positions >= 0)
            if len(chosen):
                found = stack.submatrix(positions[chosen], self.damping)
                entries = entries.at[np.ix_(chosen, chosen)].set(found)
        return entries

    def _check_vectors(self, tree: optax.Params) -> bool:
        """Whether the tree is a batch; refused if it is neither that nor a vector."""
        like = jax.tree.unflatten(
            self.structure, [np.broadcast_to(np.float32(0), (1, *s)) for s in self.shapes]
        )
        trees.check_tree("tree", tree, like, "the gradients", "Pass a tree like the parameters.")
        leaves = jax.tree.leaves(tree)
        if all(x.shape == shape for x, shape in zip(leaves, self.shapes, strict=True)):
            return False
        batched = [
            x.ndim == len(shape) + 1 and x.shape[1:] == shape
            for x, shape in zip(leaves, self.shapes, strict=True)
        ]
        if not all(batched) or len({len(x) for x in leaves}) > 1:
            raise ValueError(
                f"tree must have the shapes of the parameters, {self.shapes}, or one more axis in front "
                f"of each, got {tuple(x.shape for x in leaves)}."
            )
        return True


def _places(grads: optax.Params, blocks: FisherBlocks) -> tuple[_Place, ...]:
    """The stacks of blocks that the leaves are split into."""
    shapes = [g.shape[1:] for g in jax.tree.leaves(grads)]
    if isinstance(blocks, int):
        return tuple(
            _Place((i,), (shape,), max(1, min(blocks, math.prod(shape)))) for i, shape in enumerate(shapes)
        )
    block = np.asarray(block_of_leaf(grads, blocks))
    groups = [np.flatnonzero(block == number).tolist() for number in range(max(block) + 1)]
    return tuple(_Place(tuple(group), tuple(shapes[i] for i in group), None) for group in groups)


@functools.partial(jax.jit, static_argnames="places")
def _make(
    leaves: Sequence[jax.Array], damping: jax.Array, places: tuple[_Place, ...]
) -> tuple[_Narrow | _Wide, ...]:
    """The blocks, each of the kind that its size asks for."""

    def make(place: _Place) -> _Narrow | _Wide:
        kind = _Narrow if place.block_size <= len(leaves[0]) else _Wide
        return kind.make(place, [leaves[i] for i in place.leaves], damping)

    return tuple(make(place) for place in places)


def _check_indices(indices: Sequence[int] | np.ndarray, entries: int) -> np.ndarray:
    """The indices as an array, all in range."""
    array = np.asarray(indices)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"indices must be a sequence of ints, got {indices!r}.")
    if np.any((array < 0) | (array >= entries)):
        raise IndexError(
            f"indices must be at least 0 and below {entries}, the number of parameters, got {indices!r}."
        )
    return array
