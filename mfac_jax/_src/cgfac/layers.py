"""The Fisher matrix of a layer in K-FAC, from the layer's inputs and output gradients alone.

Take N examples at T places each, with the rows a `(N T, in)` and b `(N T, out)`, and V `(in, out)`. Then

    F V = A V B,    A = a^T a / N,    B = b^T b / (N T).

Neither A nor B is formed. If a side has fewer rows than columns, the space that its rows span is enough:
a = L Q^T, with orthonormal columns Q `(in, N T)`, and L `(N T, N T)` takes the place of a. On what is
orthogonal to Q, F is zero, and only the damping acts.

Rows that are zero on both sides stand for a use that did not take place, as in a branch that was not taken.
They are not among the N T: F is that of the uses that were.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from mfac_jax._src.linalg.batches import of_each


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

    @property
    def arrays(self) -> tuple[jax.Array, jax.Array]:
        """The rows of both sides."""
        return self.inputs, self.output_grads

    @property
    def is_stacked(self) -> bool:
        """Whether both arrays have a first axis of independent layers."""
        return self.layout is not None and bool(self.layout.stack)

    @property
    def num_examples(self) -> int:
        """The number N of examples."""
        return self.inputs.shape[int(self.is_stacked)]

    def matrices(self, kernel: jax.Array) -> jax.Array:
        """The kernel as `(in, out)`, with a stack as `(S, in, out)`."""
        if self.layout is None:
            return kernel.reshape(self.inputs.shape[-1], self.output_grads.shape[-1])
        shape, groups = self.layout.shape, _groups(self.layout)
        order = [axis for group in groups for axis in group]
        kept = groups if self.is_stacked else groups[1:]
        sizes = [math.prod(shape[axis] for axis in group) for group in kept]
        return kernel.reshape(shape).transpose(order).reshape(sizes)

    def kernel(self, matrices: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The kernel of this shape that has these matrices."""
        if self.layout is None:
            return matrices.reshape(shape)
        order = [axis for group in _groups(self.layout) for axis in group]
        transposed = matrices.reshape([self.layout.shape[axis] for axis in order])
        return transposed.transpose([order.index(axis) for axis in range(len(order))]).reshape(shape)


Factors = Mapping[str, LayerFactors]  # by the path of the kernel


def _groups(layout: KernelLayout) -> tuple[tuple[int, ...], ...]:
    return layout.stack, layout.inputs, layout.outputs


class LayerFisher(NamedTuple):
    """F, in the coordinates of the spans of the rows where a side has fewer rows than columns.

    Matrices are `(in, out)`. A bias is the last row, or the last column if it belongs to the side of the
    inputs. Of stacked layers, all arrays have a first axis more, of the S layers.

    Attributes:
      a: the inputs; or their L. For a bias of the outputs they have a last column of ones.
      b: the output gradients; or their L. For a bias of the inputs they have that column.
      span_in: Q of the inputs, or None.
      span_out: Q of the output gradients, or None.
      scale: 1 / (N N T), where N counts the examples of all batches.
      noise: the share of the gradient below which a part outside of the spans is rounding.
    """

    a: jax.Array
    b: jax.Array
    span_in: jax.Array | None
    span_out: jax.Array | None
    scale: jax.Array
    noise: jax.Array

    @classmethod
    def of(
        cls, factors: LayerFactors, of_gradient: jnp.dtype, dtype: jnp.dtype, num_batches: int = 1
    ) -> "LayerFisher":
        """The matrix of the factors, computed in `dtype`. Several batches lie among the places.

        `of_gradient` is the dtype of the gradient, which says how much of it is rounding.
        """
        a, b = (_rows(x, factors.is_stacked).astype(dtype) for x in factors.arrays)
        in_use = _in_use(a, b)
        if factors.bias is not None and factors.bias_side == "outputs":
            a = _with_ones(a, in_use)
        elif factors.bias is not None:
            b = _with_ones(b, in_use)
        num_rows = b.shape[-2] if in_use is None else jnp.sum(in_use, axis=-1, dtype=dtype)
        num_rows = jnp.broadcast_to(num_rows, a.shape[:-2]).astype(dtype)
        scale = 1 / (factors.num_examples * num_batches * jnp.maximum(num_rows, 1))
        (a, span_in), (b, span_out) = _spanned(a), _spanned(b)
        noise = _noise(of_gradient, *(x.dtype for x in factors.arrays))
        return cls(a, b, span_in, span_out, scale, noise)

    def product(self, V: jax.Array) -> jax.Array:
        """F V, in coordinates."""
        # The smaller product first: a V with few rows, V B with many.
        if self.a.shape[-2] < V.shape[-2]:
            Y = _matmul(_matmul(_matmul(self.a, V), self.b.mT), self.b)
        else:
            Y = _matmul(self.a, _matmul(_matmul(V, self.b.mT), self.b))
        return self.scale[..., None, None] * _matmul(self.a.mT, Y)

    def coordinates(self, V: jax.Array) -> jax.Array:
        """The coordinates of V's part in both spans."""
        V = V if self.span_in is None else _matmul(self.span_in.mT, V)
        return V if self.span_out is None else _matmul(V, self.span_out)

    def vectors(self, V: jax.Array) -> jax.Array:
        """The matrix with these coordinates."""
        V = V if self.span_in is None else _matmul(self.span_in, V)
        return V if self.span_out is None else _matmul(V, self.span_out.mT)

    def outside(self, V: jax.Array, coordinates: jax.Array) -> jax.Array:
        """V's part outside of the spans, on which F is zero; zeros if it is only rounding."""
        if self.span_in is None and self.span_out is None:
            return jnp.zeros_like(V)
        # The gradient of the batch lies in the spans. What rounding leaves outside would be divided by the
        # damping, and could outweigh the rest.
        return _without_rounding(V - self.vectors(coordinates), V, self.noise)


