"""Contractions of window and parameters: values, dtypes, long leaves, and leaves on eight devices."""

import inspect
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax._src.base import numerics
from mfac_jax._src.rows import chunks, contractions

SHAPES = [(), (0,), (5,), (3, 4), (2, 3, 4)]
FLOAT32 = jnp.dtype(jnp.float32)
slow = pytest.mark.slow


@pytest.fixture(params=[jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64], ids=lambda d: d.__name__)
def dtype(request):
    with jax.enable_x64(request.param == jnp.float64):
        yield request.param


def normal(shape, dtype) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), dtype)


def exactly(*arrays) -> list[np.ndarray]:
    return [np.asarray(x, np.float64) for x in arrays]


def assert_close(actual, expected, dtype) -> None:
    """Equal but for the rounding of sums of a few numbers near one in `dtype`."""
    tolerance = 16 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(actual, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_sums_are_in_float32_but_for_float64_leaves(dtype):
    expected = jnp.float64 if dtype == jnp.float64 else jnp.float32
    tree = {"a": jnp.zeros(2, dtype), "b": jnp.zeros((), jnp.float16)}
    assert numerics.accumulation_dtype(tree) == expected
    assert numerics.accumulation_dtype({}) == jnp.float32


def test_contractions_are_those_of_numpy_for_leaves_of_any_shape(dtype):
    """In one program: inner products with a vector and with each other, and the weighted sum."""
    all_rows, all_x = ([normal((*n, *shape), dtype) for shape in SHAPES] for n in ([6], []))
    accumulator = numerics.accumulation_dtype(all_x)
    coefficients = normal((6,), accumulator)

    @jax.jit
    def contract(all_rows, all_x):
        return [
            (
                contractions.dots(rows, x, accumulator),
                contractions.combine(coefficients, rows),
                contractions.gram(rows, accumulator),
                contractions.column_squares(rows),
                contractions.mix(jnp.stack([coefficients, 2 * coefficients]), rows),
            )
            for rows, x in zip(all_rows, all_x, strict=True)
        ]

    for rows, x, found in zip(all_rows, all_x, contract(all_rows, all_x), strict=True):
        rows, x, c = exactly(rows, x, coefficients)
        flat = rows.reshape(6, -1)
        dots, combined, gram, squares, mixed = found
        assert_close(dots, flat @ x.ravel(), accumulator)
        assert_close(combined, np.tensordot(c, rows, axes=1), accumulator)
        assert_close(gram, flat @ flat.T, accumulator)
        assert_close(squares, np.sum(rows**2, axis=0), dtype)
        assert_close(mixed, np.tensordot([c, 2 * c], rows, axes=1), accumulator)
        assert {dots.dtype, combined.dtype, gram.dtype, mixed.dtype} == {accumulator}


def test_the_gram_matrix_of_long_rows_is_that_of_numpy():
    rows = normal((3, 2 * contractions._GRAM_COLUMNS + 5), FLOAT32)
    (exact,) = exactly(rows)
    np.testing.assert_allclose(contractions.gram(rows, FLOAT32), exact @ exact.T, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=slow)])
def test_long_leaves_have_the_same_dots_as_short_ones(devices, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    # What is compiled does not ask for the number of devices again.
    dots: Any = jax.jit(inspect.unwrap(contractions.dots), static_argnums=2)
    size = contractions._MAX_DOT_COLUMNS
    rows, x = normal((2, size + 4), FLOAT32), normal((size + 4,), FLOAT32)
    for length in range(size, size + 5):  # in four, three, two parts and one
        exact = np.matmul(*exactly(rows[:, :length], x[:length]))
        error = np.abs(dots(rows[:, :length], x[:length], FLOAT32) - exact)
        assert np.max(error) < 1e-5 * np.linalg.norm(rows, axis=1).max() * np.linalg.norm(x)
        bad = dots(rows[:, :length], x[:length].at[-1].set(jnp.nan), FLOAT32)
        assert jnp.all(jnp.isnan(bad))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=slow)])
