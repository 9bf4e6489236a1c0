"""Scores and updates of the Optimal Brain Surgeon beside dense float64 matrices; what `prune` does."""

import itertools
import math
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
from benchmarks import quadratic_losses
from mfac_jax._src.pruning import patterns
from mfac_jax.pruning import obs_scores, obs_update, prune, sparsity
from tests.training_runs import train_step

# Shapes, and a number of gradients, that most tests share: each other one is compiled anew.
SHAPES = {"conv": {"bias": (3,), "kernel": (2, 4, 3)}, "out": (8, 5)}
NUM_GRADS, DAMPING = 12, 0.05
MASKED = np.concatenate([np.zeros(3, bool), np.ones(64, bool)])  # the leaves that take part


def as_flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def as_tree(flat) -> Any:
    flat = np.asarray(flat)
    return {
        "conv": {
            "bias": jnp.asarray(flat[..., :3]),
            "kernel": jnp.asarray(flat[..., 3:27].reshape(*flat.shape[:-1], 2, 4, 3)),
        },
        "out": jnp.asarray(flat[..., 27:].reshape(*flat.shape[:-1], 8, 5)),
    }


def as_masks(flat) -> Any:
    """Biases take no part."""
    tree = as_tree(np.asarray(flat, bool))
    return {"conv": {"bias": None, "kernel": tree["conv"]["kernel"]}, "out": tree["out"]}


