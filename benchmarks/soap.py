"""SOAP: Adam in the eigenbases of Shampoo's two covariances, as an optax transform.

The algorithm, its defaults and the order of its parts are those of the authors' PyTorch code
(https://github.com/nikhilvyas/SOAP). The words here are our own; `soap_check.py` runs both side by side.

The gradient G of a matrix has the covariances L = mean of G G^T and R = mean of G^T G. In their eigenbases
(Q_L, Q_R) the gradient is Q_L^T G Q_R, and Adam's second moment is kept of that. The first moment M is kept
in the parameter's own axes and turned at each step, so it follows when the bases change:

    update = Q_L (Q_L^T M Q_R / (sqrt(V) + eps)) Q_R^T, times Adam's correction for the zeros at the start.

The first gradient only gives the first bases. Every tenth step later turns them by one power iteration and
a QR decomposition.

An array of more than two axes is taken as the matrix of (all but the last, last), as for Muon. The
authors' code takes each axis by itself, unless told to merge them. Vectors get Adam.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax


class Decays(NamedTuple):
    """How much of each mean a step keeps."""

    first: float
    second: float
    covariance: float


class LeafState(NamedTuple):
    """What SOAP knows of one parameter, of which it sees the matrix (rows, columns).

    Attributes:
      first: mean of the gradients, as the matrix.
      second: mean of the squared gradients in the bases.
      covariances: (rows, rows) and (columns, columns); None for a side that keeps its axes.
      bases: orthogonal matrices of the same shapes; a column is a direction, the largest first.
    """

    first: jax.Array
    second: jax.Array
    covariances: tuple[jax.Array | None, ...]
    bases: tuple[jax.Array | None, ...]


class SOAPState(NamedTuple):
    """State of `scale_by_soap`.

    Attributes:
      step: () int32, steps so far; the first only makes the bases.
      leaves: a `LeafState` for each parameter.
    """

    step: jax.Array
    leaves: optax.Params


def soap(
    learning_rate: optax.ScalarOrSchedule = 3e-3,
    b1: float = 0.95,
    b2: float = 0.95,
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    frequency: int = 10,
    max_side: int = 10_000,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Train with SOAP.

    Args:
      learning_rate: number or schedule.
      b1: decay of the mean gradient.
      b2: decay of the second moment.
      shampoo_beta: decay of the covariances; None for `b2`.
      eps: added to the root of the second moment.
      frequency: steps from one QR decomposition to the next.
      max_side: a longer side of a matrix keeps its axes. A matrix with two such sides gets Adam.
      weight_decay: 0 as all have it in the comparison; the authors' code has 0.01.

    References:
      Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and Kakade, *SOAP: Improving and
      Stabilizing Shampoo using Adam*, 2024, arXiv 2409.11321.
    """
    decays = Decays(b1, b2, b2 if shampoo_beta is None else shampoo_beta)
    return optax.chain(
        scale_by_soap(decays, eps, frequency, max_side),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_soap(
    decays: Decays, eps: float, frequency: int, max_side: int
) -> optax.GradientTransformation:
    """Precondition as `soap` does, without a learning rate."""

    def init(params):
        return SOAPState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: _empty(p, max_side), params))

    def update(updates, state, params=None):
        del params
        gradients, tree = jax.tree.flatten(updates)
        pairs = list(zip(gradients, tree.flatten_up_to(state.leaves), strict=True))

        def first():
            return [(jnp.zeros_like(g), begin(_matrix(g), s, decays)) for g, s in pairs]

        def later():
            return [_advance(g, s, state.step, decays, eps, frequency) for g, s in pairs]

        results = jax.lax.cond(state.step == 0, first, later)
        steps, leaves = (tree.unflatten(column) for column in zip(*results, strict=True))
        return steps, SOAPState(state.step + 1, leaves)

    return optax.GradientTransformation(init, update)


def begin(gradient: jax.Array, state: LeafState, decays: Decays) -> LeafState:
    """Make the first bases: the eigenvectors of the first gradient's covariances."""
    covariances = _covariances(gradient, state.covariances, decays.covariance)
    bases = (None if c is None else jnp.flip(jnp.linalg.eigh(c)[1], axis=1) for c in covariances)
    return state._replace(covariances=covariances, bases=tuple(bases))


def _advance(gradient, state: LeafState, count, decays: Decays, eps: float, frequency: int):
    """Return the step of one parameter, and its next state; `count` is 1 at its first step."""
    matrix = _matrix(gradient)
    first = decays.first * state.first + (1 - decays.first) * matrix
    seen = _into(matrix, state.bases)
    second = decays.second * state.second + (1 - decays.second) * seen**2
    correction = jnp.sqrt(1 - decays.second**count) / (1 - decays.first**count)
    scaled = _into(first, state.bases) / (jnp.sqrt(second) + eps)
    step = (correction * _out_of(scaled, state.bases)).reshape(gradient.shape).astype(gradient.dtype)
    covariances = _covariances(matrix, state.covariances, decays.covariance)
    state = LeafState(first, second, covariances, state.bases)
    return step, jax.lax.cond(count % frequency == 0, turn, lambda s: s, state)


def turn(state: LeafState) -> LeafState:
    """Bring the bases nearer to the eigenvectors: one power iteration, then a QR decomposition.

    Directions are first put in order of what they carry, and the second moment's entries go with them.
    """
    second, bases = state.second, []
    for axis, (covariance, basis) in enumerate(zip(state.covariances, state.bases, strict=True)):
        if covariance is None or basis is None:
            bases.append(None)
            continue
        carried = jnp.sum(basis * _times(covariance, basis), axis=0)
        order = jnp.argsort(carried, descending=True)
        second = jnp.take(second, order, axis)
        bases.append(jnp.linalg.qr(_times(covariance, basis[:, order]))[0])
    return state._replace(second=second, bases=tuple(bases))


def _matrix(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1]) if array.ndim > 1 else array


def _empty(parameter: jax.Array, max_side: int) -> LeafState:
    matrix = _matrix(parameter)
    sides = matrix.shape if matrix.ndim == 2 else ()

    def squares():  # made twice: a donated state may not hold an array twice
        return tuple(jnp.zeros((n, n), matrix.dtype) if n <= max_side else None for n in sides)

    return LeafState(jnp.zeros_like(matrix), jnp.zeros_like(matrix), squares(), squares())


def _times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision="highest")


def _covariances(matrix: jax.Array, means, decay: float) -> tuple[jax.Array | None, ...]:
    """Bring in the newest gradient's G G^T and G^T G."""
    sides = (matrix, matrix.T)[: len(means)]
    return tuple(
        None if mean is None else decay * mean + (1 - decay) * _times(side, side.T)
        for mean, side in zip(means, sides, strict=True)
    )


def _into(matrix: jax.Array, bases) -> jax.Array:
    """Q_L^T G Q_R, where there are such bases."""
    for axis, basis in enumerate(bases):
        if basis is not None:
            matrix = _times(basis.T, matrix) if axis == 0 else _times(matrix, basis)
    return matrix


def _out_of(matrix: jax.Array, bases) -> jax.Array:
    """Q_L G Q_R^T."""
    return _into(matrix, [None if basis is None else basis.T for basis in bases])
