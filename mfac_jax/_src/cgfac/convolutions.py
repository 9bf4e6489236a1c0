"""The gradient of the kernel of a convolution as a product of rows: the patches, and the cotangents."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn

from mfac_jax._src.cgfac.known import Known, is_data_first
from mfac_jax._src.cgfac.terms import Place, Sum, Term, strides_of

_BATCH, _FEATURE, _OUTPUTS, _GROUP, _FIRST = range(5)  # names of axes; from _FIRST on, those of space


def convolution(eqn: JaxprEqn, inputs: Sequence[Known], number: int) -> Sum:
    """A convolution that sums over the places of another one: the gradient of that one's kernel.

    In it the batch is the feature that is summed over, and the kernel of the other one is the output.
    """
    del number
    params: Mapping[str, Any] = eqn.params
    left, right = inputs
    lhs, rhs, out = params["dimension_numbers"]
    x, window = jnp.transpose(left.value, lhs), jnp.transpose(right.value, rhs)
    strides = [right.places[axis].stride for axis in rhs]
    shape = eqn.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
    n_space = window.ndim - 2
    places = list(range(_FIRST, _FIRST + n_space))
    entries = list(range(_FIRST + n_space, _FIRST + 2 * n_space))
    for i in range(n_space):
        x = _patches(params, x, 2 + 2 * i, i, window.shape[2 + i], shape[out[2 + i]])
    x_axes, window_axes = [_BATCH, _FEATURE], [_OUTPUTS, _FEATURE, *places]
    of_features, of_batch = params["feature_group_count"], params["batch_group_count"]
    if (groups := max(of_features, of_batch)) > 1:
        axis = int(of_features > 1)  # of x, that is in groups
        x = _in_groups(x, axis, groups)
        x_axes.insert(axis, _GROUP)
        window, window_axes = _in_groups(window, 0, groups), [_GROUP, *window_axes]
        strides = [strides[0] * window.shape[1], *strides]
    x_axes += [name for pair in zip(places, entries, strict=True) for name in pair]
    axes: dict[int, tuple[int, ...]] = {out[2 + i]: (name,) for i, name in enumerate(entries)}
    axes |= {out[0]: (_BATCH,), out[1]: (_GROUP, _OUTPUTS) if groups > 1 else (_OUTPUTS,)}
    of_out, rows = tuple(axes[axis] for axis in range(len(out))), (_FEATURE, *places)
    if is_data_first(left, right):
        found = tuple(Place(0, stride) for stride in strides)
        return Sum((Term(x, window, tuple(x_axes), tuple(window_axes), found, of_out, rows, right.root),))
    found = tuple(Place(0, stride) for stride in strides_of(x.shape))
    return Sum((Term(window, x, tuple(window_axes), tuple(x_axes), found, of_out, rows),))


def _in_groups(x: jax.Array, axis: int, groups: int) -> jax.Array:
    return x.reshape(*x.shape[:axis], groups, x.shape[axis] // groups, *x.shape[axis + 1 :])


def _patches(
    params: Mapping[str, Any], x: jax.Array, axis: int, number: int, places: int, size: int
) -> jax.Array:
    """What the entries of a kernel meet: the axis becomes two, of the places and of the kernel's entries.

    They are cut out, not convolved with ones: nothing is rounded, in any dtype and on any device.
    """
    step, inner = params["rhs_dilation"][number], params["lhs_dilation"][number]
    apart = params["window_strides"][number]
    low = params["padding"][number][0]
    length = (x.shape[axis] - 1) * inner + 1
    high = (places - 1) * step + (size - 1) * apart + 1 - low - length
    padding = [(low, high, inner - 1) if i == axis else (0, 0, 0) for i in range(x.ndim)]
    x = lax.pad(x, jnp.zeros((), x.dtype), padding)
    parts = [
        lax.slice_in_dim(x, i * apart, i * apart + (places - 1) * step + 1, step, axis) for i in range(size)
    ]
    return jnp.stack(parts, axis + 1)
