"""Rows of low rank: how near they are, products with them, and steps that lose nothing of a gradient."""

import itertools
import math
from typing import Any

import flax.serialization
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mfac_jax
from benchmarks import compiled_update
from mfac_jax._src.rows import low_rank, storage_kinds, storages
from tests.dense_reference import inverse_product, relative_error
from tests.mfac.on_mesh import assert_sharded_as
from tests.rows.encoded import decoded, rows_of

STORAGE = mfac_jax.components.low_rank(1 / 4)
SHAPES = ((), (7,), (64, 48), (3, 3, 16, 32), (2, 96, 40), (0, 3), (50, 1), (3, 5))
PARAMS: dict[str, Any] = {
    "kernel": jnp.ones((32, 24)),
    "conv": jnp.ones((3, 3, 4, 8)),
    "bias": jnp.ones(8),
    "scale": jnp.ones(()),
}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_shape_of_the_leaf_is_known_from_its_rows(shape):
    rows = rows_of(STORAGE, normal(3, *shape))
    assert storages.shape_of_leaf(STORAGE, rows) == decoded(STORAGE, rows).shape[1:] == shape


def test_a_row_is_nearly_the_best_of_its_rank():
    for steepness in (0.0, 0.3, 3.0):
        u, v = (np.linalg.qr(normal(n, 40, seed=n))[0] for n in (96, 200))
        values = np.exp(-steepness * np.arange(40))
        gradient = (u * values @ v.T * 1e-4).astype(np.float32)
        found = decoded(STORAGE, rows_of(STORAGE, gradient[None]))[0]
        rank = rows_of(STORAGE, gradient[None]).left.shape[-1]
        best = 1e-4 * np.linalg.norm(values[rank:])
        assert np.linalg.norm(found - gradient) < 1.1 * best + 0.01 * np.linalg.norm(gradient)


@pytest.mark.parametrize("shape", [(64, 48), (3, 3, 16, 32)], ids=str)
def test_what_has_the_rank_is_kept_to_rounding_and_zeros_are(shape):
    gradient = np.outer(normal(math.prod(shape[:-1])), normal(shape[-1], seed=1)).reshape(shape)
    rows = rows_of(STORAGE, np.stack([gradient, 0 * gradient, 1e12 * gradient, 1e-12 * gradient]))
    for number, factor in enumerate((1, 0, 1e12, 1e-12)):
        found = decoded(STORAGE, rows)[number]
        assert np.linalg.norm(found - factor * gradient) <= 0.01 * np.linalg.norm(factor * gradient)


@given(st.lists(st.integers(0, 300), max_size=4), st.floats(0.01, 1))
def test_a_row_takes_no_more_than_its_share(shape, density):
    storage = mfac_jax.components.low_rank(density)
    row: Any = storage.row(jax.ShapeDtypeStruct(tuple(shape), jnp.float32))
    size = sum(math.prod(x.shape) * 2 for x in row)
    if row.right.shape:
        rank = row.left.shape[-1]
        assert rank == 1 or size <= 2 * density * math.prod(shape)
    else:
        assert size == 2 * math.prod(shape) + 2


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_what_the_rows_stand_for(shape):
    rows, x, c = rows_of(STORAGE, normal(13, *shape)), normal(*shape, seed=2), normal(13, seed=3)
    exact = decoded(STORAGE, rows)
    expected = exact.reshape(13, -1) @ x.reshape(-1)
    scale = 1e-6 * (1 + float(np.linalg.norm(exact) * np.linalg.norm(x)))
    found = STORAGE.dots(rows, jnp.asarray(x), jnp.float32)
    np.testing.assert_allclose(found, expected, atol=scale)
    combined = STORAGE.combine(jnp.asarray(c), rows)
    np.testing.assert_allclose(combined, np.tensordot(c, exact, 1), atol=1e-5)


def test_it_is_found_by_its_name():
    assert storage_kinds.by_name(STORAGE.name) is STORAGE is mfac_jax.components.low_rank(0.25)
    state = mfac_jax.scale_by_mfac(4, storage=STORAGE).init(PARAMS)
    with pytest.raises(ValueError, match=r"storage=low_rank\(0.5\), got storage=low_rank\(0.25\)"):
        mfac_jax.scale_by_mfac(4, storage=mfac_jax.components.low_rank(0.5)).update(PARAMS, state)


@pytest.mark.parametrize("density", [0, -0.5, 1.5, math.nan])
def test_densities_are_above_zero_and_at_most_one(density):
    with pytest.raises(ValueError, match="density must be a finite number > 0 and <= 1"):
        mfac_jax.components.low_rank(density)
    with pytest.raises(TypeError, match="density must be"):
        mfac_jax.components.low_rank("1/8")  # type: ignore


