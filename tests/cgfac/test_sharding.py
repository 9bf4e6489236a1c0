"""CG-FAC with batches and parameters that are sharded."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mfac_jax import cgfac, value_and_grad_with_factors
from tests.cgfac.network import X, cross_entropy
from tests.dense_reference import relative_error


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def relative_errors(actual, expected) -> list[float]:
    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    return [relative_error(np.asarray(x), np.asarray(y)) for x, y in pairs]


def train_on_one_and_on_eight(batch: int, damping: float, dtype):
    """The parameters after three steps, on one device and with the batch split over eight."""
    model = nn.Sequential([nn.Dense(16, param_dtype=dtype), nn.tanh, nn.Dense(3, param_dtype=dtype)])
    x, labels = jax.random.normal(jax.random.key(3), (batch, 12), dtype), jnp.arange(batch) % 3
    params = jax.jit(model.init)(jax.random.key(1), x)
    tx = cgfac(0.3, damping)

    @jax.jit
    def step(params, state, x, labels):
        run = value_and_grad_with_factors(lambda p: cross_entropy(model.apply(p, x), labels))
        _, gradient, factors = run(params)
        updates, state = tx.update(gradient, state, params, curvature=factors)
        return optax.apply_updates(params, updates), state

    mesh = Mesh(np.array(jax.devices()), ("data",))
    everywhere, sharded = (NamedSharding(mesh, PartitionSpec(*names)) for names in ((), ("data",)))
    one, many = (params, tx.init(params)), jax.device_put((params, tx.init(params)), everywhere)
    x_sharded, labels_sharded = jax.device_put((x, labels), sharded)
    for _ in range(3):
        one, many = step(*one, x, labels), step(*many, x_sharded, labels_sharded)
    return one[0], many[0]


BATCHES = pytest.mark.parametrize("batch", [64, 8], ids=["more examples than entries", "fewer"])


@pytest.mark.slow
@BATCHES
def test_a_batch_sharded_over_eight_devices_trains_as_on_one(batch):
    one, many = train_on_one_and_on_eight(batch, 0.1, jnp.float32)
    assert max(relative_errors(many, one)) < 1e-5


@pytest.mark.slow
@BATCHES
def test_in_double_precision_so_does_one_at_the_damping_of_the_default(x64, batch):
    """In float32 rounding is multiplied with the condition number, and the two differ by 3e-4."""
    one, many = train_on_one_and_on_eight(batch, 1e-2, jnp.float64)
    assert max(relative_errors(many, one)) < 1e-10


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit], ids=str
)
def test_parameters_and_batch_may_both_be_sharded(axis_type):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    place = functools.partial(NamedSharding, mesh)
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 6)), "bias": jnp.zeros(6)}

    def loss(params, x):
        return jnp.mean(jnp.tanh(x @ params["kernel"] + params["bias"]) ** 2)

    tx = cgfac(0.1, 0.1)

    @jax.jit
    def step(params, x):
        _, gradient, factors = value_and_grad_with_factors(loss)(params, x)
        return tx.update(gradient, tx.init(params), params, curvature=factors)[0]

    expected = step(params, X)
    with jax.set_mesh(mesh):
        split = {"kernel": place(PartitionSpec(None, "model")), "bias": place(PartitionSpec("model"))}
        params, x = jax.device_put(params, split), jax.device_put(X, place(PartitionSpec("data")))
        updates = jax.device_get(step(params, x))
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
