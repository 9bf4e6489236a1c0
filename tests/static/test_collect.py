"""Gradients are collected from batches or from examples, exactly as many as asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import collect_gradients


def loss_fn(params, batch):
    x, y = batch
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


PARAMS = {"w": jnp.arange(3.0), "b": jnp.ones(())}


def batches(number: int, size: int = 4) -> list:
    random = np.random.default_rng(0)
    return [(random.standard_normal((size, 3)), random.standard_normal(size)) for _ in range(number)]


def test_gradients_of_batches_are_collected_exactly_as_many_as_asked_for():
    read = iter(batches(7))
    grads = collect_gradients(loss_fn, PARAMS, read, 5)
    assert len(list(read)) == 2
    for i, batch in enumerate(batches(5)):
        expected = jax.grad(loss_fn)(PARAMS, batch)
        jax.tree.map(lambda g, e, i=i: np.testing.assert_allclose(g[i], e, rtol=1e-5), grads, expected)


def test_gradients_of_examples_are_collected_over_batches():
    empty = (np.zeros((0, 3)), np.zeros(0))
    grads = collect_gradients(loss_fn, PARAMS, [empty, *batches(3)], 10, per_example=True)
    x, y = (np.concatenate(parts) for parts in zip(*batches(3), strict=True))
    for i in range(10):
        expected = jax.grad(loss_fn)(PARAMS, (x[i : i + 1], y[i : i + 1]))
        jax.tree.map(lambda g, e, i=i: np.testing.assert_allclose(g[i], e, rtol=1e-5), grads, expected)
    assert jax.tree.leaves(grads)[0].shape[0] == 10


def test_batches_that_end_too_soon_are_refused():
    with pytest.raises(ValueError, match="num_grads=4 gradients, but ended after 2"):
        collect_gradients(loss_fn, PARAMS, batches(2), 4)
