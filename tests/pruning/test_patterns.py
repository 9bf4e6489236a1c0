"""Patterns: what they list, and groups along the inputs of a leaf."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax._src.pruning import patterns
from mfac_jax._src.pruning.select import check_request


@pytest.mark.parametrize(
    ("pattern", "size", "choices", "together"),
    [(None, 1, 1, 1), ("2:4", 4, 6, 2), ("1:4", 4, 4, 3), ("4:8", 8, 70, 4), ("block:4", 4, 1, 4)],
)
def test_a_pattern_lists_what_goes_together(pattern, size, choices, together):
    found = patterns.parse(pattern)
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
        patterns.parse(pattern)


def test_patterns_with_very_many_choices_are_refused():
    with pytest.raises(ValueError, match=r"'8:16' has 12870 choices per group.*Pass a smaller group"):
        patterns.parse("8:16")


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("shape", [(8,), (4, 3), (3, 2, 8, 5), (0, 3)])
def test_groups_lie_along_the_inputs(shape, size):
    x = jnp.arange(np.prod(shape)).reshape(shape)
    inputs = (max(0, len(shape) - 2),)
    groups = patterns.groups(x, size, inputs)
    assert groups.shape == (x.size // size, size)
    np.testing.assert_array_equal(patterns.ungroup(groups, shape, inputs), x)
    step = shape[-1] if len(shape) > 1 else 1
    np.testing.assert_array_equal(np.diff(groups, axis=1), step)


def test_a_scalar_is_a_group():
    assert patterns.groups(jnp.ones(()), 1, ()).shape == (1, 1)
    assert patterns.ungroup(jnp.ones((1, 1)), (), ()).shape == ()


def test_groups_must_divide_the_inputs():
    masks = {"in": jnp.ones((4, 6), bool), "conv": jnp.ones((3, 3, 3, 16), bool), "bias": None}
    with pytest.raises(
        ValueError, match=r"axis 2 of leaf \['conv'\], \(3, 3, 3, 16\), has 3 entries.*None there"
    ):
        check_request(masks, 0.5, patterns.parse("2:4"), [(2,), (0,)])
    check_request({**masks, "conv": None}, 0.5, patterns.parse("2:4"), [(0,)])
