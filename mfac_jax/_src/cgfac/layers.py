"""The Fisher matrix of a layer in K-FAC, from the layer's inputs and output gradients alone.

With the rows of a `(R, in)` and b `(R, out)`, of N examples at T places each, and V `(in, out)`:

    F V = A V B,    A = a^T a / N,    B = b^T b / (N T).

Neither A nor B is made. A side with fewer rows than columns is looked at in the space that its rows span:
a = L Q^T with orthonormal columns Q `(in, R)`, so that L `(R, R)` stands for a; what is orthogonal to Q
meets the damping alone.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("inputs", "output_grads"), meta_fields=("bias",)
)
@dataclasses.dataclass(frozen=True)
class LayerFactors:
    """What the Fisher matrix of a layer is made of in K-FAC, for the examples of a batch.

    `value_and_grad_with_factors` makes them; a model that it does not see through can make its own.

    Attributes:
      inputs: what the kernel is multiplied with, `(N, ..., in)`: N examples, and axes of the places where
        the kernel is used more than once, such as those of an image or of a text. Of a convolution the
        patches, in the order of the kernel's entries.
      output_grads: gradients of each example's own loss by what comes out, `(N, ..., out)`; of the mean
        loss they are N times its gradients. Another number of examples than that of the inputs is allowed.
      bias: path of the parameter that is added to what comes out, as in 'dense/bias'; None for none.

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


Factors = Mapping[str, LayerFactors]  # by the path of the kernel


class LayerFisher(NamedTuple):
    """F in the coordinates of the spans of the rows, where there are fewer of them than columns.

    Matrices are `(in, out)`; where there is a bias it is their last row.

    Attributes:
      a: the inputs, with a column of ones where there is a bias; or L.
      b: the output gradients; or L.
      span_in: Q of the inputs, or None.
      span_out: Q of the output gradients, or None.
      scale: 1 / (N N T), N with the examples of all batches.
      noise: of the gradient, in shares of it: what is smaller outside of the spans is rounding.
    """

    a: jax.Array
    b: jax.Array
    span_in: jax.Array | None
    span_out: jax.Array | None
    scale: float
    noise: jax.Array

    @classmethod
    def of(cls, factors: LayerFactors, dtype: jnp.dtype, num_batches: int = 1) -> "LayerFisher":
        """The matrix of the factors, computed with in `dtype`; batches are among the places."""
        arrays = (factors.inputs, factors.output_grads)
        a, b = (x.reshape(-1, x.shape[-1]).astype(dtype) for x in arrays)
        if factors.bias is not None:
            a = jnp.concatenate([a, jnp.ones((len(a), 1), dtype)], axis=1)
        scale = 1 / (len(factors.inputs) * num_batches * len(b))
        (a, span_in), (b, span_out) = _spanned(a), _spanned(b)
        return cls(a, b, span_in, span_out, scale, _noise(*(x.dtype for x in arrays)))

    def product(self, V: jax.Array) -> jax.Array:
        """F V, of coordinates."""
        if len(self.a) < len(V):
            Y = _matmul(_matmul(_matmul(self.a, V), self.b.T), self.b)
        else:
            Y = _matmul(self.a, _matmul(_matmul(V, self.b.T), self.b))
        return self.scale * _matmul(self.a.T, Y)

    def coordinates(self, V: jax.Array) -> jax.Array:
        """Those of the part of V that is in both spans."""
        V = V if self.span_in is None else _matmul(self.span_in.T, V)
        return V if self.span_out is None else _matmul(V, self.span_out)

    def vectors(self, V: jax.Array) -> jax.Array:
        """The matrix with these coordinates."""
        V = V if self.span_in is None else _matmul(self.span_in, V)
        return V if self.span_out is None else _matmul(V, self.span_out.T)

    def outside(self, V: jax.Array, coordinates: jax.Array) -> jax.Array:
        """The part of V that is not in both spans, on which F is zero; zeros where it is only rounding."""
        if self.span_in is None and self.span_out is None:
            return jnp.zeros_like(V)
        rest = V - self.vectors(coordinates)
        return jnp.where(jnp.max(jnp.abs(rest)) > self.noise * jnp.max(jnp.abs(V)), rest, 0)


def empty_window(factors: Factors, num_batches: int) -> Factors:
    """Zeros, `(N, num_batches, ...)` for each array of the factors, which may be shapes.

    The batches are no leading axis, so that examples may be split over a mesh.
    """

    def zeros(x):
        return jnp.zeros((x.shape[0], num_batches, *x.shape[1:]), x.dtype)

    return jax.tree.map(zeros, dict(factors))


def remember(window: Factors, factors: Factors, step: jax.Array) -> Factors:
    """The window with the factors in the place of the oldest; the first stand for all that are to come."""

    def put(rows, x):
        x = x.astype(rows.dtype)
        written = lax.dynamic_update_index_in_dim(rows, x, step % rows.shape[1], 1)
        return jnp.where(step == 0, jnp.expand_dims(x, 1), written)

    return {kernel: jax.tree.map(put, kept, factors[kernel]) for kernel, kept in window.items()}


def _noise(*dtypes: jnp.dtype) -> jax.Array:
    """The share of a gradient that may be rounding, where a layer computes with these dtypes.

    In layers of up to 4096 x 4096, 12 eps of float32 were left outside of the spans. Products of float32
    are in TF32 on GPUs and in bfloat16 on TPUs, unless asked otherwise.
    """
    own = max(50 * float(jnp.finfo(jnp.promote_types(*dtypes)).eps), *(2 * _half_eps(d) for d in dtypes))
    elsewhere = (
        own if jnp.dtype(jnp.float64) in dtypes else max(own, 2 * _half_eps(jnp.dtype(jnp.bfloat16)))
    )
    return lax.platform_dependent(cpu=lambda: jnp.float32(own), default=lambda: jnp.float32(elsewhere))


def _half_eps(dtype: jnp.dtype) -> float:
    """eps of a dtype of 16 bits; of larger ones zero."""
    return float(jnp.finfo(dtype).eps) if jnp.finfo(dtype).bits == 16 else 0.0


def _spanned(rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """L and Q where there are fewer rows than columns, else the rows as they are."""
    if len(rows) >= rows.shape[1]:
        return rows, None
    Q, R = jnp.linalg.qr(rows.T)
    return R.T, Q


def _matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
