"""Derivatives of a step: forward mode equals finite differences, reverse mode is refused in plain words."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax import KernelLayout, empirical_fisher, gauss_newton, scale_by_cgfac
from tests.cgfac.network import LayerFactors, flat
from tests.dense_reference import relative_error

Step = Callable[[Any], Any]  # from a number to the updates


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def of_layer(
    inputs: np.ndarray, output_grads: np.ndarray, gradient: np.ndarray | None = None, **options
) -> Step:
    """A step whose rows move with the number, and the gradient with them or by itself."""
    moves = drawn(7, *inputs.shape), drawn(8, *output_grads.shape)
    factors = {name: options.pop(name) for name in ("layout", "bias", "bias_side") if name in options}
    tx = scale_by_cgfac(0.3, **options)

    def step(t):
        a, b = inputs + t * moves[0] * (inputs != 0), output_grads + t * moves[1] * (output_grads != 0)
        own = jnp.einsum("...i,...o->io", a, b) / len(a)
        tree = {"kernel": own if gradient is None else gradient * (1 + jnp.sin(t)), "other": jnp.sin(t + 1)}
        if "bias" in factors:
            tree["bias"] = (a if factors.get("bias_side") == "inputs" else b).mean(0)
        return tx.update(tree, tx.init(tree), curvature={"kernel": LayerFactors(a, b, **factors)})[0]

    return step


def of_function(kind: str) -> Step:
    tx = scale_by_cgfac(0.3, norm_constraint=0.01)
    rows, x = drawn(0, 5, 4), drawn(1, 9, 4)

    def step(t):
        g = jnp.sin(t * jnp.arange(1.0, 5.0))
        if kind == "empirical":
            matrix = empirical_fisher(rows * jnp.cos(t))
        else:
            matrix = gauss_newton(lambda w: jnp.tanh(x @ w), lambda z: jnp.mean((z - t) ** 2), g)
        return tx.update(g, tx.init(g), curvature=matrix, preconditioner=lambda v: v / (1 + t))[0]

    return step


def dependent(rows: int, columns: int) -> np.ndarray:
    """Fewer rows than columns, of which only three do not depend on the others."""
    return drawn(2, rows, 3) @ drawn(3, 3, columns)


def with_zeros() -> np.ndarray:
    rows = drawn(4, 5, 9)
    rows[:2] = 0
    return rows


STACK = KernelLayout((2, 4, 3), (0,), (1,), (2,))
STEPS: dict[str, Callable[[], Step]] = {
    "more rows than columns": lambda: of_layer(drawn(0, 9, 4), drawn(1, 9, 3)),
    "fewer": lambda: of_layer(drawn(0, 4, 9), drawn(1, 4, 8)),
    "fewer, of another batch": lambda: of_layer(drawn(0, 4, 9), drawn(1, 4, 8), drawn(2, 9, 8)),
    "rows of zeros": lambda: of_layer(with_zeros(), drawn(1, 5, 8)),
    "a bias": lambda: of_layer(drawn(0, 9, 4), drawn(1, 9, 3), bias="bias"),
    "a bias of the inputs": lambda: of_layer(
        drawn(0, 9, 4), drawn(1, 9, 3), bias="bias", bias_side="inputs"
    ),
    "a stack": lambda: of_layer(drawn(0, 2, 9, 4), drawn(1, 2, 9, 3), drawn(2, 2, 4, 3), layout=STACK),
    "a norm constraint": lambda: of_layer(drawn(0, 9, 4), drawn(1, 9, 3), norm_constraint=0.01),
    "solved exactly": lambda: of_layer(drawn(0, 9, 1), drawn(1, 9, 3), tolerance=1e-8),
    "empirical Fisher": lambda: of_function("empirical"),
    "Gauss-Newton": lambda: of_function("Gauss-Newton"),
}
FAST = ("fewer", "a norm constraint", "Gauss-Newton")
DEFAULT = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in STEPS]


@pytest.mark.parametrize("name", DEFAULT)
def test_forward_mode_equals_finite_differences(x64, name):
    step = STEPS[name]()
    t, h = 0.7, 1e-5
    there, tangent, before, after = jax.jit(
        lambda t: (*jax.jvp(step, (t,), (1.0,)), step(t - h), step(t + h))
    )(t)
    assert np.all(np.isfinite(flat(there)))
    assert relative_error(flat(tangent), (flat(after) - flat(before)) / (2 * h)) < 1e-5


@pytest.mark.slow
def test_rows_that_depend_on_each_other_have_a_derivative(x64):
    """A rounding of 1e-16 tells them apart; the derivative of a QR decomposition is some 1e16 there."""
    a, b, da = dependent(6, 9), drawn(1, 6, 3), dependent(6, 6)
    tx: Any = scale_by_cgfac(0.3, tolerance=1e-10, max_iterations=100)

    def step(t):
        rows = (np.eye(6) + t * da) @ a  # they stay dependent
        g = {"kernel": rows.T @ b / 6}
        return tx.update(g, tx.init(g), curvature={"kernel": LayerFactors(rows, b)})[0]["kernel"]

    def dense(t):
        rows = (np.eye(6) + t * da) @ a
        matrix = np.kron(rows.T @ rows / 6, b.T @ b / 6) + 0.3 * np.eye(27)
        return np.linalg.solve(matrix, (rows.T @ b / 6).ravel()).reshape(9, 3)

    _, tangent = jax.jit(lambda t: jax.jvp(step, (t,), (1.0,)))(0.0)
    assert relative_error(tangent, (dense(1e-5) - dense(-1e-5)) / 2e-5) < 1e-6


@pytest.mark.slow
def test_a_row_that_appears_has_a_derivative(x64):
    """The direction of a row of zeros is in no span before it moves."""
    a, b = with_zeros(), drawn(1, 5, 3)
    move = drawn(5, 5, 9)
    tx: Any = scale_by_cgfac(0.3, tolerance=1e-10, max_iterations=100)

    def step(t):
        rows = a + t * move
        g = {"kernel": rows.T @ b / 5}
        return tx.update(g, tx.init(g), curvature={"kernel": LayerFactors(rows, b)})[0]["kernel"]

    _, tangent = jax.jit(lambda t: jax.jvp(step, (t,), (1.0,)))(0.0)
    difference = (jax.jit(step)(1e-5) - jax.jit(step)(-1e-5)) / 2e-5
    # The loop ends with the solution at zero. That of the new direction is one iteration away.
    assert relative_error(tangent, np.asarray(difference)) < 1e-3


@pytest.mark.parametrize(
    "name", ["more rows than columns", pytest.param("Gauss-Newton", marks=pytest.mark.slow)]
)
def test_reverse_mode_is_refused_in_plain_words(name):
    step = STEPS[name]()
    with pytest.raises(TypeError, match="scale_by_cgfac must be differentiated in forward mode"):
        jax.jit(jax.grad(lambda t: flat_sum(step(t))))(0.7)
    if name == "Gauss-Newton":  # outside of jit its loop is one of Python
        with pytest.raises(TypeError, match="scale_by_cgfac must be differentiated in forward mode"):
            jax.grad(lambda t: flat_sum(step(t)))(0.7)


def flat_sum(tree) -> jax.Array:
    return sum((jnp.sum(x) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


@pytest.mark.slow
def test_updates_without_gradients_may_be_part_of_a_loss_in_reverse_mode():
    step = STEPS["more rows than columns"]()
    slope = jax.jit(jax.grad(lambda t: t**2 + jax.lax.stop_gradient(flat_sum(step(t)))))(1.0)
    assert float(slope) == 2.0


@pytest.mark.slow
def test_jacobians_in_forward_mode_are_those_of_each_direction(x64):
    tx: Any = scale_by_cgfac(0.3)
    rows = drawn(0, 9, 2), drawn(1, 9, 2)

    def step(g):
        return tx.update({"k": g}, tx.init({"k": g}), curvature={"k": LayerFactors(*rows)})[0]["k"]

    g, e = jnp.asarray(drawn(2, 2, 2)), jnp.eye(4).reshape(4, 2, 2)
    found = jax.jit(jax.jacfwd(step))(g)
    along = jax.jit(lambda v: jax.jvp(step, (g,), (v,))[1])
    columns = jnp.stack([along(v) for v in e], axis=-1).reshape(2, 2, 2, 2)
    np.testing.assert_allclose(found, columns, rtol=1e-9)
