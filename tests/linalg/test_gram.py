"""The m x m algebra, under strict promotion, against NumPy; and what it does where Cholesky breaks down."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax._src.linalg import gram as _gram
from tests.dense_reference import relative_error

inverse_power = jax.jit(_gram.inverse_power, static_argnames="power")
outside_inverse_power = jax.jit(_gram.outside_inverse_power, static_argnames="power")


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def random_windows(blocks: int, m: int, d: int) -> np.ndarray:
    return np.random.default_rng(m).standard_normal((blocks, m, d))


def dense_power(matrix: np.ndarray, power: float, x: np.ndarray) -> np.ndarray:
    """matrix^-power x for a stack of positive matrices."""
    s, v = np.linalg.eigh(matrix)
    return np.einsum("bij,bj,bkj,bk->bi", v, s**-power, v, x)


def scalars(damping: float, count: float, dtype=None):
    return jnp.asarray(damping, dtype), jnp.asarray(count, dtype)


def test_replace_row_sets_one_row_and_column_of_every_block(x64):
    gram = random_windows(2, 5, 5)
    row = np.random.default_rng(1).standard_normal((2, 5))
    expected = gram.copy()
    expected[:, 3, :] = row
    expected[:, :, 3] = row
    replaced = _gram.replace_row(jnp.asarray(gram), jnp.asarray(row), jnp.asarray(3))
    np.testing.assert_array_equal(replaced, expected)


shapes = pytest.mark.parametrize(("m", "d"), [(1, 4), (6, 20), (20, 6)])
powers = pytest.mark.parametrize("power", [1.0, 0.5, 0.25, 2.0])


@shapes
@powers
def test_inverse_power_applies_a_power_of_the_damped_gram_matrix(x64, m, d, power):
    window = random_windows(3, m, d)
    gram, w = window @ window.mT, np.random.default_rng(1).standard_normal((3, m))
    expected = dense_power(gram / 8 + 0.1 * np.eye(m), power, w)
    for traced in (False, True):
        function = jax.jit(_gram.inverse_power) if traced else inverse_power
        c = function(jnp.asarray(gram), *scalars(0.1, 8), power, jnp.asarray(w))
        np.testing.assert_allclose(c, expected, rtol=1e-10, atol=1e-10)


@shapes
@powers
def test_outside_inverse_power_applies_a_power_of_the_fisher_matrix_to_any_vector(x64, m, d, power):
    window, x = random_windows(3, m, d), random_windows(3, 1, d)[:, 0]
    gram, gx = window @ window.mT, np.einsum("bmd,bd->bm", window, x)
    expected = dense_power(window.mT @ window / 8 + 0.1 * np.eye(d), power, x)
    for traced in (False, True):
        function = jax.jit(_gram.outside_inverse_power) if traced else outside_inverse_power
        c = function(jnp.asarray(gram), *scalars(0.1, 8), power, jnp.asarray(gx))
        answer = 0.1**-power * x + np.einsum("bmd,bm->bd", window, np.asarray(c))
        np.testing.assert_allclose(answer, expected, rtol=1e-10, atol=1e-10)


def hard_grams(m: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((m, 50))
    half_zero = rows * (np.arange(m) % 2)[:, None]
    near_parallel = rows[:1] + 1e-4 * rows
    spread = rows * np.logspace(-15, 15, m)[:, None]
    graded = rows * 10.0 ** np.resize([-99, -99, -30, -99, 15, -99, 0, -3], m)[:, None]
    return {
        "zero": np.zeros((m, m)),
        "zero rows": half_zero @ half_zero.T,
        "repeated": np.ones((m, m)),
        "repeated, huge": np.full((m, m), 1e30),
        "repeated, tiny": np.full((m, m), 1e-30),
        "near parallel": near_parallel @ near_parallel.T,
        "norms from 1e-15 to 1e15": spread @ spread.T,
        "zero rows, norms from 1e-30 to 1e15": graded @ graded.T,
        "not positive": 2 * np.ones((m, m)) - np.eye(m),
    }


@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("m", [1, 2, 8, 64])
@pytest.mark.parametrize("kind", hard_grams(1))
def test_coefficients_are_finite_for_any_gram_matrix(kind, m, power):
    gram, newest = jnp.asarray(hard_grams(m)[kind][None], jnp.float32), jnp.eye(m)[-1:]
    smallest = float(jnp.finfo(jnp.float32).tiny)
    for damping, count in itertools.product([smallest, 1e-30, 1e-8, 1e3], [1, m]):
        c = inverse_power(gram, *scalars(damping, count, jnp.float32), power, newest)
        assert jnp.all(jnp.isfinite(c)), (damping, count)
    for damping in [1e-8, 1e3]:
        c = outside_inverse_power(gram, *scalars(damping, m, jnp.float32), power, gram[:, -1])
        assert jnp.all(jnp.isfinite(c)), damping


@pytest.mark.parametrize("m", [2, 7, 64, 512])
def test_repeated_gradients_keep_their_sum_where_cholesky_breaks_down(m):
    """G^T c = (sum of c) g when all rows are g, and the sum is one."""
    c = inverse_power(jnp.ones((1, m, m)), *scalars(1e-12, m, jnp.float32), 1.0, jnp.eye(m)[-1:])
    assert abs(float(jnp.sum(c)) - 1) < 0.2


def test_a_system_that_is_not_a_number_ends():
    c = inverse_power(jnp.ones((1, 3, 3)), *scalars(np.nan, 3, jnp.float32), 1.0, jnp.eye(3)[-1:])
    assert jnp.all(jnp.isnan(c))


def sound_gram(m: int) -> jax.Array:
    """A Gram matrix near its worst: cond is 1e4."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((m, m)))
    matrix = q * np.logspace(-4, 0, m) @ q.T
    return jnp.asarray((matrix + matrix.T)[None], jnp.float32)


def test_there_is_no_jitter_where_cholesky_is_sound():
    """The least jitter would move the answer by 3 %, 8 eps sqrt(m) cond; rounding does by 0.1 % at most."""
    gram, newest = sound_gram(16), jnp.eye(16)[-1:]
    c = inverse_power(gram, *scalars(1e-12, 16, jnp.float32), 1.0, newest)
    exact = 16 * np.linalg.solve(np.asarray(gram[0], np.float64) + 16e-12 * np.eye(16), newest[0])
    assert relative_error(c[0], exact) < 1e-3


def test_a_block_that_needs_the_jitter_leaves_the_others_as_they_are():
    sound, newest = sound_gram(16), jnp.eye(16)[-1:]
    arguments = scalars(1e-12, 16, jnp.float32)
    alone = inverse_power(sound, *arguments, 1.0, newest)
    broken = jnp.ones_like(sound)
    stack, w = jnp.concatenate([broken, sound, broken]), jnp.repeat(newest, 3, axis=0)
    together = inverse_power(stack, *arguments, 1.0, w)
    np.testing.assert_array_equal(together[1], alone[0])
    np.testing.assert_array_equal(together[0], inverse_power(broken, *arguments, 1.0, newest)[0])
    assert jnp.all(jnp.isfinite(together))
