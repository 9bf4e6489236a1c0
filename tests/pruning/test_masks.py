"""Masks are checked, counted and kept in checkpoints; the weights that go are the cheapest of a pattern."""

import re
from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax._src.pruning import masks as _masks
from mfac_jax._src.pruning import patterns
from mfac_jax.pruning import apply_masks, kernel_masks, pruning_report, sparsity, sparsity_by_leaf

PARAMS = {"conv": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "out": jnp.ones((2, 8, 1))}
KEPT = np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1], [1, 1, 0]])
MASKS = {"conv": {"kernel": KEPT == 1, "bias": None}, "out": np.ones((2, 8, 1), bool)}


def with_kernel(mask) -> dict:
    return {**MASKS, "conv": {"kernel": mask, "bias": None}}


class Net(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.Embed(5, 4)(x)
        x = flax.linen.LayerNorm()(x)
        return flax.linen.Dense(2)(x)


# Which leaves.


def test_kernels_of_linen_are_found():
    params = Net().init(jax.random.key(0), jnp.zeros(1, int))
    masks = kernel_masks(params)
    assert list(sparsity_by_leaf(masks)) == ["params/Dense_0/kernel"]
    assert masks["params"]["Dense_0"]["kernel"].shape == (4, 2)


def test_kernels_of_nnx_are_found_and_named_without_value():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Embed(5, 4, rngs=rngs), nnx.LayerNorm(4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
    )
    params = nnx.state(model, nnx.Param)
    masks = kernel_masks(params)
    assert isinstance(masks, nnx.State)
    assert sparsity_by_leaf(masks) == {"layers/2/kernel": 0.0}
    assert jax.tree.structure(apply_masks(params, masks)) == jax.tree.structure(params)


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (
            {
                "linear": {"w": jnp.ones((2, 2)), "b": jnp.ones(2)},
                "embed": {"embeddings": jnp.ones((2, 2))},
            },
            "linear/w",
        ),
        ((jnp.ones((2, 2)), jnp.ones(2)), "0"),
        (jnp.ones((2, 2)), "()"),
        ({"bias": jnp.ones((6, 2)), "kernel": jnp.ones((6, 2, 2))}, "kernel"),  # of nn.scan
        ({"counts": jnp.ones((2, 2), int), "rescale_in": jnp.ones((2, 2)), "mask": None}, "rescale_in"),
        ({"kernel": jax.ShapeDtypeStruct((2, 2), jnp.bfloat16)}, "kernel"),
        ({"kernel": jnp.ones((2, 2)), "other": optax.MaskedNode()}, "kernel"),
    ],
    ids=["haiku", "tuple", "bare array", "stacked", "integers", "shapes", "masked"],
)
def test_kernels_are_found_in_any_tree(params, names):
    assert ", ".join(sparsity_by_leaf(kernel_masks(params))) == names


def test_parameters_without_a_kernel_are_refused():
    with pytest.raises(ValueError, match=r"must have a kernel.*\['bias'\].*Pass masks of your own"):
        kernel_masks({"bias": jnp.ones((3, 3)), "w": jnp.ones(3)})


# What a mask may be.


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int32, np.float32, jnp.bfloat16])
@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_masks_of_zeros_and_ones_are_accepted(dtype, make):
    masks = _masks.check_masks(PARAMS, with_kernel(make(KEPT, dtype)))
    assert masks["conv"]["kernel"].dtype == bool
    np.testing.assert_array_equal(masks["conv"]["kernel"], KEPT == 1)
    assert masks["conv"]["bias"] is None


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    {
        "missing leaf": ({"conv": MASKS["conv"]}, ValueError, r"\['out'\] is only in one of the two"),
        "other node": (list(MASKS.values()), ValueError, r"must have the tree.*with None at leaves"),
        "shape": (with_kernel(np.ones((3, 4))), ValueError, r"\['kernel'\] is \(3, 4\) for \(4, 3\)"),
        "scalar": (with_kernel(True), TypeError, r"\['kernel'\] is bool.*Pass an array, or None"),
        "value": (with_kernel(KEPT * 0.5), ValueError, r"\['kernel'\] has 0.5.*Pass a comparison"),
        "NaN": (with_kernel(KEPT * np.nan), ValueError, r"no values but 0 .* and 1 .* has nan"),
        "strings": (with_kernel(KEPT.astype(str)), TypeError, r"must be arrays of bools.*is <U"),
        "nothing": (
            jax.tree.map(lambda _: None, PARAMS),
            ValueError,
            "at one leaf or more, got None at all",
        ),
    }.values(),
)
def test_what_is_no_mask_is_refused(masks, error, message):
    with pytest.raises(error, match=message):
        apply_masks(PARAMS, masks)


