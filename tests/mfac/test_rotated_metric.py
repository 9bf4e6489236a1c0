"""The rotated metric: against its formula in NumPy, and on gradients of any kind."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mfac_jax import mfac, scale_by_mfac, state_shardings
from mfac_jax._src.mfac.metrics import METRICS
from mfac_jax.components import rotated_metric
from tests.dense_reference import inverse_product, relative_error

SHAPES = {"bias": (4,), "conv": (2, 2, 3, 4), "kernel": (6, 5), "scale": ()}
DECAY = 0.95
ROTATED = METRICS["rotated"]
mapped: Any = jax.jit(lambda state, g, count, x: ROTATED.update(state, g, count)[1].into(x))
updated: Any = jax.jit(lambda state, g, count: ROTATED.update(state, g, count)[0])


def gradients(steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Each leaf is a stack of matrices with covariances far from the identity, both ways."""
    random = np.random.default_rng(seed)
    mixing = {
        name: [random.standard_normal((n, n)) for n in as_matrix(shape)] for name, shape in SHAPES.items()
    }

    def draw(name, shape):
        left, right = mixing[name]
        return (left @ random.standard_normal((len(left), len(right))) @ right).reshape(shape)

    return [{name: draw(name, shape) for name, shape in SHAPES.items()} for _ in range(steps)]


def as_matrix(shape) -> tuple[int, int]:
    """Rows and columns: (places x in, out) for a convolution, a row for a vector."""
    return (int(np.prod(shape[:-1])), shape[-1]) if len(shape) > 1 else (1, int(np.prod(shape)))


class Reference:
    """The metric of one leaf as the docstring has it, in NumPy."""

    def __init__(self, name):
        self.shape, self.matrix, self.count = SHAPES[name], as_matrix(SHAPES[name]), 0
        self.covariances = [np.zeros((n, n)) for n in self.matrix]
        self.bases = [np.eye(n) for n in self.matrix]
        self.v = np.zeros(self.matrix)

    def step(self, gradient):
        g = gradient.reshape(self.matrix)
        self.count += 1
        for side, new in enumerate((g @ g.T, g.T @ g)):
            self.covariances[side] = DECAY * self.covariances[side] + (1 - DECAY) * new
        if self.count <= 10 or self.count % 10 == 0:
            self.turn()
        self.v = DECAY * self.v + (1 - DECAY) * self.into(g) ** 2

    def turn(self):
        if len(self.shape) < 2:
            return
        for side in (0, 1):
            covariance = self.covariances[side] / np.max(np.abs(self.covariances[side]))
            self.bases[side] = np.linalg.qr(
                (covariance + 1e-4 * np.eye(len(covariance))) @ self.bases[side]
            )[0]

    def into(self, x):
        return self.bases[0].T @ x @ self.bases[1]

    def map(self, x):
        floor = 1e-3 * np.sqrt(np.mean(self.v)) if len(self.shape) > 1 else 0
        scale = ((np.sqrt(self.v) + floor) / np.sqrt(1 - DECAY**self.count) + 1e-8) ** -0.5
        left, right = self.bases
        return (left @ (scale * self.into(x.reshape(self.matrix))) @ right.T).reshape(self.shape)


def test_updates_are_those_of_the_formula(x64):
    """P F^-1 P g with the rows as they entered the window, by the bases of their step."""
    num_grads, damping = 5, 0.3
    stream = gradients(30)
    tx = scale_by_mfac(num_grads, damping, metric="rotated")
    state: Any = tx.init(jax.tree.map(jnp.asarray, stream[0]))
    update: Any = jax.jit(tx.update)
    rows: list[np.ndarray] = []
    reference = {name: Reference(name) for name in SHAPES}
    for grads in stream:
        updates, state = update(jax.tree.map(jnp.asarray, grads), state)
        for name, g in grads.items():
            reference[name].step(g)
        rows.append(flat({name: reference[name].map(g) for name, g in grads.items()}))
        window = np.stack(rows[-num_grads:])
        inside = unflat(inverse_product(window, window[-1], damping, num_grads))
        expected = flat({name: reference[name].map(x) for name, x in inside.items()})
        assert relative_error(flat(updates), expected) < 1e-8
    assert update._cache_size() == 1


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def unflat(x: np.ndarray) -> dict[str, np.ndarray]:
    ends = np.cumsum([int(np.prod(shape)) for shape in SHAPES.values()])
    parts = zip(SHAPES.items(), np.split(x, ends[:-1]), strict=True)
    return {name: part.reshape(shape) for (name, shape), part in parts}


