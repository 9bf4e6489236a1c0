"""Pruned weights stay at zero under any optimizer, which sees the survivors only."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax import mfac, scale_by_mfac, state_shardings
from mfac_jax.pruning import KeepPrunedState, apply_masks, keep_pruned, kernel_masks, set_masks, sparsity

PARAMS = {"bias": jnp.ones(3), "kernel": jnp.arange(1.0, 13.0).reshape(4, 3), "other": jnp.ones((2, 2))}
KEPT = {"kernel": np.array([[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 1, 0]], bool), "other": np.eye(2) == 1}
MASKS: Any = {"bias": None, **KEPT}
ALL_KEPT: Any = kernel_masks(PARAMS)
STEPS = 5
EPS = float(jnp.finfo(jnp.float32).eps)
M = 3  # of the windows; they wrap


TX = keep_pruned(mfac(0.1, M, weight_decay=0.1), MASKS)
STATE: Any = TX.init(PARAMS)
SGD = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9))


def gradients_for(params, seed: int = 0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal((STEPS, *p.shape)), p.dtype), params)


GRADIENTS = gradients_for(PARAMS)


def train(tx, params, state, gradients=GRADIENTS):
    """Parameters after every step, the last ones and the last state, whose types may not change."""
    return scan(tx, params, state, gradients)


@functools.partial(jax.jit, static_argnames="tx")
def scan(tx, params, state, gradients):
    def step(carry, g):
        params, state = carry
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (params, state), after = jax.lax.scan(step, (params, state), gradients)
    return after, params, state


def first_step(tx, params, state):
    updates, state = tx.update(jax.tree.map(lambda g: g[0], GRADIENTS), state, params)
    return optax.apply_updates(params, updates), state


step_once: Any = jax.jit(first_step, static_argnums=0)


def pruned_entries(params) -> np.ndarray:
    return np.concatenate(
        [np.asarray(params[name], np.float32)[..., ~kept] for name, kept in KEPT.items()], -1
    )


def surviving(tree, axes: int = 0) -> dict:
    """The survivors alone, flat, behind some axes in front."""
    return {**tree, **{name: tree[name][(slice(None),) * axes + (kept,)] for name, kept in KEPT.items()}}


def assert_close(actual, expected, factor: float = 100):
    chex.assert_trees_all_close(actual, expected, rtol=factor * EPS, atol=factor * EPS)


# Zero stays zero.


@pytest.mark.parametrize(
    "tx",
    {
        "mfac": TX,
        "adamw": keep_pruned(optax.adamw(0.1), MASKS),
        "noise": keep_pruned(optax.chain(SGD, optax.add_noise(0.1, 0.5, 0)), MASKS),
        "inject_hyperparams": keep_pruned(optax.inject_hyperparams(optax.adamw)(0.1), MASKS),
        "MultiSteps": keep_pruned(optax.MultiSteps(SGD, 2).gradient_transformation(), MASKS),
        "apply_if_finite": keep_pruned(optax.apply_if_finite(SGD, 2), MASKS),
        "masked": keep_pruned(optax.masked(SGD, {"bias": False, "kernel": True, "other": False}), MASKS),
    }.items(),
    ids=lambda item: item[0],
)
def test_pruned_weights_are_zero_after_every_step(tx):
    after, _, _ = train(tx[1], PARAMS, tx[1].init(PARAMS))
    assert np.all(pruned_entries(after) == 0)
    assert np.all(surviving(after, 1)["kernel"][-1] != 0)


AROUND = {
    "MultiSteps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 2),
    "masked": lambda tx: optax.masked(tx, {"bias": False, "kernel": True, "other": True}),
    "chain before": lambda tx: optax.chain(
        optax.clip_by_global_norm(1.0), optax.add_noise(0.1, 0.5, 0), tx
    ),
    "partition": lambda tx: optax.partition(
        {"pruned": tx, "dense": optax.sgd(0.1)}, {"bias": "dense", "kernel": "pruned", "other": "pruned"}
    ),
    "inject_hyperparams": lambda _: optax.inject_hyperparams(
        lambda rate: keep_pruned(optax.sgd(rate), ALL_KEPT)
    )(rate=0.1),
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND.keys())
def test_wrappers_around_leave_zeros_and_masks_can_be_set_through_them(around):
    tx = around(keep_pruned(SGD, ALL_KEPT))
    _, params, state = train(tx, PARAMS, tx.init(PARAMS))
    params, state = apply_masks(params, MASKS), set_masks(tx, state, MASKS)
    after, _, _ = train(tx, params, state)
    assert np.all(pruned_entries(after) == 0)
    assert np.all(surviving(after, 1)["kernel"][-1] != 0)


def test_lookahead_stays_sparse_on_both_sides():
    tx = optax.lookahead(keep_pruned(SGD, MASKS), 2, 0.5)
    params = optax.LookaheadParams.init_synced(apply_masks(PARAMS, MASKS))
    _, params, state = train(tx, params, tx.init(params))
    assert np.all(pruned_entries(params.fast) == 0)
    assert np.all(pruned_entries(params.slow) == 0)
    none = jax.tree.map(jnp.zeros_like, ALL_KEPT)
    params = optax.LookaheadParams(*(apply_masks(p, none) for p in params))
    _, params, _ = train(tx, params, set_masks(tx, state, none))
    assert not np.any(params.fast["kernel"])
    assert not np.any(params.slow["kernel"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_weights_that_are_not_zero_yet_become_so_exactly(dtype):
    params = jax.tree.map(lambda p: (p / 7).astype(dtype), PARAMS)
    tx = keep_pruned(SGD, MASKS)
    gradients = gradients_for(params)
    updates: Any = tx.update(jax.tree.map(lambda g: g[0], gradients), tx.init(params), params)[0]
    assert updates["kernel"].dtype == dtype
    np.testing.assert_array_equal(pruned_entries(updates), -pruned_entries(params))
    after, _, _ = train(tx, params, tx.init(params), gradients)
    assert np.all(pruned_entries(after) == 0)


def test_updates_with_fewer_digits_take_a_few_steps():
    params = jax.tree.map(lambda p: p / 7, PARAMS)
    gradients = gradients_for(jax.tree.map(lambda p: p.astype(jnp.bfloat16), params))
    tx = keep_pruned(optax.sgd(0.1), MASKS)
    after, _, _ = train(tx, params, tx.init(params), gradients)
    assert np.all(np.abs(pruned_entries(after)[0]) <= 2.0**-8 * pruned_entries(params))
    assert np.all(np.abs(pruned_entries(after)[2]) <= 2.0**-24 * pruned_entries(params))
    zeros = apply_masks(params, MASKS)
    assert np.all(pruned_entries(train(tx, zeros, tx.init(zeros), gradients)[0]) == 0)


def test_what_a_later_transform_adds_stands_until_the_next_step():
    add_one = optax.stateless_with_tree_map(lambda u, _: u + 1)
    tx = optax.chain(keep_pruned(SGD, MASKS), add_one)
    after, _, _ = train(tx, PARAMS, tx.init(PARAMS))
    np.testing.assert_array_equal(pruned_entries(after), 1)  # not the number of the step


def test_without_params_there_is_no_update():
    tx = keep_pruned(optax.sgd(0.1), MASKS)
    with pytest.raises(ValueError, match="keep_pruned needs params"):
        tx.update(PARAMS, tx.init(PARAMS))


# What the optimizer inside sees.


def test_mfac_trains_as_if_the_survivors_were_all_there_is():
    after, _, _ = train(TX, PARAMS, STATE)
    alone, inner = surviving(PARAMS), mfac(0.1, M, weight_decay=0.1)
    expected, _, _ = train(inner, alone, inner.init(alone), surviving(GRADIENTS, 1))
    assert_close(surviving(after, 1), expected)


def test_norms_are_those_of_the_survivors():
    """Also of parameters that are not zero yet."""
    inner = optax.chain(optax.add_decayed_weights(1.0), optax.clip_by_global_norm(0.1), optax.scale(-1.0))
    tx = keep_pruned(inner, MASKS)
    found, _ = step_once(tx, PARAMS, tx.init(PARAMS))
    alone = surviving(PARAMS)
    expected, _, _ = train(inner, alone, inner.init(alone), surviving(GRADIENTS, 1))
    assert_close(surviving(found), jax.tree.map(lambda p: p[0], expected))


def test_gradients_of_pruned_weights_may_be_anything():
    spoiled = {**GRADIENTS, "kernel": jnp.where(MASKS["kernel"], GRADIENTS["kernel"], jnp.nan)}
    chex.assert_trees_all_equal(train(TX, PARAMS, STATE, spoiled), train(TX, PARAMS, STATE))


def test_extra_arguments_pass_through():
    def update(updates, state, params=None, *, factor=1.0, **extra_args):
        del params, extra_args
        return jax.tree.map(lambda u: factor * u, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = keep_pruned(inner, MASKS)
    updates, _ = tx.update(PARAMS, tx.init(PARAMS), PARAMS, factor=3.0, unknown=1)
    np.testing.assert_array_equal(surviving(updates)["kernel"], 3 * surviving(PARAMS)["kernel"])


# The state.


def test_masks_change_without_a_new_compilation():
    tx = keep_pruned(scale_by_mfac(M), ALL_KEPT)
    step: Any = jax.jit(functools.partial(first_step, tx), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    for masks in (ALL_KEPT, MASKS, jax.tree.map(lambda m: m.astype(jnp.uint8), MASKS)):
        state = set_masks(tx, state, masks)
        for _ in range(2):
            params, state = step(params, state)
    assert step._cache_size() == 1
    assert np.all(pruned_entries(params) == 0)
    assert sparsity(optax.tree.get(state, "masks")) == sparsity(MASKS) == 8 / 16
    # The state was donated, the masks were not.
    chex.assert_trees_all_equal(optax.tree.get(tx.init(PARAMS), "masks")["kernel"], ALL_KEPT["kernel"])


def test_set_masks_runs_under_jit():
    _, _, state = train(TX, PARAMS, STATE)
    masks = jax.tree.map(lambda mask: jnp.asarray(~mask), MASKS)
    expected = set_masks(TX, state, masks)
    found = jax.jit(functools.partial(set_masks, TX))(state, masks)
    assert_close(found, expected)


def test_the_tree_functions_of_optax_reach_masks_and_state():
    doubled: Any = optax.tree.map_params(TX, lambda leaf: (leaf, leaf), STATE)
    assert isinstance(doubled.masks["kernel"], tuple)
    assert isinstance(optax.tree.get(doubled, "window")["bias"], tuple)
    assert optax.tree.get(STATE, "masks")["bias"] == optax.MaskedNode()
    shapes = jax.eval_shape(TX.init, jax.eval_shape(lambda: PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, STATE)


@functools.cache
def updates_on_one_device():
    tx = keep_pruned(scale_by_mfac(M), ALL_KEPT)
    update = jax.jit(tx.update)
    _, state = update(PARAMS, tx.init(PARAMS), PARAMS)
    return jax.device_get(update(PARAMS, set_masks(tx, state, MASKS), PARAMS)[0])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_masks_lie_as_the_parameters(axis_type):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(axis_type,))
    specs = {"bias": (None,), "kernel": ("x", None), "other": (None, "x")}
    shardings = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
    tx = keep_pruned(scale_by_mfac(M), ALL_KEPT)
    params = jax.device_put(PARAMS, shardings)
    state: Any = tx.init(params)
    planned = state_shardings(tx, params, shardings)
    step: Any = jax.jit(
        lambda g, state, params: tx.update(g, state, params), out_shardings=(shardings, planned)
    )
    for masks in (ALL_KEPT, MASKS):
        state = set_masks(tx, state, masks)
        for leaf, expected in zip(jax.tree.leaves(state), jax.tree.leaves(planned), strict=True):
            assert leaf.sharding.is_equivalent_to(expected, leaf.ndim)
        updates, state = step(params, state, params)
    assert step._cache_size() == 1
    assert_close(jax.device_get(updates), updates_on_one_device())


# M-FAC after the masks have changed.


def kernel_or_not(path) -> bool:
    return path[0].key == "kernel"


@pytest.mark.parametrize(
    ("metric", "blocks"),
    [("diagonal", None), ("identity", "leaf"), ("diagonal", kernel_or_not)],
)
def test_the_window_is_that_of_one_who_only_saw_the_survivors(metric, blocks):
    options: Any = {"metric": metric, "blocks": blocks, "relative_damping": True, "window_momentum": 0.5}
    inner = scale_by_mfac(M, 0.5, **options, solver="inverse")
    tx, given = keep_pruned(inner, ALL_KEPT), blocks if callable(blocks) else None
    start = tx.init(PARAMS)
    _, _, late = train(tx, PARAMS, start)
    late: Any = set_masks(tx, late, MASKS, blocks=given)
    _, _, always = train(tx, PARAMS, set_masks(tx, start, MASKS, blocks=given))
    for name in ("window", "second_moment", "gram", "grads_seen", "next_row"):
        assert_close(getattr(late.inner_state, name), getattr(always.inner_state, name))
    assert_close(train(tx, PARAMS, late)[0], train(tx, PARAMS, always)[0])


def test_the_gram_matrix_is_that_of_the_window_as_stored():
    tx = keep_pruned(scale_by_mfac(M, 0.5, storage=jnp.bfloat16), ALL_KEPT)
    _, state = step_once(tx, PARAMS, tx.init(PARAMS))
    found = set_masks(tx, state, MASKS).inner_state
    rows = np.concatenate(
        [np.asarray(w, np.float64).reshape(M, -1) for w in jax.tree.leaves(found.window)], 1
    )
    assert found.window["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(found.gram[0], rows @ rows.T, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, state.inner_state)


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(0.1),
        optax.chain(optax.trace(0.9), optax.clip_by_global_norm(0.1), optax.scale(-1.0)),
        optax.contrib.schedule_free_sgd(0.1),
    ],
    ids=["adam", "momentum and norm", "schedule-free"],
)
def test_momentum_of_pruned_weights_is_forgotten(inner):
    tx = keep_pruned(inner, ALL_KEPT)
    _, state = step_once(tx, PARAMS, tx.init(PARAMS))
    found = set_masks(tx, state, MASKS)
    optax.tree.map_params(
        tx,
        lambda leaf, mask: mask is None or np.testing.assert_array_equal(leaf[..., ~mask], 0),
        found,
        MASKS,
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    kept = [
        np.asarray(leaf)[..., KEPT["kernel"]]
        for leaf in jax.tree.leaves(found)
        if leaf.shape[-2:] == (4, 3)
    ]
    assert len(kept) > 1
    assert all(np.all(leaf != 0) for leaf in kept)


def test_statistics_that_are_not_shaped_like_parameters_stay():
    tx = keep_pruned(optax.scale_by_factored_rms(min_dim_size_to_factor=1), ALL_KEPT)
    _, state = step_once(tx, PARAMS, tx.init(PARAMS))
    chex.assert_trees_all_equal(set_masks(tx, state, MASKS).inner_state.v_row, state.inner_state.v_row)


def test_scalars_may_be_pruned_too():
    params = {"scale": jnp.ones(()), "gain": jnp.ones(())}
    tx = keep_pruned(SGD, jax.tree.map(lambda p: jnp.ones(p.shape, bool), params))
    state = set_masks(tx, tx.init(params), {"scale": jnp.array(False), "gain": jnp.array(True)})
    after, _, _ = train(tx, params, state, gradients_for(params))
    assert not np.any(after["scale"])
    assert np.all(after["gain"])


# Training loops.


def test_a_flax_train_state_is_pruned_while_it_trains():
    tx = keep_pruned(SGD, ALL_KEPT)
    state: Any = TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    step = jax.jit(lambda state, g: state.apply_gradients(grads=g))
    for number in range(STEPS):
        if number == 2:
            state = state.replace(opt_state=set_masks(state.tx, state.opt_state, MASKS))
        state = step(state, jax.tree.map(lambda g: g[number], GRADIENTS))  # noqa: B023
    assert np.all(pruned_entries(state.params) == 0)


def test_an_nnx_optimizer_is_pruned_while_it_trains():
    rngs = nnx.Rngs(0)
    first = nnx.Linear(3, 8, rngs=rngs)
    model = nnx.Sequential(first, jnp.tanh, nnx.Linear(8, 1, rngs=rngs))
    masks = kernel_masks(nnx.state(model, nnx.Param))
    tx = keep_pruned(optax.adam(0.1), masks)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    inputs = jax.random.normal(jax.random.key(0), (16, 3))

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda model: jnp.mean((model(inputs) - 1) ** 2))(model))

    step(model, optimizer)
    masks = jax.tree.map(
        lambda p, m: None if m is None else jnp.abs(p) > 0.3, nnx.state(model, nnx.Param), masks
    )
    state = set_masks(tx, nnx.as_pure(optimizer.opt_state), nnx.as_pure(masks))
    nnx.update(optimizer.opt_state, nnx.state(state))
    for _ in range(3):
        step(model, optimizer)
    np.testing.assert_array_equal(first.kernel[...] != 0, masks["layers"][0]["kernel"][...])


@pytest.mark.parametrize("power", [1, 3], ids=["linear", "cubic"])
def test_the_schedules_of_optax_are_those_of_the_field(power):
    first, last, begin, steps = 0.1, 0.9, 7, 40
    schedule = optax.polynomial_schedule(first, last, power, steps, begin)
    step = np.arange(60)
    share = np.clip((step - begin) / steps, 0, 1)
    expected = last + (first - last) * (1 - share) ** power
    np.testing.assert_allclose(np.array([schedule(t) for t in step]), expected, rtol=1e-5)


# What is refused.


@pytest.mark.parametrize(
    ("state", "masks", "message"),
    {
        "no keep_pruned": (
            mfac(0.1, M).init(PARAMS),
            MASKS,
            "must hold the state of keep_pruned, and has none",
        ),
        "other tree": (STATE, KEPT, r"\['bias'\] is only in one of the two"),
        "other shape": (
            STATE,
            {**MASKS, "other": np.ones((3, 2))},
            r"\['other'\] is \(3, 2\) for \(2, 2\)",
        ),
        "mask is gone": (
            STATE,
            {**MASKS, "other": None},
            r"\['other'\] has None, and had \(2, 2\).*jnp.ones",
        ),
        "mask is new": (
            STATE,
            {**MASKS, "bias": np.ones(3)},
            r"\['bias'\] has \(3,\), and had None.*jnp.ones",
        ),
    }.values(),
)
def test_masks_that_do_not_fit_the_state_are_refused(state, masks, message):
    with pytest.raises(ValueError, match=message):
        set_masks(TX, state, masks)


def test_blocks_of_labels_have_to_be_given():
    tx = keep_pruned(scale_by_mfac(M, blocks=kernel_or_not), MASKS)
    with pytest.raises(
        ValueError, match=r"blocks must split the tree into the 2 block\(s\) of the state, got 1"
    ):
        set_masks(tx, tx.init(PARAMS), MASKS)


def test_a_window_on_the_host_is_refused():
    params = {"kernel": jnp.ones((8, 128))}
    tx = keep_pruned(mfac(0.1, M, host_chunk=1), kernel_masks(params))
    with pytest.raises(ValueError, match="window in memory of the device, got one on the host"):
        set_masks(tx, tx.init(params), kernel_masks(params))


def test_a_part_of_the_window_is_refused():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(
        lambda: set_masks(TX, STATE, MASKS), mesh=mesh, in_specs=(), out_specs=PartitionSpec()
    )
    with pytest.raises(ValueError, match=r"cannot run inside of jax.shard_map.*Call it outside"):
        jax.eval_shape(inside)


def test_masks_that_do_not_fit_the_parameters_are_refused():
    with pytest.raises(ValueError, match=r"must have the shapes.*\['kernel'\]"):
        keep_pruned(mfac(), {**MASKS, "kernel": np.ones((3, 4))}).init(PARAMS)
    with pytest.raises(ValueError, match="no values but 0"):
        keep_pruned(mfac(), {**MASKS, "kernel": 2 * np.ones((4, 3))})
    with pytest.raises(ValueError, match="only in one of the two"):
        TX.update({"kernel": PARAMS["kernel"]}, STATE, PARAMS)


def test_a_new_state_has_the_masks_of_the_factory():
    state: Any = set_masks(TX, STATE, ALL_KEPT)
    assert isinstance(state, KeepPrunedState)
    assert sparsity(optax.tree.get(state, "masks")) == 0
    assert sparsity(optax.tree.get(TX.init(PARAMS), "masks")) == 0.5
