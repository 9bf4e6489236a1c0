"""Least squares whose Hessian has a condition number of 1e6, without noise, in float64.

The unknowns are a matrix W, so that optimizers for matrices see one. Each measurement is its inner product
with a matrix of the data; the Hessian is no Kronecker product.
"""

import jax
import jax.numpy as jnp
import numpy as np

from examples.common.workload import Workload

SHAPE, MEASUREMENTS = (12, 16), 256
CONDITION = 1e6  # of the Hessian, the square of the data's


def _relative_loss(params, data, rows):
    residual = jnp.tensordot(data["x"][rows], params["w"], 2) - data["y"][rows]
    return jnp.mean(residual**2) / jnp.mean(data["y"] ** 2)


def _loss(params, model_state, data, indices, key):
    del key  # nothing is random
    return _relative_loss(params, data, indices), model_state


def _evaluate(params, model_state, data):
    del model_state
    error = params["w"] - data["solution"]
    return {
        "train_loss": _relative_loss(params, data, slice(None)),
        "valid_loss": jnp.sum(error**2) / jnp.sum(data["solution"] ** 2),
    }


def make_workload(steps: int = 1000, *, seed: int) -> Workload:
    """Make the workload, in float64 where `jax.enable_x64` is on; the seed sets data and solution.

    Each step sees all measurements. W starts at zero, where both losses are one. `valid_loss` is the
    squared error of W, relative to the solution.
    """
    random = np.random.default_rng(seed)
    unknowns = SHAPE[0] * SHAPE[1]
    left = np.linalg.qr(random.standard_normal((MEASUREMENTS, unknowns)))[0]
    right = np.linalg.qr(random.standard_normal((unknowns, unknowns)))[0]
    singular = np.sqrt(MEASUREMENTS) * np.geomspace(1, CONDITION**-0.5, unknowns)
    x = ((left * singular) @ right.T).reshape(MEASUREMENTS, *SHAPE)
    solution = random.standard_normal(SHAPE)
    data = {"x": x, "y": np.tensordot(x, solution, 2), "solution": solution}
    return Workload(
        name="least-squares",
        source=f"{MEASUREMENTS} measurements of {unknowns} unknowns, drawn at random",
        params={"w": jnp.zeros(SHAPE)},
        model_state={},
        data=jax.tree.map(jnp.asarray, data),
        batches=np.broadcast_to(np.arange(MEASUREMENTS, dtype=np.int32), (steps, MEASUREMENTS)),
        loss=_loss,
        evaluate=_evaluate,
    )
