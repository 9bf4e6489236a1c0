"""Which operations use a kernel: products of matrices, and convolutions."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn


class Origin(NamedTuple):
    """What a value was computed from.

    Attributes:
      parameter: number of the parameter that the value is, entry by entry, or None.
      use: number of the use of a kernel whose output the value is, or None.
      has_all_axes: whether the value has the axes of that parameter; otherwise they are its last ones.
      has_data: whether anything but parameters and constants went into it.
    """

    parameter: int | None = None
    use: int | None = None
    has_all_axes: bool = True
    has_data: bool = False


class Use(NamedTuple):
    """One use of a kernel.

    Attributes:
      kernel: number of the parameter.
      inputs: `(N, ..., in)`.
      output: the type of the output.
      as_rows: from an array like the output to `(N, ..., out)`.
      has_outputs_last: whether the last axes of the output are those of `out`, as for adding a bias.
    """

    kernel: int
    inputs: jax.Array
    output: Any
    as_rows: Callable[[jax.Array], jax.Array]
    has_outputs_last: bool


def use_in(
    eqn: JaxprEqn, inputs: Sequence[jax.Array], origins: Sequence[Origin], output: jax.Array
) -> Use | None:
    """The use of a kernel that the operation is, or None."""
    if eqn.primitive.name == "dot_general":
        return _use_in_product(eqn.params, inputs, origins, output)
    if eqn.primitive.name == "conv_general_dilated":
        return _use_in_convolution(eqn.params, inputs, origins, output)
    return None


def _kernel(origin: Origin, value: jax.Array, other: Origin) -> int | None:
    """The value's number if it is a parameter with its own axes, and the other side depends on data."""
    is_kernel = origin.has_all_axes and other.has_data and jnp.issubdtype(value.dtype, jnp.floating)
    return origin.parameter if is_kernel else None


def _use_in_product(
    params: Mapping[str, Any], inputs: Sequence[jax.Array], origins: Sequence[Origin], output: jax.Array
) -> Use | None:
    """A product that sums over the kernel's first axes, with something that has a batch axis."""
    (contracted, batch) = params["dimension_numbers"]
    kernels = {side: _kernel(origins[side], inputs[side], origins[1 - side]) for side in (1, 0)}
    side, kernel = next(((i, k) for i, k in kernels.items() if k is not None), (0, None))
    if kernel is None or any(batch):
        return None
    x, of_kernel, of_x = inputs[1 - side], contracted[side], contracted[1 - side]
    order = sorted(range(len(of_kernel)), key=of_kernel.__getitem__)
    free = [axis for axis in range(x.ndim) if axis not in of_x]
    if not free or [of_kernel[i] for i in order] != list(range(len(of_kernel))):
        return None
    rows = jnp.transpose(x, (*free, *(of_x[i] for i in order)))
    rows = rows.reshape(*rows.shape[: len(free)], math.prod(rows.shape[len(free) :]))

    def as_rows(y):
        if side == 0:  # the kernel's axes come first
            y = jnp.moveaxis(y, range(y.ndim - len(free), y.ndim), range(len(free)))
        return y.reshape(*y.shape[: len(free)], math.prod(y.shape[len(free) :]))

    return Use(kernel, rows, jax.typeof(output), as_rows, side == 1)


def _use_in_convolution(
    params: Mapping[str, Any], inputs: Sequence[jax.Array], origins: Sequence[Origin], output: jax.Array
) -> Use | None:
    """A convolution in one group, whose kernel has the axes (places..., in, out)."""
    x, kernel = inputs
    (batch_axis, channel_axis, *places), of_kernel, of_output = params["dimension_numbers"]
    last = kernel.ndim - 1
    is_plain = of_kernel == (last, last - 1, *range(last - 1))
    groups = (params["feature_group_count"], params["batch_group_count"])
    number = _kernel(origins[1], kernel, origins[0])
    if number is None or not is_plain or groups != (1, 1):
        return None
    patches = lax.conv_general_dilated_patches(
        jnp.transpose(x, (batch_axis, channel_axis, *places)),
        kernel.shape[:-2],
        params["window_strides"],
        params["padding"],
        params["lhs_dilation"],
        params["rhs_dilation"],
        precision=lax.Precision.HIGHEST,  # patches are made by a convolution with ones: nothing may round
    )  # (N, in * entries of a patch, *places)
    n, _, *counts = patches.shape
    # The kernel's entries come in the order (places..., in), so the channel goes last.
    patches = patches.reshape(n, kernel.shape[-2], -1, *counts)
    patches = jnp.moveaxis(patches, (2, 1), (-2, -1)).reshape(n, *counts, -1)

    def as_rows(y):
        return jnp.transpose(y, (of_output[0], *of_output[2:], of_output[1]))

    return Use(number, patches, jax.typeof(output), as_rows, of_output[1] == last)
