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
from tests.training_runs import correlated_gradients, relative_error, train_step

P = PartitionSpec
slow = pytest.mark.slow
NUM_GRADS, STEPS = 8, 20
SHAPES = {"kernel": (128, 256), "conv": (8, 8, 128), "bias": (128,), "odd": (5, 3), "scale": ()}
ON_HOST = {"kernel", "conv"}  # the others cannot be written there on TPUs
GRADIENTS = correlated_gradients(SHAPES, STEPS, refused="conv")
SPECS = {"kernel": P(None, "x"), "conv": P(), "bias": P(), "odd": P(), "scale": P()}


def start():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))
    ones = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    return jax.device_put(
        ones, {name: NamedSharding(mesh, P(*[None] * x.ndim)) for name, x in ones.items()}
    )


def train(tx, params, state):
    shardings = jax.tree.map(lambda x: x.sharding, (params, state))
    step: Any = jax.jit(functools.partial(train_step, tx), donate_argnums=(0, 1), out_shardings=shardings)
    for grads in GRADIENTS:
        params, state = step(params, state, grads)
        assert_window_on_host(state)
    assert step._cache_size() == 1
    return params, state


@functools.cache
def in_device_memory(storage):
    tx = mfac(0.01, NUM_GRADS, metric="diagonal", storage=storage)
    params, state = start(), tx.init(start())
    step: Any = jax.jit(functools.partial(train_step, tx))
    for grads in GRADIENTS:
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
    moved, wanted = (jax.tree.map(lambda x: np.asarray(x) - 1, p) for p in (params, wanted_params))
    assert relative_error(moved, wanted) < 1e-6
    for name in ("window", "gram", "coefficients"):
        found, wanted = (optax.tree.get(s, name) for s in (state, wanted_state))
        assert relative_error(found, wanted) < 1e-6, name
    assert optax.tree.get(state, "grads_rejected") == 1


@pytest.mark.parametrize(
    ("host_chunk", "storage"),
    [
        (3, None),
        *(
            pytest.param(*c, marks=slow)
            for c in [(1, None), (NUM_GRADS, None), (100, None), (3, jnp.bfloat16)]
        ),
    ],
    ids=str,
)
def test_steps_are_those_of_device_memory(host_chunk, storage):
    tx = mfac(0.01, NUM_GRADS, metric="diagonal", storage=storage, host_chunk=host_chunk)
    state = tx.init(start())
    assert_window_on_host(state)
    assert_equal_to_device_memory(*train(tx, start(), state), storage=storage)


@slow
def test_a_scan_over_steps_is_the_same():
    tx = mfac(0.01, NUM_GRADS, metric="diagonal", storage=None, host_chunk=3)
    stacked = jax.tree.map(lambda *x: np.stack(x), *GRADIENTS)

    def train_all(params, state):
        def step(carry, grads):
            params, state = carry
            return train_step(tx, params, state, grads), None

        return jax.lax.scan(step, (params, state), stacked)[0]

    params, state = jax.jit(train_all, donate_argnums=1)(start(), tx.init(start()))
    assert_window_on_host(state)
    assert_equal_to_device_memory(params, state)


def on_mesh(axis_type: AxisType):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(axis_type,) * 2)
    padded = {name: [*spec, *[None] * (len(SHAPES[name]) - len(spec))] for name, spec in SPECS.items()}
    return {name: NamedSharding(mesh, P(*spec)) for name, spec in padded.items()}


@slow
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_on_a_mesh_each_device_streams_its_shard(axis_type):
    tx, param_shardings = (
        mfac(0.01, NUM_GRADS, metric="diagonal", storage=None, host_chunk=3),
        on_mesh(axis_type),
    )
    params = jax.device_put(start(), param_shardings)
    shardings = state_shardings(tx, params, param_shardings)
    state = tx.init(params)
    for made in (jax.jit(tx.init, out_shardings=shardings)(params), state):
        assert [x.sharding for x in jax.tree.leaves(made)] == jax.tree.leaves(shardings)
    assert_window_on_host(state)
    step: Any = jax.jit(
        functools.partial(train_step, tx), donate_argnums=(0, 1), out_shardings=(param_shardings, shardings)
    )
    for grads in GRADIENTS:
        params, state = step(params, state, jax.device_put(grads, param_shardings))
        assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(shardings)
    assert step._cache_size() == 1
    assert_equal_to_device_memory(params, state)


@slow
def test_in_shard_map_each_device_streams_its_shard():
    tx, param_shardings = (
        mfac(0.01, NUM_GRADS, storage=None, axis_name=("x", "y"), host_chunk=3),
        on_mesh(AxisType.Auto),
    )
    params = jax.device_put(start(), param_shardings)
    shardings = state_shardings(tx, params, param_shardings)
    state = tx.init(params)
    assert [x.sharding for x in jax.tree.leaves(state)] == jax.tree.leaves(shardings)
    specs, state_specs = (jax.tree.map(lambda s: s.spec, t) for t in (param_shardings, shardings))
    in_specs, out_specs = (specs, state_specs, specs), (specs, state_specs)
    step: Any = functools.partial(train_step, tx)
    step = jax.shard_map(step, mesh=param_shardings["kernel"].mesh, in_specs=in_specs, out_specs=out_specs)
    step = jax.jit(step, donate_argnums=(0, 1))
    for grads in GRADIENTS:
        params, state = step(params, state, jax.device_put(grads, param_shardings))
        assert_window_on_host(state)
    assert_equal_to_device_memory(params, state)