def test_masks_may_be_traced():
    pruned: Any = jax.jit(apply_masks)(PARAMS, with_kernel(jnp.asarray(KEPT)))
    np.testing.assert_array_equal(pruned["conv"]["kernel"], KEPT)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_pruned_entries_become_zero_whatever_they_were(dtype):
    x = jnp.array([jnp.nan, jnp.inf, -1.0, -0.0, 3.0, -0.0], dtype)
    pruned = apply_masks(x, jnp.array([0, 0, 0, 0, 1, 1]))
    assert pruned.dtype == dtype
    np.testing.assert_array_equal(np.asarray(pruned, np.float32), [0, 0, 0, 0, 3, 0])
    np.testing.assert_array_equal(np.signbit(np.asarray(pruned, np.float32)), [False] * 5 + [True])


def test_leaves_without_a_mask_are_handed_back():
    params = {**PARAMS, "conv": {"kernel": jnp.ones((4, 3)), "bias": object()}}
    assert apply_masks(params, MASKS)["conv"]["bias"] is params["conv"]["bias"]


# The report.


def test_sparsity_counts_entries_not_leaves():
    assert sparsity(MASKS) == 5 / 28
    assert sparsity_by_leaf(MASKS) == {"conv/kernel": 5 / 12, "out": 0.0}
    assert sparsity(jnp.zeros(3)) == 1.0
    assert sparsity(np.ones((0, 3))) == 0.0


def test_the_report_has_a_line_for_each_leaf_and_the_total():
    lines = pruning_report({**MASKS, "big": np.zeros((40, 50), np.uint8)}).splitlines()
    assert [line.split() for line in lines] == [
        ["leaf", "shape", "entries", "kept", "sparsity"],
        ["big", "40", "x", "50", "2,000", "0", "1.0000"],
        ["conv/kernel", "4", "x", "3", "12", "7", "0.4167"],
        ["out", "2", "x", "8", "x", "1", "16", "16", "0.0000"],
        ["total", "2,028", "23", "0.9887"],
    ]
    assert len({len(line) for line in lines}) == 1


def test_masks_survive_a_checkpoint(tmp_path):
    masks = _masks.check_masks(PARAMS, MASKS)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "masks", masks)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "masks", jax.eval_shape(lambda: masks))
        without_target = checkpointer.restore(tmp_path / "masks")
    for found in (restored, without_target):
        assert found["conv"]["bias"] is None
        np.testing.assert_array_equal(found["conv"]["kernel"], masks["conv"]["kernel"])
        assert found["out"].dtype == bool


# Patterns.


@pytest.mark.parametrize(
    ("pattern", "size", "choices", "together"),
    [(None, 1, 1, 1), ("2:4", 4, 6, 2), ("1:4", 4, 4, 3), ("4:8", 8, 70, 4), ("block:4", 4, 1, 4)],
)
def test_a_pattern_lists_what_goes_together(pattern, size, choices, together):
    found = patterns.parse_pattern(pattern)
    assert found.size == size
    assert found.together == together
    assert len(np.unique(found.choices, axis=0)) == len(found.choices) == choices
    assert np.all(found.choices.sum(1) == together)


@pytest.mark.parametrize(
    "pattern", ["4:2", "0:4", "2:2", "abc", "block:1", "block:0", "2:", "-1:4", "", 4, "2:4 "]
)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(
        ValueError, match=f"pattern must be None, 'N:M'.*got {re.escape(repr(pattern))}.*'2:4'"
    ):
        patterns.parse_pattern(pattern)


