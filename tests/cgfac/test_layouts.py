"""Stacked layers, kernels with other axes first, biases of either side, uses that did not take place."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import KernelLayout
from tests.cgfac.network import LayerFactors, tx_and_state
from tests.dense_reference import relative_error

DAMPING = 0.05
EXACT: dict[str, Any] = {"tolerance": 1e-9, "max_iterations": 3000}


class Layer(NamedTuple):
    """A kernel's shape, the layout, the sizes of the rows, and the bias: its shape and side."""

    kernel: tuple[int, ...]
    layout: KernelLayout | None
    inputs: tuple[int, ...]
    output_grads: tuple[int, ...]
    bias: tuple[int, ...] | None = None
    side: str = "outputs"


LAYERS = {
    "under a scan": Layer(
        (3, 6, 5), KernelLayout((3, 6, 5), (0,), (1,), (2,)), (3, 20, 6), (3, 20, 5), (3, 5)
    ),
    "experts, fewer rows than inputs": Layer(
        (30, 3, 4), KernelLayout((30, 3, 4), (1,), (0,), (2,)), (3, 5, 2, 30), (3, 5, 2, 4)
    ),
    "under two scans": Layer(
        (2, 4, 3, 5), KernelLayout((2, 4, 3, 5), (2, 0), (1,), (3,)), (6, 9, 4), (6, 9, 5)
    ),
    "heads first": Layer(
        (4, 6, 3), KernelLayout((4, 6, 3), (), (1,), (0, 2)), (9, 2, 6), (9, 2, 12), (4, 3)
    ),
    "outputs first": Layer((5, 7), KernelLayout((5, 7), (), (1,), (0,)), (9, 7), (9, 5), (5,)),
    "groups of a convolution": Layer(
        (3, 2, 8), KernelLayout((3, 2, 4, 2), (2,), (0, 1), (3,)), (4, 6, 5, 6), (4, 6, 5, 2), (8,)
    ),
    "transposed": Layer((5, 7), None, (20, 5), (20, 7), (5,), "inputs"),
    "transposed, fewer rows than columns": Layer((15, 17), None, (6, 15), (6, 17), (15,), "inputs"),
    "transposed under a scan": Layer(
        (2, 5, 4), KernelLayout((2, 5, 4), (0,), (1,), (2,)), (2, 30, 5), (2, 30, 4), (2, 5), "inputs"
    ),
}


def drawn(layer: Layer, seed: int) -> tuple[dict[str, np.ndarray], Any]:
    rng = np.random.default_rng(seed)
    gradient = {"kernel": rng.standard_normal(layer.kernel)}
    if layer.bias:
        gradient["bias"] = rng.standard_normal(layer.bias)
    a, b = rng.standard_normal(layer.inputs), rng.standard_normal(layer.output_grads)
    factors = LayerFactors(a, b, "bias" if layer.bias else None, layer.layout, layer.side)
    return gradient, factors


def dense_solution(gradient, factors, damping: float = DAMPING) -> dict[str, np.ndarray]:
    """Of (A (x) B + damping I)^-1 for each matrix of the stack, put together by the entries' numbers."""
    entries = {name: np.arange(g.size).reshape(g.shape) for name, g in gradient.items()}
    a, b, layout = factors.inputs, factors.output_grads, factors.layout
    of_kernel = entries["kernel"]
    if layout is not None:
        of_kernel = of_kernel.reshape(layout.shape).transpose(
            *layout.stack, *layout.inputs, *layout.outputs
        )
    is_stacked = layout is not None and len(layout.stack) > 0
    n = a.shape[int(is_stacked)]
    a, b = (x.reshape(len(x) if is_stacked else 1, -1, x.shape[-1]) for x in (a, b))
    of_kernel = of_kernel.reshape(len(a), a.shape[-1], b.shape[-1])
    found = {name: np.empty(g.size) for name, g in gradient.items()}
    for number, (rows, others, of_one) in enumerate(zip(a, b, of_kernel, strict=True)):
        V, ones = gradient["kernel"].ravel()[of_one], np.ones((len(rows), 1))
        of_bias = entries.get("bias", np.arange(0)).reshape(len(a), -1)[number]
        if "bias" in gradient:
            row = gradient["bias"].ravel()[of_bias]
            if factors.bias_side == "outputs":
                V, rows = np.concatenate([V, row[None]]), np.concatenate([rows, ones], 1)
            else:
                V, others = np.concatenate([V, row[:, None]], 1), np.concatenate([others, ones], 1)
        fisher = np.kron(rows.T @ rows / n, others.T @ others / len(others))
        x = np.linalg.solve(fisher + damping * np.eye(V.size), V.ravel()).reshape(V.shape)
        found["kernel"][of_one] = x[: of_one.shape[0], : of_one.shape[1]]
        if "bias" in gradient:
            found["bias"][of_bias] = x[-1] if factors.bias_side == "outputs" else x[:, -1]
    return {name: x.reshape(gradient[name].shape) for name, x in found.items()}


def under(name: str, factors: Any) -> Any:
    """With the bias's path under that of the layer."""
    return dataclasses.replace(factors, bias=factors.bias and f"{name}/{factors.bias}")


FAST = ("under a scan", "experts, fewer rows than inputs", "transposed", "groups of a convolution")