def test_the_shardings_of_a_chain_put_its_windows_alone_on_the_host():
    tx = optax.chain(
        optax.ema(0.9),
        optax.masked(scale_by_mfac(NUM_GRADS, host_chunk=3), {name: name != "conv" for name in SHAPES}),
        optax.scale_by_lbfgs(NUM_GRADS),
    )
    params = start()
    shardings = state_shardings(tx, params, NamedSharding(jax.make_mesh((1,), ("x",)), P()))
    kinds = [
        (jax.tree_util.keystr(path), s.memory_kind)
        for path, s in jax.tree_util.tree_leaves_with_path(shardings)
    ]
    on_host = [name for name, kind in kinds if kind == "pinned_host"]
    assert len(on_host) == 1
    assert "window['kernel']" in on_host[0]


@slow
def test_outside_of_jit_with_products_with_the_fisher_inverse_and_diagnostics():
    tx, other = scale_by_mfac(4, host_chunk=3), scale_by_mfac(4)
    state: Any = tx.init(start())
    expected: Any = other.init(start())
    for grads in GRADIENTS[:2]:
        _, state = tx.update(grads, state)
        _, expected = other.update(grads, expected)
    assert_window_on_host(state)
    found, wanted = (ihvp(s, start(), damping=1.0) for s in (state, expected))
    assert relative_error(found, wanted) < 1e-6
    assert relative_error(diagnostics(state), diagnostics(expected)) < 1e-6


@slow
@pytest.mark.parametrize(
    "args", [ocp.args.StandardRestore, ocp.args.PyTreeRestore], ids=lambda a: a.__name__
)
def test_a_checkpoint_is_restored_to_the_host(tmp_path, args):
    tx, params = scale_by_mfac(4, host_chunk=3), start()
    shardings = state_shardings(tx, params, NamedSharding(jax.make_mesh((1,), ("x",)), P()))
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    _, state = jax.jit(tx.update, out_shardings=(None, shardings))(GRADIENTS[0], state)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, params),
        shardings,
    )
    standard = args is ocp.args.StandardRestore
    saved = ocp.args.StandardSave(state) if standard else ocp.args.PyTreeSave(state)
    asked = (
        args(shapes)
        if standard
        else args(shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes))
    )
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=saved)
        manager.wait_until_finished()
        restored: Any = manager.restore(0, args=asked)
    assert_window_on_host(restored)
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    jax.jit(tx.update)(GRADIENTS[1], restored)


def test_a_donated_state_is_updated_in_place_with_temporaries_of_chunks():
    params = {"kernel": jnp.ones((1024, 128))}
    tx = scale_by_mfac(64, host_chunk=4)
    state = tx.init(params)
    compiled: Any = jax.jit(tx.update, donate_argnums=1).lower(params, state).compile()
    memory, row = compiled.memory_analysis(), params["kernel"].nbytes
    # On CPU this counts memory of the host and of the device together.
    assert memory.alias_size_in_bytes >= 64 * row
    assert memory.temp_size_in_bytes < (4 + 4) * row


# Bad input.


@pytest.mark.parametrize("value", [0, -1, True, 1.5, "all"])
@pytest.mark.parametrize(
    "factory", [scale_by_mfac, functools.partial(mfac, 0.01)], ids=["scale_by_mfac", "mfac"]
)
def test_a_chunk_that_is_no_count_of_rows_is_refused(factory, value):
    with pytest.raises(
        (TypeError, ValueError), match=r"host_chunk must be an int >= 1, got .*Pass e\.g\. 8"
    ):
        factory(4, host_chunk=value)


def test_a_traced_chunk_is_refused():
    tx = optax.inject_hyperparams(scale_by_mfac, static_args="num_grads")(num_grads=4, host_chunk=2)
    with pytest.raises(TypeError, match=r"host_chunk .*pass static_args=\('host_chunk',\)"):
        tx.init(start())
    static = ("num_grads", "host_chunk")
    assert_window_on_host(
        optax.inject_hyperparams(scale_by_mfac, static_args=static)(num_grads=4, host_chunk=2).init(start())
    )


def test_a_window_in_the_other_memory_is_refused():
    tx, other = scale_by_mfac(4, host_chunk=2), scale_by_mfac(4)
    with pytest.raises(ValueError, match=r"pinned memory of the host with host_chunk=2\. Put it there"):
        tx.update(start(), other.init(start()))
    with pytest.raises(ValueError, match="memory of the device with host_chunk=None"):
        other.update(start(), tx.init(start()))