def test_any_number_of_rows_of_16_bits_is_contracted_exactly(dtype, devices, monkeypatch):
    """They are added eight at a time, and float16 rows of one device are multiplied one by one."""
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    dots, combine = (inspect.unwrap(f) for f in (contractions.dots, contractions.combine))

    @jax.jit
    def contract(rows, x, c):
        return [(dots(rows[:m], x, FLOAT32), combine(c[:m], rows[:m])) for m in numbers]

    numbers = (1, 2, 7, 8, 9, 16, 23, 24)
    rows, x, c = normal((24, 3, 5), dtype), normal((3, 5), FLOAT32), normal((24,), FLOAT32)
    exact = exactly(rows, x, c)
    for m, (products, combined) in zip(numbers, contract(rows, x, c), strict=True):
        assert_close(products, np.einsum("mab,ab->m", exact[0][:m], exact[1]), FLOAT32)
        assert_close(combined, np.einsum("m,mab->ab", exact[2][:m], exact[0][:m]), FLOAT32)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=lambda d: d.__name__)
def test_contractions_of_16_bits_have_their_derivatives_by_the_rows(dtype, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    rows, step, x, c = (normal(shape, FLOAT32) for shape in [(9, 4), (9, 4), (4,), (9,)])

    @jax.jit
    def derivatives(rows, step):
        def both(rows):
            half = rows.astype(dtype)
            return inspect.unwrap(contractions.dots)(half, x, FLOAT32), contractions.combine(c, half)

        return jax.jvp(both, (rows,), (step,))[1]

    along_dots, along_combined = derivatives(rows, step)
    (rounded,) = exactly(step.astype(dtype))
    assert_close(along_dots, rounded @ np.asarray(x, np.float64), FLOAT32)
    assert_close(along_combined, np.asarray(c, np.float64) @ rounded, FLOAT32)


@pytest.mark.parametrize("length", [1, 3, 7, 9])
def test_rows_in_chunks_are_contracted_as_all_at_once(length):
    """Chunks of three overlap at the end of seven rows; nine are more than there are."""
    rows, x, coefficients = (normal(shape, FLOAT32) for shape in [(7, 4), (4,), (7,)])

    def dot(chunk):
        return jnp.einsum("mi,i->m", chunk["rows"], x)

    def contract(own, chunk):
        return jnp.einsum("m,mi->i", own, chunk["rows"])

    @jax.jit
    def in_chunks(rows):
        products = chunks.dots_in_chunks(dot, {"rows": rows}, length)
        start = jnp.ones(4)
        return products, chunks.combine_in_chunks(contract, start, coefficients, {"rows": rows}, length)

    products, total = in_chunks(rows)
    np.testing.assert_allclose(products, np.asarray(rows) @ x, rtol=1e-5)
    np.testing.assert_allclose(total, 1 + np.asarray(coefficients) @ rows, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_bounded_to_nan(bad):
    bounded = numerics.bounded(jnp.asarray([1.0, bad, 2.0]), FLOAT32)
    np.testing.assert_array_equal(bounded, np.array([1, np.nan, 2], np.float32))


def test_the_largest_finite_entries_are_clipped_so_that_their_squares_add_up(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.asarray([largest, -largest, 1.5], dtype)
    accumulator = numerics.accumulation_dtype(x)
    bounded = numerics.bounded(x, accumulator)
    assert bounded.dtype == accumulator
    np.testing.assert_array_equal(bounded[2], 1.5)
    assert bounded[0] == -bounded[1]
    assert 2.0**34 * float(numerics.square(bounded, accumulator)) < float(jnp.finfo(accumulator).max)


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


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, marks=[] if spec == SPECS[3] else slow, id=str(spec)) for spec in SPECS]
)
@pytest.mark.parametrize("jit", [pytest.param(False, marks=slow), True])
def test_sharded_leaves_give_the_values_of_whole_ones(mesh, spec, jit):
    rows, x, coefficients = (normal(shape, jnp.float32) for shape in [(6, 8, 4), (8, 4), (6,)])
    leaf = jax.device_put(x, NamedSharding(mesh, spec))
    window = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(None, *spec)))
    dots, combine = contractions.dots, contractions.combine
    if jit:
        dots, combine = jax.jit(dots, static_argnums=2), jax.jit(combine)
    exact = np.einsum("mab,ab->m", *exactly(rows, x))
    assert_close(dots(window, leaf, FLOAT32), exact, jnp.float32)
    combined = combine(coefficients, window)
    assert_close(combined, np.einsum("m,mab->ab", *exactly(coefficients, rows)), jnp.float32)
    # Under jit with auto axes a tracer does not tell its sharding: the compiler chooses.
    if not jit or mesh.axis_types[0] == AxisType.Explicit:
        assert combined.sharding.is_equivalent_to(leaf.sharding, 2)
