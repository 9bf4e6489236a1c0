"""Gradients are collected from batches or from examples, exactly as many as asked for."""

from typing import Any

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
    with pytest.raises(ValueError, match=r"num_grads=4 gradients, but ended after 2.*or num_grads=2"):
        collect_gradients(loss_fn, PARAMS, batches(2), 4)
    read = iter(batches(2))
    list(read)
    with pytest.raises(ValueError, match=r"ended after 0\. Pass batches.*iterator that was read before"):
        collect_gradients(loss_fn, PARAMS, read, 1)


def no_loss(value):
    return lambda params, batch: value(params)


@pytest.mark.parametrize(
    ("loss", "read", "options", "error", "message"),
    {
        "3 inputs, 5 labels": (
            loss_fn,
            [(np.ones((3, 3)), np.ones(5))],
            {"per_example": True},
            ValueError,
            r"same length on all leaves.*batch 0 has leaf \[0\]: \(3, 3\), leaf \[1\]: \(5,\)",
        ),
        "a scalar": (
            loss_fn,
            [*batches(1, 2), (np.ones((3, 3)), 1.0)],
            {"per_example": True},
            ValueError,
            r"batch 1 has leaf \[0\]: \(3, 3\), leaf \[1\]: \(\)",
        ),
        "no leaf": (loss_fn, [{}], {"per_example": True}, ValueError, "batch 0 has no leaf"),
        "no example": (loss_fn, batches(1, 0), {}, ValueError, "must have an example each.*batch 0"),
        "text": (loss_fn, [{"id": "a"}], {}, TypeError, r"leaf \['id'\] of batch 0 is str"),
        "array of text": (loss_fn, [np.array(["a"])], {}, TypeError, "batch 0 is ndarray"),
        "one batch": (loss_fn, {"x": np.ones(3)}, {}, TypeError, "iterable of batches, got dict"),
        "a number": (loss_fn, 5, {}, TypeError, "iterable of batches, got int"),
        "no function": (3.0, batches(1), {}, TypeError, "loss_fn must be a function.*got 3.0"),
        "aux": (no_loss(lambda p: (p["b"], 1)), batches(1), {}, TypeError, "scalar, got .*float32.*, 1"),
        "a vector": (no_loss(lambda p: p["w"]), batches(1), {}, TypeError, r"scalar, got float32\[3\]"),
        "an int": (no_loss(lambda p: 1), batches(1), {}, TypeError, "scalar, got 1"),
        "None": (no_loss(lambda p: None), batches(1), {}, TypeError, "scalar, got None"),
        "flag": (loss_fn, batches(1), {"per_example": 1}, TypeError, "per_example must be True or False"),
    }.values(),
)
def test_what_gives_no_gradients_is_refused(loss, read, options, error, message):
    with pytest.raises(error, match=message):
        collect_gradients(loss, PARAMS, read, 4, **options)


def test_batches_may_hold_scalars_keys_and_nothing():
    keys = [(jax.random.split(jax.random.key(0), 2), None)]
    noisy = lambda params, batch: params["b"] * jax.random.normal(batch[0][0])  # noqa: E731
    grads: Any = collect_gradients(noisy, PARAMS, keys, 2, per_example=True)
    np.testing.assert_allclose(grads["b"], [jax.random.normal(key) for key in keys[0][0]], rtol=1e-6)
    scaled = lambda params, batch: params["b"] * batch["scale"]  # noqa: E731
    grads = collect_gradients(scaled, PARAMS, [{"scale": 2.0}, {"scale": 3.0}], 2)
    np.testing.assert_array_equal(grads["b"], [2, 3])


def test_numpy_parameters_in_float64_are_taken_without_a_warning():
    params = {"w": np.arange(3.0), "b": np.ones(())}
    grads = collect_gradients(loss_fn, params, batches(1), 1)
    jax.tree.map(np.testing.assert_array_equal, grads, collect_gradients(loss_fn, PARAMS, batches(1), 1))