def test_patterns_with_very_many_choices_are_refused():
    with pytest.raises(ValueError, match=r"'8:16' has 12870 choices a group.*Pass a smaller group"):
        patterns.parse_pattern("8:16")


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("shape", [(8,), (4, 3), (3, 2, 8, 5), (0, 3)])
def test_groups_lie_along_the_inputs(shape, size):
    x = jnp.arange(np.prod(shape)).reshape(shape)
    groups = patterns.groups(x, size)
    assert groups.shape == (x.size // size, size)
    np.testing.assert_array_equal(patterns.ungroup(groups, shape), x)
    step = shape[-1] if len(shape) > 1 else 1
    np.testing.assert_array_equal(np.diff(groups, axis=1), step)


def test_a_scalar_is_a_group():
    assert patterns.groups(jnp.ones(()), 1).shape == (1, 1)
    assert patterns.ungroup(jnp.ones((1, 1)), ()).shape == ()


def test_groups_must_divide_the_inputs():
    masks = {"in": jnp.ones((4, 6), bool), "conv": jnp.ones((3, 3, 3, 16), bool), "bias": None}
    with pytest.raises(
        ValueError, match=r"axis 2 of leaf \['conv'\], \(3, 3, 3, 16\), is 3 long.*None there"
    ):
        patterns.check_request(masks, 0.5, patterns.parse_pattern("2:4"))
    patterns.check_request({**masks, "conv": None}, 0.5, patterns.parse_pattern("2:4"))


# Selection.

SHAPES = {"a": (4, 3), "b": None, "c": (8,)}
ENTRIES = 20
# Few values, so that there are ties.
COSTS = st.lists(st.sampled_from([0.0, 1.0, 2.0, 2.5, float("inf")]), min_size=ENTRIES, max_size=ENTRIES)
NEVER_PRUNED: Any = {"a": jnp.ones((4, 3), bool), "b": None, "c": jnp.ones(8, bool)}
few = settings(max_examples=20, deadline=None)


def as_tree(flat) -> dict:
    flat = np.asarray(flat)
    return {"a": jnp.asarray(flat[:12].reshape(4, 3)), "b": None, "c": jnp.asarray(flat[12:])}


def as_flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(tree["a"]), np.ravel(tree["c"])])


def scores_of(costs, pattern: patterns.Pattern) -> dict:
    """A choice costs the sum of its entries."""
    return jax.tree.map(
        lambda x: patterns.groups(x, pattern.size) @ pattern.choices.T.astype(x.dtype), costs
    )


def select(costs, masks, amount: float, name: str | None = None, **options) -> Any:
    pattern = patterns.parse_pattern(name)
    patterns.check_request(masks, amount, pattern, **options)
    finite = jax.tree.map(lambda x: jnp.minimum(x, 100.0), costs) if name else costs
    return patterns.select(scores_of(finite, pattern), masks, amount, pattern, **options)


@few
@given(COSTS, st.floats(0, 0.999), st.floats(0, 0.999))
def test_exactly_the_cheapest_entries_go_ties_in_order(costs, first, second):
    first, second = sorted([first, second])
    masks = select(as_tree(costs), NEVER_PRUNED, first)
    order = np.argsort(costs, kind="stable")
    expected = np.ones(ENTRIES, bool)
    expected[order[: round(first * ENTRIES)]] = False
    np.testing.assert_array_equal(as_flat(masks), expected)
    again = select(as_tree(costs[::-1]), masks, second)
    assert np.sum(~as_flat(again)) == round(second * ENTRIES)
    assert not np.any(as_flat(again) & ~as_flat(masks))


@few
@given(COSTS, st.floats(0, 0.999))
def test_each_leaf_has_the_sparsity(costs, amount):
    masks = select(as_tree(costs), NEVER_PRUNED, amount, per_leaf=True)
    assert jnp.sum(~masks["a"]) == round(amount * 12)
    assert jnp.sum(~masks["c"]) == round(amount * 8)
    alone = select({"a": as_tree(costs)["a"]}, {"a": NEVER_PRUNED["a"]}, amount)
    np.testing.assert_array_equal(masks["a"], alone["a"])


@few
@given(COSTS, st.floats(0, 0.5), st.floats(0, 0.5))
def test_two_of_four_stay_in_the_groups_that_are_reached(costs, first, second):
    first, second = sorted([first, second])
    masks = select(as_tree(costs), NEVER_PRUNED, first, "2:4")
    pruned = [np.sum(~np.asarray(patterns.groups(m, 4)), axis=1) for m in jax.tree.leaves(masks)]
    assert set(np.concatenate(pruned)) <= {0, 2}
    assert abs(np.sum(np.concatenate(pruned)) - round(first * ENTRIES)) <= 1
    again = select(as_tree(costs[::-1]), masks, second, "2:4")
    assert not np.any(as_flat(again) & ~as_flat(masks))


@few
@given(COSTS, st.lists(st.booleans(), min_size=ENTRIES, max_size=ENTRIES))
def test_at_its_limit_every_group_obeys_and_what_is_pruned_stays(costs, kept):
    kept[1] = kept[4] = kept[13] = kept[14] = kept[17] = kept[0] = kept[7] = kept[3] = kept[10] = kept[
        18
    ] = True
    masks = select(as_tree(costs), as_tree(kept), 0.5, "2:4")
    for mask, before in zip(jax.tree.leaves(masks), jax.tree.leaves(as_tree(kept)), strict=True):
        assert np.all(np.sum(patterns.groups(mask, 4), axis=1) <= 2)
        assert not np.any(mask & ~before)


