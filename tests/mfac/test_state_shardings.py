"""Where the state lies on a mesh: the policy, shardings of whole chains, and of models of Flax."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.linen import spmd
from jax.sharding import AxisType, NamedSharding

from mfac_jax import mfac, scale_by_mfac, state_shardings
from mfac_jax._src.rows import mesh as _mesh
from tests.mfac.on_mesh import NUM_GRADS, SPECS, P, assert_sharded_as, make_mesh, start

slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((8, 16), {"x": 8}, (("x",), ())),  # the last axis only where there is no other
        ((4, 8, 64), {"x": 4}, ((), ("x",), ())),  # the longest of the others
        ((3, 16), {"x": 8}, ((), ("x",))),
        ((16,), {"x": 4, "y": 2}, (("x", "y"),)),  # all together
        ((4, 6), {"x": 2, "y": 4}, (("y",), ("x",))),  # one after the other, the largest first
        ((9, 4, 3), {"x": 4, "y": 3}, (("y",), ("x",), ())),
        ((5, 3), {"x": 2}, ((), ())),
        ((8, 3), {"x": 1}, ((), ())),
        ((0, 8), {"x": 8}, ((), ())),
        ((), {"x": 8}, ()),
    ],
)
def test_the_policy(shape, axes, expected):
    assert _mesh.split(shape, axes) == expected


CHAINS = {
    "chain": optax.chain(optax.clip_by_global_norm(1.0), mfac(0.01, 8), optax.ema(0.9)),
    "masked": optax.masked(mfac(0.01, 8), {"w": True, "b": False}),
    "partition": optax.partition({"m": mfac(0.01, 8), "a": optax.adam(0.01)}, {"w": "m", "b": "a"}),
    "inject_hyperparams": optax.inject_hyperparams(mfac, static_args="num_grads")(0.01, num_grads=8),
    "MultiSteps": optax.MultiSteps(mfac(0.01, 8), 2),
    "apply_if_finite": optax.apply_if_finite(mfac(0.01, 8, weight_decay=1e-4), 3),
}


@pytest.mark.parametrize(
    "chain", [n if n in ("masked", "MultiSteps") else pytest.param(n, marks=slow) for n in CHAINS]
)
def test_state_shardings_fit_any_chain(chain):
    mesh, tx = make_mesh(AxisType.Auto, ("x",), (8,)), CHAINS[chain]
    params = {"w": jnp.ones((64, 32)), "b": jnp.ones(32)}
    shardings = state_shardings(
        tx, params, {"w": NamedSharding(mesh, P("x")), "b": NamedSharding(mesh, P())}
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))
    assert_sharded_as(state, shardings)
    (_, window), *others = optax.tree.get_all_with_path(shardings, "window")
    assert not others
    assert window.values["w"].spec == P(None, "x", None)
    assert window.scales["w"].spec == P(None, None, None)


def test_partition_specs_are_taken_on_the_mesh_that_is_set():
    mesh, tx = make_mesh(AxisType.Auto), mfac(0.01, NUM_GRADS)
    with jax.set_mesh(mesh):
        assert state_shardings(tx, start(), SPECS["mixed"]) == state_shardings(
            tx, start(), {name: NamedSharding(mesh, spec) for name, spec in SPECS["mixed"].items()}
        )


def test_state_shardings_without_parameters_and_of_python_numbers():
    mesh = make_mesh(AxisType.Auto)
    for params in ({}, {"w": 1.0}):
        shardings = state_shardings(mfac(0.1, 4), params, NamedSharding(mesh, P()))
        assert optax.tree.get(shardings, "gram").mesh == mesh
    with pytest.raises(ValueError, match="for what is replicated"):
        state_shardings(mfac(0.1, 4), {"w": jnp.ones(2)}, {"w": None})
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shardings = state_shardings(mfac(0.1, 4), {"w": jnp.ones((8, 2))}, P())
        assert optax.tree.get(shardings, "window").values["w"].spec == P(None, ("x", "y"), None)


@slow
def test_a_leaf_without_entries_keeps_its_sharding():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx: Any = scale_by_mfac(4, axis_name="x")
    params = {"w": jnp.ones((8, 2)), "none": jnp.ones((0, 8))}
    shardings = state_shardings(tx, params, NamedSharding(mesh, P()))
    specs = jax.tree.map(lambda s: s.spec, shardings)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    update = jax.jit(jax.shard_map(tx.update, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs)))
    assert_sharded_as(update(params, state)[1], shardings)


def boxed_linen_layer(mesh):
    """Parameters in boxes, one with mesh axes and one with logical axes, and their shardings."""
    kernel_init = nn.with_partitioning(nn.initializers.lecun_normal(), ("x", "y"))
    bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("features",))
    params = nn.Dense(16, kernel_init=kernel_init, bias_init=bias_init).init(
        jax.random.key(0), jnp.ones((1, 8))
    )["params"]
    rules = (("x", "x"), ("y", "y"), ("features", "y"))
    return params, spmd.logical_to_mesh_sharding(nn.get_partition_spec(params), mesh, rules)


def nnx_layer(mesh):
    """Parameters with metadata, and the shardings these say."""

    def init(initializer, axes):
        return nnx.with_partitioning(initializer, axes)

    with nnx.use_eager_sharding(False):
        layer = nnx.Linear(
            8,
            16,
            kernel_init=init(nnx.initializers.lecun_normal(), ("x", "y")),
            bias_init=init(nnx.initializers.zeros_init(), ("y",)),
            rngs=nnx.Rngs(0),
        )
    params = nnx.state(layer, nnx.Param)
    return params, nnx.get_named_sharding(params, mesh)


LAYERS = pytest.mark.parametrize("make_layer", [boxed_linen_layer, nnx_layer])


@LAYERS
def test_shardings_of_flax_models_are_those_of_their_metadata(make_layer):
    params, param_shardings = make_layer(make_mesh(AxisType.Auto))
    shardings = state_shardings(mfac(0.01, NUM_GRADS), params, param_shardings)
    window = [s.spec for s in jax.tree.leaves(optax.tree.get(shardings, "window").values)]
    assert window == [P(None, ("y", "x")), P(None, "x", "y")]


@slow
@LAYERS
def test_flax_models_are_stepped_with_these_shardings(make_layer):
    mesh, tx = make_mesh(AxisType.Auto), mfac(0.01, NUM_GRADS)
    params, param_shardings = make_layer(mesh)
    shardings = state_shardings(tx, params, param_shardings)
    params = jax.tree.map(
        jax.device_put,
        params,
        jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(param_shardings)),
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    step: Any = jax.jit(tx.update, donate_argnums=1, out_shardings=(param_shardings, shardings))
    updates, state = step(params, state)
    assert_sharded_as(state, shardings)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(state) == jax.tree.structure(tx.init(params))


def test_shardings_that_do_not_fit_are_refused():
    mesh, params = make_mesh(AxisType.Auto), {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
    tx, fits = mfac(0.01, 4), NamedSharding(mesh, P())
    for bad, error, message in [
        (NamedSharding(mesh, P(None, None, "x")), ValueError, r"\['w'\].*Leave out an entry"),
        (NamedSharding(mesh, P("x")), ValueError, r"axis 0 of leaf \['w'\], 6 long, .*'x'"),
        (P("x"), ValueError, r"P\('x',\) for leaf \['w'\], but no mesh is set.*jax\.set_mesh"),
        (
            jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            TypeError,
            r"that of leaf \['w'\] is Single.*NamedSharding\(mesh, spec\)",
        ),
    ]:
        with pytest.raises(error, match=message):
            state_shardings(tx, params, {"w": bad, "b": fits})
    with pytest.raises(ValueError, match="tree of params"):
        state_shardings(tx, params, {"w": fits})
    other = NamedSharding(make_mesh(AxisType.Auto, ("z",), (8,)), P())
    with pytest.raises(ValueError, match="one mesh, got 2"):
        state_shardings(tx, params, {"w": fits, "b": other})
