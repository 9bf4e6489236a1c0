"""Rows of one-byte numbers: what they stand for, products with them, and whole steps."""

import functools
import itertools
import math
from typing import Any

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import mfac_jax
from mfac_jax._src.rows import scaled
from mfac_jax._src.rows.storage_kinds import as_storage
from tests.dense_reference import inverse_product, relative_error
from tests.mfac.on_mesh import assert_sharded_as
from tests.rows.encoded import decoded, rows_of

# The largest distance of a number from the nearest of the dtype, in parts of the largest in its group.
STEPS = {jnp.int8: 0.5 / 127, jnp.float8_e4m3fn: 2**-4, jnp.float8_e5m2: 2**-3}
EACH = pytest.mark.parametrize(
    "dtype",
    [jnp.int8, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in list(STEPS)[1:])],
    ids=lambda dtype: dtype.__name__,
)
SHAPES = ((), (7,), (300,), (1009, 3), (64, 10), (3, 3, 16, 32), (2, 512, 4), (0, 3), (50, 1))


def normal(*shape, seed=0, dtype: Any = np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_stands_for_numbers_near_the_gradient(dtype, shape):
    gradients = normal(4, *shape) * 10.0 ** normal(4, *shape, seed=1)
    gradients[2] = 0
    rows = rows_of(dtype, gradients)
    found = decoded(dtype, rows)
    assert rows.values.dtype == dtype
    scales = rows.scales.shape
    assert len(scales) == len(rows.values.shape)
    assert all(n % k == 0 for n, k in zip(rows.values.shape, scales, strict=True) if k)
    for x, y in zip(gradients, found, strict=True):
        assert np.all(np.abs(x - y) <= 1.001 * STEPS[dtype] * np.max(np.abs(x), initial=0))
    np.testing.assert_array_equal(found[2], 0)


@pytest.mark.parametrize(
    ("shape", "grouped"),
    [
        ((768, 3072), (0,)),
        ((50304, 768), (1,)),  # a scale for each word
        ((24, 2048, 6144), (1,)),
        ((3, 3, 64, 96), (0, 2)),
        ((2048, 12, 64), (0,)),
        ((96, 384), (1,)),
        ((64, 10), (0, 1)),
        ((8192,), (0,)),
        ((), ()),
    ],
)
def test_groups_go_along_few_axes(shape, grouped):
    assert scaled.grouped_axes(shape) == grouped


@given(st.lists(st.integers(0, 600), max_size=5))
def test_scales_take_little_room(shape):
    row: Any = as_storage(jnp.int8).row(jax.ShapeDtypeStruct(tuple(shape), jnp.float32))
    assert math.prod(row.scales.shape) * 128 <= math.prod(shape) or row.scales.size == 1


@EACH
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_those_of_what_the_rows_stand_for(dtype, shape):
    rows, x, c = rows_of(dtype, normal(13, *shape)), normal(*shape, seed=2), normal(13, seed=3)
    exact = decoded(dtype, rows).astype(np.float64)
    expected = exact.reshape(13, -1) @ x.reshape(-1)
    scale = 1e-6 * (1 + float(np.linalg.norm(exact) * np.linalg.norm(x)))
    for dots in (as_storage(dtype).dots, scaled._dots_at_once):
        np.testing.assert_allclose(dots(rows, jnp.asarray(x), jnp.float32), expected, atol=scale)
    combined = np.tensordot(c, exact, 1)
    scales = rows.scales * c.reshape(-1, *[1] * len(shape))
    for found in (
        as_storage(dtype).combine(jnp.asarray(c), rows),
        scaled._sum_at_once(scales, rows.values),
    ):
        np.testing.assert_allclose(found, combined, atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (jnp.int8, np.nan),
        pytest.param(jnp.int8, np.inf, marks=pytest.mark.slow),
        pytest.param(jnp.float8_e4m3fn, np.nan, marks=pytest.mark.slow),
        pytest.param(jnp.float8_e5m2, np.inf, marks=[pytest.mark.slow, pytest.mark.exhaustive]),
    ],
)
@pytest.mark.parametrize("shape", [(40, 8), (64, 64), (32, 160)], ids=str)  # XLA's maxima may lose a NaN
def test_a_gradient_that_is_not_finite_is_not_stored(shape, dtype, bad):
    params = {"w": jnp.ones(shape), "b": jnp.ones(8)}
    tx: Any = mfac_jax.scale_by_mfac(4, 1.0, storage=dtype)
    good = jax.tree.map(lambda p: jnp.asarray(normal(*p.shape)), params)
    _, state = tx.update(good, tx.init(params))
    _, after = tx.update(good | {"w": good["w"].at[3, 2].set(bad)}, state)
    assert after.grads_rejected == 1
    jax.tree.map(np.testing.assert_array_equal, after.window, state.window)


