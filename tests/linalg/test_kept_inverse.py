"""The inverse that is kept from step to step, beside Cholesky and float64."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mfac_jax
from mfac_jax._src.linalg import kept_inverse
from mfac_jax._src.linalg.gram import replace_row
from mfac_jax._src.linalg.solve import solve as cholesky_solve
from tests.training_runs import correlated_gradients, relative_error

M, D = 16, 80
solve = jax.jit(kept_inverse.solve)


def gradients(number: int, noise: float = 1.0, seed: int = 0) -> jax.Array:
    """With a direction in common, of squared norms near one."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal(D) + noise * random.standard_normal((number, D))
    return jnp.asarray(rows / np.sqrt((1 + noise**2) * D), jnp.float32)


def replace_and_solve(shift, carry, t_and_gradient):
    """A step of G, K and P with gradient t; its result has c, and whether P was made anew."""
    (G, K, kept), (t, g) = carry, t_and_gradient
    index = t % M
    G = G.at[index].set(g)
    row = jnp.matmul(G, g, precision="highest")
    K = replace_row(K, row[None], index)
    corrected = kept_inverse.replace_row(kept, row[None], index, jnp.array(True))
    newest = (jnp.arange(M) == index).astype(K.dtype)[None]
    c, kept = kept_inverse.solve(corrected, K, jnp.full(1, shift, K.dtype), newest)
    return (G, K, kept), (G, c[0], jnp.any(kept.matrix != corrected.matrix))


@jax.jit
def replace_all(shift, grads):
    empty = kept_inverse.KeptInverse(jnp.zeros((1, M, M)), jnp.zeros(1))
    start = (jnp.zeros((M, D)), jnp.zeros((1, M, M)), empty)
    step = functools.partial(replace_and_solve, shift)
    return jax.lax.scan(step, start, (jnp.arange(len(grads)), grads))[1]


def errors_and_renewals(grads: jax.Array, shift: float, every: int) -> tuple[np.ndarray, int]:
    """Relative errors of G^T c beside float64 at every so many steps, and how often P was made anew."""
    G, c, anew = replace_all(shift, grads)
    errors = []
    for t in range(every - 1, len(grads), every):
        rows = np.asarray(G[t], np.float64)
        expected = rows.T @ np.linalg.solve(rows @ rows.T + shift * np.eye(M), np.eye(M)[t % M])
        found = rows.T @ np.asarray(c[t], np.float64)
        errors.append(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    return np.asarray(errors), int(jnp.sum(anew))


@pytest.mark.parametrize("damping", [1e-3, pytest.param(1e-6, marks=pytest.mark.slow)])
def test_ten_thousand_replacements_keep_the_digits(damping):
    errors, renewals = errors_and_renewals(gradients(10_000), M * damping, every=97)
    assert np.max(errors) < 1e-4
    assert renewals == 1  # the first


def test_nearly_parallel_gradients_are_solved_by_cholesky():
    grads = gradients(10_000, noise=1e-3)
    errors, renewals = errors_and_renewals(grads, 1e-7, every=97)
    assert renewals > 1000
    assert np.all(np.isfinite(errors))
    G = grads[-M:]
    K = jnp.matmul(G, G.T, precision="highest")[None]
    kept = kept_inverse.KeptInverse(jnp.eye(M)[None], jnp.full(1, 1e-7))
    newest = jnp.eye(M)[:1]
    found, anew = solve(kept, K, jnp.full(1, 1e-7), newest)
    np.testing.assert_array_equal(found, cholesky_solve(K, jnp.full((1, 1), 1e-7), newest))
    assert jnp.all(anew.matrix != kept.matrix)


def test_sums_of_one_sign_are_no_reason_for_a_new_inverse():
    """With cosines of a half the residual is rounded more, as in training with 1,024 gradients."""
    m, random = 1024, np.random.default_rng(0)
    noise = 1e-3 * random.standard_normal((m, m))
    K = jnp.asarray(0.5 + 0.5 * np.eye(m) + (noise + noise.T) / 2, jnp.float32)[None]
    shift, unknown = jnp.full(1, 1.0), kept_inverse.KeptInverse(0 * K, jnp.zeros(1))
    _, kept = solve(unknown, K, shift, jnp.eye(m)[:1])
    for index in range(4):
        row = np.where(np.arange(m) == index, 1, 0.5 + 1e-3 * random.standard_normal(m))
        row = jnp.asarray(row, jnp.float32)[None]
        K = replace_row(K, row, jnp.int32(index))
        corrected = kept_inverse.replace_row(kept, row, jnp.int32(index), jnp.array(True))
        found, kept = solve(corrected, K, shift, jnp.eye(m)[index][None])
        assert jnp.all(kept.matrix == corrected.matrix)
        assert relative_error(K[0] @ found[0] + found[0], jnp.eye(m)[index]) < 1e-4


@pytest.fixture(params=["here", "on a GPU"])
def place(request):
    """Run what runs on that platform."""
    if request.param == "on a GPU":
        request.getfixturevalue("as_on_gpu")


def test_a_shift_that_moves_is_met_by_refinement_and_then_by_a_new_inverse(place):
    G = gradients(M)
    K, newest = jnp.matmul(G, G.T, precision="highest")[None], jnp.eye(M)[:1]
    _, kept = solve(kept_inverse.KeptInverse(0 * K, jnp.zeros(1)), K, jnp.full(1, 0.1), newest)
    for shift, is_anew in ((0.11, False), (0.13, False), (0.9, True)):
        found, after = solve(kept, K, jnp.full(1, shift), newest)
        expected = np.linalg.solve(np.asarray(K[0], np.float64) + shift * np.eye(M), np.eye(M)[0])
        np.testing.assert_allclose(found[0], expected, rtol=2e-5, atol=2e-6)
        assert bool(jnp.any(after.matrix != kept.matrix)) == is_anew


OPTIONS: dict[str, Any] = {
    "absolute": {"damping": 1.0},
    "blocks": {"damping": optax.exponential_decay(30.0, 10, 0.3), "blocks": "leaf"},
    "mfac": {
        "damping": 0.2,
        "relative_damping": True,
        "window_momentum": 0.9,
        "nesterov": True,
        "step_adaptation": 0.3,
        "metric": "diagonal",
    },
}


@pytest.mark.parametrize(
    "kind", ["absolute", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("blocks", "mfac"))]
)
def test_updates_are_those_of_cholesky(place, kind):
    options = OPTIONS[kind]
    shapes = {"w": (9, 5), "b": (5,)}
    stream = correlated_gradients(shapes, 40, refused="w")
    stream[20] = stream[19]  # a repeat
    stream[30] = jax.tree.map(np.zeros_like, stream[30])
    params = jax.tree.map(lambda shape: jnp.zeros(shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    transforms = [mfac_jax.scale_by_mfac(8, **options, solver=s) for s in ("cholesky", "inverse")]
    states: list[Any] = [tx.init(params) for tx in transforms]
    updates = [jax.jit(tx.update) for tx in transforms]
    for t, grads in enumerate(stream):
        (expected, states[0]), (found, states[1]) = (
            update(grads, state) for update, state in zip(updates, states, strict=True)
        )
        if t not in (4, 30):
            assert relative_error(found, expected) < 2e-5
    assert states[1].grads_rejected == 1
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), states[1]))
    assert not jax.tree.leaves(states[0].solver)


