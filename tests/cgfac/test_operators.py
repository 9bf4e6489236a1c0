"""Functions as curvature: what they multiply by, and that their systems are solved."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from mfac_jax import empirical_fisher, gauss_newton, ihvp, scale_by_mfac
from tests.cgfac.network import (
    INF,
    LABELS,
    NAN,
    PARAMS,
    X,
    apply,
    cross_entropy,
    flat,
    gradient_and_factors,
    loss,
    tx_and_state,
)
from tests.dense_reference import relative_error


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def dense(product, params) -> np.ndarray:
    """The matrix of a linear function of trees."""
    vector, unravel = ravel_pytree(params)
    product = jax.jit(product)
    return np.stack([flat(product(unravel(e))) for e in jnp.eye(len(vector), dtype=vector.dtype)], axis=1)


@pytest.mark.parametrize("kind", [pytest.param("cross-entropy", marks=pytest.mark.slow), "squared error"])
def test_gauss_newton_is_that_of_the_jacobian_and_the_hessian(x64, kind):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    x = X.astype(jnp.float64)
    of_outputs = cross_entropy if kind == "cross-entropy" else lambda z: jnp.mean(optax.l2_loss(z).sum(1))
    found = dense(gauss_newton(lambda p: apply(p, x), of_outputs, params), params)
    J = np.concatenate(
        [
            np.reshape(j, (36, -1))
            for j in jax.tree.leaves(jax.jit(jax.jacobian(lambda p: apply(p, x)))(params))
        ],
        1,
    )
    H = np.reshape(jax.jit(jax.hessian(of_outputs))(apply(params, x)), (36, 36))
    np.testing.assert_allclose(found, J.T @ H @ J, atol=1e-12)


def test_the_empirical_fisher_matrix_is_that_of_the_gradients():
    def of_example(params, i):
        return cross_entropy(apply(params, X[i][None]), LABELS[i][None])

    grads = jax.jit(jax.vmap(jax.grad(of_example), (None, 0)))(PARAMS, jnp.arange(12))
    G = np.concatenate([np.reshape(g, (12, -1)) for g in jax.tree.leaves(grads)], axis=1)
    np.testing.assert_allclose(dense(empirical_fisher(grads), PARAMS), G.T @ G / 12, atol=1e-6)


def test_a_function_is_solved_as_one_system():
    gradient, _ = gradient_and_factors()
    matrix = gauss_newton(apply, cross_entropy, PARAMS)
    tx, state = tx_and_state(PARAMS, 0.1, tolerance=1e-3, max_iterations=200)
    updates, state = jax.jit(functools.partial(tx.update, curvature=matrix))(gradient, state)
    expected = np.linalg.solve(dense(matrix, PARAMS) + 0.1 * np.eye(flat(PARAMS).size), flat(gradient))
    assert relative_error(flat(updates), expected) < 1e-3
    assert len(set(np.asarray(state.iterations))) == 1


def test_an_exact_preconditioner_takes_one_iteration():
    A = np.random.default_rng(0).standard_normal((20, 20))
    A = A @ A.T / 20
    damped_inverse = np.linalg.inv(A + 0.1 * np.eye(20))
    gradient = np.random.default_rng(1).standard_normal(20)
    functions = {"curvature": lambda v: A @ v, "preconditioner": lambda v: damped_inverse @ v}
    A, damped_inverse, gradient = (x.astype(np.float32) for x in (A, damped_inverse, gradient))
    tx, state = tx_and_state(jnp.zeros(20), 0.1, tolerance=1e-3)
    updates, state = tx.update(jnp.asarray(gradient), state, **functions)
    assert relative_error(updates, damped_inverse @ gradient) < 1e-5
    assert int(state.iterations[0]) == 1


@pytest.mark.slow
def test_a_preconditioner_changes_the_way_and_not_the_solution():
    gradient = jax.grad(loss)(PARAMS)
    matrix = gauss_newton(apply, cross_entropy, PARAMS)
    window = scale_by_mfac(8, 0.1)
    mfac_state: Any = window.init(PARAMS)
    update, gradient_at = jax.jit(window.update), jax.jit(jax.grad(lambda p, x: cross_entropy(apply(p, x))))
    for seed in range(8):
        noise = jax.random.normal(jax.random.key(seed), X.shape)
        _, mfac_state = update(gradient_at(PARAMS, X + noise), mfac_state)
    tx, state = tx_and_state(PARAMS, 0.1, tolerance=1e-4, max_iterations=200)
    preconditioner = functools.partial(ihvp, mfac_state, damping=0.1)
    plain, plain_state = jax.jit(functools.partial(tx.update, curvature=matrix))(gradient, state)
    preconditioned = functools.partial(tx.update, curvature=matrix, preconditioner=preconditioner)
    updates, state = jax.jit(preconditioned)(gradient, state)
    assert relative_error(flat(updates), flat(plain)) < 1e-3
    assert float(state.residuals[0]) != float(plain_state.residuals[0])


@pytest.mark.parametrize("eigenvalue", [-5.0, -0.1, NAN, INF, -INF, 1e38])
def test_an_operator_that_is_not_positive_definite_is_reported_and_the_update_finite(eigenvalue):
    values = jnp.array([2.0, eigenvalue, 1.0])
    tx, state = tx_and_state(jnp.ones(3), 0.1)
    for gradient in (jnp.array([0.3, 1.0, -2.0]), jnp.array([1.0, 0.1, 0.1]), jnp.zeros(3)):
        updates, state = tx.update(gradient, state, curvature=lambda v: values * v)
        assert np.all(np.isfinite(updates))
        assert float(updates @ gradient) >= 0
        if np.any(gradient) and eigenvalue != 1e38 and eigenvalue != -0.1:
            assert bool(state.indefinite[0])