def run(stream) -> Any:
    state: Any = ROTATED.init(lambda: jax.tree.map(lambda g: jnp.zeros(g.shape, jnp.float32), stream[0]))
    for count, g in enumerate(stream, 1):
        state = updated(state, jax.tree.map(jnp.float32, g), jnp.int32(count))
    return state


def test_bases_become_the_eigenvectors_of_the_covariances():
    state = run(gradients(1) * 400)  # the same gradient, so that nothing moves
    for name in ("conv", "kernel"):
        for covariance, basis in (
            (state.row_covariance, state.row_basis),
            (state.column_covariance, state.column_basis),
        ):
            S, Q = np.asarray(covariance[name][0, 0], np.float64), np.asarray(basis[name][0, 0], np.float64)
            rotated = Q.T @ S @ Q
            np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=1e-5)
            np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-5 * np.trace(S))
            assert np.all(np.diff(np.diag(rotated)) <= 1e-5 * np.trace(S))


HOSTILE = {
    "zeros": lambda g: 0 * g,
    "rank one": lambda g: np.ones(g.shape),
    "one entry": lambda g: np.eye(1, g.size).reshape(g.shape),
    "tiny": lambda g: 1e-30 * g,
    "huge": lambda g: 1e13 * np.sign(g),
    "outliers": lambda g: np.where(np.arange(g.size).reshape(g.shape) % 5 == 0, 1e8, 1e-8) * g,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_bases_stay_orthogonal_and_all_is_finite(kind):
    stream = gradients(25)
    for at in (*range(4), *range(12, 25, 2)):
        stream[at] = jax.tree.map(HOSTILE[kind], stream[at])
    state = run(stream)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))
    for basis in (state.row_basis, state.column_basis):
        for Q in (basis["conv"][0, 0], basis["kernel"][0, 0]):
            np.testing.assert_allclose(Q.T @ Q, np.eye(len(Q)), atol=2e-6)
    last = jax.tree.map(jnp.float32, stream[-1])
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(mapped(state, last, jnp.int32(26), last)))


def test_the_map_is_symmetric():
    x, y, last = (jax.tree.map(jnp.float32, g) for g in gradients(3, seed=1))
    state, count = run(gradients(15)), jnp.int32(16)
    there, back = flat(mapped(state, last, count, x)), flat(mapped(state, last, count, y))
    np.testing.assert_allclose(there @ flat(y), flat(x) @ back, rtol=1e-5)


def test_vectors_have_the_diagonal_metric(x64):
    tx = scale_by_mfac(3, 1e12, relative_damping=True, metric="rotated")
    adam = optax.scale_by_adam(b1=0.0, b2=DECAY)
    params = jnp.zeros(4)
    state, adams = tx.init(params), adam.init(params)
    for g in gradients(12):
        found, state = tx.update(jnp.asarray(g["bias"]), state)
        expected, adams = adam.update(jnp.asarray(g["bias"]), adams)
        np.testing.assert_allclose(flat(found), flat(expected), rtol=1e-8)


def test_rounding_does_not_choose_bases():
    """The first gradients leave most directions open."""
    stream = [{"kernel": g["kernel"]} for g in gradients(3)]
    random = np.random.default_rng(1)
    nudged = [{"kernel": g["kernel"] * (1 + 1e-7 * random.standard_normal((6, 5)))} for g in stream]
    found, wanted = (flat(mapped(run(s[:-1]), s[-1], jnp.int32(3), s[-1])) for s in (nudged, stream))
    assert relative_error(found, wanted) < 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_leaves_the_metric(bad):
    tx, stream = mfac(0.01, 4, metric="rotated"), gradients(4)
    update: Any = jax.jit(tx.update)
    params = jax.tree.map(lambda g: jnp.zeros(g.shape), stream[0])
    state: Any = tx.init(params)
    for g in stream:
        _, state = update(jax.tree.map(jnp.float32, g), state, params)
    spoiled = jax.tree.map(jnp.float32, stream[0])
    spoiled["kernel"] = spoiled["kernel"].at[1, 2].set(bad)
    _, after = update(spoiled, state, params)
    assert optax.tree.get(after, "grads_rejected") == 1
    before, after = (optax.tree.get(s, "ScaleByMFACState").metric for s in (state, after))
    jax.tree.map(np.testing.assert_array_equal, after, before)


