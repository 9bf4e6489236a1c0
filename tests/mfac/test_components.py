"""Components as a user would write them, outside of the package: against dense matrices, and in pruning."""

import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax import ihvp, mfac, pruning, scale_by_mfac, state_shardings
from mfac_jax.components import Coordinates, Metric, Solver, StepLength, Storage
from tests.dense_reference import inverse_product

DAMPING, NUM_GRADS, STEPS = 1e-2, 6, 9
SHAPES = {"kernel": (5, 3), "bias": (4,), "scale": ()}


# A storage: float16 with one scale for each row.
class HalfRows(NamedTuple):
    values: Any
    scale: Any


def half_row(leaf):
    return HalfRows(jax.ShapeDtypeStruct(leaf.shape, jnp.float16), jax.ShapeDtypeStruct((), jnp.float32))


def to_half(x, rows):
    scale = jnp.max(jnp.abs(x), initial=0)
    return HalfRows((x / jnp.where(scale == 0, 1, scale)).astype(jnp.float16), scale)


def from_half(row):
    return row.values.astype(jnp.float32) * row.scale


def dots_of_half(rows, x, dtype):
    return rows.scale * jnp.sum(rows.values.astype(dtype) * x, axis=tuple(range(1, rows.values.ndim)))


def combine_half(coefficients, rows):
    return jnp.tensordot(coefficients * rows.scale, rows.values.astype(coefficients.dtype), 1)


HALF = Storage("scaled float16", half_row, to_half, from_half, dots_of_half, combine_half)


# A metric: a fixed rotation of each matrix.
def rotation(size):
    return np.linalg.qr(np.random.default_rng(size).standard_normal((size, size)))[0].astype(np.float32)


def rotated(tree, transposed):
    def rotate(x):
        if x.ndim != 2:
            return x
        Q = rotation(len(x))
        return jnp.matmul(Q.T if transposed else Q, x, precision="highest")

    return jax.tree.map(rotate, tree)


ROTATED = Metric(
    name="turned",
    init=lambda new: (),
    update=lambda state, grads, count: (
        state,
        Coordinates(lambda tree: rotated(tree, False), lambda tree: rotated(tree, True)),
    ),
)

# A solver: the inverse by LU, nothing kept. A step length: half of the update.
LU = Solver(
    name="lu",
    init=lambda zeros, blocks, m: (),
    replace_row=lambda state, row, index, accept: state,
    solve=lambda state, K, shift, rhs: (
        jnp.linalg.solve(K + shift[:, None, None] * jnp.eye(K.shape[-1]), rhs[..., None])[..., 0],
        state,
    ),
)
HALVED = StepLength("halved", lambda zeros: (), lambda state, view: (state, jnp.log(0.5)))


def gradients(steps=STEPS):
    random = np.random.default_rng(0)
    return [
        {name: np.asarray(random.standard_normal(shape), np.float32) for name, shape in SHAPES.items()}
        for _ in range(steps)
    ]


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def as_stored(storage, grads):
    """The gradients as the storage gives them back."""
    rows = jax.tree.map(lambda g: np.zeros((1, *g.shape), np.float32), grads[0])
    return [jax.tree.map(lambda x, r: storage.decode(storage.encode(x, r)), g, rows) for g in grads]


def run(tx, grads) -> tuple[Any, Any]:
    state, updates = tx.init(jax.tree.map(jnp.asarray, grads[0])), None
    step = jax.jit(tx.update)
    for g in grads:
        updates, state = step(g, state)
    return updates, state


@pytest.mark.parametrize(
    "options",
    [{}, pytest.param({"blocks": "leaf", "solver": "inverse"}, marks=pytest.mark.slow)],
    ids=["one block", "leaf"],
)
def test_a_storage_of_ones_own_gives_the_dense_answer_on_the_window_as_stored(options):
    grads = gradients()
    updates, state = run(scale_by_mfac(NUM_GRADS, DAMPING, storage=HALF, **options), grads)
    stored = as_stored(HALF, grads)[-NUM_GRADS:]
    rows = np.stack([flat(g) for g in stored])
    blocks = [slice(0, 4), slice(4, 19), slice(19, 20)] if "blocks" in options else [slice(None)]
    expected = inverse_product(rows, rows[-1], DAMPING, NUM_GRADS, blocks=blocks)
    np.testing.assert_allclose(flat(updates), expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())
    assert state.window.values["kernel"].dtype == jnp.float16
    assert state.window.scale["kernel"].shape == (NUM_GRADS,)


def test_a_storage_of_ones_own_refuses_gradients_that_are_not_finite():
    tx, grads = scale_by_mfac(NUM_GRADS, DAMPING, storage=HALF), gradients()
    _, before = run(tx, grads)
    bad = grads[0] | {"bias": np.full(4, np.nan, np.float32)}
    _, after = jax.jit(tx.update)(bad, before)
    assert int(after.grads_rejected) == 1
    jax.tree.map(np.testing.assert_array_equal, after.window, before.window)


