"""NorMuon: Muon whose orthogonalized step is evened out over output neurons, as an optax transform.

After Muon's orthogonalization some neurons move much further than others. NorMuon keeps a second moment for
each neuron, divides by its root, and gives the matrix the norm back that it had before.

The order of the parts and the constants are those of the authors' code
(https://github.com/zichongli5/NorMuon), except in two points. Momentum is that of optax's Muon, which
corrects for its zeros at the start. A kernel's factor for its shape is that of the matrix that is
orthogonalized, where the authors' code takes the last two axes. `check_rivals.py` runs both side by side.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

TINY = 1e-10


class NeuronState(NamedTuple):
    """State of `scale_by_neurons`.

    Attributes:
      second: for each matrix the mean square of every output neuron, (1, ..., outputs).
    """

    second: optax.Params


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    dimensions: Callable[[optax.Params], optax.Params],
    beta: float = 0.95,
    beta2: float = 0.95,
) -> optax.GradientTransformationExtraArgs:
    """Train matrices with NorMuon, and vectors with Adam as optax's Muon does.

    Args:
      learning_rate: number or schedule.
      dimensions: from parameters to Muon's dimension numbers, None for what is no matrix. The last axis is
        that of the output neurons.
      beta: decay of the momentum.
      beta2: decay of the neurons' second moments.

    References:
      Li, Liu, Liang, Chen and Zhao, *NorMuon: Making Muon more efficient and scalable*, 2025,
      arXiv 2510.05491.
    """
    matrices = optax.chain(
        optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=dimensions),
        scale_by_neurons(beta2),
        optax.scale_by_learning_rate(learning_rate),
    )

    def labels(params):
        return jax.tree.map(lambda p: "matrix" if p.ndim > 1 else "vector", params)

    return optax.partition({"matrix": matrices, "vector": optax.adam(learning_rate, nesterov=True)}, labels)


def scale_by_neurons(beta2: float) -> optax.GradientTransformation:
    """Divide each output neuron's step by the root of its mean square; restore the matrix's norm.

    The step then gets Muon's factor for its shape: a matrix (in, out) moves by sqrt(max(1, out / in)).
    """

    def mean_square(step):
        return jnp.mean(step**2, axis=range(step.ndim - 1), keepdims=True)

    def init(params):
        return NeuronState(jax.tree.map(lambda p: jnp.zeros_like(mean_square(p)), params))

    def evened(step, second):
        scaled = step / (jnp.sqrt(second) + TINY)
        restored = jnp.linalg.norm(step.ravel()) / (jnp.linalg.norm(scaled.ravel()) + TINY)
        outputs = step.shape[-1]
        return math.sqrt(max(1, outputs**2 / step.size)) * restored * scaled

    def update(updates, state, params=None):
        del params
        squares = jax.tree.map(mean_square, updates)
        second = optax.tree.update_moment(squares, state.second, beta2, 1)
        return jax.tree.map(evened, updates, second), NeuronState(second)

    return optax.GradientTransformation(init, update)
