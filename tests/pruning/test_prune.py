"""What `prune` chooses, step by step, and in which trees and arrays."""

import itertools
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import mfac_jax
from mfac_jax._src.pruning import patterns
from mfac_jax.pruning import obs_scores, obs_update, prune, sparsity
from tests.pruning.small_network import (
    ALL,
    BEFORE,
    DAMPING,
    MASKED,
    NUM_GRADS,
    G,
    W,
    as_flat,
    as_masks,
    as_tree,
    constrained_minimiser,
    fisher,
    gradients_at,
    pruned,
)
from tests.training_runs import train_step


@pytest.mark.parametrize("pattern", ["2:4", "block:4"])
def test_groups_go_by_what_the_dense_inverse_says_they_cost(pattern):
    """The cheapest half of the groups goes, each by its cheapest choice."""
    choices = [*itertools.combinations(range(4), 2)] if pattern == "2:4" else [(0, 1, 2, 3)]
    inverse = np.linalg.inv(fisher(ALL))
    numbers = as_tree(np.arange(67))
    cheapest = []
    for leaf in (numbers["conv"]["kernel"], numbers["out"]):
        for group in np.moveaxis(np.asarray(leaf), -2, -1).reshape(-1, 4):
            costs = []
            for choice in choices:
                Q = group[list(choice)]
                costs.append(W[Q] @ np.linalg.solve(inverse[np.ix_(Q, Q)], W[Q]) / 2)
            cheapest.append((min(costs), group[list(choices[int(np.argmin(costs))])]))
    cheapest.sort(key=lambda x: x[0])
    goes = np.concatenate([Q for _, Q in cheapest[:8]])
    amount = len(goes) / 64
    with jax.enable_x64(True):
        params, masks = pruned(as_tree(W), as_tree(G), amount, pattern=pattern, gradient_term=0.0)
    np.testing.assert_array_equal(3 + np.flatnonzero(~as_flat(masks)), np.sort(goes))
    after = ALL.copy()
    after[goes] = False
    np.testing.assert_allclose(as_flat(params), constrained_minimiser(ALL, after, 0.0), rtol=1e-8)


