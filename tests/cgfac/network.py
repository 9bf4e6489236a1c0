"""A small network, its layers' factors, and what the tests of CG-FAC measure with."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import mfac_jax
from mfac_jax import scale_by_cgfac, value_and_grad_with_factors

LayerFactors: Any = mfac_jax.LayerFactors  # of NumPy's arrays too
NAN, INF = float("nan"), float("inf")
# Of float32 solutions: rounding of 1e-7, times the largest eigenvalue over the damping, some 1e3 to 1e4.
AFTER_CG = 1e-3

MLP = nn.Sequential([nn.Dense(5), nn.tanh, nn.Dense(3)])
X = jax.random.normal(jax.random.key(0), (12, 4))
LABELS = jnp.arange(12) % 3
PARAMS = jax.jit(MLP.init)(jax.random.key(1), X)["params"]


def cross_entropy(outputs, labels=LABELS):
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels).mean()


def apply(params, x=X):
    return MLP.apply({"params": params}, x)


def loss(params):
    return cross_entropy(apply(params))


STEP = jax.jit(value_and_grad_with_factors(loss))


@functools.cache
def gradient_and_factors() -> tuple[Any, Any]:
    """At PARAMS."""
    _, gradient, factors = STEP(PARAMS)
    return gradient, factors


def tx_and_state(params, *args, **options) -> tuple[Any, Any]:
    tx = scale_by_cgfac(*args, **options)
    return tx, tx.init(params)


def flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)]).astype(np.float64)