def test_it_is_refused_on_manual_axes():
    with pytest.raises(ValueError, match="storage must have one array for a row"):
        mfac_jax.scale_by_mfac(4, storage=STORAGE, axis_name="x")


# Whole steps.


def stream(steps, params=PARAMS):
    random = np.random.default_rng(0)
    common = {name: random.standard_normal(p.shape) for name, p in params.items()}
    for _ in range(steps):
        noise = {name: random.standard_normal(p.shape) for name, p in params.items()}
        yield {name: np.asarray(common[name] + noise[name], np.float32) for name in params}


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(tree[name], np.float64)) for name in sorted(tree)])


def flat_window(window) -> np.ndarray:
    """The rows as stored, `(m, d)` in float64."""
    leaves = [
        decoded(STORAGE, low_rank.LowRankRow(window.left[name], window.right[name]))
        for name in sorted(window.left)
    ]
    return np.concatenate([rows.reshape(len(rows), -1) for rows in leaves], axis=1)


def blocks_of(params) -> list[slice]:
    ends = np.cumsum([0, *(params[name].size for name in sorted(params))])
    return [slice(*pair) for pair in itertools.pairwise(ends)]


@pytest.mark.parametrize(
    ("options", "momentum"),
    [
        ({"blocks": "leaf"}, 0.9),
        pytest.param({}, 0.0, marks=pytest.mark.slow),
        pytest.param({}, 0.9, marks=pytest.mark.slow),
        pytest.param({"solver": "inverse"}, 0.9, marks=pytest.mark.slow),
        pytest.param({"host_chunk": 4}, 0.9, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_update_is_that_of_the_exact_mean_in_the_window_as_stored(options, momentum):
    """The mean of the rows of the window, and the running mean of what rows left out."""
    tx = mfac_jax.scale_by_mfac(6, 0.1, storage=STORAGE, window_momentum=momentum, nesterov=True, **options)
    state: Any = tx.init(PARAMS)
    update: Any = jax.jit(tx.update)
    updates, rows, mean, left_out = None, [], 0.0, np.zeros(())
    for gradient in stream(9):
        newest = int(state.next_row)
        updates, state = update(gradient, state)
        window = flat_window(jax.device_get(state.window))
        rows.append(window[newest])
        left_out = flat(gradient) - window[newest]
        mean = momentum * mean + (1 - momentum) * left_out
    used = np.stack(rows[-6:])
    weights = momentum ** np.arange(5, -1, -1.0)
    vector = momentum * (weights @ used / weights.sum() + mean / (1 - momentum**9))
    vector += (1 - momentum) * (used[-1] + left_out)
    blocks = blocks_of(PARAMS) if options.get("blocks") else (slice(None),)
    expected = inverse_product(used, vector, 0.1, 6, blocks)
    assert relative_error(flat(updates), expected) < 2e-5


def test_nothing_is_lost_over_a_thousand_steps_and_a_checkpoint():
    """With a large damping the update is the mean of the gradients over the damping."""
    momentum, params = 0.5, {"kernel": PARAMS["kernel"], "bias": PARAMS["bias"]}
    tx = mfac_jax.scale_by_mfac(
        16, 1e6, storage=mfac_jax.components.low_rank(0.02), window_momentum=momentum
    )
    state: Any = tx.init(params)
    update: Any = jax.jit(tx.update)
    updates, mean, total, exact = None, 0.0, 0.0, 0.0
    for step, gradient in enumerate(stream(1000, params)):
        updates, state = update(gradient, state)
        mean = momentum * mean + (1 - momentum) * flat(gradient)
        total, exact = total + flat(updates) * 1e6, exact + mean / (1 - momentum ** (step + 1))
        if step == 500:
            file = flax.serialization.to_bytes(state)
            state = jax.tree.map(jnp.asarray, flax.serialization.from_bytes(tx.init(params), file))
    assert relative_error(flat(updates) * 1e6, np.asarray(mean)) < 1e-3
    assert relative_error(np.asarray(total), np.asarray(exact)) < 1e-3


@pytest.mark.parametrize(
    ("leaf", "bad"),
    [
        ("kernel", np.nan),
        pytest.param("kernel", np.inf, marks=pytest.mark.slow),
        pytest.param("conv", np.nan, marks=pytest.mark.slow),
        pytest.param("bias", np.nan, marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(leaf, bad):
    tx: Any = mfac_jax.scale_by_mfac(4, 1.0, storage=STORAGE, window_momentum=0.9)
    state: Any = tx.init(PARAMS)
    update: Any = jax.jit(tx.update)
    first, second = (jax.tree.map(jnp.asarray, gradient) for gradient in stream(2))
    _, state = update(first, state)
    _, after = update(second | {leaf: second[leaf].at[(0,) * second[leaf].ndim].set(bad)}, state)
    assert after.grads_rejected == 1
    jax.tree.map(np.testing.assert_array_equal, after.window, state.window)
    jax.tree.map(np.testing.assert_array_equal, after.remainder, state.remainder)


@pytest.mark.parametrize(
    ("axis_type", "metric"),
    [
        (AxisType.Auto, "diagonal"),
        pytest.param(AxisType.Explicit, "diagonal", marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, "identity", marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_it_is_the_run_on_one_device(axis_type, metric):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    specs = {"kernel": P("x", "y"), "conv": P(None, None, None, "x"), "bias": P("y"), "scale": P()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx: Any = mfac_jax.scale_by_mfac(6, 1.0, storage=STORAGE, metric=metric, window_momentum=0.5)
    places = mfac_jax.state_shardings(tx, PARAMS, shardings)
    params = jax.device_put(PARAMS, shardings)
    state, spread = tx.init(PARAMS), tx.init(params)
    assert_sharded_as(spread, places)
    estimate = mfac_jax.memory_estimate(params, 6, storage=STORAGE, metric=metric)
    assert estimate.device == sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(spread))
    update, on_mesh = jax.jit(tx.update), jax.jit(tx.update, out_shardings=(shardings, places))
    for gradient in stream(8):
        expected, state = update(gradient, state)
        with jax.set_mesh(mesh):
            found, spread = on_mesh(jax.device_put(gradient, shardings), spread)
        for name in PARAMS:  # a number on the edge may be rounded either way
            assert relative_error(found[name], np.asarray(expected[name])) < 1e-2


def test_factors_are_split_as_the_axes_that_they_go_along_and_not_gathered():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = {"kernel": jnp.ones((512, 256)), "layers": jnp.ones((4, 256, 512)), "bias": jnp.ones(64)}
    specs = {"kernel": P("x", "y"), "layers": P(None, "x", "y"), "bias": P(("x", "y"))}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx: Any = mfac_jax.scale_by_mfac(16, 1.0, storage=mfac_jax.components.low_rank(), metric="diagonal")
    places = mfac_jax.state_shardings(tx, params, shardings)
    assert places.window.left["layers"].spec == P(None, None, "x", None)
    assert places.window.right["layers"].spec == P(None, None, "y")
    params = jax.device_put(params, shardings)
    options: dict[str, Any] = {"donate_argnums": 1, "out_shardings": (shardings, places)}
    compiled: Any = jax.jit(tx.update, **options).lower(params, tx.init(params)).compile()
    assert set(compiled_update.collectives(compiled.as_text())) == {"all-reduce"}


def test_a_donated_step_copies_no_window():
    params = {f"kernel{i}": jnp.ones((512, 256)) for i in range(4)}
    windows, temporaries = [], []
    for num_grads in (64, 256):
        tx: Any = mfac_jax.scale_by_mfac(num_grads, 1.0, storage=mfac_jax.components.low_rank())
        state = jax.eval_shape(tx.init, params)
        windows.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.window)))
        compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state).compile()
        memory: Any = compiled.memory_analysis()
        temporaries.append(memory.temp_size_in_bytes)
        assert memory.alias_size_in_bytes > windows[-1]
    assert windows[0] <= 64 * 2 / 16 * 4 * 512 * 256
    assert np.diff(temporaries) < 0.15 * np.diff(windows)
    assert temporaries[0] < 6 * 4 * 4 * 512 * 256  # a few gradients


def test_masks_are_forgotten_in_what_rows_left_out():
    mask = jnp.ones((64, 48), bool).at[:32].set(False)
    inner = mfac_jax.scale_by_mfac(4, 1.0, storage=STORAGE)
    tx: Any = mfac_jax.pruning.keep_pruned(inner, jnp.ones_like(mask))
    params = jnp.ones((64, 48))
    state: Any = tx.init(params)
    _, state = tx.update(jnp.asarray(normal(64, 48)), state, params)
    state = mfac_jax.pruning.set_masks(tx, state, mask)
    remainder = np.asarray(state.inner_state.remainder)
    assert np.all(remainder[:32] == 0)
    assert np.any(remainder[32:])
    rows = decoded(STORAGE, state.inner_state.window)
    assert np.linalg.norm(rows[:, :32]) < 0.01 * np.linalg.norm(rows)
    updates, _ = tx.update(jnp.asarray(normal(64, 48, seed=1)), state, params)
    assert np.all(np.asarray(params + updates)[:32] == 0)
