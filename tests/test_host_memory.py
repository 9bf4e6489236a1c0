"""The window in pinned memory of the host: the same steps, where the state lies, and what is refused."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax import diagnostics, ihvp, mfac, scale_by_mfac, state_shardings

P = PartitionSpec
NUM_GRADS, STEPS = 8, 20
SHAPES = {"kernel": (128, 16), "conv": (3, 8, 128), "bias": (128,), "odd": (5, 3), "scale": ()}
ON_HOST = {"kernel", "conv"}  # the others cannot be written there on TPUs
# Over 8 devices in all: a shard of the kernel is (16, 128), and one of the others a leaf that is whole.
SPECS = {"kernel": P(None, "x"), "conv": P(), "bias": P(), "odd": P(), "scale": P()}


@functools.cache
def gradients() -> list[dict[str, np.ndarray]]:
    """Correlated gradients; the fifth is refused."""
    random = np.random.default_rng(0)
    common = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    stream = [
        {name: (c + random.standard_normal(c.shape)).astype(np.float32) for name, c in common.items()}
        for _ in range(STEPS)
    ]
    stream[4]["conv"][1, 2, 3] = np.nan
    return stream


def start():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def train_step(tx, params, state, grads):
    """A step that leaves the parameters where the gradient is refused."""
    rejected = optax.tree.get(state, "grads_rejected")
    updates, state = tx.update(grads, state, params)
    accepted = optax.tree.get(state, "grads_rejected") == rejected
    moved = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, params), state


def train(tx, params, state, jit: bool = True):
    step: Any = functools.partial(train_step, tx)
    step = jax.jit(step, donate_argnums=(0, 1)) if jit else step
    for grads in gradients():
        params, state = step(params, state, grads)
        assert_window_on_host(state)
    return params, state


@functools.cache
def in_device_memory(storage):
    tx = mfac(0.01, NUM_GRADS, storage=storage)
    params, state = start(), tx.init(start())
    step: Any = jax.jit(functools.partial(train_step, tx))
    for grads in gradients():
        params, state = step(params, state, grads)
    return jax.device_get((params, state))


def assert_window_on_host(state, on_host=frozenset(ON_HOST)) -> None:
    """These leaves of the window are on the host, all else on the device."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        names = jax.tree_util.keystr(path)
        expected = "window" in names and any(repr(name) in names for name in on_host)
        assert leaf.sharding.memory_kind == ("pinned_host" if expected else "device"), names


def assert_equal_to_device_memory(params, state, storage=None) -> None:
    wanted_params, wanted_state = in_device_memory(storage)
    for name, param in params.items():
        moved, wanted = np.asarray(param) - 1, wanted_params[name] - 1
        np.testing.assert_allclose(moved, wanted, rtol=0, atol=1e-6 * np.linalg.norm(wanted))
    gram, wanted = (optax.tree.get(s, "gram") for s in (state, wanted_state))
    np.testing.assert_allclose(gram, wanted, rtol=0, atol=1e-6 * np.linalg.norm(wanted))
    assert optax.tree.get(state, "grads_rejected") == 1


@pytest.mark.parametrize(
    ("host_chunk", "storage"),
    [(1, None), (3, None), (NUM_GRADS, None), (100, None), (3, jnp.bfloat16)],
    ids=str,
)
def test_steps_are_those_of_device_memory(host_chunk, storage):
    tx = mfac(0.01, NUM_GRADS, storage=storage, host_chunk=host_chunk)
    state = tx.init(start())
    assert_window_on_host(state)
    assert_equal_to_device_memory(*train(tx, start(), state), storage=storage)


def test_outside_of_jit_steps_are_the_same():
    tx = mfac(0.01, NUM_GRADS, host_chunk=3)
    assert_equal_to_device_memory(*train(tx, start(), tx.init(start()), jit=False))


def test_a_scan_over_steps_is_the_same():
    tx = mfac(0.01, NUM_GRADS, host_chunk=3)
    stacked = jax.tree.map(lambda *x: np.stack(x), *gradients())

    def train_all(params, state):
        def step(carry, grads):
            return train_step(tx, *carry, grads), None

        return jax.lax.scan(step, (params, state), stacked)[0]

    params, state = jax.jit(train_all, donate_argnums=1)(start(), tx.init(start()))
    assert_window_on_host(state)
    assert_equal_to_device_memory(params, state)


def on_mesh(axis_type: AxisType):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    padded = {name: [*spec, *[None] * (len(SHAPES[name]) - len(spec))] for name, spec in SPECS.items()}
    return {name: NamedSharding(mesh, P(*spec)) for name, spec in padded.items()}


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_on_a_mesh_each_device_streams_its_shard(axis_type):
    tx, param_shardings = mfac(0.01, NUM_GRADS, host_chunk=3), on_mesh(axis_type)
    params = jax.device_put(start(), param_shardings)
    shardings = state_shardings(tx, params, param_shardings)
    state = tx.init(params)
    for made in (jax.jit(tx.init, out_shardings=shardings)(params), state):
        assert jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), made, shardings)
    step: Any = jax.jit(
        functools.partial(train_step, tx), donate_argnums=(0, 1), out_shardings=(param_shardings, shardings)
    )
    for grads in gradients():
        params, state = step(params, state, jax.device_put(grads, param_shardings))
        assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(shardings)
    assert step._cache_size() == 1
    assert_equal_to_device_memory(params, state)


if __name__ == "__main__":
    pass
