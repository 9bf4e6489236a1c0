"""What the window of gradients says about a training run: spectrum, similarity, damping and step."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from mfac_jax._src.base.numerics import root
from mfac_jax._src.linalg.spectrum import eigenvalues, noise
from mfac_jax._src.mfac.state import ScaleByMFACState
from mfac_jax._src.mfac.state_checks import as_state, check_fields, kind_of


class Diagnostics(NamedTuple):
    """Figures about the gradients in the window and the last step; `diagnostics` has the formulas.

    Attributes:
      spectrum: eigenvalues of the Fisher matrix of the window, largest first.
      damping: of the last step, in the units of the spectrum.
      effective_rank: number of directions that the gradients spread over, from 1 to `rows_used`.
      condition_number: of the damped system as it was solved, over the rows in use.
      damping_share: share of the window's directions that the damping rules, from 0 to 1.
      similarity: mean cosine of two gradients of the window.
      newest_similarity: mean cosine of the newest gradient and the others.
      alignment: cosine of the newest gradient and the update.
      gradient_norm: norm of the newest gradient.
      step_norm: norm of the update.
      fisher_norm: root mean square of the products of the update with the gradients of the window.
      mean_cosine: running mean, over 20 steps or so, of the cosine of a gradient and the update before it.
        Well above 0 the steps are too short, below about -0.1 too long. Zero without `step_adaptation`.
      step_factor: what `step_adaptation` multiplies the update by.
      grads_seen: gradients accepted so far.
      grads_rejected: gradients refused because an entry was NaN or Inf.
      rows_used: gradients in the window.
    """

    spectrum: jax.Array  # (blocks, num_grads), float32 like all below, float64 with a float64 parameter
    damping: jax.Array  # (blocks,)
    effective_rank: jax.Array  # (blocks,)
    condition_number: jax.Array  # (blocks,)
    damping_share: jax.Array  # (blocks,)
    similarity: jax.Array  # (blocks,)
    newest_similarity: jax.Array  # (blocks,)
    alignment: jax.Array  # (blocks,)
    gradient_norm: jax.Array  # (blocks,)
    step_norm: jax.Array  # (blocks,)
    fisher_norm: jax.Array  # (blocks,)
    mean_cosine: jax.Array  # ()
    step_factor: jax.Array  # ()
    grads_seen: jax.Array  # () int32
    grads_rejected: jax.Array  # () int32
    rows_used: jax.Array  # () int32


_READ = ("grads_seen", "grads_rejected", "next_row", "gram", "coefficients", "shift", "log_step")


def diagnostics(state: optax.OptState) -> Diagnostics:
    """Measure the window of gradients and the last step, from the m x m Gram matrix alone.

    It runs under `jax.jit` and `jax.vmap`, and never reads the window. For each block, with K the Gram
    matrix of the n gradients in use, g the newest of them, s_1 >= ... >= s_n the eigenvalues of K / n,
    damping what the last step added to the diagonal of K, over n, and u = f G^T c the update with its
    coefficients c and step factor f::

        effective_rank    = (sum_i s_i)^2 / sum_i s_i^2
        condition_number  = (s_1 + damping) / (s_n + damping)
        damping_share     = sum_i damping / (s_i + damping) / n
        similarity        = mean of cos(g_i, g_k) over i != k
        newest_similarity = mean of cos(g_i, g) over the other g_i
        alignment         = cos(g, u)
        gradient_norm     = |g|
        step_norm         = |u| = f sqrt(c^T K c)
        fisher_norm       = sqrt(sum_i (g_i^T u)^2 / n) = f |K c| / sqrt(n)

    All figures are in the metric and exclude what comes after the transform: momentum of updates, weight
    decay, learning rate. After a refused gradient they are those of the last one accepted. All are finite.
    What is not defined is zero; before the first step condition number and step factor are one.

    Args:
      state: a `ScaleByMFACState`, or any optimizer state that holds exactly one.

    Returns:
      A `Diagnostics` of arrays.

    Raises:
      TypeError: `state` holds no `ScaleByMFACState`.
      ValueError: `state` holds several of them, was made by a vmapped `init`, or a field of it has another
        shape or dtype.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> tx = mfac_jax.scale_by_mfac(num_grads=4, damping=1.0)
      >>> state = tx.init(jnp.zeros(2))
      >>> for gradient in ([2.0, 0.0], [0.0, 2.0]):
      ...   _, state = tx.update(jnp.array(gradient), state)
      >>> result = mfac_jax.diagnostics(state)
      >>> print(result.spectrum, result.effective_rank, result.similarity)
      [[2. 2. 0. 0.]] [2.] [0.]

    References:
      Trevor Hastie, Robert Tibshirani, Jerome Friedman, `The Elements of Statistical Learning
      <https://hastie.su.domains/ElemStatLearn/>`_, 2009, section 3.4.1: n (1 - damping_share) are the
      effective degrees of freedom of ridge regression.
    """
    state = as_state(_find(state))
    is_adapted = kind_of(state, "step_adaptation") == "adapted"
    check_fields(state, (*_READ, "step_length") if is_adapted else _READ, "mfac_jax.diagnostics")
    # The nnx optimizer wraps every array of its state.
    seen, rejected, next_row, *arrays = [jnp.asarray(getattr(state, name)) for name in _READ]
    mean_cosine = jnp.asarray(optax.tree.get(state.step_length, "mean_cosine", 0.0))
    return _measure(seen, rejected, next_row, *arrays, mean_cosine)


def _find(state) -> ScaleByMFACState:
    """The only `ScaleByMFACState` in an optimizer's state."""
    if isinstance(state, ScaleByMFACState):
        return state
    found = optax.tree.get_all_with_path(state, "ScaleByMFACState")
    if not found:
        raise TypeError(
            f"state must be a ScaleByMFACState or an optimizer state that holds one, got a "
            f"{type(state).__name__} without. Pass what init or update of mfac or scale_by_mfac returned."
        )
    if len(found) > 1:
        raise ValueError(
            f"state must hold one ScaleByMFACState, got {len(found)}, at "
            f"{', '.join(jax.tree_util.keystr(path) for path, _ in found)}. Pass one of them; "
            "optax.tree.get_all_with_path(state, 'ScaleByMFACState') returns them all."
        )
    return found[0][1]


