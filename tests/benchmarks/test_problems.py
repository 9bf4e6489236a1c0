"""The problems of the comparison: their sizes, and what is special of those with little noise."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.problems import PROBLEMS
from benchmarks.workloads import least_squares, poisson
from examples.common.training import bind_step, first_state

STEPS = {
    "digits-mlp-44": 44,
    "digits-cnn-44": 44,
    "digits-mlp-1320": 1320,
    "digits-cnn-1320": 1320,
    "text-3000": 3000,
    "autoencoder": 1000,
    "poisson": 2000,
    "least-squares": 1000,
}
LOW_NOISE = ("autoencoder", "poisson", "least-squares")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in STEPS if name not in LOW_NOISE]


@pytest.mark.parametrize("name", [*LOW_NOISE, *SLOW])
def test_a_run_has_the_steps_of_its_name(name):
    assert len(PROBLEMS[name].make(seed=0).batches) == STEPS[name]


@pytest.mark.slow
def test_cifar10_has_ten_and_thirty_epochs_of_its_images():
    for epochs in (10, 30):
        workload = PROBLEMS[f"cifar10-{epochs}"].make(seed=0)  # digits take the place of the images
        assert len(workload.batches) == epochs * (len(workload.data["images"]) // 64)


@pytest.mark.parametrize("name", LOW_NOISE)
def test_a_few_steps_reduce_the_loss_and_the_seeds_share_their_functions(name):
    with jax.enable_x64(PROBLEMS[name].float64):
        workload, other = (PROBLEMS[name].make(seed=seed) for seed in (0, 1))
        assert (workload.loss, workload.evaluate) == (other.loss, other.evaluate)
        assert differ(workload.data, other.data)
        evaluate = jax.jit(workload.evaluate)
        before = evaluate(workload.params, {}, workload.data)
        assert set(before) == {"train_loss", "valid_loss"}
        dtype = np.dtype(np.float64 if PROBLEMS[name].float64 else np.float32)
        assert {x.dtype for x in jax.tree.leaves((workload.params, before))} == {dtype}
        tx = optax.adam(3e-3)
        state, step = first_state(workload, tx), bind_step(workload, tx, 0)
        for batch in workload.batches[:20]:
            state, _ = step(state, batch)
        after = evaluate(state.params, {}, workload.data)
    assert float(after["train_loss"]) < 0.9 * float(before["train_loss"])


def differ(first: Any, second: Any) -> bool:
    return any(
        not np.array_equal(*pair) for pair in zip(*map(jax.tree.leaves, (first, second)), strict=True)
    )


def test_the_exact_solution_solves_poissons_equation_and_is_zero_on_the_boundary():
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        inner, boundary = jnp.asarray(random.random((50, 2))), poisson.draw_boundary(random)
        residual = poisson.source_term(inner) + poisson.laplacian(poisson.solution, inner)
        np.testing.assert_allclose(residual, 0, atol=1e-12)
        np.testing.assert_allclose(poisson.solution(boundary), 0, atol=1e-15)
    assert np.isin(boundary, (0, 1)).any(axis=1).all()


def test_least_squares_has_its_condition_number_and_its_solution_has_no_loss():
    with jax.enable_x64(True):
        workload = PROBLEMS["least-squares"].make(seed=2)
        rows = workload.batches[0]

        def loss(w: jax.Array) -> jax.Array:
            return workload.loss({"w": w}, {}, workload.data, rows, None)[0]

        unknowns = math.prod(least_squares.SHAPE)
        hessian = jax.jit(jax.hessian(loss))(workload.params["w"]).reshape(unknowns, unknowns)
        assert loss(workload.params["w"]) == 1
        assert loss(workload.data["solution"]) < 1e-25
    assert np.linalg.cond(hessian) == pytest.approx(least_squares.CONDITION, rel=1e-6)
