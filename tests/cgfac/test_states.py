"""States and inputs of CG-FAC from elsewhere: NumPy's arrays, lost fields, other dtypes, empty leaves."""

import dataclasses
import pickle
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax import scale_by_cgfac, value_and_grad_with_factors
from tests.cgfac.network import LayerFactors, flat, tx_and_state
from tests.dense_reference import relative_error

X = jax.random.normal(jax.random.key(0), (9, 4))
PARAMS = {"bias": jnp.zeros(3), "kernel": jax.random.normal(jax.random.key(1), (4, 3))}
GRADIENT = jax.tree.map(jnp.ones_like, PARAMS)
FACTORS = {"kernel": LayerFactors(X, X[:, :3], "bias")}


def windowed():
    return tx_and_state(PARAMS, 0.1, num_batches=2, factors=FACTORS)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(jax.jit, marks=pytest.mark.slow, id="jit"),
        pytest.param(lambda update: update, id="not"),
    ],
)
def test_a_state_of_numpy_arrays_goes_on_as_it_was(wrap):
    tx = scale_by_cgfac(0.1, num_batches=2, factors=FACTORS)
    update = wrap(tx.update)
    _, state = update(GRADIENT, tx.init(PARAMS), PARAMS, curvature=FACTORS)
    restored = pickle.loads(pickle.dumps(jax.device_get(state)))
    assert all(isinstance(x, (np.ndarray, np.generic)) for x in jax.tree.leaves(restored))
    expected = update(GRADIENT, state, PARAMS, curvature=FACTORS)
    found = update(GRADIENT, restored, PARAMS, curvature=FACTORS)
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_dtypes(found, expected)


