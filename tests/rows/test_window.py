"""The window as a whole: rows in and out of storage, products by block, and storages of one's own."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax._src.base import numerics
from mfac_jax._src.rows import host_memory, storage_kinds, storages, window
from mfac_jax._src.rows.manual_axes import ManualAxes
from mfac_jax._src.rows.storage_kinds import floats
from mfac_jax._src.rows.storages import Storage
from mfac_jax._src.rows.zeros import empty_row, empty_window

DTYPES = pytest.mark.parametrize(
    "dtype",
    [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)],
    ids=lambda d: d.__name__,
)
TREE = {"a": (3, 2), "b": (), "empty": (0, 2)}


def normal(shape, dtype=jnp.float32, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def tree_of(dtype, rows: tuple[int, ...] = ()) -> dict[str, jax.Array]:
    shapes = TREE.items()
    return {name: normal((*rows, *shape), dtype, seed) for seed, (name, shape) in enumerate(shapes)}


class ScaledRow(NamedTuple):
    integers: Any
    scale: Any


def _scaled(rows: ScaledRow, dtype) -> jax.Array:
    scale = jnp.expand_dims(rows.scale, range(rows.scale.ndim, rows.integers.ndim))
    return rows.integers.astype(dtype) * scale.astype(dtype)


# As a user would write one: 16 bits an entry and one scale for each row of a leaf.
SCALED = Storage(
    name="scaled",
    row=lambda leaf: ScaledRow(
        jax.ShapeDtypeStruct(leaf.shape, jnp.int16), jax.ShapeDtypeStruct((), jnp.float32)
    ),
    encode=lambda x, rows: ScaledRow(
        jnp.round(x / _step_of(x)).astype(jnp.int16), _step_of(x).astype(jnp.float32)
    ),
    decode=lambda row: _scaled(row, jnp.float32),
    dots=lambda rows, x, dtype: jnp.sum(_scaled(rows, dtype) * x, axis=range(1, rows.integers.ndim)),
    combine=lambda c, rows: jnp.tensordot(c, _scaled(rows, c.dtype), axes=1),
)


def _step_of(x: jax.Array) -> jax.Array:
    largest = jnp.max(jnp.abs(x), initial=0)
    return jnp.where(largest > 0, largest, jnp.where(jnp.isnan(largest), jnp.nan, 1)) / 32767


@pytest.mark.parametrize(
    "storage", [floats(None), floats(jnp.dtype(jnp.bfloat16)), SCALED], ids=lambda s: s.name
)
def test_an_empty_window_has_the_axes_of_each_leaf_behind_its_rows(storage):
    params = tree_of(jnp.float16)
    empty = empty_window(params, storage, 4, ManualAxes(), False)
    for leaf, rows in zip(params.values(), storages.split(storage, empty), strict=True):
        assert storages.main_array(rows).shape == (4, *leaf.shape)
        assert all(array.shape[0] == 4 and not array.any() for array in jax.tree.leaves(rows))
        if storage is floats(None):
            assert rows.dtype == leaf.dtype
    row = empty_row(params, jnp.float32, ManualAxes())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), row) == {
        name: (shape, jnp.float32) for name, shape in TREE.items()
    }


def plan_of(tree, rows, storage=None, blocks=(0, 1, 0)) -> window.Plan:
    return window.make_plan("updates", tree, rows, storage or floats(None), blocks, ManualAxes())


@DTYPES
def test_ordinary_gradients_come_back_from_the_window_as_they_went_in(dtype):
    tree = tree_of(dtype)
    rows = empty_window(tree, floats(None), 2, ManualAxes(), False)
    plan = plan_of(tree, rows)
    bounded = jax.tree.map(lambda x: numerics.bounded(x, jnp.dtype(jnp.float32)), tree)
    decoded = plan.decode(plan.encode(bounded, rows))
    assert jax.tree.structure(decoded) == jax.tree.structure(tree)
    for actual, expected in zip(jax.tree.leaves(decoded), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype


def test_entries_beyond_the_dtype_of_the_window_are_clipped():
    row = floats(None).encode(jnp.asarray([1e6, -5e5, 2.0]), jnp.zeros((2, 3), jnp.float16))
    np.testing.assert_array_equal(row, np.array([65504, -65504, 2], np.float16))


@pytest.mark.parametrize("storage", [floats(None), SCALED], ids=lambda s: s.name)
def test_products_with_the_window_are_those_of_each_block(storage):
    """Rows 0 to 3 are put in one by one; the next is only looked at."""
    stack, newest = tree_of(jnp.float32, (4,)), tree_of(jnp.float32)
    like = jnp.zeros((2, 4))

    @jax.jit
    def products(stack, newest):
        rows = empty_window(newest, storage, 4, ManualAxes(), False)
        plan = plan_of(newest, rows, storage)
        for index in range(4):
            row = plan.encode(jax.tree.map(lambda x, i=index: x[i], stack), rows)
            rows = window.write_row(rows, row, jnp.asarray(index), jnp.asarray(True))
        coefficients = jnp.arange(8.0).reshape(2, 4)
        x = plan.decode(plan.encode(newest, rows))
        return (
            plan.dots(rows, newest, like),
            plan.dots(rows, x, like),
            plan.combine(coefficients, rows),
            window.gram(rows, storage, plan.blocks, jnp.zeros((2, 4, 4))),
        )

    (dots, _), (encoded_dots, squares), combined, gram = products(stack, newest)
    # The blocks are `a` with the empty leaf, and `b`.
    matrices = [np.asarray(stack["a"]).reshape(4, -1), np.asarray(stack["b"])[:, None]]
    vectors = [np.asarray(newest["a"]).ravel(), np.asarray(newest["b"])[None]]
    expected = np.stack([G @ x for G, x in zip(matrices, vectors, strict=True)])
    close: Any = {"rtol": 1e-3, "atol": 1e-3} if storage is SCALED else {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(dots, expected, **close)
    np.testing.assert_allclose(encoded_dots, expected, **close)
    np.testing.assert_allclose(squares, [x @ x for x in vectors], **close)
    np.testing.assert_allclose(combined["a"].ravel(), np.arange(4) @ matrices[0], **close)
    np.testing.assert_allclose(combined["b"], np.arange(4, 8) @ matrices[1][:, 0], **close)
    np.testing.assert_allclose(gram, [G @ G.T for G in matrices], **close)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_entry_makes_all_products_nan(bad):
    tree = tree_of(jnp.float32)
    tree["a"] = tree["a"].at[1, 1].set(bad)
    rows = empty_window(tree, floats(None), 5, ManualAxes(), False)
    plan = plan_of(tree, rows, blocks=(0, 0, 0))
    bounded = jax.tree.map(lambda x: numerics.bounded(x, jnp.dtype(jnp.float32)), tree)
    products, square = plan.dots(rows, plan.decode(plan.encode(bounded, rows)), jnp.zeros((1, 5)))
    assert np.isnan(products).all()
    assert np.isnan(square).all()


# The second is what GPUs run.
WAYS = pytest.mark.parametrize(
    "write_row", [window.write_row, window._write_either], ids=lambda f: f.__name__
)


@WAYS
@DTYPES
def test_write_row_has_its_derivatives(dtype, write_row):
    rows, x = jnp.ones((3, 2, 2), dtype), jnp.ones((2, 2), dtype)

    @jax.jit
    def derivative(rows, x):
        write = lambda rows, x: write_row(rows, x, jnp.asarray(1), jnp.asarray(True))  # noqa: E731
        return jax.jvp(write, (rows, x), (2 * rows, 3 * x))[1]

    np.testing.assert_array_equal(
        derivative(rows, x), np.array([2, 3, 2])[:, None, None] * np.ones((3, 2, 2))
    )


@WAYS
@DTYPES
@pytest.mark.parametrize("accept", [True, False])
def test_write_row_replaces_one_row_if_it_is_accepted(dtype, accept, write_row):
    rows, row = tree_of(dtype, (4,)), jax.tree.map(jnp.ones_like, tree_of(dtype))
    written = write_row(rows, row, jnp.asarray(2), jnp.asarray(accept))
    for name in rows:
        expected = np.array(rows[name])
        if accept:
            expected[2] = 1
        np.testing.assert_array_equal(written[name], expected)
        assert written[name].dtype == dtype


@pytest.mark.parametrize("storage", [floats(None), SCALED], ids=lambda s: s.name)
def test_rows_are_split_by_leaf_and_joined_again(storage):
    params = tree_of(jnp.float32)
    rows = empty_window(params, storage, 3, ManualAxes(), False)
    joined = storages.join(storage, jax.tree.structure(params), storages.split(storage, rows))
    assert jax.tree.structure(joined) == jax.tree.structure(rows)
    assert jax.tree.structure(storages.first_tree(storage, rows)) == jax.tree.structure(params)


def test_what_a_storage_leaves_out_is_done_a_row_at_a_time():
    full, bare = floats(None), floats(None)._replace(gram=None, map=None)
    rows, dtype = normal((4, 3, 2)), jnp.dtype(jnp.float32)
    np.testing.assert_allclose(
        storages.gram(bare, rows, dtype), storages.gram(full, rows, dtype), rtol=1e-5, atol=1e-6
    )
    found = storages.map_rows(bare, lambda x: 2 * x, rows)
    np.testing.assert_array_equal(found, storages.map_rows(full, lambda x: 2 * x, rows))


def test_storages_are_known_by_their_names():
    for value in (None, jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2):
        storage = storage_kinds.as_storage(value)
        assert storage_kinds.by_name(storage.name) is storage
    assert storage_kinds.as_storage(SCALED) is SCALED
    assert storage_kinds.by_name("scaled") is None


@pytest.mark.parametrize("storage", [jnp.float16, jnp.int16, jnp.complex64, "half", 16])
def test_a_storage_that_is_none_is_refused(storage):
    message = (
        r"storage must be None, jnp\.float32, jnp\.bfloat16, jnp\.int8, .*Storage, got .*Pass jnp\.int8"
    )
    with pytest.raises(ValueError, match=message):
        storage_kinds.as_storage(storage)


def test_a_tree_that_does_not_fit_the_window_has_no_plan():
    params = tree_of(jnp.float32)
    rows: Any = empty_window(params, SCALED, 3, ManualAxes(), False)
    with pytest.raises(ValueError, match=r"must have the shapes .* leaf \['b'\] is \(4,\) and was \(\)"):
        plan_of({**params, "b": jnp.ones(4)}, rows, SCALED)
    with pytest.raises(ValueError, match=r"must have the tree .* leaf \['c'\] is only in one of the two"):
        plan_of({**params, "c": jnp.ones(4)}, rows, SCALED)


def test_rows_of_whole_tiles_can_be_on_the_host():
    tiled = [(8, 128), (256, 1024), (8, 8, 128), (128, 5, 16)]
    others = [(128,), (128, 12), (8, 64), (0, 128), ()]
    assert [shape for shape in (*tiled, *others) if host_memory.may_be_on_host(shape)] == tiled
