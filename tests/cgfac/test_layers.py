"""The solutions of layers against explicit Kronecker products in float64; the window."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import scale_by_cgfac, value_and_grad_with_factors
from tests.cgfac.network import LayerFactors, tx_and_state
from tests.dense_reference import relative_error


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def layer(kernel: tuple[int, ...], split: int, rows: tuple[int, ...], bias: bool, seed: int = 0):
    """A random gradient of a layer whose kernel has `split` axes of inputs, and its factors."""
    rng = np.random.default_rng(seed)
    size_in, size_out = np.prod(kernel[:split], dtype=int), np.prod(kernel[split:], dtype=int)
    gradient = {"kernel": rng.standard_normal(kernel)}
    if bias:
        gradient["bias"] = rng.standard_normal(kernel[split:])
    inputs, output_grads = rng.standard_normal((*rows, size_in)), rng.standard_normal((*rows, size_out))
    return gradient, inputs, output_grads


def kronecker_solution(gradient, inputs, output_grads, damping: float):
    """(A (x) B + damping I)^-1 times the gradient, `(in, out)`, with the bias as last row."""
    n, size_in, size_out = len(inputs), inputs.shape[-1], output_grads.shape[-1]
    a, b = inputs.reshape(-1, size_in), output_grads.reshape(-1, size_out)
    V = gradient["kernel"].reshape(size_in, size_out)
    if "bias" in gradient:
        a = np.concatenate([a, np.ones((len(a), 1))], axis=1)
        V = np.concatenate([V, gradient["bias"].reshape(1, -1)])
    fisher = np.kron(a.T @ a / n, b.T @ b / len(b))
    return np.linalg.solve(fisher + damping * np.eye(V.size), V.ravel()).reshape(V.shape)


def as_matrix(tree, size_out: int) -> np.ndarray:
    rows = [np.reshape(tree["kernel"], (-1, size_out))]
    return np.concatenate([*rows, np.reshape(tree["bias"], (1, -1))] if "bias" in tree else rows)


LAYERS: dict[str, Any] = {
    "more examples than entries": ((6, 5), 1, (40,)),
    "fewer examples than inputs": ((30, 5), 1, (12,)),
    "fewer examples than outputs": ((6, 25), 1, (12,)),
    "fewer examples than either": ((20, 25), 1, (6,)),
    "one example": ((5, 4), 1, (1,)),
    "places": ((6, 5), 1, (4, 3, 2)),
    "convolution": ((3, 3, 2, 7), 3, (5, 4, 4)),
    "several axes": ((6, 2, 3), 1, (9, 4)),
}


BIASES = {name: number % 2 == 0 for number, name in enumerate(LAYERS)}


@pytest.mark.parametrize(
    "biases",
    [BIASES, pytest.param({name: not bias for name, bias in BIASES.items()}, marks=pytest.mark.slow)],
    ids=["every other with a bias", "the others with one"],
)
def test_the_error_is_below_the_tolerance_asked_for(x64, biases):
    """In all layers, which are solved in one program."""
    gradients, factors = {}, {}
    for name, sizes in LAYERS.items():
        gradients[name], inputs, output_grads = layer(*sizes, bias=biases[name])
        bias = f"{name}/bias" if biases[name] else None
        factors[f"{name}/kernel"] = LayerFactors(inputs, output_grads, bias)

    @jax.jit
    def solved(damping, tolerance):
        tx, state = tx_and_state(gradients, damping, tolerance=tolerance, max_iterations=3000)
        return tx.update(gradients, state, curvature=factors)

    for tolerance, damping in ((1e-1, 1.0), (1e-3, 1e-3), (1e-8, 1e-3)):
        updates, state = solved(damping, tolerance)
        assert np.all((state.iterations > 0) & (state.iterations < 3000))
        assert not np.any(state.indefinite)
        for name, gradient in gradients.items():
            of_layer = factors[f"{name}/kernel"]
            found = as_matrix(updates[name], of_layer.output_grads.shape[-1])
            expected = kronecker_solution(gradient, of_layer.inputs, of_layer.output_grads, damping)
            assert relative_error(found, expected) < tolerance, name


def test_the_gradient_of_the_batch_needs_no_more_than_its_own_space(x64):
    """A gradient a^T b / N is in both spans, so the damping divides no rounding outside of them."""
    _, inputs, output_grads = layer((40, 30), 1, (8,), False)
    gradient = {"kernel": (inputs.T @ output_grads / 8).astype(np.float32)}
    inputs, output_grads = np.float32(inputs), np.float32(output_grads)
    tx, state = tx_and_state(gradient, 1e-6, tolerance=1e-3, max_iterations=3000)
    updates, state = tx.update(gradient, state, curvature={"kernel": LayerFactors(inputs, output_grads)})
    outside = updates["kernel"] - inputs.T @ np.linalg.lstsq(inputs.T, updates["kernel"])[0]
    assert np.linalg.norm(outside) < 1e-3 * np.linalg.norm(updates["kernel"])


def linear_loss(params, x, y):
    """Of a linear network of any depth, with squared error."""
    for W in params:
        x = x @ W
    return jnp.mean(jnp.sum((x - y) ** 2, axis=1)) / 2


@pytest.mark.slow
def test_a_linear_network_with_squared_error_has_the_natural_gradient_of_gauss_newton(x64):
    """H = I: rows whose squares add up to the derivative of the outputs make the Gauss-Newton matrix."""
    rng = np.random.default_rng(0)
    params = [rng.standard_normal(shape) for shape in ((5, 4), (4, 6), (6, 3))]
    x, y, damping = rng.standard_normal((20, 5)), rng.standard_normal((20, 3)), 0.1
    _, gradient, factors = jax.jit(value_and_grad_with_factors(linear_loss))(params, x, y)
    for number in range(3):
        back = functools.reduce(np.matmul, params[number + 1 :], np.eye(params[number].shape[1]))
        of_outputs = np.sqrt(3.0) * back.T  # B = back back^T from three rows
        factors[str(number)] = LayerFactors(factors[str(number)].inputs, of_outputs)
    tx, state = tx_and_state(params, damping, tolerance=1e-10, max_iterations=3000)
    updates, _ = tx.update(gradient, state, curvature=factors)
    for number, W in enumerate(params):
        front = functools.reduce(np.matmul, params[:number], x)
        back = functools.reduce(np.matmul, params[number + 1 :], np.eye(W.shape[1]))
        J = np.einsum("ni,ko->noik", front, back).reshape(-1, W.size)  # the outputs are front W back
        matrix = J.T @ J / len(x) + damping * np.eye(W.size)
        expected = np.linalg.solve(matrix, np.ravel(gradient[number])).reshape(W.shape)
        assert relative_error(updates[number], expected) < 1e-9


@pytest.mark.slow
def test_blocks_do_not_wait_for_each_other_in_what_they_return():
    """A layer in a hard system's company has the solution and the count that it has alone."""
    layers = layer((6, 5), 1, (40,), False), layer((7, 4), 1, (9,), False, seed=1)
    (easy, *of_easy), (hard, *of_hard) = jax.tree.map(np.float32, layers)
    factors = {"easy": LayerFactors(*of_easy), "hard": LayerFactors(of_hard[0] * 30, of_hard[1])}
    both = {"easy": easy["kernel"], "hard": hard["kernel"]}
    tx, state = tx_and_state(both, 0.1, tolerance=1e-4, max_iterations=500)
    together, state = tx.update(both, state, curvature=factors)
    for number, name in enumerate(both):
        alone, alone_state = tx.update(
            {name: both[name]}, tx.init({name: both[name]}), curvature={name: factors[name]}
        )
        assert int(alone_state.iterations[0]) == int(state.iterations[number])
        assert relative_error(together[name], alone[name]) < 1e-3