def test_the_cheapest_pair_of_four_goes():
    costs = jnp.array([3.0, 1.0, 2.0, 5.0, 0.0, 9.0, 9.0, 0.0])
    masks = select(costs, jnp.ones(8, bool), 0.5, "2:4")
    np.testing.assert_array_equal(masks, [True, False, False, True, False, True, True, False])
    one_is_gone = jnp.array([True, True, True, False, True, True, True, True])
    masks = select(costs, one_is_gone, 0.5, "2:4")
    np.testing.assert_array_equal(masks, [True, False, True, False, False, True, True, False])


def test_infinite_scores_go_last_but_go():
    costs = jnp.array([jnp.inf, 1.0, jnp.inf, 0.0])
    np.testing.assert_array_equal(select(costs, jnp.ones(4, bool), 0.75), [False, False, True, False])
    pattern = patterns.parse_pattern("2:4")
    masks = patterns.select(jnp.full((1, 6), jnp.inf), jnp.array([True, True, True, False]), 0.5, pattern)
    np.testing.assert_array_equal(masks, [False, True, True, False])


@few
@given(COSTS, st.floats(0, 0.999), st.floats(0, 0.999))
def test_blocks_go_whole_and_as_many_as_fit_best(costs, first, second):
    first, second = sorted([first, second])
    masks = select(as_tree(costs), NEVER_PRUNED, first, "block:4")
    pruned = [np.sum(~np.asarray(patterns.groups(m, 4)), axis=1) for m in jax.tree.leaves(masks)]
    assert set(np.concatenate(pruned)) <= {0, 4}
    assert abs(np.sum(~as_flat(masks)) - round(first * ENTRIES)) <= 2
    again = select(as_tree(costs), masks, second, "block:4")
    assert not np.any(as_flat(again) & ~as_flat(masks))
    assert abs(np.sum(~as_flat(again)) - round(second * ENTRIES)) <= 2


@pytest.mark.parametrize(
    ("masks", "amount", "pattern", "message"),
    {
        "one": (NEVER_PRUNED, 1.0, None, r"sparsity must be .* < 1, got 1.0"),
        "negative": (NEVER_PRUNED, -0.1, None, r"sparsity must be .* >= 0 and < 1, got -0.1"),
        "NaN": (NEVER_PRUNED, float("nan"), None, "sparsity must be .*, got nan"),
        "below": (
            as_tree(np.arange(20) > 9),
            0.4,
            None,
            r"got 0.4, where masks has 0.5 already \(10 of 20\)",
        ),
        "above 2:4": (NEVER_PRUNED, 0.6, "2:4", "at most 0.5 with this pattern, got 0.6.*Pass less"),
        "part of a block": (as_tree(np.arange(20) > 0), 0.5, "block:4", r"leaf \['a'\] has one.*in part"),
    }.values(),
)
def test_what_cannot_be_selected_is_refused(masks, amount, pattern, message):
    with pytest.raises(ValueError, match=message):
        select(as_tree(np.zeros(ENTRIES)), masks, amount, pattern)


def test_per_leaf_a_leaf_that_is_sparser_already_is_named():
    masks = {**NEVER_PRUNED, "c": jnp.zeros(8, bool)}
    assert sparsity(select(as_tree(np.zeros(ENTRIES)), masks, 0.5)) == 0.5
    with pytest.raises(ValueError, match=r"where leaf \['c'\] has 1 already \(8 of 8\)"):
        select(as_tree(np.zeros(ENTRIES)), masks, 0.5, per_leaf=True)


def test_a_schedule_may_give_the_sparsity():
    amount: Any = optax.linear_schedule(0.0, 0.8, 4)(jnp.asarray(2))
    assert sparsity(select(as_tree(np.arange(ENTRIES) * 1.0), NEVER_PRUNED, amount)) == 0.4


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_sharded_masks_are_selected_alike_and_stay_sharded(axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    costs = jax.random.uniform(jax.random.key(0), (16, 8))
    expected = select(costs, jnp.ones((16, 8), bool), 0.4, "2:4")
    masks = select(jax.device_put(costs, sharding), jnp.ones((16, 8), bool, device=sharding), 0.4, "2:4")
    assert masks.sharding == sharding
    np.testing.assert_array_equal(masks, expected)
