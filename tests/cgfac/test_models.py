"""Of every small model: rows give the gradient of each kernel that is captured; the others are named."""

import math
import warnings

import jax
import numpy as np
import pytest

from mfac_jax import LayerFactors, value_and_grad_with_factors
from mfac_jax._src.base.trees import paths_and_leaves
from tests.cgfac.layer_models import MODELS


def products(layer: LayerFactors, shape: tuple[int, ...]) -> np.ndarray:
    """The sum of the rows' outer products over N, as an array of the kernel's shape."""
    inputs, outputs = (np.asarray(x, np.float64) for x in (layer.inputs, layer.output_grads))
    if layer.layout is None:
        n = len(inputs)
        return (flat(inputs).T @ flat(outputs) / n).reshape(shape)
    layout = layer.layout
    stacked = inputs if layout.stack else inputs[None], outputs if layout.stack else outputs[None]
    n = stacked[0].shape[1]
    matrices = np.stack([flat(a).T @ flat(b) / n for a, b in zip(*stacked, strict=True)])
    order = (*layout.stack, *layout.inputs, *layout.outputs)
    kernel = matrices.reshape([layout.shape[axis] for axis in order]).transpose(np.argsort(order))
    return kernel.reshape(shape)


def sums(layer: LayerFactors) -> np.ndarray:
    """The sum over N of the rows on the side of the bias."""
    rows = np.asarray(layer.inputs if layer.bias_side == "inputs" else layer.output_grads, np.float64)
    rows = rows if layer.layout is not None and layer.layout.stack else rows[None]
    return rows.reshape(len(rows), -1, rows.shape[-1]).sum(1) / rows.shape[1]


def flat(rows: np.ndarray) -> np.ndarray:
    return rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1])


def close(actual: np.ndarray, expected: np.ndarray, scale: float) -> bool:
    """Equal but for the rounding of sums in float32."""
    return bool(np.all(np.abs(actual.reshape(expected.shape) - expected) <= 1e-5 * scale))


# One of each kind; the others run in the slow suite.
QUICK = (
    *("a bias", "outputs first", "a multiple", "a kernel in pieces", "put together", "tied", "used twice"),
    *("a bias elsewhere", "scan over layers", "nested scans in remat", "map over examples", "cond"),
    *(
        "a list of layers",
        "custom_vjp and plain",
        "custom_jvp",
        "experts",
        "heads first",
        "groups",
        "strides",
    ),
    *(
        "transposed",
        "lookup and decoder",
        "a masked kernel",
        "a penalty",
        "other examples",
        "linen attention",
    ),
    *("weight normalisation", "scales and places", "no batch", "shard_map"),
)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_rows_of_all_uses_give_the_gradient(name):
    model = MODELS[name]()
    function = value_and_grad_with_factors(model.loss)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found, plain = jax.jit(lambda p: (function(p), jax.value_and_grad(model.loss)(p)))(model.params)
    (value, grads, factors), (expected_value, expected) = found, plain
    np.testing.assert_allclose(value, expected_value, rtol=1e-5)
    actual, expected = (jax.tree.map(np.asarray, paths_and_leaves(tree)) for tree in (grads, expected))
    scale = max(np.abs(leaf).max(initial=0) for leaf in expected.values())
    assert all(close(actual[path], leaf, scale) for path, leaf in expected.items())
    assert {path: layer.bias for path, layer in factors.items()} == model.kernels
    for path, layer in factors.items():
        assert close(products(layer, expected[path].shape), expected[path], scale), path
        assert layer.bias is None or close(sums(layer), expected[layer.bias], scale), layer.bias
    texts = [str(warning.message) for warning in said]
    assert len(texts) == bool(model.missed)
    assert all(f"'{path}'" in texts[0] for path in model.missed)
    report = function.explain(model.params)
    assert set(report) == set(expected)
    kernels = {path for path, what in report.items() if what == "kernel"}
    assert kernels == set(model.kernels)
    assert {path: what for path, what in report.items() if what.startswith("bias of")} == {
        bias: f"bias of {path}" for path, bias in model.kernels.items() if bias
    }
    for path, word in model.missed.items():
        assert report[path].startswith("left out: ")
        assert word in report[path]


def test_the_quick_ones_are_there():
    assert set(QUICK) <= set(MODELS)
