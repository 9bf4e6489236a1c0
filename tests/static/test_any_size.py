"""The static inverse of gradients, dampings and vectors of any size."""

from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_jax import FisherInverse
from mfac_jax._src.base import numerics

LARGEST = float(np.finfo(np.float32).max)


def random_tree(rows: tuple[int, ...] = ()) -> dict:
    random = np.random.default_rng(len(rows))
    return {name: random.standard_normal((*rows, *s)).astype(np.float32) for name, s in SHAPES.items()}


SHAPES = {"bias": (2,), "kernel": (4, 3)}
GRADS, VECTOR = random_tree((3,)), random_tree()
BLOCKS: dict[str, Any] = {"one": None, "leaf": "leaf", "5": 5, "2": 2, "label": lambda path: 0}


def times_power(tree, exponent: int) -> Any:
    """The tree times 2^exponent, in float64."""
    return jax.tree.map(lambda x: np.ldexp(np.asarray(x, np.float64), exponent), tree)


def as_float32(tree) -> Any:
    return jax.tree.map(lambda x: np.clip(x, -LARGEST, LARGEST).astype(np.float32), tree)


def results(fisher, vector) -> tuple:
    return fisher.ihvp(vector), fisher.diagonal(), {"entries": fisher.submatrix(range(14))}


@pytest.mark.parametrize(
    "blocks", ["leaf", *(pytest.param(kind, marks=pytest.mark.slow) for kind in BLOCKS if kind != "leaf")]
)
@settings(max_examples=4, deadline=None)
@given(st.integers(-100, 50), st.integers(-90, 90))
def test_powers_of_two_pass_through_bit_for_bit(blocks, size, of_vector):
    """F^-1 of 2^k g and 4^k damping is 4^-k F^-1, whatever a float32 would make of 4^k."""
    damping = 0.37
    expected = results(FisherInverse.from_gradients(GRADS, damping, blocks=BLOCKS[blocks]), VECTOR)
    grads, vector = (as_float32(times_power(x, k)) for x, k in ((GRADS, size), (VECTOR, of_vector)))
    fisher = FisherInverse.from_gradients(grads, np.ldexp(damping, 2 * size), blocks=BLOCKS[blocks])
    products, *matrices = expected
    expected = times_power(products, of_vector - 2 * size), *times_power(matrices, -2 * size)
    jax.tree.map(np.testing.assert_array_equal, results(fisher, vector), as_float32(expected))


def exact_inverse(grads: np.ndarray, damping: float) -> list[list[Fraction]]:
    """F^-1 in rational numbers."""
    m, d = grads.shape
    G = [[Fraction(float(x)) for x in row] for row in grads]
    rows = [
        [sum(g[i] * g[j] for g in G) / m + Fraction(damping) * (i == j) for j in range(d)]
        + [Fraction(int(i == j)) for j in range(d)]
        for i in range(d)
    ]
    for i in range(d):
        best = max(range(i, d), key=lambda k: abs(rows[k][i]))
        rows[i], rows[best] = rows[best], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for k in range(d):
            if k != i:
                rows[k] = [x - rows[k][i] * y for x, y in zip(rows[k], rows[i], strict=True)]
    return [row[d:] for row in rows]