@jax.jit
def _measure(seen, rejected, next_row, gram, coefficients, shift, log_step, mean_cosine) -> Diagnostics:
    """The formulas of `diagnostics`."""
    m, dtype = gram.shape[-1], gram.dtype
    max_float = float(jnp.finfo(dtype).max)
    rows_used = jnp.minimum(seen, m)
    n = jnp.maximum(rows_used, 1)
    newest = (next_row - 1) % m

    spectrum = eigenvalues(gram) / n.astype(dtype)
    damping = jnp.minimum(shift / n.astype(dtype), max_float / 4)  # sums with eigenvalues stay finite
    norms, cosines = _norms_and_cosines(gram)
    # The update in gradients of norm one, and divided by its largest coefficient: squares neither overflow
    # nor vanish.
    on_unit = jnp.clip(coefficients * norms, -max_float, max_float)
    largest = jnp.max(jnp.abs(on_unit), axis=-1, keepdims=True)
    on_unit = _ratio(on_unit, largest)
    projections = jnp.einsum("bij,bj->bi", cosines, on_unit, precision=lax.Precision.HIGHEST)
    update_norm = root(jnp.maximum(jnp.sum(on_unit * projections, axis=-1), 0))
    step_factor = jnp.exp(log_step)
    length = largest[:, 0] * step_factor

    return Diagnostics(
        spectrum=spectrum,
        damping=damping,
        effective_rank=_effective_rank(spectrum),
        condition_number=_condition_number(spectrum, damping, n),
        damping_share=_damping_share(spectrum, damping, n),
        similarity=_similarity(cosines, jnp.ones_like(norms)),
        newest_similarity=_similarity(
            cosines, (jnp.arange(m, dtype=newest.dtype) == newest).astype(dtype)[None]
        ),
        alignment=jnp.clip(_ratio(projections[:, newest], update_norm), -1, 1),
        gradient_norm=norms[:, newest],
        step_norm=jnp.minimum(length * update_norm, max_float),
        fisher_norm=jnp.minimum(length * _root_mean_square(norms * projections, n), max_float),
        mean_cosine=mean_cosine.astype(dtype),
        step_factor=step_factor,
        grads_seen=seen,
        grads_rejected=rejected,
        rows_used=rows_used,
    )


def _norms_and_cosines(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Norms of the gradients `(blocks, m)`, and their cosines, zero with a zero gradient."""
    squares = jnp.diagonal(gram, axis1=-2, axis2=-1)
    norms = root(jnp.where(squares >= jnp.finfo(gram.dtype).tiny, squares, 0))
    cosines = _ratio(_ratio(gram, norms[..., :, None]), norms[..., None, :])
    return norms, jnp.clip(cosines, -1, 1)


def _effective_rank(spectrum: jax.Array) -> jax.Array:
    """(sum s)^2 / sum s^2."""
    s = _ratio(spectrum, spectrum[:, :1])
    return _ratio(jnp.square(jnp.sum(s, axis=-1)), jnp.sum(jnp.square(s), axis=-1))


def _condition_number(spectrum: jax.Array, damping: jax.Array, n: jax.Array) -> jax.Array:
    """(s_1 + damping) / (s_n + damping), with rounding noise in place of an s_n below it."""
    first = spectrum[:, 0]
    last = jnp.maximum(spectrum[:, n - 1], noise(spectrum) * first)
    return jnp.maximum(_ratio(first + damping, last + damping), 1)


def _damping_share(spectrum: jax.Array, damping: jax.Array, n: jax.Array) -> jax.Array:
    """The mean of damping / (s + damping) over the n rows in use."""
    shares = _ratio(damping[:, None], spectrum + damping[:, None])
    in_use = jnp.arange(spectrum.shape[-1], dtype=n.dtype) < n
    return jnp.sum(jnp.where(in_use, shares, 0), axis=-1) / n.astype(spectrum.dtype)


def _similarity(cosines: jax.Array, chosen: jax.Array) -> jax.Array:
    """Mean cosine of the gradients `chosen` `(blocks, m)` and the other ones, without zero gradients."""
    in_use = jnp.diagonal(cosines, axis1=-2, axis2=-1)  # one, or zero for a zero gradient
    others = in_use[:, None, :] * (1 - jnp.eye(cosines.shape[-1], dtype=cosines.dtype))[None]
    pairs = (chosen * in_use)[..., None] * others
    return _ratio(jnp.sum(pairs * cosines, axis=(-2, -1)), jnp.sum(pairs, axis=(-2, -1)))


def _root_mean_square(x: jax.Array, n: jax.Array) -> jax.Array:
    """sqrt(sum x^2 / n) along the last axis; the squares neither overflow nor vanish."""
    largest = jnp.max(jnp.abs(x), axis=-1, keepdims=True)
    return largest[:, 0] * root(jnp.sum(jnp.square(_ratio(x, largest)), axis=-1) / n.astype(x.dtype))


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and zero where y is zero."""
    return jnp.where(y > 0, x / jnp.where(y > 0, y, 1), 0)
