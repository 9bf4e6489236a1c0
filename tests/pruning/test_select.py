"""The weights that go are the cheapest that a pattern allows."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mfac_jax._src.pruning import patterns
from mfac_jax._src.pruning.select import check_request
from mfac_jax._src.pruning.select import select as select_by_scores
from mfac_jax.pruning import sparsity

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


def in_groups(x, size: int) -> np.ndarray:
    return np.asarray(patterns.groups(jnp.asarray(x), size, *inputs_of(x)))


def inputs_of(tree) -> list[tuple[int]]:
    return [(max(0, x.ndim - 2),) for x in jax.tree.leaves(tree)]


def scores_of(costs, pattern: patterns.Pattern) -> dict:
    """A choice costs the sum of its entries."""
    return jax.tree.map(lambda x: in_groups(x, pattern.size) @ pattern.choices.T.astype(x.dtype), costs)


def select(costs, masks, amount: float, name: str | None = None) -> Any:
    pattern = patterns.parse(name)
    check_request(masks, amount, pattern, inputs_of(masks))
    finite = jax.tree.map(lambda x: jnp.minimum(x, 100.0), costs) if name else costs
    return select_by_scores(scores_of(finite, pattern), masks, amount, pattern, inputs_of(masks))


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
@given(COSTS, st.floats(0, 0.5), st.floats(0, 0.5))
def test_two_of_four_stay_in_the_groups_that_are_reached(costs, first, second):
    first, second = sorted([first, second])
    masks = select(as_tree(costs), NEVER_PRUNED, first, "2:4")
    pruned = [np.sum(~in_groups(m, 4), axis=1) for m in jax.tree.leaves(masks)]
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
        assert np.all(np.sum(in_groups(mask, 4), axis=1) <= 2)
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
    pattern = patterns.parse("2:4")
    masks = select_by_scores(
        jnp.full((1, 6), jnp.inf), jnp.array([True, True, True, False]), 0.5, pattern, [(0,)]
    )
    np.testing.assert_array_equal(masks, [False, True, True, False])


@few
@given(COSTS, st.floats(0, 0.999), st.floats(0, 0.999))
def test_blocks_go_whole_and_as_many_as_fit_best(costs, first, second):
    first, second = sorted([first, second])
    masks = select(as_tree(costs), NEVER_PRUNED, first, "block:4")
    pruned = [np.sum(~in_groups(m, 4), axis=1) for m in jax.tree.leaves(masks)]
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
            r"got 0.4, where masks already have 0.5 \(10 of 20\)",
        ),
        "above 2:4": (NEVER_PRUNED, 0.6, "2:4", "at most 0.5 with this pattern, got 0.6.*Pass less"),
        "part of a block": (as_tree(np.arange(20) > 0), 0.5, "block:4", r"leaf \['a'\] has one.*in part"),
    }.values(),
)
def test_what_cannot_be_selected_is_refused(masks, amount, pattern, message):
    with pytest.raises(ValueError, match=message):
        select(as_tree(np.zeros(ENTRIES)), masks, amount, pattern)


def test_a_schedule_may_give_the_sparsity():
    amount: Any = optax.linear_schedule(0.0, 0.8, 4)(jnp.asarray(2))
    assert sparsity(select(as_tree(np.arange(ENTRIES) * 1.0), NEVER_PRUNED, amount)) == 0.4


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_sharded_masks_are_selected_alike_and_stay_sharded(axis_type):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, PartitionSpec("x", None))
    costs = jax.random.uniform(jax.random.key(0), (16, 8))
    expected = select(costs, jnp.ones((16, 8), bool), 0.4, "2:4")
    masks = select(jax.device_put(costs, sharding), jnp.ones((16, 8), bool, device=sharding), 0.4, "2:4")
    assert masks.sharding == sharding
    np.testing.assert_array_equal(masks, expected)