LAYERS = {"up": ((32, 64), P("x", "y")), "down": ((64, 32), P("y", "x")), "bias": ((64,), P("y"))}


def layer_gradients(steps: int) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [
        {name: random.standard_normal(shape) for name, (shape, _) in LAYERS.items()} for _ in range(steps)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("metric", ["rotated", rotated_metric(8)])
def test_on_a_mesh_it_is_the_run_on_one_device(x64, axis_type, metric):
    tx, stream = mfac(0.1, 4, metric=metric), layer_gradients(8)
    update: Any = jax.jit(tx.update)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, (_, spec) in LAYERS.items()}
    params = jax.device_put(stream[0], shardings)
    state, spread = tx.init(jax.tree.map(jnp.asarray, stream[0])), tx.init(params)
    places = state_shardings(tx, params, shardings)
    on_mesh: Any = jax.jit(tx.update, out_shardings=(shardings, places))
    for g in stream:
        expected, state = update(g, state, stream[0])
        with jax.set_mesh(mesh):
            found, spread = on_mesh(jax.device_put(g, shardings), spread, params)
        assert relative_error(flat(found), flat(expected)) < 1e-8
    assert on_mesh._cache_size() == 1


def test_a_leaf_that_looks_like_its_tiles_is_sharded_as_a_row():
    """The second moment of a convolution over one place."""
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, P(None, None, None, "x"))
    params: Any = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.float32)
    metrics: Any = ("diagonal", "rotated")
    for metric in metrics:
        found: Any = state_shardings(scale_by_mfac(2, metric=metric), params, sharding)
        assert found.metric.second_moment == sharding


@pytest.mark.parametrize(
    ("shape", "spec"), [((64, 16), P(None, "x")), ((8, 64, 16), P(None, "y", "x")), ((64, 64), P("x"))]
)
def test_tiles_on_several_devices_have_the_covariances_of_one(shape, spec):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    g = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    tx: Any = scale_by_mfac(2, metric=rotated_metric(8 if min(shape) < 64 else 32))
    update: Any = jax.jit(lambda g, state: tx.update(g, state)[1].metric)
    on_mesh = jax.device_put(g, NamedSharding(mesh, spec))
    expected, found = update(g, tx.init(g)), update(on_mesh, tx.init(on_mesh))
    for name in ("row_covariance", "column_covariance", "second_moment"):
        assert relative_error(getattr(found, name), np.asarray(getattr(expected, name))) < 1e-5


@pytest.mark.parametrize("block_size", [0, 7, 100, 2**14])
def test_a_size_that_blocks_cannot_have_is_refused(block_size):
    message = f"block_size must be .*, got {block_size}. Pass e.g. 128." if block_size else "block_size"
    with pytest.raises(ValueError, match=message):
        rotated_metric(block_size)


def test_a_size_of_numpy_is_that_size():
    assert rotated_metric(int(np.int64(64))) is rotated_metric(np.int64(64))  # pyright: ignore[reportArgumentType]
    scale_by_mfac(2, metric=rotated_metric(np.int64(1024)))  # pyright: ignore[reportArgumentType]


def test_the_first_state_promotes_no_ranks():
    with jax.numpy_rank_promotion("raise"):
        scale_by_mfac(2, metric="rotated").init({"w": jnp.ones((64, 64))})


def test_a_state_with_other_blocks_is_refused():
    params = jnp.ones((32, 16))
    state = scale_by_mfac(2, metric=rotated_metric(8)).init(params)
    with pytest.raises(ValueError, match="rotated, blocks of 8"):
        scale_by_mfac(2, metric="rotated").update(params, state)


def test_tiles_lie_where_their_part_of_the_leaf_is():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    shapes = {"large": (8192, 2048), "small": (64, 32), "odd": (50257, 64)}
    specs = {"large": P("x", "y"), "small": P("x", None), "odd": P(None, "y")}
    params: Any = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    found: Any = state_shardings(scale_by_mfac(2, metric="rotated"), params, shardings).metric
    for side in (found.row_basis, found.column_covariance):
        assert side["large"].spec == P(("x",), ("y",), None, None)
        # One tile is whole on all devices.
        assert side["small"].is_fully_replicated
    assert found.row_basis["odd"].is_fully_replicated
