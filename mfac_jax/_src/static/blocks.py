"""Blocks of the inverse Fisher matrix, in stacks of one size: what each holds, and what follows from it.

With the gradients of a block as rows of G `(m, d)`, A any root with A^T A = (G G^T + m damping I)^-1, and
W = A G, everything follows from W:

    F^-1 = (I - W^T W) / damping,    F = damping I + G^T G / m.

A block with at most m entries holds its own inverse instead, `(d, d)`.

Gradients, damping and vectors may have any size: powers of two bring numbers near one before their
products. With G = D G', D a diagonal of powers of two, W = A' G' with A'^T A' = (G' G'^T + m damping
D^-2)^-1. In a block that holds its inverse the columns are scaled instead.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mfac_jax._src.base import numerics
from mfac_jax._src.base.numerics import Parts
from mfac_jax._src.linalg.solve import inverse_root
from mfac_jax._src.rows import contractions
from mfac_jax._src.rows.blocks import Blocks, block_of_leaf


class Place(NamedTuple):
    """Which entries of the tree belong to a stack of blocks.

    Attributes:
      leaves: their numbers, in the order of `jax.tree.leaves`.
      shapes: of these leaves.
      size: entries of a block, if one leaf is cut into several; None if all leaves are one block.
    """

    leaves: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    size: int | None

    @property
    def entries(self) -> int:
        """Of all leaves together."""
        return sum(map(math.prod, self.shapes))

    @property
    def block_size(self) -> int:
        """Entries of a block. The last block of a leaf may have fewer, with zeros at its end."""
        return self.entries if self.size is None else self.size

    def flat(self, xs: Sequence[jax.Array]) -> jax.Array:
        """The entries of the leaves, `(blocks, block_size)`."""
        flat = jnp.concatenate([x.ravel() for x in xs])
        return jnp.pad(flat, (0, -flat.size % self.block_size)).reshape(-1, self.block_size)

    def unflat(self, blocks: jax.Array) -> list[jax.Array]:
        """The leaves from what `flat` made of them."""
        ends = np.cumsum([math.prod(shape) for shape in self.shapes])
        parts = jnp.split(blocks.ravel()[: self.entries], ends[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def coordinates(self, leaf: np.ndarray, offset: np.ndarray) -> "Coordinates":
        """Where entries of the tree, given by leaf and offset in it, stand in this place."""
        number, axes = np.full(len(leaf), -1, np.int32), max(2, *map(len, self.shapes), 0)
        index = np.zeros((len(leaf), axes), np.int32)
        for i, (own, shape) in enumerate(zip(self.leaves, self.shapes, strict=True)):
            chosen = leaf == own
            number[chosen] = i
            if self.size is not None:
                shape = (-(-math.prod(shape) // self.size), self.size)
            index[chosen, : len(shape)] = (
                np.stack(np.unravel_index(offset[chosen], shape), -1) if shape else 0
            )
        return Coordinates(number, index)


class Coordinates(NamedTuple):
    """Where some entries stand in a place: integers, so that a program serves all of them.

    Attributes:
      number: of the leaf among those of the place, -1 for entries that are elsewhere, `(k,)`.
      inside: where in the leaf, `(k, axes)`, with zeros behind; block and position in it, if a leaf is cut.
    """

    number: Any
    inside: Any


def places(grads: optax.Params, blocks: Blocks | int) -> tuple[Place, ...]:
    """The places of the stacks that the leaves are split into; leaves without entries are in none."""
    shapes = [g.shape[1:] for g in jax.tree.leaves(grads)]
    filled = [i for i, shape in enumerate(shapes) if 0 not in shape]
    if isinstance(blocks, int):
        return tuple(Place((i,), (shapes[i],), min(blocks, math.prod(shapes[i]))) for i in filled)
    groups: dict[int, list[int]] = {}
    for i, block in enumerate(block_of_leaf(grads, blocks)):
        if i in filled:
            groups.setdefault(block, []).append(i)
    return tuple(Place(tuple(group), tuple(shapes[i] for i in group), None) for group in groups.values())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Narrow:
    """Blocks with at most as many entries as there are gradients.

    Attributes:
      place: where they are.
      inverse: C F^-1 C of each block, `(blocks, block_size, block_size)`.
      exponents: those of C, a diagonal of powers of two, `(blocks, block_size)`.
    """

    place: Place = dataclasses.field(metadata={"static": True})
    inverse: jax.Array
    exponents: jax.Array

    @classmethod
    def make(cls, place: Place, grads: Sequence[jax.Array], damping: Parts) -> "Narrow":
        m, dtype = len(grads[0]), damping.mantissa.dtype
        rows = jax.vmap(place.flat, out_axes=1)(list(grads)).astype(dtype)  # (blocks, m, size)
        shift = _times(m, damping)
        exponents = numerics.exponents_near_one(jnp.max(jnp.abs(rows), axis=1), shift)
        columns = numerics.times_power(rows, -exponents[:, None])
        # A contraction over the gradients: C^-1 (m F - m damping I) C^-1.
        fisher = jax.vmap(lambda G: contractions.gram(G.T, dtype))(columns)
        root = inverse_root(fisher, numerics.times_power(shift.mantissa, shift.exponent - 2 * exponents))
        inverse = m * jnp.einsum("bki,bkj->bij", root, root, precision=jax.lax.Precision.HIGHEST)
        return cls(place, inverse, exponents)

    def ihvp(self, xs: Sequence[jax.Array], damping: Parts) -> list[jax.Array]:
        """The products of the blocks with the leaves."""
        del damping
        x = self.place.flat(xs).astype(self.inverse.dtype)
        sizes = jnp.where(x == 0, jnp.iinfo(jnp.int32).min // 2, numerics.exponent_of(x) - self.exponents)
        largest = jnp.max(sizes, axis=1, keepdims=True)
        x = numerics.times_power(x, -self.exponents - largest)
        product = jnp.einsum("bij,bj->bi", self.inverse, x, precision=jax.lax.Precision.HIGHEST)
        return self.place.unflat(numerics.within_range(product, largest - self.exponents))

    def diagonal(self, damping: Parts) -> list[jax.Array]:
        """The diagonals, as leaves."""
        del damping
        diagonal = jnp.diagonal(self.inverse, axis1=-2, axis2=-1)
        return self.place.unflat(numerics.within_range(diagonal, -2 * self.exponents))

    def entries(self, rows: Coordinates, columns: Coordinates, damping: Parts) -> jax.Array:
        """The entries in these rows and columns, zero where one of them is elsewhere."""
        del damping
        (block, i), (_, j) = self._positions(rows), self._positions(columns)
        exponents = -self.exponents[block, i][:, None] - self.exponents[block, j][None]
        found = numerics.within_range(self.inverse[block[:, None], i[:, None], j], exponents)
        return jnp.where(_share_a_block(self.place, rows, columns), found, 0)

    def _positions(self, entries: Coordinates) -> tuple[jax.Array, jax.Array]:
        """Blocks, and positions in them."""
        if self.place.size is not None:
            return entries.inside[:, 0], entries.inside[:, 1]
        starts = np.cumsum([0, *map(math.prod, self.place.shapes)])
        axes = entries.inside.shape[1]
        strides = np.zeros((len(self.place.shapes), axes), np.int32)
        for number, shape in enumerate(self.place.shapes):
            strides[number, : len(shape)] = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        inside = jnp.sum(jnp.asarray(strides)[entries.number] * entries.inside, axis=1, dtype=jnp.int32)
        position = jnp.asarray(starts, jnp.int32)[entries.number] + inside
        return jnp.zeros_like(position), position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Wide:
    """Blocks with more entries than there are gradients.

    Attributes:
      place: where they are.
      rows: W, `(blocks, m, block_size)` if a leaf is cut, else `(1, m, *shape)` for each leaf.
    """

    place: Place = dataclasses.field(metadata={"static": True})
    rows: tuple[jax.Array, ...]

    @classmethod
    def make(cls, place: Place, grads: Sequence[jax.Array], damping: Parts, scaled: bool) -> "Wide":
        m, dtype = len(grads[0]), damping.mantissa.dtype
        if place.size is None:  # leaves keep their axes: no copy of G with other axes
            rows = [g[None].astype(dtype) for g in grads]
        else:
            rows = [jax.vmap(place.flat, out_axes=1)(list(grads)).astype(dtype)]
        shift = _times(m, damping)
        exponents = jnp.zeros((len(rows[0]), 1), jnp.int32)
        if scaled:
            largest = [jnp.max(jnp.abs(G), axis=tuple(range(2, G.ndim))) for G in rows]
            exponents = numerics.exponents_near_one(functools.reduce(jnp.maximum, largest), shift)
            rows = [numerics.times_power(G, -_in_front(exponents, G)) for G in rows]
        gram = _total(_each_block(lambda G: contractions.gram(G, dtype), G) for G in rows)
        root = inverse_root(gram, numerics.times_power(shift.mantissa, shift.exponent - 2 * exponents))
        return cls(place, tuple(_each_block(contractions.mix, root, G) for G in rows))

    def _split(self, xs: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves with the leading axes of `rows`."""
        return [x[None] for x in xs] if self.place.size is None else [self.place.flat(xs)]

    def _join(self, ys: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves from what `_split` made of them."""
        return [y[0] for y in ys] if self.place.size is None else self.place.unflat(ys[0])

    def ihvp(self, xs: Sequence[jax.Array], damping: Parts) -> list[jax.Array]:
        """The products of the blocks with the leaves."""
        dtype = damping.mantissa.dtype
        xs = [x.astype(dtype) for x in self._split(xs)]
        largest = [jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim))) for x in xs]
        size = numerics.exponent_of(functools.reduce(jnp.maximum, largest))
        xs = [numerics.times_power(x, -_in_front(size, x)) for x in xs]
        dots = lambda W, x: contractions.dots(W, x, dtype)  # noqa: E731
        inner = _total(_each_block(dots, W, x) for W, x in zip(self.rows, xs, strict=True))
        inside = [_each_block(contractions.combine, inner, W) for W in self.rows]
        products = [(x - y) / damping.mantissa for x, y in zip(xs, inside, strict=True)]
        return self._join(
            [numerics.within_range(y, _in_front(size - damping.exponent, y)) for y in products]
        )

    def diagonal(self, damping: Parts) -> list[jax.Array]:
        """The diagonals, as leaves: at least the rounding noise, if gradients span a coordinate."""
        noise = jnp.finfo(damping.mantissa.dtype).eps
        squares = [_each_block(contractions.column_squares, W) for W in self.rows]
        diagonal = [jnp.maximum(1 - s, noise) / damping.mantissa for s in squares]
        return self._join([numerics.within_range(d, -damping.exponent) for d in diagonal])

    def entries(self, rows: Coordinates, columns: Coordinates, damping: Parts) -> jax.Array:
        """The entries in these rows and columns, zero where one of them is elsewhere."""
        left, right = self._columns(rows), self._columns(columns)
        inside = jnp.matmul(left, right.T, precision=jax.lax.Precision.HIGHEST)
        equal = jnp.all(rows.inside[:, None] == columns.inside[None], axis=-1)
        equal &= rows.number[:, None] == columns.number[None]
        found = (equal.astype(inside.dtype) - inside) / damping.mantissa
        found = numerics.within_range(found, -damping.exponent)
        return jnp.where(_share_a_block(self.place, rows, columns), found, 0)

    def _columns(self, entries: Coordinates) -> jax.Array:
        """W at the entries, `(k, m)`."""
        if self.place.size is not None:
            return self.rows[0][entries.inside[:, 0], :, entries.inside[:, 1]]
        columns = jnp.zeros((len(entries.number), self.rows[0].shape[1]), self.rows[0].dtype)
        for number, (rows, shape) in enumerate(zip(self.rows, self.place.shapes, strict=True)):
            chosen = (entries.number == number)[:, None]
            index = tuple(jnp.where(chosen, entries.inside, 0)[:, : len(shape)].T)

            def add(columns, rows=rows, chosen=chosen, index=index):
                # One gather, its first axis the entries: `rows[0]` would copy the leaf.
                return jnp.where(chosen, rows[(0, slice(None), *index)], columns)

            columns = jax.lax.cond(jnp.any(chosen), add, lambda columns: columns, columns)
        return columns


def _times(m: int, damping: Parts) -> Parts:
    """m times the damping."""
    return damping._replace(mantissa=m * damping.mantissa)


def _in_front(x: jax.Array, like: jax.Array) -> jax.Array:
    """The array with axes of length one behind its own, as many as `like` has."""
    return x.reshape(*x.shape, *[1] * (like.ndim - x.ndim))


def _share_a_block(place: Place, rows: Coordinates, columns: Coordinates) -> jax.Array:
    """Which pairs of entries belong to one block of the place."""
    inside = (rows.number >= 0)[:, None] & (columns.number >= 0)[None]
    return inside if place.size is None else inside & (rows.inside[:, :1] == columns.inside[None, :, 0])


def _total(terms: Iterable[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, terms)


def _each_block(function: Callable[..., jax.Array], *stacks: jax.Array) -> jax.Array:
    """`function` for each block of the stacks; without a batch axis for a single block, which is faster."""
    if len(stacks[0]) == 1:
        return function(*(stack[0] for stack in stacks))[None]
    return jax.vmap(function)(*stacks)


@functools.partial(jax.jit, static_argnames=("places", "scaled"))
def make(
    leaves: Sequence[jax.Array], damping: Parts, places: tuple[Place, ...], scaled: bool
) -> tuple[Narrow | Wide, ...]:
    """The stacks at these places, each narrow or wide by the size of its blocks.

    Where `scaled` is false, products of the gradients must fit. This saves a copy of wide blocks.
    """

    def stack(place: Place) -> Narrow | Wide:
        own = [leaves[i] for i in place.leaves]
        if place.block_size <= len(own[0]):
            return Narrow.make(place, own, damping)
        return Wide.make(place, own, damping, scaled)

    return tuple(stack(place) for place in places)