@settings(max_examples=8, deadline=None)
@given(
    st.lists(st.floats(-30, 30), min_size=3, max_size=3),
    st.floats(-60, 60),
    st.floats(-25, 25),
    st.booleans(),
)
def test_rows_of_any_sizes_give_the_inverse_in_rational_numbers(sizes, damping_size, vector_size, jitted):
    """Relative to the largest entry, and to what float32 can hold."""
    random = np.random.default_rng(0)
    grads = (10.0 ** np.asarray(sizes)[:, None] * random.standard_normal((3, 6))).astype(np.float32)
    x = (10.0**vector_size * random.standard_normal(6)).astype(np.float32)
    damping = 10.0**damping_size
    inverse = exact_inverse(grads, damping)
    product = [sum(a * Fraction(float(b)) for a, b in zip(row, x, strict=True)) for row in inverse]
    make: Any = (
        jax.jit(FisherInverse.from_gradients, static_argnums=1) if jitted else FisherInverse.from_gradients
    )
    fisher = make(grads, damping)
    pairs = [
        (fisher.ihvp(jnp.asarray(x)), product),
        (fisher.diagonal(), [inverse[i][i] for i in range(6)]),
        (fisher.submatrix(range(6)), [a for row in inverse for a in row]),
    ]
    for found, expected in pairs:
        expected = np.clip([float(max(min(a, 10**39), -(10**39))) for a in expected], -LARGEST, LARGEST)
        atol = 1e-5 * np.abs(expected).max() + 1.5e-45
        np.testing.assert_allclose(np.ravel(found).astype(float), expected, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        pytest.param(jnp.float16, 2.0**-12, marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, 2.0**100, marks=pytest.mark.slow),
        (jnp.float64, 2.0**450),
    ],
)
def test_other_dtypes_keep_their_digits(dtype, scale):
    with jax.enable_x64(dtype == jnp.float64):
        eps = float(jnp.finfo(dtype).eps)
        grads = jax.tree.map(lambda g: jnp.asarray(g, dtype) * jnp.asarray(scale, dtype), GRADS)
        x = jax.tree.map(lambda v: jnp.asarray(v, dtype), VECTOR)
        fisher = FisherInverse.from_gradients(grads, 0.5 * scale**2)
        found = flat(fisher.ihvp(jax.tree.map(lambda v: v * jnp.asarray(scale, dtype), x)))
        ones = jax.tree.map(lambda g: jnp.asarray(flat_like(g) / scale), grads)
    matrix = np.concatenate([np.reshape(g, (3, -1)) for g in jax.tree.leaves(ones)], axis=1).astype(float)
    expected = np.linalg.solve(0.5 * np.eye(14) + matrix.T @ matrix / 3, flat(x)) / scale
    limit = float(jnp.finfo(dtype).max)
    np.testing.assert_allclose(
        found, np.clip(expected, -limit, limit), rtol=0, atol=8 * eps * np.abs(expected).max()
    )


def flat_like(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(flat_like(x)) for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize(("damping", "size"), [(1e-40, 1e-20), (3e38, 1e20)])
def test_a_traced_damping_is_the_same_as_a_number(damping: Any, size):
    x = jnp.array([1.0, 2.0, -1.0]) * size
    grads = jnp.array([[1e-25, 0, 0], [0, 3e-25, 0]])
    damping = np.float32(damping)
    expected: Any = FisherInverse.from_gradients(grads, damping).ihvp(x)
    found = jax.jit(lambda a: FisherInverse.from_gradients(grads, a).ihvp(x))(damping)
    np.testing.assert_allclose(found, expected, rtol=4 * float(np.finfo(np.float32).eps))
    assert np.all(np.isfinite(expected) & (np.asarray(expected) != 0))


def test_the_damping_can_be_read_where_the_dtype_holds_it():
    for damping, held in [(1e-3, 1e-3), (1e-40, 1e-40), (1e39, LARGEST)]:
        fisher = FisherInverse.from_gradients(jnp.ones((2, 3)), damping)
        np.testing.assert_allclose(fisher.damping, held, rtol=1e-5)


@pytest.mark.slow
def test_the_derivative_by_the_damping_is_that_of_the_formula():
    """-F^-2 x, in forward mode."""
    x = jax.tree.map(jnp.asarray, VECTOR)
    inverse = lambda a: FisherInverse.from_gradients(GRADS, a).ihvp(x)  # noqa: E731
    once, found = jax.jvp(inverse, (0.3,), (1.0,))
    twice = FisherInverse.from_gradients(GRADS, 0.3).ihvp(once)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-3, atol=1e-3), found, twice)


@pytest.mark.parametrize("double", [False, True])
def test_numbers_are_put_together_from_parts_as_c_does(double):
    """Down to subnormal numbers, which XLA for CPU makes zeros elsewhere."""
    kind, low, high = (np.float64, -1090, 1030) if double else (np.float32, -155, 135)
    random = np.random.default_rng(0)
    x = (random.uniform(0.5, 1, 2000) * random.choice([-1, 1], 2000)).astype(kind)
    exponents = random.integers(low, high, 2000).astype(np.int32)
    with np.errstate(over="ignore", under="ignore"):
        expected = np.ldexp(x, exponents)
    limit = np.finfo(kind).max
    with jax.enable_x64(double):
        found = jax.jit(numerics.within_range)(x, exponents)
    np.testing.assert_array_equal(found, np.clip(expected, -limit, limit))
