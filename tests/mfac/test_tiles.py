"""How leaves are cut into matrices."""

import math

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from mfac_jax._src.mfac.tiles import tiles_of


@pytest.mark.parametrize(
    ("shape", "down", "across", "rows", "columns"),
    [
        ((64, 10), 1, 1, 64, 10),
        ((768, 768), 1, 1, 768, 768),
        ((768, 3072), 1, 3, 768, 1024),  # the long side in pieces
        ((768, 12, 64), 1, 1, 768, 768),  # queries of all heads
        ((12, 64, 768), 1, 1, 768, 768),
        ((12, 768, 768), 12, 1, 768, 768),  # stacked layers
        ((3, 3, 16, 32), 3, 1, 48, 32),  # places and channels together, as far as they are short
        ((3, 3, 256, 256), 9, 1, 256, 256),
        ((8192, 8192), 8, 8, 1024, 1024),
    ],
)
def test_the_matrices_of_usual_leaves(shape, down, across, rows, columns):
    tiles = tiles_of(shape)
    assert tiles is not None
    assert (tiles.down, tiles.across, tiles.rows, tiles.columns) == (down, across, rows, columns)
    assert tiles.turns_rows
    assert tiles.turns_columns


def test_a_long_side_that_cannot_be_cut_is_not_rotated():
    tiles = tiles_of((50257, 768))  # 50257 = 29 * 1733
    assert tiles is not None
    assert (tiles.down, tiles.across, tiles.rows, tiles.columns) == (1, 1, 50257, 768)
    assert not tiles.turns_rows
    assert tiles.turns_columns


@pytest.mark.parametrize("shape", [(), (7,), (7, 1), (1, 1, 7), (0, 3), (3, 0)])
def test_what_is_no_matrix_has_no_tiles(shape):
    assert tiles_of(shape) is None


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=2, max_size=4))
def test_tiles_make_up_the_leaf(shape):
    tiles = tiles_of(shape)
    if tiles is None or math.prod(shape) > 10**6:
        return
    leaf = np.arange(math.prod(shape)).reshape(shape)
    split = tiles.split(jnp.asarray(leaf))
    assert split.shape == (tiles.down, tiles.across, tiles.rows, tiles.columns)
    np.testing.assert_array_equal(tiles.join(split), leaf)


USUAL = (64, 96, 128, 256, 320, 512, 768, 1024, 2048, 3072, 4096, 16384)


@given(st.lists(st.sampled_from(USUAL), min_size=2, max_size=3))
def test_covariances_and_bases_take_few_copies_of_a_large_leaf(shape):
    tiles = tiles_of(shape)
    assert tiles is not None
    squares = tiles.turns_rows * tiles.rows**2 + tiles.turns_columns * tiles.columns**2
    assert 2 * tiles.down * tiles.across * squares / math.prod(shape) < 6
