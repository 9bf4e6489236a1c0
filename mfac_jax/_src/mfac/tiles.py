"""Leaves as batches of matrices: which axes are rows and columns, and how long sides are cut."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import NamedSharding, PartitionSpec

from mfac_jax._src.rows import mesh

# A side is cut where it is longer. Covariances and bases of longer ones take a cube of operations.
_LONGEST = 1024
# A side up to this length stays whole, however short the other one is.
_SHORT = 128


class Tiles(NamedTuple):
    """A leaf as tiles (down, across, rows, columns), of which each is a matrix.

    Attributes:
      shape: of the leaf.
      down: how often the rows of the leaf are cut.
      across: the same of its columns.
      rows: of a tile.
      columns: of a tile.
      turns_rows: whether the rows have a basis of their own.
      turns_columns: the same of the columns.
    """

    shape: tuple[int, ...]
    down: int
    across: int
    rows: int
    columns: int
    turns_rows: bool
    turns_columns: bool

    def squares(self, side: int) -> tuple[int, int, int, int]:
        """The shape of what is kept for a side of each tile."""
        return self.down, self.across, side, side

    def split(self, leaf: jax.Array) -> jax.Array:
        """The tiles of the leaf."""
        return leaf.reshape(self.down, self.rows, self.across, self.columns).swapaxes(1, 2)

    def join(self, tiles: jax.Array) -> jax.Array:
        """The leaf of these tiles."""
        return tiles.swapaxes(1, 2).reshape(self.shape)


def sharding_of_sides(shape: Sequence[int], row: NamedSharding, side: int) -> NamedSharding:
    """Where (down, across, side, side) arrays lie: each tile with its part of the leaf, if it can.

    `row` is the leaf's. Mesh axes that do not divide the tiles split the sides.
    """
    tiles = tiles_of(shape)
    assert tiles is not None
    first, entries, rest = _first_column(shape), [], []
    spec = (*row.spec, *[None] * (len(shape) - len(row.spec)))
    for number, axes in ((tiles.down, range(first)), (tiles.across, range(first, len(shape)))):
        names = [name for axis in axes for name in mesh.axes_of(spec[axis])]
        size = math.prod(row.mesh.shape[name] for name in names)
        entries.append(tuple(names) or None if number % size == 0 else None)
        rest += names if number % size else []
    size = math.prod(row.mesh.shape[name] for name in rest)
    beyond = tuple(rest) if rest and side % size == 0 else None
    return NamedSharding(row.mesh, PartitionSpec(*entries, beyond, None))


def tiles_of(shape: Sequence[int]) -> Tiles | None:
    """The tiles of a leaf; None for a vector, or what is one."""
    if min(shape, default=0) == 0 or len(shape) < 2:
        return None
    first = _first_column(shape)
    above, behind = shape[:first], shape[first:]
    n1, n2 = math.prod(above), math.prod(behind)
    rows, columns = _tile_side(above, n2), _tile_side(behind, n1)
    if 1 in (n1, n2) or rows == columns == 1:
        return None
    turns = rows > 1, columns > 1
    rows, columns = (
        side if turned else n for side, turned, n in zip((rows, columns), turns, (n1, n2), strict=True)
    )
    return Tiles(tuple(shape), n1 // rows, n2 // columns, rows, columns, *turns)


def _first_column(shape: Sequence[int]) -> int:
    """The axis where the columns begin, so that the matrix is as near to a square as it can be."""
    return min(range(len(shape) - 1, 0, -1), key=lambda k: max(math.prod(shape[:k]), math.prod(shape[k:])))


def _tile_side(lengths: Sequence[int], other: int) -> int:
    """How long a side of a tile is: the last axes that fit together, and a part of the one before.

    At most twice the other side of the matrix, so that covariances and bases take few copies of the leaf.
    One, for no basis, where only small parts divide a long axis.
    """
    most, side = min(_LONGEST, max(2 * other, _SHORT)), 1
    for length in reversed(lengths):
        part = max(n for n in range(1, most // side + 1) if length % n == 0)
        side *= part
        if part < length:
            break
    return side if 8 * side > most or side == math.prod(lengths) else 1