@jax.custom_jvp
def _without_rounding(rest: jax.Array, V: jax.Array, noise: jax.Array) -> jax.Array:
    """The rest of V; zeros if it is no larger than rounding of V."""
    return jnp.where(_is_more_than(noise, rest, V), rest, 0)


@_without_rounding.defjvp
def _(primals, tangents):
    # Where the rest is rounding, its tangent need not be: the spans' tangents hold no directions that only
    # appear as the rows move (a row of zeros that becomes another).
    (rest, V, noise), (d_rest, d_V, _) = primals, tangents
    is_kept = _is_more_than(noise, rest, V) | _is_more_than(noise, d_rest, d_V)
    return _without_rounding(rest, V, noise), jnp.where(is_kept, d_rest, 0)


def _is_more_than(noise: jax.Array, rest: jax.Array, V: jax.Array) -> jax.Array:
    """Whether the rest of V is more than rounding, for each of the stacked layers."""
    rest, V = (jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0) for x in (rest, V))
    return rest > noise.astype(V.dtype) * V


def _rows(x: jax.Array, is_stacked: bool) -> jax.Array:
    """The rows of a side, `(rows, columns)`; of stacked layers `(S, rows, columns)`."""
    stack = int(is_stacked)
    return x.reshape(*x.shape[:stack], math.prod(x.shape[stack:-1]), x.shape[-1])


def _in_use(a: jax.Array, b: jax.Array) -> jax.Array | None:
    """Which rows stand for a use that took place; None if no row of a belongs to one of b."""
    if a.shape[-2] != b.shape[-2]:
        return None
    return jnp.any(a != 0, axis=-1) | jnp.any(b != 0, axis=-1)


def _with_ones(rows: jax.Array, in_use: jax.Array | None) -> jax.Array:
    """The rows with the column of a bias."""
    ones = jnp.ones(rows.shape[:-1], rows.dtype) if in_use is None else in_use.astype(rows.dtype)
    return jnp.concatenate([rows, ones[..., None]], axis=-1)


def _noise(of_gradient: jnp.dtype, *of_rows: jnp.dtype) -> jax.Array:
    """The share of a gradient that may be rounding, in a layer that computes in these dtypes."""
    # In layers of up to 4096 x 4096, 12 eps of float32 were left outside of the spans.
    full = 50 * float(jnp.finfo(jnp.promote_types(*of_rows)).eps)
    own = max(full, *(2 * _half_eps(d) for d in (of_gradient, *of_rows)))
    # By default, products of float32 are in TF32 on GPUs, and in bfloat16 on TPUs.
    elsewhere = (
        own if jnp.dtype(jnp.float64) in of_rows else max(own, 2 * _half_eps(jnp.dtype(jnp.bfloat16)))
    )
    return lax.platform_dependent(cpu=lambda: jnp.float32(own), default=lambda: jnp.float32(elsewhere))


def _half_eps(dtype: jnp.dtype) -> float:
    """eps of a dtype of 16 bits; zero for larger ones."""
    return float(jnp.finfo(dtype).eps) if jnp.finfo(dtype).bits == 16 else 0.0


def _spanned(rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """L and Q if there are fewer rows than columns; else the rows as they are."""
    if rows.shape[-2] >= rows.shape[-1]:
        return rows, None
    Q, R = _orthonormal(rows.mT)
    return R.mT, Q


@jax.custom_jvp
def _orthonormal(columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of the columns."""
    Q, R = jnp.linalg.qr(columns) if columns.ndim == 2 else of_each(jnp.linalg.qr, columns)
    return Q, R


@_orthonormal.defjvp
def _(primals, tangents):
    # That of jnp.linalg.qr keeps R a triangle, and is not finite where columns depend on each other. Here Q
    # only turns as far as the span does.
    (columns,), (d_columns,) = primals, tangents
    Q, R = _orthonormal(columns)
    inside = _matmul(Q.mT, d_columns)
    return (Q, R), (_matmul(d_columns - _matmul(Q, inside), jnp.linalg.pinv(R)), inside)


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