@functools.cache
def solved(names: tuple[str, ...]) -> Any:
    """Gradients and factors by the layers' names, and the updates; all layers in one program."""
    with jax.enable_x64(True):
        drawings = {name: drawn(LAYERS[name], seed) for seed, name in enumerate(names)}
        gradients = {name: gradient for name, (gradient, _) in drawings.items()}
        factors = {f"{name}/kernel": under(name, of) for name, (_, of) in drawings.items()}
        tx, state = tx_and_state(gradients, DAMPING, **EXACT)
        updates, _ = jax.jit(tx.update)(gradients, state, curvature=factors)
        return drawings, jax.device_get(updates)


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in LAYERS]
)
def test_a_layer_is_solved_as_its_dense_matrices_are(name):
    names = FAST if name in FAST else tuple(other for other in LAYERS if other not in FAST)
    drawings, updates = solved(names)
    expected = dense_solution(*drawings[name])
    for leaf, x in expected.items():
        assert relative_error(updates[name][leaf], x) < 1e-8


def test_a_stack_reports_its_slowest_layer(x64):
    gradient, factors = drawn(LAYERS["under a scan"], 0)
    factors = dataclasses.replace(factors, inputs=factors.inputs * np.array([1, 10, 0.1])[:, None, None])
    tx, state = tx_and_state(gradient, DAMPING, tolerance=1e-3, max_iterations=500)
    update = jax.jit(tx.update)
    together, state = update(gradient, state, curvature={"kernel": factors})
    counts = []
    for number in range(3):
        one = jax.tree.map(lambda g, i=number: g[i], gradient)
        rows = LayerFactors(factors.inputs[number], factors.output_grads[number], "bias")
        alone, state_alone = update(one, tx.init(one), curvature={"kernel": rows})
        counts.append(int(state_alone.iterations[0]))
        assert relative_error(together["kernel"][number], alone["kernel"]) < 1e-9
    assert len(set(counts)) == 3
    np.testing.assert_array_equal(state.iterations, max(counts))


@pytest.mark.parametrize(
    "name", ["under a scan", "transposed", pytest.param("heads first", marks=pytest.mark.slow)]
)
def test_a_use_that_did_not_take_place_changes_nothing(x64, name):
    """Its rows are zeros on both sides, among the places or in examples of their own kernel."""
    gradient, factors = drawn(LAYERS[name], 3)
    axis = 1 + factors.is_stacked

    def padded(x):
        x = np.expand_dims(x, axis) if x.ndim == axis + 1 else x
        return np.concatenate([np.zeros_like(x), x], axis)

    with_zeros = jax.tree.map(padded, factors)
    tx, state = tx_and_state(gradient, DAMPING, **EXACT)
    updates, _ = jax.jit(tx.update)(gradient, state, curvature={"kernel": with_zeros})
    for leaf, x in dense_solution(gradient, factors).items():
        assert relative_error(updates[leaf], x) < 1e-8


def test_a_window_of_stacked_layers_is_one_batch_of_all(x64):
    layer = LAYERS["under a scan"]
    batches = [drawn(layer, seed)[1] for seed in range(3)]
    gradient, _ = drawn(layer, 0)
    tx, state = tx_and_state(gradient, DAMPING, num_batches=2, factors={"kernel": batches[0]}, **EXACT)
    update = jax.jit(tx.update)
    for number, factors in enumerate(batches):
        updates, state = update(gradient, state, curvature={"kernel": factors})
        kept = [batches[max(0, number - 1)], factors]
        together = jax.tree.map(lambda *x: np.concatenate(x, axis=1), *kept)
        for leaf, x in dense_solution(gradient, together).items():
            assert relative_error(updates[leaf], x) < 1e-8


@pytest.mark.slow
def test_stacked_layers_train_under_vmap_as_alone():
    gradient, factors = jax.tree.map(jnp.float32, drawn(LAYERS["groups of a convolution"], 1))
    tx, state = tx_and_state(gradient, DAMPING)
    both = jax.tree.map(lambda *x: jnp.stack(x), gradient, jax.tree.map(lambda g: 2 * g, gradient))
    updates, _ = jax.vmap(lambda g: tx.update(g, state, curvature={"kernel": factors}))(both)
    one, _ = tx.update(gradient, state, curvature={"kernel": factors})
    chex.assert_trees_all_close(jax.tree.map(lambda u: u[0], updates), one, rtol=1e-4, atol=1e-4)
    chex.assert_trees_all_close(jax.tree.map(lambda u: u[1] / 2, updates), one, rtol=1e-4, atol=1e-4)


GOOD = drawn(LAYERS["under a scan"], 0)[1]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another size": ({"layout": KernelLayout((3, 6, 4), (0,), (1,), (2,))}, "a shape of the kernel's size"),
    "an axis twice": ({"layout": KernelLayout((3, 6, 5), (0,), (1,), (1,))}, "each axis of it once"),
    "another stack": ({"layout": KernelLayout((3, 6, 5), (1,), (0,), (2,))}, "must fit the kernels"),
    "no stack": ({"layout": KernelLayout((3, 6, 5), (), (0, 1), (2,))}, "must fit the kernels"),
    "one example of each": ({"inputs": GOOD.inputs[:, 0]}, "a second axis of one or more examples"),
    "the other side": ({"bias_side": "inputs"}, r"have 6 inputs, and 'bias' is \(3, 5\)"),
    "no side": ({"bias_side": "left"}, "must be 'inputs' or 'outputs', got 'left'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_fits_no_kernel_is_refused(name):
    changes, message = WRONG[name]
    gradient, factors = jax.tree.map(jnp.float32, drawn(LAYERS["under a scan"], 0))
    changes = jax.tree.map(jnp.float32, changes) if "inputs" in changes else changes
    tx, state = tx_and_state(gradient)
    with pytest.raises(ValueError, match=message):
        tx.update(gradient, state, curvature={"kernel": dataclasses.replace(factors, **changes)})