FIELDS = ("grads_seen", "grads_rejected", "mean_squares", "residuals", "iterations", "indefinite")
SPOILED: dict[str, Any] = {
    "missing": lambda x: None,
    "of another shape": lambda x: jnp.zeros((7, 2), x.dtype),
    "of another dtype": lambda x: x.astype(jnp.float16),
    "a list": lambda x: [np.asarray(x).tolist()],
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_field_is_refused_by_its_name(field, name):
    tx, state = tx_and_state(PARAMS)
    spoiled = state._replace(**{field: SPOILED[name](getattr(state, field))})
    for update in (tx.update, jax.jit(tx.update)):
        with pytest.raises(ValueError, match=rf"state\.{field} must be an array .* call init again"):
            update(GRADIENT, spoiled, curvature=FACTORS)


KEPT = windowed()[1].window["kernel"]
WINDOWS: dict[str, tuple[Any, str]] = {
    "missing": (None, r"state\.window must be a dict of LayerFactors"),
    "of dicts": ({"kernel": vars(KEPT)}, r"state\.window must be a dict of LayerFactors"),
    "empty": ({}, r"state\.window must be a dict of LayerFactors"),
    "of one batch": (optax.EmptyState(), "num_batches=2, got num_batches=1"),
    "of integers": ({"kernel": jax.tree.map(jnp.int32, KEPT)}, r"state\.window must be"),
    "of other batches": (
        {"kernel": dataclasses.replace(KEPT, output_grads=jnp.zeros((9, 3, 3)))},
        "num_batches=2, got num_batches=2 and 3",
    ),
    "of fewer examples": (
        {"kernel": jax.tree.map(lambda x: x[:5], KEPT)},
        "must have the shapes of the factors",
    ),
    "of another kernel": ({"other": KEPT}, "must have the shapes of the factors"),
    "of a layer without bias": (
        {"kernel": dataclasses.replace(KEPT, bias=None)},
        "must have the shapes of the factors",
    ),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_a_spoiled_window_is_refused(name):
    tx, state = windowed()
    window, message = WINDOWS[name]
    with pytest.raises(ValueError, match=message):
        tx.update(GRADIENT, state._replace(window=window), curvature=FACTORS)


@pytest.mark.parametrize("kind", [tuple, lambda state: state._asdict(), lambda state: None])
def test_another_tuple_is_no_state(kind):
    tx, state = tx_and_state(PARAMS)
    with pytest.raises(TypeError, match="state must be a ScaleByCGFACState"):
        tx.update(GRADIENT, kind(state), curvature=FACTORS)


def test_a_state_in_double_precision_is_refused_without_x64():
    with jax.enable_x64(True):
        doubles = jax.device_get(scale_by_cgfac().init(jax.tree.map(jnp.float64, PARAMS)))
    with pytest.raises(
        ValueError, match=r"mean_squares must be an array \(2,\) of float32, got .* float64"
    ):
        scale_by_cgfac().update(GRADIENT, doubles, curvature=FACTORS)


def test_gradients_in_double_precision_have_the_bounds_of_the_state(x64):
    """1e30 is clipped as it is in float32; no square of it may stay in the state."""
    tx, state = tx_and_state(PARAMS, 0.1)
    updates = []
    for dtype in (jnp.float32, jnp.float64):
        huge = jax.tree.map(lambda g, dtype=dtype: (1e30 * g).astype(dtype), GRADIENT)
        found, after = jax.jit(tx.update)(huge, state, curvature=FACTORS)
        assert int(after.grads_seen) == 1
        assert np.all(np.isfinite(flat(after)))
        assert after.mean_squares.dtype == jnp.float32
        chex.assert_trees_all_equal_dtypes(found, huge)
        updates.append(flat(found))
    np.testing.assert_allclose(*updates, rtol=1e-6)
    assert np.all(updates[0] != 0)


def test_layers_of_more_rows_than_float16_can_count_are_trained():
    """70,000 rows, and a gradient of float16: the same step as in float32."""
    x, w = jax.random.normal(jax.random.key(2), (70000, 5)), jnp.ones((5, 4)) / 2
    gradient = {"w": (x.T @ (x @ w) / 70000).astype(jnp.float16)}
    tx = scale_by_cgfac(tolerance=1e-3)
    rows = {"w": LayerFactors(x.astype(jnp.float16), x @ w)}
    updates, state = jax.jit(tx.update)(gradient, tx.init(gradient), curvature=rows)
    a, b = np.asarray(x, np.float64), np.asarray(x @ w, np.float64)
    fisher = np.kron(a.T @ a / 70000, b.T @ b / 70000) + 0.01 * np.eye(20)
    expected = np.linalg.solve(fisher, np.float64(gradient["w"]).ravel()).reshape(5, 4)
    assert updates["w"].dtype == jnp.float16
    assert int(state.iterations[0]) > 0
    assert relative_error(np.asarray(updates["w"], np.float64), expected) < 0.01


def test_leaves_without_entries_take_part():
    """As kernel, as its outputs, as leaf of no layer; and a tree without leaves."""
    params = {"w": X[:4, :3], "no outputs": jnp.zeros((4, 0)), "rest": jnp.zeros((0, 3))}
    factors = {"w": LayerFactors(X, X[:, :3]), "no outputs": LayerFactors(X, X[:, :0])}
    tx, state = tx_and_state(params, 0.1)
    updates, state = jax.jit(tx.update)(params, state, curvature=factors)
    chex.assert_trees_all_equal_shapes(updates, params)
    assert int(state.iterations[-1]) > 0
    assert np.all(np.isfinite(flat(updates)))
    assert not np.any(state.indefinite)
    for tree in ({}, {"rest": jnp.zeros((0, 3))}):
        found, _ = tx.update(tree, tx.init(tree), curvature=lambda v: v)
        chex.assert_trees_all_equal(found, tree)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    """A tree with `__call__`, as modules of equinox are."""

    kernel: jax.Array

    def __call__(self, x):
        return x @ self.kernel


def test_trees_that_can_be_called_are_parameters_and_no_functions():
    model = Module(PARAMS["kernel"])
    run = jax.jit(value_and_grad_with_factors(lambda model: jnp.mean(model(X) ** 2)))
    _, gradient, factors = run(model)
    tx, state = tx_and_state(model, 0.1)
    updates, _ = tx.update(gradient, state, curvature=factors)
    plain = {"kernel": gradient.kernel}
    expected, _ = tx.update(plain, tx.init(plain), curvature=factors)
    np.testing.assert_allclose(updates.kernel, expected["kernel"], rtol=1e-5)
    of_function, _ = tx.update(gradient, state, curvature=lambda v: v)
    np.testing.assert_allclose(of_function.kernel, gradient.kernel / 1.1, rtol=1e-4)
    for curvature in (model, gradient, factors["kernel"]):
        with pytest.raises(TypeError, match="must be a dict from paths of kernels to LayerFactors"):
            tx.update(gradient, state, curvature=curvature)
    with pytest.raises(ValueError, match="preconditioner must be a function"):
        tx.update(gradient, state, curvature=lambda v: v, preconditioner=model)
    with pytest.raises(TypeError, match="factors must be a dict"):
        tx_and_state(model, factors=model)


def test_a_partial_is_a_function_though_it_is_a_tree():
    tx, state = tx_and_state(GRADIENT, 0.1)
    scaled = jax.tree_util.Partial(lambda s, v: jax.tree.map(lambda x: s * x, v), jnp.float32(2))
    updates, _ = tx.update(GRADIENT, state, curvature=scaled)
    np.testing.assert_allclose(updates["bias"], GRADIENT["bias"] / 2.1, rtol=1e-4)
