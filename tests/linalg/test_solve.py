"""The m x m algebra, under strict promotion, against NumPy; and what it does where Cholesky breaks down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax._src.linalg import solve as _solve
from mfac_jax._src.linalg.gram import replace_row
from tests.dense_reference import relative_error

inverse_root = jax.jit(_solve.inverse_root)
SOLVES = {"solve": _solve.solve, "solve_twice": jax.jit(_solve.solve_twice)}


@pytest.fixture(params=SOLVES)
def solve(request):
    """What runs here, and what runs on a GPU."""
    return SOLVES[request.param]


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


def as_shift(shift: float, blocks: int, dtype=jnp.float32) -> jax.Array:
    return jnp.full((blocks, 1), shift, dtype)


def newest(m: int, blocks: int = 1) -> jax.Array:
    return jnp.repeat(jnp.eye(m)[-1:], blocks, axis=0)


def test_replace_row_sets_one_row_and_column_of_every_block(x64):
    gram = np.random.default_rng(0).standard_normal((2, 5, 5))
    row = np.random.default_rng(1).standard_normal((2, 5))
    expected = gram.copy()
    expected[:, 3, :] = row
    expected[:, :, 3] = row
    replaced = replace_row(jnp.asarray(gram), jnp.asarray(row), jnp.asarray(3))
    np.testing.assert_array_equal(replaced, expected)


@pytest.mark.parametrize(
    ("m", "d"), [(1, 4), (6, 20), pytest.param(20, 6, marks=pytest.mark.slow)], ids=str
)
def test_solve_and_inverse_root_invert_the_damped_gram_matrix(x64, solve, m, d):
    random = np.random.default_rng(m)
    window, w = random.standard_normal((3, m, d)), random.standard_normal((3, m))
    gram, shift = window @ window.mT, 0.8
    expected = np.linalg.inv(gram + shift * np.eye(m))
    solved = solve(jnp.asarray(gram), as_shift(shift, 3, jnp.float64), jnp.asarray(w))
    np.testing.assert_allclose(solved, np.einsum("bij,bj->bi", expected, w), rtol=1e-10, atol=1e-10)
    root = np.asarray(inverse_root(jnp.asarray(gram), as_shift(shift, 3, jnp.float64)))
    np.testing.assert_allclose(root.mT @ root, expected, rtol=1e-10, atol=1e-10)


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


SHIFTS = [float(jnp.finfo(jnp.float32).tiny), 1e-30, 1e-8, 1e-6, 1e3]


@pytest.mark.parametrize("m", [1, 8, *(pytest.param(m, marks=pytest.mark.slow) for m in (2, 64))])
def test_solutions_are_finite_for_any_gram_matrix(solve, m):
    for kind, matrix in hard_grams(m).items():
        gram = jnp.asarray(matrix[None], jnp.float32)
        for shift in SHIFTS:
            c = solve(gram, as_shift(shift, 1), newest(m))
            assert jnp.all(jnp.isfinite(c)), (kind, shift)


def test_solutions_of_many_blocks_are_finite_together(solve):
    gram = jnp.asarray(np.stack([*hard_grams(8).values()]), jnp.float32)
    for shift in SHIFTS:
        shifts = as_shift(shift, len(gram))
        assert jnp.all(jnp.isfinite(solve(gram, shifts, newest(8, len(gram)))))
        assert jnp.all(jnp.isfinite(inverse_root(gram, shifts)))


@pytest.mark.parametrize("m", [8, *(pytest.param(m, marks=pytest.mark.slow) for m in (2, 7, 64, 512))])
def test_repeated_gradients_keep_their_sum_where_cholesky_breaks_down(solve, m):
    """G^T c = (sum of c) g when all rows are g, and the sum is one."""
    c = m * solve(jnp.ones((1, m, m)), as_shift(m * 1e-12, 1), newest(m))
    assert abs(float(jnp.sum(c)) - 1) < 0.2


def test_a_system_that_is_not_a_number_ends(solve):
    c = solve(jnp.ones((1, 8, 8)), as_shift(np.nan, 1), newest(8))
    assert jnp.all(jnp.isnan(c))


def sound_gram(m: int) -> jax.Array:
    """A Gram matrix near its worst: cond is 1e4."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((m, m)))
    matrix = q * np.logspace(-4, 0, m) @ q.T
    return jnp.asarray((matrix + matrix.T)[None], jnp.float32)


@pytest.mark.parametrize("m", [16, 301])
def test_there_is_no_jitter_where_cholesky_is_sound(solve, m):
    """The least jitter would move the answer by 3 %, 8 eps sqrt(m) cond; rounding does by 0.1 % at most."""
    gram = sound_gram(m)
    c = solve(gram, as_shift(16e-12, 1), newest(m))
    exact = np.linalg.solve(np.asarray(gram[0], np.float64) + 16e-12 * np.eye(m), newest(m)[0])
    assert relative_error(c[0], exact) < 1e-3


def test_a_block_that_needs_the_jitter_leaves_the_others_as_they_are(solve):
    sound = sound_gram(16)
    alone = solve(sound, as_shift(16e-12, 1), newest(16))
    broken = jnp.ones_like(sound)
    stack = jnp.concatenate([broken, sound, broken])
    together = solve(stack, as_shift(16e-12, 3), newest(16, 3))
    np.testing.assert_array_equal(together[1], alone[0])
    np.testing.assert_array_equal(together[0], solve(broken, as_shift(16e-12, 1), newest(16))[0])
    assert jnp.all(jnp.isfinite(together))


def test_on_a_gpu_nothing_waits_for_the_host(as_on_gpu):
    """Which it would do to choose a branch, or to end a loop."""
    steps = str(jax.make_jaxpr(_solve.solve_twice)(sound_gram(300), as_shift(1.0, 1), newest(300)))
    assert "cholesky" in steps
    assert not [name for name in ("cond", "while", "scan") if f"{name}[" in steps]


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
def test_a_program_for_a_gpu_has_no_loop(platform):
    inputs = (sound_gram(300), as_shift(1.0, 1), newest(300))
    program = _solve.solve.trace(*inputs).lower(lowering_platforms=(platform,)).as_text()
    assert "solver_potrf" in program
    assert "stablehlo.while" not in program  # which all other platforms have
