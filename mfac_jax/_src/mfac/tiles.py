"""Leaves as batches of matrices: which axes are rows and columns, and how long sides are cut.

Axes are only cut, or put together where the device has all of them: so a sharded leaf that is cut where its
parts end becomes tiles without a word between devices.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax._src.rows import mesh

# A side is cut where it is longer. Covariances and bases of longer ones take a cube of operations.
BLOCK_SIZE = 1024
# Powers of two, from a vector of a processor to what factors in minutes.
BLOCK_SIZES = tuple(2**n for n in range(3, 14))
# A side up to this length stays whole, however short the other one is.
_SHORT = 128


class Side(NamedTuple):
    """How some neighbouring axes of a leaf are cut.

    Attributes:
      ahead: the lengths of the axes that are not in a tile.
      parts: how often the next axis is cut.
      length: of the side of a tile: a part of that axis, and all axes behind it.
      turns: whether the side has a basis of its own.
    """

    ahead: tuple[int, ...]
    parts: int
    length: int
    turns: bool

    @property
    def grid(self) -> tuple[int, ...]:
        """The axes along which tiles stand."""
        return (*self.ahead, self.parts)


class Tiles(NamedTuple):
    """A leaf as tiles (*grid, rows, columns), of which each is a matrix.

    Attributes:
      shape: of the leaf.
      above: how the axes are cut that the rows are made of.
      behind: the same of the columns.
    """

    shape: tuple[int, ...]
    above: Side
    behind: Side

    @property
    def grid(self) -> tuple[int, ...]:
        """The axes along which tiles stand."""
        return self.above.grid + self.behind.grid

    def squares(self, side: Side) -> tuple[int, ...]:
        """The shape of what is kept for a side of each tile."""
        return (*self.grid, side.length, side.length)

    def split(self, leaf: jax.Array) -> jax.Array:
        """The tiles of the leaf."""
        above, behind = self.above, self.behind
        cut = leaf.reshape(*above.grid, above.length, *behind.grid, behind.length)
        return jnp.moveaxis(cut, len(above.grid), -2)

    def join(self, tiles: jax.Array) -> jax.Array:
        """The leaf of these tiles."""
        return jnp.moveaxis(tiles, -2, len(self.above.grid)).reshape(self.shape)


def tiles_of(shape: Sequence[int], block_size: int = BLOCK_SIZE) -> Tiles | None:
    """The tiles of a leaf; None for a vector, or what is one."""
    if min(shape, default=0) == 0 or len(shape) < 2:
        return None
    first = _first_column(shape)
    above, behind = shape[:first], shape[first:]
    n1, n2 = math.prod(above), math.prod(behind)
    sides = _cut(above, n2, block_size), _cut(behind, n1, block_size)
    if 1 in (n1, n2) or not (sides[0].turns or sides[1].turns):
        return None
    return Tiles(tuple(shape), *sides)


def _first_column(shape: Sequence[int]) -> int:
    """The axis where the columns begin, so that the matrix is as near to a square as it can be."""
    return min(range(len(shape) - 1, 0, -1), key=lambda k: max(math.prod(shape[:k]), math.prod(shape[k:])))


def _cut(lengths: Sequence[int], other: int, block_size: int) -> Side:
    """The last axes that fit together, and a part of the one before.

    At most twice the other side of the matrix, so that covariances and bases take few copies of the leaf.
    Where only small parts divide a long axis the side stays whole, and has no basis.
    """
    most, side, axis, part = min(block_size, max(2 * other, _SHORT)), 1, 0, 1
    for axis in reversed(range(len(lengths))):
        part = max(n for n in range(1, most // side + 1) if lengths[axis] % n == 0)
        side *= part
        if part < lengths[axis] or axis == 0:
            break
    if side == 1 or (8 * side <= most and side < math.prod(lengths)):
        return Side((), 1, math.prod(lengths), False)
    return Side(tuple(lengths[:axis]), lengths[axis] // part, side, True)


def sharding_of_squares(
    leaf_shape: Sequence[int], row: NamedSharding, shape: Sequence[int]
) -> NamedSharding | None:
    """Where covariances and bases of this shape lie: each tile with its part of the leaf, if it can.

    `row` is the leaf's sharding. Mesh axes that do not divide the tiles are not used: of sides that they
    split, XLA for CPU gave wrong products (jax 0.10.2). None if the shape is not that of covariances or
    bases of the leaf.
    """
    of_sizes = [tiles_of(leaf_shape, size) for size in BLOCK_SIZES]
    found = (
        tiles
        for tiles in of_sizes
        if tiles is not None and tuple(shape) in (tiles.squares(tiles.above), tiles.squares(tiles.behind))
    )
    tiles = next(found, None)
    if tiles is None:
        return None
    spec = (*row.spec, *[None] * (len(leaf_shape) - len(row.spec)))
    names = [mesh.axes_of(entry) for entry in spec]
    first = _first_column(leaf_shape)
    entries = []
    for side, axes in ((tiles.above, names[:first]), (tiles.behind, names[first:])):
        cut = len(side.ahead)
        entries += [*axes[:cut], _dividing(side.parts, axes[cut], row.mesh)]
    return NamedSharding(row.mesh, PartitionSpec(*(entry or None for entry in (*entries, (), ()))))


def _dividing(length: int, names: Sequence[str], mesh_) -> tuple[str, ...]:
    """As many of the first mesh axes as divide the length together."""
    kept = len(names)
    while length % math.prod(mesh_.shape[name] for name in names[:kept]):
        kept -= 1
    return tuple(names[:kept])