@pytest.mark.slow
def test_a_storage_of_ones_own_is_seen_by_map_params_products_and_masks():
    tx = pruning.keep_pruned(
        scale_by_mfac(NUM_GRADS, DAMPING, storage=HALF),
        {"kernel": np.ones((5, 3), bool), "bias": None, "scale": None},
    )
    grads, params = gradients(), jax.tree.map(jnp.ones_like, gradients()[0])
    state = tx.init(params)
    for g in grads:
        _, state = jax.jit(tx.update)(g, state, params)
    kept = np.arange(15).reshape(5, 3) % 2 == 0
    state = pruning.set_masks(
        tx, state, {"kernel": kept, "bias": None, "scale": None}, storage=HALF
    ).inner_state
    masked = [g | {"kernel": g["kernel"] * kept} for g in as_stored(HALF, grads)[-NUM_GRADS:]]
    rows = np.stack([flat(g) for g in as_stored(HALF, masked)])
    order = (int(state.next_row) + np.arange(NUM_GRADS)) % NUM_GRADS  # from the oldest row on
    gram = np.asarray(state.gram[0])[np.ix_(order, order)]
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-4, atol=1e-4)
    x = gradients(10)[-1]
    product = ihvp(state, x, DAMPING, storage=HALF)
    expected = inverse_product(rows, flat(x), DAMPING, NUM_GRADS)
    np.testing.assert_allclose(flat(product), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ValueError, match=r"'scaled float16', got None"):
        ihvp(state, x, DAMPING)


def test_a_metric_of_ones_own_sees_whole_matrices():
    grads = gradients()
    updates, state = run(scale_by_mfac(NUM_GRADS, DAMPING, metric=ROTATED), grads)
    rows = np.stack([flat(g) for g in grads[-NUM_GRADS:]])
    expected = inverse_product(rows, rows[-1], DAMPING, NUM_GRADS)  # no rotation changes F^-1 g
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    newest = (int(state.next_row) - 1) % NUM_GRADS
    in_metric = rotation(5) @ grads[-1]["kernel"]
    np.testing.assert_allclose(state.window["kernel"][newest], in_metric, rtol=1e-5, atol=1e-5)


def test_a_solver_and_a_step_length_of_ones_own():
    grads = gradients()
    updates, _ = run(scale_by_mfac(NUM_GRADS, DAMPING, solver=LU, step_adaptation=HALVED), grads)
    rows = np.stack([flat(g) for g in grads[-NUM_GRADS:]])
    expected = inverse_product(rows, rows[-1], DAMPING, NUM_GRADS) / 2
    np.testing.assert_allclose(flat(updates), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_components_of_ones_own_run_in_mfac_and_under_inject_hyperparams():
    make = optax.inject_hyperparams(mfac, static_args=("num_grads",))
    options = {"metric": ROTATED, "storage": HALF, "solver": LU}
    injected, _ = run(make(learning_rate=0.1, num_grads=4, **options), gradients(5))
    plain, _ = run(mfac(0.1, 4, **options), gradients(5))
    np.testing.assert_allclose(flat(injected), flat(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        ({"metric": ROTATED}, r"metric must be elementwise with axis_name='x', got 'turned'"),
        (
            {"storage": HALF},
            r"storage must have one array .*axis_name='x', got 'scaled float16'",
        ),
    ],
)
def test_components_that_need_more_than_a_part_of_a_leaf_are_refused_on_manual_axes(component, message):
    with pytest.raises(ValueError, match=message):
        scale_by_mfac(NUM_GRADS, DAMPING, axis_name="x", **component)


@pytest.mark.parametrize(
    "component",
    [
        {"metric": ROTATED._replace(name="diagonal")},
        {"solver": LU._replace(name="cholesky")},
        {"storage": HALF._replace(name="float32")},
        {"step_adaptation": HALVED._replace(name="none")},
    ],
    ids=lambda component: next(iter(component)),
)
def test_components_need_a_name_of_their_own(component):
    with pytest.raises(ValueError, match=r"must have a name of its own, got '\w+', which the package uses"):
        scale_by_mfac(NUM_GRADS, DAMPING, **component)


def test_masks_are_refused_in_a_metric_whose_entries_meet():
    tx = pruning.keep_pruned(scale_by_mfac(2, metric=ROTATED), jnp.ones((2, 2), bool))
    state = tx.init(jnp.ones((2, 2)))
    with pytest.raises(ValueError, match=r"a metric of 'identity', 'diagonal', 'rotated', got 'turned'"):
        pruning.set_masks(tx, state, jnp.eye(2, dtype=bool))


def test_a_metric_may_keep_several_trees_and_its_state_be_donated():
    twice = Metric("twice", lambda new: (new(), new()), ROTATED.update)
    tx = scale_by_mfac(2, metric=twice)
    state = jax.jit(tx.init)(jnp.ones(3))
    eager: Any = tx.init(jnp.ones(3))
    for first in (state, eager):
        _, after = jax.jit(tx.update, donate_argnums=1)(jnp.ones(3), first)
        assert [x.shape for x in jax.tree.leaves(after.metric)] == [(3,), (3,)]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_a_storage_of_ones_own_on_a_mesh(axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,), devices=jax.devices()[:4])
    shapes = {"kernel": (8, 4), "bias": (3,)}
    random = np.random.default_rng(0)
    grads = [{k: random.standard_normal(s).astype(np.float32) for k, s in shapes.items()} for _ in range(6)]
    specs = {"kernel": PartitionSpec("x"), "bias": PartitionSpec()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx = scale_by_mfac(4, DAMPING, storage=HALF)
    params = jax.device_put(grads[0], shardings)
    placed = state_shardings(tx, params, shardings)
    assert placed.window.values["kernel"].spec == PartitionSpec(None, "x", None)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    step, updates = jax.jit(tx.update), None
    for g in grads:
        updates, state = step(jax.device_put(g, shardings), state)
    expected, _ = run(tx, grads)
    np.testing.assert_allclose(flat(updates), flat(expected), rtol=1e-4, atol=1e-5)


def lines(*parts) -> int:
    return sum(len(inspect.getsource(part).splitlines()) for part in parts)


if __name__ == "__main__":
    storage = lines(HalfRows, half_row, to_half, from_half, dots_of_half, combine_half) + 1
    print(f"storage: {storage} lines; metric: {lines(rotation, rotated) + 8} lines")