def weights_and_gradients(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Flat, with gradients that have a direction in common; in float32's numbers."""
    random = np.random.default_rng(seed)
    w, common = random.standard_normal((2, 67)).astype(np.float32)
    grads = random.standard_normal((NUM_GRADS, 67)).astype(np.float32) + 2 * common
    return w.astype(np.float64), grads.astype(np.float64)


W, G = weights_and_gradients()
BEFORE = np.random.default_rng(1).random(67) > 0.2 * MASKED
AFTER = BEFORE & (np.random.default_rng(2).random(67) > 0.5 * MASKED)
ALL = np.ones(67, bool)


def fisher(alive: np.ndarray) -> np.ndarray:
    return DAMPING * np.eye(67) + (G * alive).T @ (G * alive) / NUM_GRADS


def constrained_minimiser(before, after, gradient_term: float) -> np.ndarray:
    """From the KKT system of min q(delta) with w + delta zero where `after` is not, of what was alive."""
    alive = np.flatnonzero(before)
    constraints = np.eye(67)[before & ~after][:, alive]
    matrix = np.block(
        [
            [fisher(before)[np.ix_(alive, alive)], constraints.T],
            [constraints, np.zeros((len(constraints),) * 2)],
        ]
    )
    slope = gradient_term * G.mean(0)[alive]
    solution = np.linalg.solve(matrix, np.concatenate([-slope, -constraints @ W[alive]]))
    moved = np.zeros(67)
    moved[alive] = W[alive] + solution[: len(alive)]
    return moved


def sum_of_independent_updates(before, after, gradient_term: float) -> np.ndarray:
    inverse = np.linalg.inv(fisher(before))
    v = np.where(before & ~after, W / np.diag(inverse), 0)
    return np.where(after, W - inverse @ (v + gradient_term * G.mean(0) * before), 0)


def pruned(*args, **options) -> tuple[Any, Any]:
    """`prune` on the shared shapes, with the shared damping."""
    return prune(*args, **({"damping": DAMPING} | options))


# The scores and the updates.


@pytest.mark.parametrize("before", [ALL, BEFORE], ids=["all", "masks"])
def test_scores_are_those_of_the_dense_inverse(before):
    expected = W**2 / (2 * np.diag(np.linalg.inv(fisher(before))))
    with jax.enable_x64(True):
        scores = obs_scores(as_tree(W), as_tree(G), DAMPING, masks=as_masks(before))
    assert scores["conv"]["bias"] is None
    chosen = before[3:]
    np.testing.assert_allclose(as_flat(scores)[chosen], expected[3:][chosen], rtol=1e-10)


@pytest.mark.parametrize("gradient_term", [0.0, 0.7])
@pytest.mark.parametrize("before", [ALL, BEFORE], ids=["all", "masks_before"])
@pytest.mark.parametrize(
    ("update", "reference"),
    [("joint", constrained_minimiser), ("independent", sum_of_independent_updates)],
)
def test_updates_are_the_dense_ones(update, reference, before, gradient_term):
    expected = reference(before, AFTER, gradient_term)
    masks_before = None if before is ALL else as_masks(before)
    with jax.enable_x64(True):
        moved: Any = obs_update(
            as_tree(W),
            as_tree(G),
            as_masks(AFTER),
            DAMPING,
            masks_before=masks_before,
            update=update,
            gradient_term=gradient_term,
        )
    assert np.linalg.norm(as_flat(moved) - expected) < 1e-9 * np.linalg.norm(expected)
    assert np.all(as_flat(moved)[~AFTER] == 0)


def test_the_longest_move_is_a_multiple_of_what_goes():
    with jax.enable_x64(True):
        options: Any = {"damping": DAMPING, "gradient_term": 0.0}
        free, short, long = (
            as_flat(obs_update(as_tree(W), as_tree(G), as_masks(AFTER), **options, step_limit=limit))
            for limit in (math.inf, 0.1, 1e3)
        )
    kept = AFTER | ~MASKED
    np.testing.assert_allclose(np.linalg.norm((short - W)[kept]), 0.1 * np.linalg.norm(W[~kept]))
    cosine = (short - W)[kept] @ (free - W)[kept]
    np.testing.assert_allclose(cosine, np.linalg.norm((short - W)[kept]) * np.linalg.norm((free - W)[kept]))
    np.testing.assert_array_equal(long, free)


def test_the_joint_update_has_the_lowest_loss_in_a_thousand_cases():
    losses = quadratic_losses.random_losses(seed=1, cases=1000)
    assert len(losses.joint) == 1000
    assert np.all(losses.joint > 0)
    for other in (losses.independent, losses.zeroing):
        assert np.all(losses.joint <= other * (1 + 1e-12))  # rounding: largest excess found 5e-15
    # And they are cases that tell the three apart.
    assert np.mean(losses.joint < 0.5 * losses.independent) > 0.5
    assert 0.05 < np.mean(losses.independent > losses.zeroing) < 0.5


def test_the_distribution_of_the_losses_is_printed(capsys):
    quadratic_losses.main(["--seed", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        "joint / independent",
        "joint / zeroing",
        "independent / zeroing",
    ]
    assert float(lines[2].split("|")[-2]) <= 1


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


def test_repeated_gradients_and_tiny_damping_leave_finite_costs():
    random = np.random.default_rng(0)
    for spread in (0.0, 1e-4):
        grads = 1e3 * (np.ones((NUM_GRADS, 67)) + spread * random.standard_normal((NUM_GRADS, 67)))
        for pattern in (None, "2:4", "block:4"):
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


def test_each_leaf_is_pruned_to_the_sparsity_when_asked():
    w = as_tree(np.where(np.arange(67) < 27, 1e-3, 1.0).astype(np.float32) * W.astype(np.float32))
    zeros = as_tree(np.zeros((NUM_GRADS, 67), np.float32))
    shares = [
        mfac_jax.pruning.sparsity_by_leaf(pruned(w, zeros, 0.25, per_leaf=each)[1])
        for each in (True, False)
    ]
    assert shares == [{"conv/kernel": 0.25, "out": 0.25}, {"conv/kernel": 16 / 24, "out": 0.0}]


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


def gradients_at(params) -> Any:
    """They move with the parameters."""
    return jax.tree.map(lambda g, w: g + 0.1 * w, as_tree(G.astype(np.float32)), params)


def targets_of(spacing: str, masks) -> list[float]:
    """The sparsities that the function sees, and the last one."""
    seen = []

    def fn(params):
        seen.append(float(np.mean(as_flat(params)[3:] == 0)))
        return gradients_at(params)

    w = as_tree(W.astype(np.float32))
    new = pruned(w, fn, 0.9375, masks=masks, num_steps=4, spacing=spacing)[1]
    return [*seen, sparsity(new)]


def test_steps_are_geometric_or_linear_and_each_gets_new_gradients():
    found = targets_of("geometric", None)
    np.testing.assert_array_equal(found, [0, 0.5, 0.75, 0.875, 0.9375])
    np.testing.assert_array_equal(np.array(targets_of("linear", None)) * 64, [0, 15, 30, 45, 60])
    half = as_masks(~MASKED | (np.arange(67) % 2 == 0))
    kept = 1 - np.array(targets_of("geometric", half))
    np.testing.assert_allclose(kept[1:] / kept[:-1], (1 / 8) ** 0.25, rtol=0.15)  # whole weights
    assert kept[0] == 0.5  # also at the first call the weights are zero where masks say so
    np.testing.assert_array_equal(np.array(targets_of("linear", half)) * 64, [32, 39, 46, 53, 60])


def test_a_function_is_called_sixteen_times_and_gradients_are_one_step():
    w, calls = as_tree(W.astype(np.float32)), []
    pruned(w, lambda params: calls.append(1) or gradients_at(params), 0.5)
    assert len(calls) == 16
    one_step = pruned(w, gradients_at, 0.5, num_steps=1, gradient_term=0.0)
    given = pruned(w, gradients_at(w), 0.5)
    np.testing.assert_array_equal(as_flat(one_step), as_flat(given))


@pytest.mark.parametrize("pattern", ["2:4", "block:4"])
def test_patterns_are_obeyed_after_several_steps(pattern):
    params, masks = pruned(as_tree(W.astype(np.float32)), gradients_at, 0.5, pattern=pattern, num_steps=3)
    assert sparsity(masks) == 0.5
    for leaf in (params["conv"]["kernel"], params["out"]):
        zeros = np.sum(np.asarray(patterns.groups(leaf, 4)) == 0, axis=1)
        assert set(zeros) <= ({2} if pattern == "2:4" else {0, 4})


def test_the_steps_are_those_of_scores_and_update():
    w, amount = as_tree(W.astype(np.float32)), 0.5
    params, masks = pruned(w, gradients_at, amount, num_steps=2, spacing="linear")
    expected, kept = w, as_masks(ALL)
    defaults: Any = {"gradient_term": 0.3, "step_limit": 0.5}
    for target in (16, 32):
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


def test_double_precision_of_the_parameters_survives_gradients_of_single_precision():
    with jax.enable_x64(True):
        w, zeros = as_tree(W + 1e-12), as_tree(np.zeros((NUM_GRADS, 67), np.float32))
        params, masks = pruned(w, zeros, 0.5)
    kept = np.r_[[True] * 3, as_flat(masks)]
    np.testing.assert_array_equal(as_flat(params)[kept], (W + 1e-12)[kept])


@pytest.mark.parametrize(
    ("axis_type", "pattern"),
    [
        (AxisType.Auto, "2:4"),
        (AxisType.Explicit, None),
        pytest.param(AxisType.Auto, None, marks=pytest.mark.slow),
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


def test_linen_trees_with_fewer_weights_than_gradients():
    model, x = flax.linen.Dense(1), jax.random.normal(jax.random.key(0), (16, 8))
    variables = model.init(jax.random.key(1), x)
    grads_fn = lambda p: mfac_jax.collect_gradients(loss_fn_of(model.apply), p, [x], 16, per_example=True)  # noqa: E731
    params, masks = prune(variables, grads_fn, 0.5, num_steps=2)
    assert mfac_jax.pruning.sparsity_by_leaf(masks) == {"params/kernel": 0.5}
    assert jax.tree.structure(params) == jax.tree.structure(variables)


def test_states_of_nnx_stay_such():
    model, x = nnx.Linear(8, 1, rngs=nnx.Rngs(0)), jax.random.normal(jax.random.key(0), (16, 8))
    graph, state = nnx.split(model, nnx.Param)
    loss_fn = loss_fn_of(lambda state, batch: nnx.merge(graph, state)(batch))
    grads = mfac_jax.collect_gradients(loss_fn, state, [x], 16, per_example=True)
    params, masks = prune(state, grads, 0.5)
    assert mfac_jax.pruning.sparsity_by_leaf(masks) == {"kernel": 0.5}
    nnx.update(model, params)
    assert jnp.sum(model.kernel[...] == 0) == 4


def test_what_stands_for_no_leaf_is_left_as_it_is():
    w, grads = (as_tree(x.astype(np.float32)) for x in (W, G))
    expected = pruned(w, grads, 0.5)
    for absent in (None, optax.MaskedNode()):
        params, masks = pruned({**w, "ref": absent}, {**grads, "ref": absent}, 0.5)
        assert params.pop("ref") == absent
        assert masks.pop("ref") is None
        np.testing.assert_array_equal(as_flat((params, masks)), as_flat(expected))


# Bad input.

BAD_ROW = np.where(np.arange(NUM_GRADS)[:, None] == 7, np.nan, G).astype(np.float32)
KEPT_HALF = as_masks(~MASKED | (np.arange(67) % 2 > 0))
GIVEN = as_tree(G.astype(np.float32))
PARAMS = as_tree(W.astype(np.float32))


def other(tree, **leaves) -> Any:
    return {**tree, **leaves}


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    {
        "one": ((PARAMS, GIVEN, 1.0), {}, ValueError, "sparsity must be .*< 1, got 1.0"),
        "negative": ((PARAMS, GIVEN, -0.1), {}, ValueError, "sparsity must be .*got -0.1"),
        "no number": ((PARAMS, GIVEN, "0.5"), {}, TypeError, "sparsity must be .*got '0.5'"),
        "below masks": (
            (PARAMS, GIVEN, 0.4),
            {"masks": KEPT_HALF},
            ValueError,
            r"got 0.4, where masks has 0.5 already \(32 of 64\)",
        ),
        "axes differ": (
            (PARAMS, other(GIVEN, out=jnp.ones((5, 8, 5))), 0.5),
            {},
            ValueError,
            r"one leading axis of the same length .*\['out'\]: \(5, 8, 5\)",
        ),
        "other tree": (
            (PARAMS, {"out": GIVEN["out"]}, 0.5),
            {},
            ValueError,
            r"grads must have the tree of the parameters, but leaf \['conv'\]\['bias'\] is only in one.*"
            "collect_gradients",
        ),
        "not stacked": ((PARAMS, PARAMS, 0.5), {}, ValueError, "one leading axis of the same length"),
        "other shape": (
            (PARAMS, other(GIVEN, out=jnp.ones((NUM_GRADS, 5, 8))), 0.5),
            {},
            ValueError,
            r"behind one leading axis, but leaf \['out'\] is \(12, 5, 8\) for \(8, 5\).*jnp.stack",
        ),
        "no gradients": (
            (PARAMS, jax.tree.map(lambda g: g[:0], GIVEN), 0.5),
            {},
            ValueError,
            "one leading axis of the same length >= 1",
        ),
        "ints": (
            (PARAMS, other(GIVEN, out=jnp.ones((NUM_GRADS, 8, 5), int)), 0.5),
            {},
            TypeError,
            r"grads must be real floating-point arrays, but leaf \['out'\] is int32",
        ),
        "does not divide": (
            (PARAMS, GIVEN, 0.5),
            {"pattern": "2:8"},
            ValueError,
            r"groups of 8, which must divide .*\['kernel'\], \(2, 4, 3\), is 4 long.*None there",
        ),
        "too sparse for it": (
            (PARAMS, GIVEN, 0.6),
            {"pattern": "2:4"},
            ValueError,
            "at most 0.5 with this",
        ),
        "unknown pattern": ((PARAMS, GIVEN, 0.5), {"pattern": "4:2"}, ValueError, "got '4:2'.*'2:4'"),
        "no kernel": (
            ({"bias": jnp.ones(3)}, {"bias": jnp.ones((2, 3))}, 0.5),
            {},
            ValueError,
            r"must have a kernel.*\['bias'\].*masks of your own",
        ),
        "a NaN": (
            (PARAMS, as_tree(BAD_ROW), 0.5),
            {},
            ValueError,
            r"those with the indices \[7\] have a NaN or an Inf",
        ),
        "a parameter": (
            (other(PARAMS, out=PARAMS["out"].at[2, 1].set(jnp.inf)), GIVEN, 0.5),
            {},
            ValueError,
            r"params must be finite, but leaf \['out'\] has a NaN.*training that went well",
        ),
        "int parameter": (
            (other(PARAMS, out=jnp.ones((8, 5), int)), GIVEN, 0.5),
            {},
            TypeError,
            r"params must be real floating-point arrays, but leaf \['out'\] is int32",
        ),
        "masks": (
            (PARAMS, GIVEN, 0.5),
            {"masks": {"out": KEPT_HALF["out"]}},
            ValueError,
            "masks must have the tree of the parameters",
        ),
        "steps": (
            (PARAMS, GIVEN, 0.5),
            {"num_steps": 2},
            ValueError,
            "num_steps must be 1 with gradients that are given, got 2.*Pass a function",
        ),
        "no steps": (
            (PARAMS, lambda _: GIVEN, 0.5),
            {"num_steps": 0},
            ValueError,
            "num_steps must be an int",
        ),
        "damping": ((PARAMS, GIVEN, 0.5), {"damping": 0.0}, ValueError, "damping must be .* > 0, got 0.0"),
        "update": ((PARAMS, GIVEN, 0.5), {"update": "both"}, ValueError, "update must be one of 'joint'"),
        "no update": ((PARAMS, GIVEN, 0.5), {"update": None}, ValueError, "update must be one of 'joint'"),
        "gradient_term": (
            (PARAMS, GIVEN, 0.5),
            {"gradient_term": -1.0},
            ValueError,
            "gradient_term must be .* >= 0, got -1.0",
        ),
        "step_limit": ((PARAMS, GIVEN, 0.5), {"step_limit": 0.0}, ValueError, "step_limit must be .* > 0"),
        "NaN": ((PARAMS, GIVEN, 0.5), {"step_limit": math.nan}, ValueError, "step_limit must be .* > 0"),
        "spacing": (
            (PARAMS, GIVEN, 0.5),
            {"spacing": "cubic"},
            ValueError,
            "spacing must be one of 'geometric', 'linear'",
        ),
        "per_leaf": ((PARAMS, GIVEN, 0.5), {"per_leaf": 1}, TypeError, "per_leaf must be True or False"),
        "None": (
            (PARAMS, lambda _: None, 0.5),
            {},
            ValueError,
            "grads must have the tree of the parameters",
        ),
    }.values(),
)
def test_bad_input_is_refused(args, options, error, message):
    with pytest.raises(error, match=message):
        prune(*args, **options)


def test_parameters_that_are_not_finite_are_refused_before_gradients_are_asked_for():
    with pytest.raises(ValueError, match="params must be finite"):
        prune(other(PARAMS, out=PARAMS["out"] * jnp.nan), lambda _: pytest.fail("asked for"), 0.5)


@pytest.mark.parametrize(
    ("nonsense", "message"),
    [
        (jax.tree.map(lambda g: g.at[3].set(jnp.inf), GIVEN), r"indices \[3\]"),
        (jax.tree.map(lambda g: g[0], GIVEN), "one leading axis"),
        (GIVEN["conv"], "tree of the parameters"),
    ],
)
def test_nonsense_at_a_later_step_is_refused_and_the_parameters_are_as_they_were(nonsense, message):
    params = jax.tree.map(jnp.copy, PARAMS)
    answers = iter([GIVEN, nonsense])
    with pytest.raises(ValueError, match=message):
        pruned(params, lambda _: next(answers), 0.5)
    assert next(answers, None) is None
    np.testing.assert_array_equal(as_flat(params), W)


def test_an_update_that_overflows_is_refused_with_the_cure():
    huge = jax.tree.map(lambda w: w * 1e38, PARAMS)
    with pytest.raises(ValueError, match=r"after pruning\. Pass a larger damping, or a step_limit"):
        pruned(huge, GIVEN, 0.5, damping=1e-9)
    assert np.all(np.isfinite(as_flat(huge)))


def test_masks_of_an_update_must_fit_those_before():
    with pytest.raises(ValueError, match=r"keep no weight that masks_before prune.*\['kernel'\] has 12\."):
        obs_update(PARAMS, GIVEN, as_masks(ALL), DAMPING, masks_before=KEPT_HALF)
    with pytest.raises(ValueError, match=r"at the same leaves, but leaf \['out'\] is in one of the two"):
        obs_update(PARAMS, GIVEN, KEPT_HALF, DAMPING, masks_before=other(KEPT_HALF, out=None))


# Through training.


def test_gradual_pruning_ends_with_the_sparsity_and_zeros():
    x = jax.random.normal(jax.random.key(0), (NUM_GRADS, 8))

    def apply(params, batch):
        hidden = jnp.tanh(batch @ params["in"]["kernel"] + params["in"]["bias"])
        return hidden @ params["out"]

    loss_fn = loss_fn_of(apply)
    keys = jax.random.split(jax.random.key(1))
    params: Any = {
        "in": {"kernel": jax.random.normal(keys[0], (8, 8)), "bias": jnp.zeros(8)},
        "out": jax.random.normal(keys[1], (8, 1)),
    }
    masks = mfac_jax.pruning.kernel_masks(params)
    tx = mfac_jax.pruning.keep_pruned(mfac_jax.mfac(num_grads=8, weight_decay=1e-3), masks)
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
    expected = [round(float(schedule(number)) * 72) / 72 for number in (20, 30, 40)]
    assert shares == expected
    pruned_weights = [params["in"]["kernel"][~masks["in"]["kernel"]], params["out"][~masks["out"]]]
    assert sum(w.size for w in pruned_weights) == 54
    assert all(np.all(w == 0) for w in pruned_weights)
    assert loss_fn(params, x) < 0.5 * start