MANY = 1024


def first_of(tx) -> Any:
    return tx.init(jnp.zeros(D))


def steps_by(tx, state: Any, stream: np.ndarray) -> tuple[Any, Any]:
    """All updates, and the last state."""
    update, updates = jax.jit(tx.update), []
    for g in stream:
        found, state = update(jnp.asarray(g), state)
        updates.append(found)
    return updates, state


def default_and_cholesky():
    return mfac_jax.scale_by_mfac(MANY, 0.1), mfac_jax.scale_by_mfac(MANY, 0.1, solver="cholesky")


def test_windows_of_many_rows_keep_the_inverse_by_default():
    tx, by_cholesky = default_and_cholesky()
    fewer = first_of(mfac_jax.scale_by_mfac(MANY - 1, 0.1))
    assert not jax.tree.leaves(fewer.solver)
    stream = np.asarray(gradients(3))
    found, state = steps_by(tx, first_of(tx), stream)
    expected, _ = steps_by(by_cholesky, first_of(by_cholesky), stream)
    assert relative_error(found, expected) < 2e-6
    assert state.solver.shift[0] > 0
    assert state.made_with == first_of(mfac_jax.scale_by_mfac(MANY, solver="inverse")).made_with


@pytest.mark.slow
def test_an_accelerator_leaves_the_default_inverse_as_it_is(as_on_gpu):
    tx, by_cholesky = default_and_cholesky()
    start = first_of(tx)
    start = start._replace(solver=jax.tree.map(lambda x: x + 7, start.solver))
    stream = np.asarray(gradients(2))
    found, state = steps_by(tx, start, stream)
    expected, _ = steps_by(by_cholesky, first_of(by_cholesky), stream)
    np.testing.assert_array_equal(found, expected)
    assert jax.tree.all(jax.tree.map(lambda x: bool(jnp.all(x == 7)), state.solver))


@pytest.mark.slow
def test_a_state_that_comes_back_from_an_accelerator_is_solved_anew():
    tx, by_cholesky = default_and_cholesky()
    stream = np.asarray(gradients(12))
    _, here = steps_by(tx, first_of(tx), stream[:4])
    _, there = steps_by(
        by_cholesky, here._replace(solver=(), made_with=first_of(by_cholesky).made_with), stream[4:9]
    )
    back = there._replace(solver=here.solver, made_with=here.made_with)
    found, after = steps_by(tx, back, stream[9:])
    expected, _ = steps_by(by_cholesky, there, stream[9:])
    assert relative_error(found, expected) < 2e-6
    assert jnp.any(after.solver.matrix != here.solver.matrix)


def test_another_solver_is_refused():
    with pytest.raises(ValueError, match=r"solver must be one of 'auto', 'cholesky', 'inverse' or .*, got"):
        mfac_jax.mfac(solver="lu")  # pyright: ignore[reportArgumentType]
    state = mfac_jax.scale_by_mfac(4).init(jnp.zeros(3))
    with pytest.raises(ValueError, match=r"with solver=inverse, got solver=cholesky.*init again"):
        mfac_jax.scale_by_mfac(4, solver="inverse").update(jnp.ones(3), state)