def test_the_window_is_one_batch_of_all_that_it_holds(x64):
    """Three batches, two places each, remembered of four: F is that of the last three together."""
    rng = np.random.default_rng(0)
    batches = [(rng.standard_normal((5, 2, 6)), rng.standard_normal((5, 2, 4))) for _ in range(4)]
    gradient = {"kernel": rng.standard_normal((6, 4)), "bias": rng.standard_normal(4)}
    options = {"tolerance": 1e-10, "max_iterations": 3000}
    factors = [{"kernel": LayerFactors(jnp.asarray(a), jnp.asarray(b), "bias")} for a, b in batches]
    tx, state = tx_and_state(
        gradient, 0.1, num_batches=3, factors=jax.eval_shape(lambda: factors[0]), **options
    )
    for number, curvature in enumerate(factors):
        updates, state = tx.update(gradient, state, curvature=curvature)
        kept = [
            batches[max(0, k)] for k in range(number - 2, number + 1)
        ]  # the first stands for those to come
        inputs, output_grads = (np.concatenate(arrays) for arrays in zip(*kept, strict=True))
        expected = kronecker_solution(gradient, inputs, output_grads, 0.1)
        assert relative_error(as_matrix(updates, 4), expected) < 1e-9


def test_no_array_of_a_compiled_step_is_as_large_as_a_kronecker_factor():
    """4,096 inputs, 4,000 outputs, so that the layer itself is no square."""
    tx = scale_by_cgfac(0.1)

    def step(gradient, inputs, output_grads, state):
        return tx.update(gradient, state, curvature={"kernel": LayerFactors(inputs, output_grads, "bias")})

    gradient = jax.eval_shape(lambda: {"kernel": jnp.ones((4096, 4000)), "bias": jnp.ones(4000)})
    rows = jax.eval_shape(lambda: (jnp.ones((128, 4096)), jnp.ones((128, 4000))))
    compiled = jax.jit(step).lower(gradient, *rows, jax.eval_shape(tx.init, gradient)).compile()
    found = re.findall(r"f32\[([\d,]+)\]", str(compiled.as_text()))
    shapes = {tuple(map(int, dims.split(","))) for dims in found}
    large = {shape for shape in shapes if np.prod(shape) > 128 * 4200}
    assert (4096, 4000) in large <= {(4096, 4000), (4097, 4000)}
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * 4 * 4096 * 4000  # the layer with its bias, and its update


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, *(pytest.param(x, marks=pytest.mark.slow) for x in (jnp.float32, jnp.float16))]
)
def test_the_damping_divides_no_rounding_of_layers_in_half_precision(dtype):
    """What is outside of the spans is rounding of the gradient, of 16 bits where the layer is."""
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((256, 200), (16, 256)))

    def loss(w):
        return jnp.mean(
            jnp.sum(jnp.tanh((x.astype(dtype) @ w.astype(dtype)).astype(jnp.float32) / 16) ** 2, 1)
        )

    _, gradient, factors = jax.jit(value_and_grad_with_factors(lambda p: loss(p["w"])))({"w": w})
    tx, state = tx_and_state({"w": w}, 1e-4, max_iterations=100)
    updates, _ = tx.update(gradient, state, curvature=factors)
    inside = x.T @ np.linalg.lstsq(x.T, updates["w"])[0]
    assert np.linalg.norm(updates["w"] - inside) < 0.02 * np.linalg.norm(inside)
