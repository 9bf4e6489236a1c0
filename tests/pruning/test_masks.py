"""Masks: which leaves have one, what may be one, and how many weights they prune."""

from typing import Any

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx

from mfac_jax._src.pruning.masks import check_masks
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
    params = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros(1, int))
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
        ({"kernel": flax.linen.Partitioned(jnp.ones((2, 2)), ("x", None))}, "kernel"),
        (flax.linen.Partitioned(jnp.ones((2, 2)), ("x", None)), "value"),
    ],
    ids=["haiku", "tuple", "bare array", "stacked", "integers", "shapes", "masked", "box", "bare box"],
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
    masks = check_masks(PARAMS, with_kernel(make(KEPT, dtype)))
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
            "at one leaf at least, got None everywhere",
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
    masks = check_masks(PARAMS, MASKS)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "masks", masks)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "masks", jax.eval_shape(lambda: masks))
        without_target = checkpointer.restore(tmp_path / "masks")
    for found in (restored, without_target):
        assert found["conv"]["bias"] is None
        np.testing.assert_array_equal(found["conv"]["kernel"], masks["conv"]["kernel"])
        assert found["out"].dtype == bool
