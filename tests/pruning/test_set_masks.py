"""New masks in the state of an optimizer: what it then holds, and what is refused."""

import functools
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax import mfac, scale_by_mfac, state_shardings
from mfac_jax.components import rotated_metric
from mfac_jax.pruning import KeepPrunedState, keep_pruned, kernel_masks, set_masks, sparsity
from tests.pruning.pruned_training import (
    ALL_KEPT,
    KEPT,
    MASKS,
    PARAMS,
    SGD,
    STATE,
    TX,
    M,
    assert_close,
    first_step,
    gradients_for,
    pruned_entries,
    step_once,
    train,
)

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
    assert isinstance(optax.tree.get(doubled, "window").values["bias"], tuple)
    assert optax.tree.get(STATE, "masks")["bias"] == optax.MaskedNode()
    shapes = jax.eval_shape(TX.init, jax.eval_shape(lambda: PARAMS))
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, STATE)


@functools.cache
def updates_on_one_device():
    tx = keep_pruned(scale_by_mfac(M), ALL_KEPT)
    update = jax.jit(tx.update)
    _, state = update(PARAMS, tx.init(PARAMS), PARAMS)
    return jax.device_get(update(PARAMS, set_masks(tx, state, MASKS), PARAMS)[0])


@pytest.mark.slow
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
    [
        ("diagonal", kernel_or_not),
        pytest.param("identity", None, marks=pytest.mark.slow),
        pytest.param("diagonal", "leaf", marks=pytest.mark.slow),
    ],
)
def test_the_window_is_that_of_one_who_only_saw_the_survivors(metric, blocks):
    options: Any = {"metric": metric, "blocks": blocks, "relative_damping": True, "window_momentum": 0.5}
    inner = scale_by_mfac(M, 0.5, **options, solver="inverse")
    tx = keep_pruned(inner, ALL_KEPT)
    start = tx.init(PARAMS)
    _, _, late = train(tx, PARAMS, start)
    late: Any = set_masks(tx, late, MASKS)
    _, _, always = train(tx, PARAMS, set_masks(tx, start, MASKS))
    for name in ("window", "metric", "gram", "grads_seen", "next_row"):
        assert_close(getattr(late.inner_state, name), getattr(always.inner_state, name))
    assert_close(train(tx, PARAMS, late)[0], train(tx, PARAMS, always)[0])


@pytest.mark.parametrize("metric", ["rotated", rotated_metric(8)], ids=["rotated", "blocks of 8"])
def test_means_in_bases_belong_to_no_weight_and_stay(metric):
    tx = keep_pruned(scale_by_mfac(M, 0.5, metric=metric), ALL_KEPT)
    _, params, state = train(tx, PARAMS, tx.init(PARAMS))
    after: Any = set_masks(tx, state, MASKS)
    chex.assert_trees_all_equal(after.inner_state.metric, state.inner_state.metric)
    assert np.all(pruned_entries(jax.tree.map(lambda rows: rows[0], after.inner_state.window)) == 0)
    _, params, _ = train(tx, params, after)
    assert np.all(pruned_entries(params) == 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_an_optimizer_without_a_leaf_keeps_its_empty_window():
    groups = jax.tree.map(lambda p: "some", PARAMS)
    inner = optax.partition({"some": scale_by_mfac(M), "none": scale_by_mfac(M)}, groups)
    tx = keep_pruned(inner, ALL_KEPT)
    state = tx.init(PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(set_masks(tx, state, MASKS), state)


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


def test_a_window_on_the_host_is_refused():
    params = {"kernel": jnp.ones((8, 128))}
    tx = keep_pruned(mfac(0.1, M, host_chunk=1), kernel_masks(params))
    with pytest.raises(ValueError, match="window in device memory, got one in host memory"):
        set_masks(tx, tx.init(params), kernel_masks(params))


def test_a_part_of_the_window_is_refused():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    inside = jax.shard_map(
        lambda: set_masks(TX, STATE, MASKS), mesh=mesh, in_specs=(), out_specs=PartitionSpec()
    )
    with pytest.raises(ValueError, match=r"cannot run inside of jax.shard_map.*Call it outside"):
        jax.eval_shape(inside)


def test_a_new_state_has_the_masks_of_the_factory():
    state: Any = set_masks(TX, STATE, ALL_KEPT)
    assert isinstance(state, KeepPrunedState)
    assert sparsity(optax.tree.get(state, "masks")) == 0
    assert sparsity(optax.tree.get(TX.init(PARAMS), "masks")) == 0.5


def damaged_states():
    masks = {"a": jnp.ones((3, 2), bool), "b": jnp.ones(2, bool)}
    tx: Any = keep_pruned(mfac(0.1, 3, solver="inverse", storage=None), masks)
    state = jax.eval_shape(tx.init, jax.tree.map(lambda m: jnp.ones(m.shape), masks))
    fisher, rest = state.inner_state[0], state.inner_state[1:]
    window = fisher.window
    fields = {
        "gram": [None, jnp.ones((1, 2, 2)), jnp.ones((1, 3, 3), jnp.float16)],
        "window": [jax.tree.map(lambda x: jnp.ones((2, *x.shape[1:])), window)],
        "block_of_leaf": [jnp.zeros(1, jnp.int32)],
        "metric": [(), fisher.metric._replace(second_moment=jnp.zeros(()))],
        "solver": [()],
        "made_with": [(), None],
    }
    for field, values in fields.items():
        for value in values:
            yield rf"state\.{field}.* must be", (fisher._replace(**{field: value}), *rest)
    yield "opt_state must be that of tx: .* Restore a checkpoint into", (tuple(fisher), *rest)
    yield "state.metric must have no leaf", (fisher._replace(window={"a": window["a"]}), *rest)
    yield "state.metric must have no leaf", (fisher._replace(window=None), *rest)


def test_a_damaged_state_takes_no_masks_and_the_field_is_named():
    masks = {"a": jnp.ones((3, 2), bool), "b": jnp.ones(2, bool)}
    tx = keep_pruned(mfac(0.1, 3, solver="inverse", storage=None), masks)
    for message, inner in damaged_states():
        with pytest.raises(ValueError, match=re.compile(message, re.DOTALL)):
            set_masks(tx, KeepPrunedState(masks, inner), masks)
