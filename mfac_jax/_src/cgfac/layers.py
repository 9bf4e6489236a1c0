"""The Fisher matrix of a layer in K-FAC, from the layer's inputs and output gradients alone.

Take N examples at T places each, with the rows a `(N T, in)` and b `(N T, out)`, and V `(in, out)`. Then

    F V = A V B,    A = a^T a / N,    B = b^T b / (N T).

Neither A nor B is formed. If a side has fewer rows than columns, the space that its rows span is enough:
a = L Q^T, with orthonormal columns Q `(in, N T)`, and L `(N T, N T)` takes the place of a. On what is
orthogonal to Q, F is zero, and only the damping acts.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class KernelLayout:
    """Which axes of a kernel are which, where its first axes are not simply the one side of a layer.

    The kernel's matrices are `(S, in, out)`: the kernel, reshaped to `shape`, with its axes in the order
    `(*stack, *inputs, *outputs)`, and each of the three groups made one axis.

    Attributes:
      shape: what the kernel is reshaped to; every axis of it is in one of the three groups.
      stack: axes along which independent layers lie: layers under a scan, experts, groups of a convolution.
      inputs: axes of the side of `LayerFactors.inputs`.
      outputs: axes of the side of `LayerFactors.output_grads`.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> layout = mfac_jax.KernelLayout(shape=(4, 3, 2), stack=(0,), inputs=(1,), outputs=(2,))
      >>> layer = mfac_jax.LayerFactors(jnp.ones((4, 8, 3)), jnp.ones((4, 8, 2)), layout=layout)
      >>> tx, grads = mfac_jax.scale_by_cgfac(damping=1.0), {'experts': jnp.ones((4, 3, 2))}
      >>> updates, state = tx.update(grads, tx.init(grads), curvature={'experts': layer})
      >>> print(updates['experts'][3, 0], state.iterations)  # four experts, as in LayerFactors' example
      [0.14285715 0.14285715] [1]
    """

    shape: tuple[int, ...]
    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("inputs", "output_grads"),
    meta_fields=("bias", "layout", "bias_side"),
)
@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """The rows of the two sides of a layer, from which K-FAC makes the layer's Fisher matrix.

    `value_and_grad_with_factors` returns them. Make them by hand for layers that it does not find. The sum
    over all rows of inputs outer output_grads, divided by N, is the kernel's gradient, reshaped.

    Attributes:
      inputs: the rows of the side of the kernel's first axes, `(N, ..., in)`. N examples, then the axes of
        the places where the kernel is used, such as those of an image or a text. For `x @ kernel` they are
        x. For a convolution they are the patches, in the order of the kernel's entries.
      output_grads: the rows of the side of the kernel's other axes, `(N, ..., out)`. For `x @ kernel` they
        are the gradient of each example's own loss by the output: N times that of the mean loss. For
        `x @ kernel.T` the two change places: `inputs` is that gradient, and `output_grads` is x. A kernel
        that is used several times has the rows of all uses, as places. Rows of zeros are allowed: a use
        that did not take place has them.
      bias: path of the parameter that is added to the output, as in 'dense/bias', or None.
      layout: which axes of the kernel are which, if its first axes are not those of `inputs`. With stacked
        layers both arrays have a first axis more, of the S layers, before that of the N examples.
      bias_side: 'inputs' or 'outputs': the side whose rows, over N, add up to the gradient of the bias.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> layer = mfac_jax.LayerFactors(inputs=jnp.ones((4, 3)), output_grads=jnp.ones((4, 2)))
      >>> tx = mfac_jax.scale_by_cgfac(damping=1.0)
      >>> params = {'kernel': jnp.ones((3, 2))}
      >>> updates, state = tx.update(params, tx.init(params), curvature={'kernel': layer})
      >>> print(updates['kernel'][0], state.iterations)  # F has the eigenvalue 6 here
      [0.14285715 0.14285715] [1]
    """

    inputs: jax.Array
    output_grads: jax.Array
    bias: str | None = None
    layout: KernelLayout | None = None
    bias_side: Literal["inputs", "outputs"] = "outputs"


Factors = Mapping[str, LayerFactors]  # by the path of the kernel


class LayerFisher(NamedTuple):
    """F, in the coordinates of the spans of the rows where a side has fewer rows than columns.

    Matrices are `(in, out)`. A bias is their last row.

    Attributes:
      a: the inputs, with a column of ones for a bias; or their L.
      b: the output gradients; or their L.
      span_in: Q of the inputs, or None.
      span_out: Q of the output gradients, or None.
      scale: 1 / (N N T), where N counts the examples of all batches.
      noise: the share of the gradient below which a part outside of the spans is rounding.
    """

    a: jax.Array
    b: jax.Array
    span_in: jax.Array | None
    span_out: jax.Array | None
    scale: float
    noise: jax.Array

    @classmethod
    def of(cls, factors: LayerFactors, dtype: jnp.dtype, num_batches: int = 1) -> "LayerFisher":
        """The matrix of the factors, computed in `dtype`. Several batches lie among the places."""
        arrays = (factors.inputs, factors.output_grads)
        a, b = (x.reshape(-1, x.shape[-1]).astype(dtype) for x in arrays)
        if factors.bias is not None:
            a = jnp.concatenate([a, jnp.ones((len(a), 1), dtype)], axis=1)
        scale = 1 / (len(factors.inputs) * num_batches * len(b))
        (a, span_in), (b, span_out) = _spanned(a), _spanned(b)
        return cls(a, b, span_in, span_out, scale, _noise(*(x.dtype for x in arrays)))

    def product(self, V: jax.Array) -> jax.Array:
        """F V, in coordinates."""
        # The smaller product first: a V with few rows, V B with many.
        if len(self.a) < len(V):
            Y = _matmul(_matmul(_matmul(self.a, V), self.b.T), self.b)
        else:
            Y = _matmul(self.a, _matmul(_matmul(V, self.b.T), self.b))
        return self.scale * _matmul(self.a.T, Y)

    def coordinates(self, V: jax.Array) -> jax.Array:
        """The coordinates of V's part in both spans."""
        V = V if self.span_in is None else _matmul(self.span_in.T, V)
        return V if self.span_out is None else _matmul(V, self.span_out)

    def vectors(self, V: jax.Array) -> jax.Array:
        """The matrix with these coordinates."""
        V = V if self.span_in is None else _matmul(self.span_in, V)
        return V if self.span_out is None else _matmul(V, self.span_out.T)

    def outside(self, V: jax.Array, coordinates: jax.Array) -> jax.Array:
        """V's part outside of the spans, on which F is zero; zeros if it is only rounding."""
        if self.span_in is None and self.span_out is None:
            return jnp.zeros_like(V)
        rest = V - self.vectors(coordinates)
        # The gradient of the batch lies in the spans. What rounding leaves outside would be divided by the
        # damping, and could outweigh the rest.
        return jnp.where(jnp.max(jnp.abs(rest)) > self.noise * jnp.max(jnp.abs(V)), rest, 0)


def _noise(*dtypes: jnp.dtype) -> jax.Array:
    """The share of a gradient that may be rounding, in a layer that computes in these dtypes."""
    # In layers of up to 4096 x 4096, 12 eps of float32 were left outside of the spans.
    own = max(50 * float(jnp.finfo(jnp.promote_types(*dtypes)).eps), *(2 * _half_eps(d) for d in dtypes))
    # By default, products of float32 are in TF32 on GPUs, and in bfloat16 on TPUs.
    elsewhere = (
        own if jnp.dtype(jnp.float64) in dtypes else max(own, 2 * _half_eps(jnp.dtype(jnp.bfloat16)))
    )
    return lax.platform_dependent(cpu=lambda: jnp.float32(own), default=lambda: jnp.float32(elsewhere))


def _half_eps(dtype: jnp.dtype) -> float:
    """eps of a dtype of 16 bits; zero for larger ones."""
    return float(jnp.finfo(dtype).eps) if jnp.finfo(dtype).bits == 16 else 0.0


def _spanned(rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """L and Q if there are fewer rows than columns; else the rows as they are."""
    if len(rows) >= rows.shape[1]:
        return rows, None
    Q, R = jnp.linalg.qr(rows.T)
    return R.T, Q


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
