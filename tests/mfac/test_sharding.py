"""The same steps on a mesh of eight devices, in every mode, as on one device; where the state lies."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.linen import spmd
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import compiled_update
from mfac_jax import mfac, mfac_published, scale_by_mfac, state_shardings
from mfac_jax._src.rows import mesh as _mesh
from tests.training_runs import correlated_gradients, relative_error, train_step

P = PartitionSpec
NUM_GRADS, STEPS = 16, 20
SHAPES: dict[str, tuple[int, ...]] = {
    "kernel": (8, 16),
    "table": (24, 4),
    "conv": (3, 3, 4, 8),
    "bias": (16,),
    "odd": (5, 3),
    "scale": (),
}
# (4, 2) devices on ("x", "y").
SPECS: dict[str, dict[str, PartitionSpec]] = {
    "replicated": dict.fromkeys(SHAPES, P()),
    "sharded": {
        "kernel": P("x", "y"),
        "table": P(("x", "y")),
        "conv": P(None, None, None, ("y", "x")),
        "bias": P("x"),
        "odd": P(),
        "scale": P(),
    },
    "mixed": {
        "kernel": P("x"),
        "table": P(None, "y"),
        "conv": P(),
        "bias": P(),
        "odd": P(),
        "scale": P(),
    },
}
slow = pytest.mark.slow
TRANSFORMS = {
    "default": functools.partial(mfac, 0.01, NUM_GRADS, weight_decay=1e-3),
    "plain": functools.partial(
        mfac, 0.01, NUM_GRADS, metric="identity", momentum=None, step_adaptation=0.0, solver="inverse"
    ),
    "half, a block a leaf": functools.partial(mfac, 0.01, NUM_GRADS, blocks="leaf", storage=jnp.bfloat16),
}
CASES = [("default", placement) for placement in SPECS] + [(kind, "mixed") for kind in [*TRANSFORMS][1:]]
QUICK = ("default", "mixed")
KINDS_AND_PLACEMENTS = pytest.mark.parametrize(
    ("kind", "placement"), [pytest.param(*case, marks=[] if case == QUICK else slow) for case in CASES]
)


GRADIENTS = correlated_gradients(SHAPES, STEPS, refused="kernel")


def make_mesh(axis_type: AxisType, names=("x", "y"), sizes=(4, 2)):
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))


def start() -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


@functools.cache
def single_device(kind: str):
    tx = TRANSFORMS[kind]()
    params = jax.device_put(start(), jax.devices()[0])
    state, step = tx.init(params), jax.jit(functools.partial(train_step, tx))
    for grads in GRADIENTS:
        params, state = step(params, state, grads)
    return jax.device_get((params, state))


def check_equal_to_one_device(kind: str, params, state) -> None:
    expected_params, expected_state = single_device(kind)
    moved, expected = (jax.tree.map(lambda p, s: p - s, p, start()) for p in (params, expected_params))
    assert relative_error(moved, expected) < 1e-5
    for name in ("window", "gram", "coefficients"):
        found, wanted = (jax.device_get(optax.tree.get(s, name)) for s in (state, expected_state))
        assert relative_error(found, wanted) < (4e-3 if "half" in kind and name == "window" else 1e-5), name
    assert optax.tree.get(state, "grads_rejected") == 1


def named(mesh, placement: str) -> dict[str, NamedSharding]:
    """With an entry for each axis: explicit axes spell types so, and another spelling compiles anew."""
    specs = SPECS[placement].items()
    padded = {name: [*spec, *[None] * (len(SHAPES[name]) - len(spec))] for name, spec in specs}
    return {name: NamedSharding(mesh, P(*spec)) for name, spec in padded.items()}


def assert_sharded_as(tree, shardings) -> None:
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.shape, leaf.sharding, sharding)


@KINDS_AND_PLACEMENTS
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda t: t.name)
def test_under_jit_on_a_mesh_it_is_the_run_on_one_device(axis_type, placement, kind):
    mesh, tx = make_mesh(axis_type), TRANSFORMS[kind]()
    param_shardings = named(mesh, placement)
    params = jax.device_put(start(), param_shardings)
    shardings = state_shardings(tx, params, param_shardings)
    state = tx.init(params)
    assert_sharded_as(state, shardings)
    assert_sharded_as(jax.jit(tx.init, out_shardings=shardings)(params), shardings)
    auto = axis_type == AxisType.Auto
    step: Any = jax.jit(
        functools.partial(train_step, tx),
        donate_argnums=(0, 1),
        out_shardings=(param_shardings, shardings) if auto else None,
    )
    for grads in GRADIENTS:
        params, state = step(params, state, jax.device_put(grads, param_shardings))
        assert_sharded_as(params, param_shardings)
        assert_sharded_as(state, shardings)
    assert step._cache_size() == 1
    check_equal_to_one_device(kind, params, state)


AXES = ("x", "y")


@KINDS_AND_PLACEMENTS
@pytest.mark.parametrize(
    "inside",
    [pytest.param(False, marks=slow), True],
    ids=["init outside", "init inside"],
)
def test_inside_of_shard_map_it_is_the_run_on_one_device(placement, kind, inside):
    mesh, tx = make_mesh(AxisType.Auto), TRANSFORMS[kind](axis_name=AXES)
    param_shardings = named(mesh, placement)
    params = jax.device_put(start(), param_shardings)
    shardings = state_shardings(tx, params, param_shardings)
    specs, state_specs = (jax.tree.map(lambda s: s.spec, t) for t in (param_shardings, shardings))
    mapped = functools.partial(jax.shard_map, mesh=mesh)
    init = jax.jit(mapped(tx.init, in_specs=(specs,), out_specs=state_specs)) if inside else tx.init
    state = init(params)
    assert_sharded_as(state, shardings)
    in_specs, out_specs = (specs, state_specs, specs), (specs, state_specs)
    step = jax.jit(mapped(functools.partial(train_step, tx), in_specs=in_specs, out_specs=out_specs))
    for grads in GRADIENTS:
        params, state = step(params, state, jax.device_put(grads, param_shardings))
        assert_sharded_as(state, shardings)
    check_equal_to_one_device(kind, params, state)


@pytest.mark.parametrize(
    ("kind", "axis_name"),
    [
        ("default", "i"),
        pytest.param("default", None, marks=slow),
        *(pytest.param(kind, "i", marks=slow) for kind in [*TRANSFORMS][1:]),
    ],
    ids=str,
)
def test_inside_of_pmap_it_is_the_run_on_one_device(kind, axis_name):
    tx = TRANSFORMS[kind](axis_name=axis_name)
    params = jax.tree.map(lambda p: np.broadcast_to(p, (8, *p.shape)), start())
    state = jax.pmap(tx.init, axis_name="i")(params)
    sizes = {name: rows.size // 8 for name, rows in optax.tree.get(state, "window").items()}
    whole = {name: NUM_GRADS * p.size for name, p in start().items()}
    assert sizes == {
        n: s if axis_name is None or n in ("odd", "scale") else s // 8 for n, s in whole.items()
    }

    def step(params, state, grads):
        return train_step(tx, params, state, jax.lax.pmean(grads, "i"))

    step = jax.pmap(step, axis_name="i", donate_argnums=(0, 1))
    for grads in GRADIENTS:
        grads = jax.tree.map(lambda g: np.broadcast_to(g, (8, *g.shape)), grads)
        params, state = step(params, state, grads)
    params, state = jax.device_get((params, state))
    for name in ("gram", "coefficients"):
        copies = optax.tree.get(state, name)
        np.testing.assert_array_equal(copies, np.broadcast_to(copies[:1], copies.shape))
    expected_params, expected_state = single_device(kind)
    moved, expected = (jax.tree.map(lambda p, s: p - s, p, start()) for p in (params, expected_params))
    assert relative_error(jax.tree.map(lambda p: p[0], moved), expected) < 1e-5
    assert relative_error(optax.tree.get(state, "gram")[0], optax.tree.get(expected_state, "gram")) < 1e-5


@slow
def test_momentum_of_updates_skips_a_gradient_that_is_bad_on_another_device():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx, alone = (mfac_published(0.01, 4, weight_decay=None, axis_name=name) for name in ("x", None))
    bad = jnp.ones(8).at[3].set(jnp.inf)
    state, expected = tx.init(bad), alone.init(bad)
    shardings = state_shardings(tx, bad, NamedSharding(mesh, P("x")))
    specs = jax.tree.map(lambda s: s.spec, shardings)
    step = jax.jit(jax.shard_map(tx.update, mesh=mesh, in_specs=(P("x"), specs), out_specs=(P("x"), specs)))
    updates: Any = None
    wanted: Any = None
    for gradient in (jnp.arange(8.0), bad, jnp.ones(8)):
        updates, state = step(gradient, state)
        wanted, expected = alone.update(gradient, expected)
    np.testing.assert_allclose(updates, wanted, rtol=1e-5)


# The compiled programs.


def compile_on_mesh(tx, placement: str, mode: str):
    """A compiled update, and the bytes of the state on one device."""
    mesh = make_mesh(AxisType.Explicit if mode == "Explicit" else AxisType.Auto)
    param_shardings = named(mesh, placement)
    params = jax.device_put(start(), param_shardings)
    shardings, state = state_shardings(tx, params, param_shardings), tx.init(params)
    update: Any = tx.update
    options: dict[str, Any] = {}
    if mode == "shard_map":
        specs, state_specs = (jax.tree.map(lambda s: s.spec, t) for t in (param_shardings, shardings))
        in_specs, out_specs = (specs, state_specs, specs), (specs, state_specs)
        update = jax.shard_map(update, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    elif mode == "Auto":
        options = {"out_shardings": (param_shardings, shardings)}
    compiled: Any = jax.jit(update, donate_argnums=1, **options).lower(params, state, params).compile()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    return compiled, held


QUICK_PROGRAMS = [("Auto", "mixed"), ("shard_map", "replicated")]


@pytest.mark.parametrize(
    ("mode", "placement"),
    [
        pytest.param(*case, marks=[] if case in QUICK_PROGRAMS else slow)
        for case in itertools.product(["Auto", "Explicit", "shard_map"], SPECS)
    ],
)
def test_only_products_are_added_up_and_only_split_updates_gathered(placement, mode):
    tx = TRANSFORMS["default"](axis_name=AXES if mode == "shard_map" else None)
    compiled, held = compile_on_mesh(tx, placement, mode)
    found = compiled_update.collectives(compiled.as_text())
    assert set(found) <= {"all-reduce", "all-gather"}
    reduced = found.get("all-reduce", [0, 0])[1]
    if mode == "shard_map":
        assert reduced == 4 * NUM_GRADS
    else:
        # A leaf that is spread over two mesh axes is added up over one after the other on CPU.
        two_stages = sum(len([e for e in spec if e]) > 1 for spec in SPECS[placement].values())
        two_stages += {"replicated": 0, "sharded": 0, "mixed": 2}[placement]
        assert reduced <= (len(SHAPES) + two_stages) * NUM_GRADS * 4 + 4 * two_stages
    gathered = found.get("all-gather", [0, 0])[1]
    updates = sum(4 * int(np.prod(shape)) for shape in SHAPES.values())
    assert gathered <= 1.5 * updates  # over two axes one after the other
    assert compiled.memory_analysis().alias_size_in_bytes == held


@pytest.mark.parametrize("mode", ["Auto", "Explicit"])
def test_a_replicated_parameters_window_takes_its_share_of_memory(mode):
    mesh = make_mesh(AxisType.Auto if mode == "Auto" else AxisType.Explicit)
    params = {
        "kernel": jnp.ones((64, 128)),
        "bias": jnp.ones(128),
        "out": jnp.ones((128, 10)),
        "b": jnp.ones(10),
    }
    params = jax.device_put(params, NamedSharding(mesh, P()))
    tx = mfac(0.01, NUM_GRADS)
    state = jax.jit(tx.init, out_shardings=state_shardings(tx, params, NamedSharding(mesh, P())))(params)
    rows = jax.tree.leaves(optax.tree.get(state, "window"))
    on_one = sum(leaf.addressable_shards[0].data.nbytes for leaf in rows)
    assert on_one < 1.05 * sum(leaf.nbytes for leaf in rows) / 8


def test_a_bfloat16_window_is_never_copied_as_float32():
    params = {"kernel": jnp.ones((2048, 1024)), "bias": jnp.ones(1024)}
    tx = mfac(0.01, 64, storage=jnp.bfloat16)
    state = jax.eval_shape(tx.init, params)
    compiled: Any = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    window = 64 * 2 * 2049 * 1024
    # One copy as 16-bit integers, which the loop over its rows needs, and temporaries of a row's size; a
    # float32 copy would be two.
    assert compiled.memory_analysis().temp_size_in_bytes < 1.3 * window


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
    assert window["w"].spec == P(None, "x", None)


def test_partition_specs_are_taken_on_the_mesh_that_is_set():
    mesh, tx = make_mesh(AxisType.Auto), mfac(0.01, NUM_GRADS)
    with jax.set_mesh(mesh):
        assert state_shardings(tx, start(), SPECS["mixed"]) == state_shardings(
            tx, start(), {name: NamedSharding(mesh, spec) for name, spec in SPECS["mixed"].items()}
        )


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
    window = [s.spec for s in jax.tree.leaves(optax.tree.get(shardings, "window"))]
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


# Bad input.


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


def test_an_axis_that_is_not_bound_is_refused():
    tx: Any = scale_by_mfac(4, axis_name="model")
    state = tx.init(jnp.ones(8))
    with pytest.raises(ValueError, match="axis_name='model' is not bound"):
        tx.update(jnp.ones(8), state)
    mesh = make_mesh(AxisType.Auto)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match="axis_name='model' is not bound"):
        update(jnp.ones(8), state)


@pytest.mark.parametrize("axis_name", [3, ("x", 3), (), ("x", "x")])
def test_an_axis_name_that_is_none_is_refused(axis_name):
    with pytest.raises((TypeError, ValueError), match="axis_name must"):
        scale_by_mfac(4, axis_name=axis_name)


def test_a_window_split_over_an_axis_that_is_not_named_is_refused():
    mesh = make_mesh(AxisType.Auto)
    tx = scale_by_mfac(4, axis_name="y")
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, jnp.ones(8), NamedSharding(mesh, P())))
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs))
    with pytest.raises(ValueError, match="name in axis_name all mesh axes"):
        update(jnp.ones(8), tx.init(jnp.ones(8)))


MAY_BE_A_SHARD = r"leaf \[?.* may be a shard or replicated.*run init inside.*check_vma=True"


def test_without_check_vma_what_may_be_a_shard_is_refused():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx: Any = scale_by_mfac(4, axis_name="x")
    params = {"shard": jnp.ones((64, 3)), "odd": jnp.ones(3)}
    specs, state = {"shard": P("x"), "odd": P()}, tx.init(params)
    shardings = state_shardings(
        tx, params, {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    )
    state_specs = jax.tree.map(lambda s: s.spec, shardings)
    options = {"mesh": mesh, "in_specs": (specs, state_specs), "out_specs": (specs, state_specs)}
    with pytest.raises(ValueError, match=MAY_BE_A_SHARD):
        jax.shard_map(tx.update, check_vma=False, **options)(params, state)
    jax.eval_shape(jax.shard_map(tx.update, **options), params, state)


def test_without_check_vma_a_shard_whose_window_is_split_further_is_refused():
    mesh = make_mesh(AxisType.Auto)
    tx: Any = scale_by_mfac(4, axis_name=AXES)
    params, sharding = jnp.ones((8, 5)), NamedSharding(mesh, P("x"))
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, sharding))
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(P("x"), specs), out_specs=(P("x"), specs), check_vma=False
    )
    with pytest.raises(ValueError, match=MAY_BE_A_SHARD):
        update(params, tx.init(params))


def test_inside_of_pmap_a_state_from_outside_is_refused():
    tx: Any = scale_by_mfac(4, axis_name="i")
    params = jnp.ones((8, 16, 3))
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (8, *x.shape)), tx.init(params[0]))
    with pytest.raises(ValueError, match=MAY_BE_A_SHARD):
        jax.pmap(tx.update, axis_name="i")(params, state)


@slow
def test_on_one_device_all_modes_run():
    device, params = jax.devices()[:1], {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    tx: Any = scale_by_mfac(4, axis_name="i")
    expected = scale_by_mfac(4).update(params, scale_by_mfac(4).init(params))[0]
    stacked = jax.tree.map(lambda p: p[None], params)
    state = jax.pmap(tx.init, axis_name="i", devices=device)(stacked)
    updates, _ = jax.pmap(tx.update, axis_name="i", devices=device)(stacked, state)
    assert relative_error(updates, expected) < 1e-6
    mesh = jax.make_mesh((1,), ("i",), axis_types=(AxisType.Auto,), devices=device)
    for check_vma in (True, False):
        options: dict[str, Any] = {"mesh": mesh, "out_specs": P(), "check_vma": check_vma}
        update = jax.jit(jax.shard_map(lambda p: tx.update(p, tx.init(p))[0], in_specs=P(), **options))
        assert relative_error(update(params), expected) < 1e-6


def test_gradients_that_were_not_averaged_are_refused():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx: Any = scale_by_mfac(4, axis_name="x")
    params = {"w": jnp.ones((32, 3))}
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, NamedSharding(mesh, P())))

    def update(grads, state):
        return tx.update(jax.tree.map(lambda g: g * jax.lax.axis_index("x"), grads), state)

    update = jax.shard_map(update, mesh=mesh, in_specs=(P(), specs), out_specs=(P(), specs))
    with pytest.raises(ValueError, match=r"leaf \['w'\] differs along \('x',\). Average it before"):
        update(params, tx.init(params))


def test_shards_along_an_axis_without_a_name_are_refused():
    mesh = make_mesh(AxisType.Auto, ("x",), (8,))
    tx: Any = scale_by_mfac(4)
    params = {"w": jnp.ones((32, 3))}
    specs = jax.tree.map(lambda s: s.spec, state_shardings(tx, params, NamedSharding(mesh, P("x"))))
    options: dict[str, Any] = {"in_specs": (P("x"), specs), "out_specs": (P("x"), specs)}
    with pytest.raises(ValueError, match=r"leaf \['w'\] varies along \('x',\) and axis_name is None"):
        jax.shard_map(tx.update, mesh=mesh, **options)(params, tx.init(params))


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


@slow
def test_of_a_mesh_with_explicit_and_automatic_axes_the_window_uses_the_former():
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(AxisType.Explicit, AxisType.Auto))
    tx: Any = scale_by_mfac(4)
    params: Any = jax.device_put({"w": jnp.ones((8, 16))}, NamedSharding(mesh, P()))
    state = tx.init(params)
    assert state.window["w"].sharding.spec == P(None, "x", None)
    updates, state = jax.jit(tx.update, donate_argnums=1)(params, state)
    assert state.window["w"].sharding.spec == P(None, "x", None)
    alone: Any = jax.device_get(params)
    assert relative_error(updates, tx.update(alone, tx.init(alone))[0]) < 1e-6


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


def test_state_shardings_without_parameters_and_of_python_numbers():
    mesh = make_mesh(AxisType.Auto)
    for params in ({}, {"w": 1.0}):
        shardings = state_shardings(mfac(0.1, 4), params, NamedSharding(mesh, P()))
        assert optax.tree.get(shardings, "gram").mesh == mesh
    with pytest.raises(ValueError, match="for what is replicated"):
        state_shardings(mfac(0.1, 4), {"w": jnp.ones(2)}, {"w": None})
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        shardings = state_shardings(mfac(0.1, 4), {"w": jnp.ones((8, 2))}, P())
        assert optax.tree.get(shardings, "window")["w"].spec == P(None, ("x", "y"), None)
