"""Contractions between window and parameters: values, dtypes, and leaves sharded over eight devices."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax._src.base import numerics
from mfac_jax._src.rows import contractions, manual_axes

DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]


def empty_window(num_grads: int, params: Any) -> Any:
    return manual_axes.empty_rows(params, None, None, num_grads)


def as_row(updates: Any, window: Any) -> Any:
    return contractions.as_row(updates, None, window)


SHAPES = [(), (0,), (5,), (3, 4), (2, 3, 4)]


@pytest.fixture(params=DTYPES, ids=lambda dtype: dtype.__name__)
def dtype(request):
    with jax.enable_x64(request.param == jnp.float64):
        yield request.param


def normal(shape, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def assert_close(actual, expected, dtype) -> None:
    """Equal but for the rounding of sums of a few numbers near one in `dtype`."""
    tolerance = 16 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_sums_are_in_float32_but_for_float64_leaves(dtype):
    expected = jnp.float64 if dtype == jnp.float64 else jnp.float32
    tree = {"a": jnp.zeros(2, dtype), "b": jnp.zeros((), jnp.float16)}
    assert numerics.accumulation_dtype(tree) == expected
    assert numerics.accumulation_dtype({}) == jnp.float32


@pytest.mark.parametrize("shape", SHAPES)
def test_dots_are_inner_products_with_every_row(dtype, shape):
    rows, x = normal((6, *shape), dtype), normal(shape, dtype)
    accumulator = numerics.accumulation_dtype([x])
    products = contractions.dots(rows, x, accumulator)
    assert products.dtype == accumulator
    exact = np.asarray(rows, np.float64).reshape(6, -1) @ np.asarray(x, np.float64).reshape(-1)
    assert_close(products, exact, accumulator)


@pytest.mark.parametrize("shape", SHAPES)
def test_combine_is_the_weighted_sum_of_the_rows(dtype, shape):
    rows = normal((6, *shape), dtype)
    coefficients = normal((6,), numerics.accumulation_dtype([rows]))
    combined = contractions.combine(coefficients, rows)
    assert combined.dtype == coefficients.dtype
    exact = np.tensordot(np.asarray(coefficients, np.float64), np.asarray(rows, np.float64), axes=1)
    assert_close(combined, exact, combined.dtype)


@pytest.mark.parametrize("devices", [1, 8])
def test_long_leaves_have_the_same_dots_as_short_ones(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    dots: Any = inspect.unwrap(
        contractions.dots
    )  # what is compiled does not ask for the number of devices again
    size = contractions._MAX_DOT_COLUMNS
    rows, x = normal((2, size + 4), jnp.float32), normal((size + 4,), jnp.float32)
    for length in range(size, size + 5):  # in four, three, two parts and one
        exact = np.asarray(rows[:, :length], np.float64) @ np.asarray(x[:length], np.float64)
        found = dots(rows[:, :length], x[:length], jnp.dtype(jnp.float32))
        error = np.abs(found - exact)
        assert np.max(error) < 1e-5 * np.linalg.norm(rows, axis=1).max() * np.linalg.norm(x)
        bad = dots(rows[:, :length], x[:length].at[-1].set(jnp.nan), jnp.dtype(jnp.float32))
        assert jnp.all(jnp.isnan(bad))


@pytest.mark.parametrize("accept", [True, False])
def test_write_row_replaces_one_row_if_it_is_accepted(dtype, accept):
    window = {"a": normal((4, 3, 2), dtype), "b": normal((4,), dtype)}
    row = {"a": jnp.ones((3, 2), dtype), "b": jnp.ones((), dtype)}
    written = jax.jit(contractions.write_row)(window, row, jnp.asarray(2), jnp.asarray(accept))
    for name in window:
        expected = np.array(window[name])
        if accept:
            expected[2] = 1
        np.testing.assert_array_equal(written[name], expected)
        assert written[name].dtype == dtype


def test_an_empty_window_has_a_row_axis_and_the_dtype_of_each_leaf(dtype):
    params = {"a": normal((3, 2), dtype), "b": jnp.zeros((), jnp.float32), "empty": jnp.zeros((0, 2))}
    window = empty_window(4, params)
    assert jax.tree.map(lambda x: (x.shape[1:], x.dtype), window) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(window))


def test_ordinary_gradients_are_not_bounded(dtype):
    tree = {"a": normal((3, 4), dtype), "none": None, "empty": jnp.zeros((0,), dtype)}
    row = as_row(tree, empty_window(1, tree))
    assert jax.tree.structure(row) == jax.tree.structure(tree)
    for actual, expected in zip(jax.tree.leaves(row), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(actual, expected)
        assert actual.dtype == expected.dtype


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_entry_is_nan_in_the_row_and_in_every_product(dtype, bad):
    x = normal((3, 4), dtype).at[1, 2].set(bad)
    row = as_row(x, jnp.zeros((5, 3, 4), dtype))
    np.testing.assert_array_equal(np.isnan(row.astype(jnp.float32)), np.asarray(x == bad) | np.isnan(x))
    assert np.isnan(
        contractions.dots(jnp.zeros((5, 3, 4), dtype), row, numerics.accumulation_dtype(x))
    ).all()


def test_the_largest_finite_entries_are_clipped_so_that_their_squares_add_up(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([largest, -largest, 1.5], dtype)
    row = as_row(x, jnp.zeros((1, 3), dtype))
    accumulator = numerics.accumulation_dtype(x)
    np.testing.assert_array_equal(row[2], x[2])
    assert row[0] == -row[1]
    assert 2.0**34 * float(numerics.square(row, accumulator)) < float(jnp.finfo(accumulator).max)


def test_entries_beyond_the_dtype_of_the_window_are_clipped():
    row = as_row(jnp.asarray([1e6, -5e5, 2.0]), jnp.zeros((2, 3), jnp.float16))
    np.testing.assert_array_equal(row, np.array([65504, -65504, 2], np.float16))


def test_narrow_clips_to_what_a_dtype_can_hold():
    wide = jnp.asarray([1e38, -1e38, 1.5, 3.4e38])
    np.testing.assert_array_equal(numerics.narrow(wide, wide.dtype), wide)
    largest = float(jnp.finfo(jnp.float16).max)
    half = numerics.narrow(wide, jnp.dtype(jnp.float16))
    np.testing.assert_array_equal(half, np.array([largest, -largest, 1.5, largest], np.float16))
    assert jnp.all(jnp.isfinite(numerics.narrow(wide, jnp.dtype(jnp.bfloat16))))


# The axes of a (8, 4) leaf that are sharded over a mesh of 4 x 2.
SPECS = [PartitionSpec(), PartitionSpec("x"), PartitionSpec(None, "y"), PartitionSpec("x", "y")]
SPECS += [PartitionSpec(("x", "y"))]


@pytest.fixture(params=[AxisType.Auto, AxisType.Explicit], ids=lambda axis_type: axis_type.name)
def mesh(request):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(request.param,) * 2)
    with jax.set_mesh(mesh):
        yield mesh


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("jit", [False, True])
def test_sharded_leaves_give_the_values_of_whole_ones(mesh, spec, jit):
    rows, x, coefficients = (normal(shape, jnp.float32) for shape in [(6, 8, 4), (8, 4), (6,)])
    leaf = jax.device_put(x, NamedSharding(mesh, spec))
    window = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, *spec)))
    dots, combine = contractions.dots, contractions.combine
    if jit:
        dots, combine = jax.jit(dots, static_argnums=2), jax.jit(combine)
    exact = np.einsum("mab,ab->m", *(np.asarray(v, np.float64) for v in (rows, x)))
    assert_close(dots(window, leaf, jnp.dtype(jnp.float32)), exact, jnp.float32)
    combined = combine(coefficients, window)
    exact = np.einsum("m,mab->ab", *(np.asarray(v, np.float64) for v in (coefficients, rows)))
    assert_close(combined, exact, jnp.float32)
    # Under jit with auto axes a tracer does not tell its sharding: the compiler chooses.
    if not jit or mesh.axis_types[0] == AxisType.Explicit:
        assert combined.sharding.is_equivalent_to(leaf.sharding, 2)