def test_float64_has_scales_of_its_own(x64):
    gradients = normal(3, 40, 8, dtype=np.float64) * 1e200
    rows = rows_of(jnp.int8, gradients)
    assert rows.scales.dtype == jnp.float64
    assert relative_error(decoded(jnp.int8, rows) / 1e200, gradients / 1e200) < 0.01


PARAMS: dict[str, Any] = {
    "bias": jnp.ones(16),
    "kernel": jnp.ones((32, 16)),
    "conv": jnp.ones((3, 3, 4, 8)),
}


LONG: dict[str, Any] = PARAMS | {"kernel": jnp.ones((32, 160))}  # its groups are rows


def stream(steps, params=PARAMS):
    random = np.random.default_rng(0)
    common = {name: random.standard_normal(p.shape) for name, p in params.items()}
    return [
        {
            name: (common[name] + random.standard_normal(p.shape)).astype(np.float32)
            for name, p in params.items()
        }
        for _ in range(steps)
    ]


@EACH
@pytest.mark.parametrize(
    "options",
    [{}, {"blocks": "leaf"}, {"solver": "inverse"}],
    ids=str,
)
def test_an_update_is_that_of_the_window_as_stored(dtype, options):
    tx = mfac_jax.scale_by_mfac(6, 0.1, storage=dtype, **options)
    u: Any = None
    state: Any
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for gradient in stream(9):
        u, state = update(gradient, state)
    rows = [
        decoded(dtype, scaled.ScaledRow(*pair)).reshape(6, -1)
        for pair in zip(*(jax.tree.leaves(tree) for tree in state.window), strict=True)
    ]
    window = np.concatenate(rows, axis=1)
    newest = (int(state.next_row) - 1) % 6
    ends = np.cumsum([0, *(len(row[0]) for row in rows)])
    parts = [slice(*pair) for pair in itertools.pairwise(ends)]
    blocks = parts if options.get("blocks") else (slice(None),)
    expected = inverse_product(window, window[newest], 0.1, 6, blocks)
    found = np.concatenate([np.ravel(x) for x in jax.tree.leaves(u)])
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("axis_type", "metric"),
    [
        (AxisType.Auto, "diagonal"),
        pytest.param(AxisType.Auto, "identity", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, "diagonal", marks=pytest.mark.slow),
    ],
)
def test_on_a_mesh_it_is_the_run_on_one_device(axis_type, metric):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    specs = {"bias": P("y"), "kernel": P("x", "y"), "conv": P(None, None, None, "x")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    tx: Any = mfac_jax.scale_by_mfac(6, 1.0, storage=jnp.int8, metric=metric)
    places = mfac_jax.state_shardings(tx, LONG, shardings)
    params = jax.device_put(LONG, shardings)
    state, spread = tx.init(LONG), tx.init(params)
    assert_sharded_as(spread, places)
    update, on_mesh = jax.jit(tx.update), jax.jit(tx.update, out_shardings=(shardings, places))
    for gradient in stream(8, LONG):
        expected, state = update(gradient, state)
        with jax.set_mesh(mesh):
            found, spread = on_mesh(jax.device_put(gradient, shardings), spread)
        for name in LONG:  # a number on the edge may be rounded either way
            assert relative_error(found[name], np.asarray(expected[name])) < 2e-3
    scales = spread.window.scales["kernel"]
    assert scales.sharding.shard_shape(scales.shape) == (6, 8, 1)


def test_a_donated_step_copies_no_window():
    params = {"kernel": jnp.ones((512, 256)), "conv": jnp.ones((3, 3, 64, 128))}
    tx: Any = mfac_jax.scale_by_mfac(64, 1.0, storage=jnp.int8)
    state = tx.init(params)
    size = sum(x.nbytes for x in jax.tree.leaves(state.window))
    compiled = jax.jit(tx.update, donate_argnums=1).lower(params, state).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.15 * size
    assert memory.alias_size_in_bytes > size


def test_training_goes_on_from_a_checkpoint_of_arrays():
    tx = mfac_jax.mfac(1e-2, 8, storage=jnp.int8)
    update = jax.jit(tx.update)
    state = tx.init(PARAMS)
    for gradient in stream(5):
        _, state = update(gradient, state, PARAMS)
    leaves, structure = jax.tree.flatten(state)
    restored = jax.tree.unflatten(structure, list(map(np.asarray, leaves)))
    expected, found = (update(stream(6)[-1], each, PARAMS)[0] for each in (state, restored))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_another_storage_is_refused_by_name():
    state = mfac_jax.scale_by_mfac(4, storage=jnp.int8).init(PARAMS)
    with pytest.raises(ValueError, match="storage=float32, got storage=int8"):
        mfac_jax.scale_by_mfac(4, storage=jnp.float32).update(PARAMS, state)


def test_it_trains_as_float32_does():
    def loss(params, x, y):
        return jnp.mean(jnp.square(jnp.tanh(x @ params["w"]) @ params["v"] - y))

    x, y = jnp.asarray(normal(64, 8)), jnp.asarray(normal(64, 1, seed=1))
    start = {"w": jnp.asarray(normal(8, 16, seed=2)) / 3, "v": jnp.asarray(normal(16, 1, seed=3)) / 4}
    ends = {}
    for storage in (jnp.float32, jnp.int8):
        tx = mfac_jax.mfac(1e-2, 16, storage=storage)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, tx=tx):
            updates, state = tx.update(jax.grad(loss)(params, x, y), state, params)
            return optax.apply_updates(params, updates), state

        params = jax.tree.map(jnp.copy, start)
        state = tx.init(params)
        for _ in range(60):
            params, state = step(params, state)
        ends[storage] = loss(params, x, y)
    assert ends[jnp.int8] < 1.2 * ends[jnp.float32] < 0.3 * loss(start, x, y)


def last_parameters(storage, start, rate):
    """After three steps."""
    tx = mfac_jax.mfac(rate, 4, storage=storage)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.sin(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (start, tx.init(start)), None, length=3)
    return sum(map(jnp.sum, jax.tree.leaves(params)))


@EACH
@pytest.mark.parametrize("transform", [jax.grad, jax.jacfwd, lambda f, i: jax.grad(jax.jit(f), i)])
def test_what_has_no_derivative_says_so(dtype, transform):
    for argument in (0, 1):  # the rate changes the gradients of later steps

        def of_argument(start, rate):
            return last_parameters(dtype, start, rate)

        with pytest.raises(ValueError, match=r"storage must be jnp\.float32 where a step is"):
            transform(of_argument, argument)(jnp.ones(3), 0.1)


def test_gradients_that_are_cut_off_may_be_stored_in_bytes():
    tx = mfac_jax.mfac(0.1, 4, storage=jnp.int8)

    def loss(params):
        updates, _ = tx.update(jax.lax.stop_gradient(params), tx.init(params))
        return sum(map(jnp.sum, jax.tree.leaves(optax.apply_updates(params, updates))))

    np.testing.assert_allclose(jax.grad(loss)(jnp.ones(3)), 1)
