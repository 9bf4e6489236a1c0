"""How leaves are cut into matrices."""

import math
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled_update import collectives
from mfac_jax._src.mfac.tiles import BLOCK_SIZES, tiles_of


@pytest.mark.parametrize(
    ("shape", "grid", "rows", "columns"),
    [
        ((64, 10), (1, 1), 64, 10),
        ((768, 768), (1, 1), 768, 768),
        ((768, 3072), (1, 3), 768, 1024),  # the long side in pieces
        ((768, 12, 64), (1, 1), 768, 768),  # queries of all heads
        ((12, 64, 768), (1, 1), 768, 768),
        ((12, 768, 768), (12, 1), 768, 768),  # stacked layers
        ((3, 3, 16, 32), (3, 1), 48, 32),  # places and channels together, as far as they are short
        ((3, 3, 256, 256), (3, 3, 1), 256, 256),
        ((8192, 8192), (8, 8), 1024, 1024),
        ((24, 2048, 8192), (24, 2, 8), 1024, 1024),
    ],
)
def test_the_matrices_of_usual_leaves(shape, grid, rows, columns):
    tiles = tiles_of(shape)
    assert tiles is not None
    assert (tiles.grid, tiles.above.length, tiles.behind.length) == (grid, rows, columns)
    assert tiles.above.turns
    assert tiles.behind.turns


def test_smaller_blocks_cut_shorter():
    tiles = tiles_of((24, 2048, 12, 64), 128)
    assert tiles is not None
    assert (tiles.grid, tiles.above.length, tiles.behind.length) == ((24, 16, 6), 128, 128)


def test_a_long_side_that_cannot_be_cut_is_not_rotated():
    tiles = tiles_of((50257, 768))  # 50257 = 29 * 1733
    assert tiles is not None
    assert (tiles.grid, tiles.above.length, tiles.behind.length) == ((1, 1), 50257, 768)
    assert not tiles.above.turns
    assert tiles.behind.turns


@pytest.mark.parametrize("shape", [(), (7,), (7, 1), (1, 1, 7), (0, 3), (3, 0)])
def test_what_is_no_matrix_has_no_tiles(shape):
    assert tiles_of(shape) is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=4), st.sampled_from(BLOCK_SIZES))
def test_tiles_make_up_the_leaf(shape, block_size):
    tiles = tiles_of(shape, block_size)
    if tiles is None or math.prod(shape) > 10**6:
        return
    leaf = np.arange(math.prod(shape)).reshape(shape)
    split = tiles.split(jnp.asarray(leaf))
    assert split.shape == (*tiles.grid, tiles.above.length, tiles.behind.length)
    np.testing.assert_array_equal(tiles.join(split), leaf)


USUAL = (64, 96, 128, 256, 320, 512, 768, 1024, 2048, 3072, 4096, 16384)


@given(st.lists(st.sampled_from(USUAL), min_size=2, max_size=3))
def test_covariances_and_bases_take_few_copies_of_a_large_leaf(shape):
    tiles = tiles_of(shape)
    assert tiles is not None
    squares = sum(math.prod(tiles.squares(side)) for side in (tiles.above, tiles.behind) if side.turns)
    assert 2 * squares / math.prod(shape) < 6


def test_tiles_within_a_device_take_no_other_device():
    """As XLA sees it: a cut where the parts of a sharded leaf end."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for shape, spec in (((3, 64, 32), P(None, "x", "y")), ((64, 4, 8), P("x", "y")), ((8, 16), P("y"))):
        tiles = tiles_of(shape, 8)
        assert tiles is not None

        def apart_and_together(leaf, tiles=tiles):
            return tiles.join(2 * tiles.split(leaf))

        sharding = NamedSharding(mesh, spec)
        leaf: Any = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        program = jax.jit(apart_and_together, out_shardings=sharding).lower(leaf).compile()
        assert collectives(program.as_text() or "") == {}