def test_what_is_pruned_costs_nothing_and_its_weight_does_not_matter():
    """A group that has lost an entry costs what the others do, whatever the parameters still hold there."""
    before = BEFORE.copy()
    before[3 : 3 + 12 : 3] = [True, False, True, True]
    with jax.enable_x64(True):
        options: Any = {"masks": as_masks(before), "pattern": "2:4"}
        expected = pruned(as_tree(W * before), as_tree(G * before), 0.5, **options)
        found = pruned(as_tree(np.where(before, W, 1e6)), as_tree(G), 0.5, **options)
    np.testing.assert_allclose(as_flat(found), as_flat(expected), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("pattern", [None, "2:4", pytest.param("block:4", marks=pytest.mark.slow)])
def test_repeated_gradients_and_tiny_damping_leave_finite_costs(pattern):
    random = np.random.default_rng(0)
    for spread in (0.0, 1e-4):
        grads = 1e3 * (np.ones((NUM_GRADS, 67)) + spread * random.standard_normal((NUM_GRADS, 67)))
        w32, g32 = as_tree(W.astype(np.float32)), as_tree(grads.astype(np.float32))
        params, masks = pruned(w32, g32, 0.5, damping=1e-9, pattern=pattern)
        assert sparsity(masks) == 0.5
        assert np.all(np.isfinite(as_flat(params)))


# What `prune` chooses.


def test_the_sparsity_is_exact_and_pruned_weights_are_zero():
    for amount in (0.0, 0.3, 0.5, 0.97):
        params, masks = pruned(as_tree(W.astype(np.float32)), as_tree(G.astype(np.float32)), amount)
        assert np.sum(~as_flat(masks)) == round(amount * 64)
        np.testing.assert_array_equal(as_flat(params)[3:] != 0, as_flat(masks))
        assert masks["conv"]["bias"] is None


def test_equal_weights_go_in_their_order_and_as_many_as_asked_for():
    ones, zeros = as_tree(np.ones(67, np.float32)), as_tree(np.zeros((NUM_GRADS, 67), np.float32))
    params, masks = pruned(ones, zeros, 0.4)
    np.testing.assert_array_equal(as_flat(masks), np.arange(64) >= round(0.4 * 64))
    np.testing.assert_array_equal(as_flat(params)[3:], as_flat(masks))


@pytest.mark.parametrize("update", ["joint", "independent"])
def test_without_gradients_magnitudes_decide_and_nothing_moves(update):
    w, zeros = as_tree(W.astype(np.float32)), as_tree(np.zeros((NUM_GRADS, 67), np.float32))
    params, masks = pruned(w, zeros, 0.5, update=update, gradient_term=1.0)
    smallest = np.argsort(np.abs(W[3:]))[:32]
    np.testing.assert_array_equal(np.sort(smallest), np.flatnonzero(~as_flat(masks)))
    np.testing.assert_array_equal(as_flat(params), np.where(np.r_[[True] * 3, as_flat(masks)], W, 0))


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
def test_masks_of_jaxpruner_are_kept_through(dtype):
    masks = jax.tree.map(lambda mask: np.asarray(mask, dtype), as_masks(BEFORE))
    w, grads = as_tree(W.astype(np.float32)), as_tree(G.astype(np.float32))
    params, new = pruned(w, grads, 0.6, masks=masks)
    assert sparsity(new) == round(0.6 * 64) / 64
    assert not np.any(as_flat(new) & ~BEFORE[3:])
    assert jax.tree.structure(new) == jax.tree.structure(masks)
    assert np.all(as_flat(params)[~BEFORE] == 0)
    again = pruned(params, grads, sparsity(new), masks=new, gradient_term=0.0)
    np.testing.assert_array_equal(as_flat(again), as_flat((params, new)))


def test_a_network_that_is_pruned_whole_stays_so():
    masks = as_masks(~MASKED)
    params, new = pruned(as_tree(W.astype(np.float32)), gradients_at, 0.999, masks=masks, num_steps=3)
    assert sparsity(new) == 1.0
    assert np.all(as_flat(params)[3:] == 0)


# Steps.


def targets_of(masks) -> np.ndarray:
    """The sparsities that the function sees, and the last one."""
    seen = []

    def fn(params):
        seen.append(float(np.mean(as_flat(params)[3:] == 0)))
        return gradients_at(params)

    new = pruned(as_tree(W.astype(np.float32)), fn, 0.9375, masks=masks, num_steps=4)[1]
    return np.array([*seen, sparsity(new)])


def test_each_step_prunes_the_same_share_and_gets_new_gradients():
    np.testing.assert_array_equal(targets_of(None), [0, 0.5, 0.75, 0.875, 0.9375])
    kept = 1 - targets_of(as_masks(~MASKED | (np.arange(67) % 2 == 0)))
    np.testing.assert_allclose(kept[1:] / kept[:-1], (1 / 8) ** 0.25, rtol=0.15)  # whole weights
    assert kept[0] == 0.5  # also at the first call the weights are zero where masks say so


def test_a_function_is_called_sixteen_times_and_gradients_are_one_step():
    w, calls = as_tree(W.astype(np.float32)), []
    pruned(w, lambda params: calls.append(1) or gradients_at(params), 0.5)
    assert len(calls) == 16
    one_step = pruned(w, gradients_at, 0.5, num_steps=1, gradient_term=0.0)
    given = pruned(w, gradients_at(w), 0.5)
    np.testing.assert_array_equal(as_flat(one_step), as_flat(given))


@pytest.mark.parametrize("pattern", ["2:4", pytest.param("block:4", marks=pytest.mark.slow)])
def test_patterns_are_obeyed_after_several_steps(pattern):
    params, masks = pruned(as_tree(W.astype(np.float32)), gradients_at, 0.5, pattern=pattern, num_steps=3)
    assert sparsity(masks) == 0.5
    for leaf in (params["conv"]["kernel"], params["out"]):
        zeros = np.sum(np.asarray(patterns.groups(leaf, 4, (leaf.ndim - 2,))) == 0, axis=1)
        assert set(zeros) <= ({2} if pattern == "2:4" else {0, 4})


def test_the_steps_are_those_of_scores_and_update():
    w = as_tree(W.astype(np.float32))
    params, masks = pruned(w, gradients_at, 0.75, num_steps=2)
    expected, kept = w, as_masks(ALL)
    defaults: Any = {"gradient_term": 0.3, "step_limit": 0.5}
    for target in (32, 48):
        grads, before = gradients_at(expected), kept
        scores = np.where(as_flat(before), as_flat(obs_scores(expected, grads, DAMPING, masks=before)), -1)
        kept = as_masks(np.r_[[True] * 3, np.argsort(np.argsort(scores, kind="stable")) >= target])
        expected = obs_update(expected, grads, kept, DAMPING, masks_before=before, **defaults)
    np.testing.assert_array_equal(as_flat((params, masks)), as_flat((expected, kept)))


# Kinds of trees and arrays.


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype, make):
    w, grads = (jax.tree.map(lambda x: make(x, dtype), as_tree(x.astype(np.float32))) for x in (W, G))
    params, masks = pruned(w, grads, 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    assert sparsity(masks) == 0.5


def test_arrays_of_numpy_in_double_precision_are_read_as_jax_reads_them():
    as_numpy = lambda flat: {"a": flat[..., 27:].reshape(*flat.shape[:-1], 8, 5), "b": flat[..., :3]}  # noqa: E731
    params, masks = pruned(as_numpy(W), as_numpy(G), 0.5)
    assert params["a"].dtype == jnp.float32
    assert sparsity(masks) == 0.5


@pytest.mark.slow
def test_double_precision_of_the_parameters_survives_gradients_of_single_precision():
    with jax.enable_x64(True):
        w, zeros = as_tree(W + 1e-12), as_tree(np.zeros((NUM_GRADS, 67), np.float32))
        params, masks = pruned(w, zeros, 0.5)
    kept = np.r_[[True] * 3, as_flat(masks)]
    np.testing.assert_array_equal(as_flat(params)[kept], (W + 1e-12)[kept])


@pytest.mark.parametrize(
    ("axis_type", "pattern"),
    [
        (AxisType.Explicit, None),
        pytest.param(AxisType.Auto, None, marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, "2:4", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, "2:4", marks=pytest.mark.slow),
    ],
)
def test_sharded_over_devices_it_is_the_same_and_stays_sharded(axis_type, pattern):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    specs = {"conv": {"bias": (None,), "kernel": (None, "x", None)}, "out": ("x", None)}
    by_leaf = lambda *front: jax.tree.map(  # noqa: E731
        lambda spec: NamedSharding(mesh, PartitionSpec(*front, *spec)),
        specs,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    w, grads = as_tree(W.astype(np.float32)), as_tree(G.astype(np.float32))
    before = jax.tree.map(np.asarray, as_masks(~MASKED | (np.arange(67) % 4 > 0)))
    expected, expected_masks = pruned(w, grads, 0.5, masks=before, pattern=pattern)
    w, grads = jax.device_put(w, by_leaf()), jax.device_put(grads, by_leaf(None))
    params, masks = pruned(w, grads, 0.5, masks=before, pattern=pattern)
    np.testing.assert_array_equal(as_flat(masks), as_flat(expected_masks))
    np.testing.assert_allclose(as_flat(params), as_flat(expected), rtol=1e-5, atol=1e-6)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == by_leaf()
    of_kernels = {"conv": by_leaf()["conv"] | {"bias": None}, "out": by_leaf()["out"]}
    for found in (masks, obs_scores(w, grads, DAMPING, masks=before)):
        assert jax.tree.map(lambda leaf: leaf.sharding, found) == of_kernels


def loss_fn_of(apply):
    return lambda params, batch: jnp.mean((apply(params, batch) - jnp.sum(batch, 1, keepdims=True)) ** 2)


@pytest.mark.parametrize("outputs", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_linen_trees_are_pruned_also_with_fewer_weights_than_gradients(outputs):
    model, x = flax.linen.Dense(outputs), jax.random.normal(jax.random.key(0), (NUM_GRADS, 8))
    variables = model.init(jax.random.key(1), x)
    loss_fn = loss_fn_of(model.apply)
    grads_fn = lambda p: mfac_jax.collect_gradients(loss_fn, p, [x], NUM_GRADS, per_example=True)  # noqa: E731
    params, masks = prune(variables, grads_fn, 0.5, num_steps=2)
    assert mfac_jax.pruning.sparsity_by_leaf(masks) == {"params/kernel": 0.5}
    assert jax.tree.structure(params) == jax.tree.structure(variables)


def test_states_of_nnx_stay_such():
    model, x = nnx.Linear(8, 5, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (NUM_GRADS, 8))
    graph, state = nnx.split(model, nnx.Param)
    loss_fn = loss_fn_of(lambda state, batch: nnx.merge(graph, state)(batch))
    grads = mfac_jax.collect_gradients(loss_fn, state, [x], NUM_GRADS, per_example=True)
    params, masks = prune(state, grads, 0.5)
    assert mfac_jax.pruning.sparsity_by_leaf(masks) == {"kernel": 0.5}
    nnx.update(model, params)
    assert jnp.sum(model.kernel[...] == 0) == 20


def test_what_stands_for_no_leaf_is_left_as_it_is():
    w, grads = (as_tree(x.astype(np.float32)) for x in (W, G))
    expected = pruned(w, grads, 0.5)
    for absent in (None, optax.MaskedNode()):
        params, masks = pruned({**w, "ref": absent}, {**grads, "ref": absent}, 0.5)
        assert params.pop("ref") == absent
        assert masks.pop("ref") is None
        np.testing.assert_array_equal(as_flat((params, masks)), as_flat(expected))


# Through training.


@pytest.mark.slow
def test_gradual_pruning_ends_with_the_sparsity_and_zeros():
    x = jax.random.normal(jax.random.key(0), (NUM_GRADS, 8))

    def apply(params, batch):
        hidden = jnp.einsum("bij,ijk->bk", batch.reshape(-1, 2, 4), params["conv"]["kernel"])
        return jnp.tanh(hidden + params["conv"]["bias"]) @ params["out"][:3] + batch @ params["out"]

    loss_fn = loss_fn_of(apply)
    params = as_tree(W.astype(np.float32))
    masks = mfac_jax.pruning.kernel_masks(params)
    tx = mfac_jax.pruning.keep_pruned(mfac_jax.mfac(0.1, num_grads=4, weight_decay=1e-3), masks)
    state = tx.init(params)
    schedule: Any = optax.polynomial_schedule(0.0, 0.75, 3, 30, 10)
    step = jax.jit(lambda params, state: train_step(tx, params, state, jax.grad(loss_fn)(params, x)))
    start, shares = loss_fn(params, x), []
    for number in range(50):
        if 10 < number <= 40 and number % 10 == 0:
            grads = mfac_jax.collect_gradients(loss_fn, params, [x], NUM_GRADS, per_example=True)
            params, masks = prune(params, grads, schedule(number), masks=masks)
            state = mfac_jax.pruning.set_masks(tx, state, masks)
            shares.append(sparsity(masks))
        params, state = step(params, state)
    assert shares == [round(float(schedule(number)) * 64) / 64 for number in (20, 30, 40)]
    assert np.sum(as_flat(params)[3:] == 0) == np.sum(~as_flat(masks)) == 48
    assert np.all(as_flat(params)[3:][~as_flat(masks)] == 0)
    assert loss_fn(params, x) < 0.3 * start
