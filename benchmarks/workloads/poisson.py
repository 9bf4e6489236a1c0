r"""A physics-informed network for Poisson's equation on the unit square.

Minus the Laplacian of u is f inside, and u is 0 on the boundary. The solution is known:
u = sin(pi x) sin(pi y) + sin(2 pi x) sin(3 pi y) / 2. The loss is

    mean over inner points of (f + Laplacian)^2 + 100 * mean over boundary points of u^2.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from examples.common.workload import Workload

LAYERS, WIDTH = 3, 32
INNER, BOUNDARY = 400, 80  # points
BOUNDARY_WEIGHT = 100.0  # f is about pi^2 times as large as u
WAVES = ((1, 1, 1.0), (2, 3, 0.5))  # of the solution: half waves along x and y, height
GRID = 64  # points along each axis that the solution is compared on


class Network(nn.Module):
    """From points `(n, 2)` to values `(n,)`."""

    @nn.compact
    def __call__(self, points):  # noqa: D102
        x = points
        for _ in range(LAYERS):
            x = nn.tanh(nn.Dense(WIDTH)(x))
        return nn.Dense(1)(x)[..., 0]


def solution(points):
    """The exact u."""
    x, y = np.pi * points[..., 0], np.pi * points[..., 1]
    return sum(height * jnp.sin(i * x) * jnp.sin(j * y) for i, j, height in WAVES)


def source_term(points):
    """The f of this solution."""
    x, y = np.pi * points[..., 0], np.pi * points[..., 1]
    waves = ((height * np.pi**2 * (i**2 + j**2), i, j) for i, j, height in WAVES)
    return sum(size * jnp.sin(i * x) * jnp.sin(j * y) for size, i, j in waves)


def laplacian(function, points):
    """Sum the second derivatives along both axes, each by forward mode twice."""

    def second_derivative(direction):
        def slope(at):
            return jax.jvp(function, (at,), (jnp.broadcast_to(direction, at.shape),))[1]

        return jax.jvp(slope, (points,), (jnp.broadcast_to(direction, points.shape),))[1]

    return jax.vmap(second_derivative)(jnp.eye(2, dtype=points.dtype)).sum(axis=0)


def _network(params, points) -> Any:
    return Network().apply({"params": params}, points)


def _total(params, inner, boundary):
    network = functools.partial(_network, params)
    residual = source_term(inner) + laplacian(network, inner)
    return jnp.mean(residual**2) + BOUNDARY_WEIGHT * jnp.mean(network(boundary) ** 2)


def _loss(params, model_state, data, indices, key):
    del key  # nothing is random
    return _total(params, data["inner"][indices], data["boundary"]), model_state


def _evaluate(params, model_state, data):
    del model_state
    exact = solution(data["grid"])
    error = _network(params, data["grid"]) - exact
    return {
        "train_loss": _total(params, data["inner"], data["boundary"]),
        "valid_loss": jnp.sum(error**2) / jnp.sum(exact**2),
    }


def draw_boundary(random: np.random.Generator) -> np.ndarray:
    """Draw as many points on each side of the square."""
    along, side = random.random((4, BOUNDARY // 4)), np.ones(BOUNDARY // 4)
    sides = [(along[0], 0 * side), (along[1], side), (0 * side, along[2]), (side, along[3])]
    return np.concatenate([np.stack(pair, axis=-1) for pair in sides])


def make_workload(steps: int = 2000, *, seed: int) -> Workload:
    """Make the workload; the seed sets points and parameters. Each step sees all points.

    Its `valid_loss` is the squared error relative to the exact solution, on a grid.
    """
    random = np.random.default_rng(seed)
    axis = (np.arange(GRID) + 0.5) / GRID
    data = {
        "inner": random.random((INNER, 2)),
        "boundary": draw_boundary(random),
        "grid": np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2),
    }
    return Workload(
        name="poisson",
        source=f"{INNER} points inside of the unit square and {BOUNDARY} on its boundary, drawn at random",
        params=Network().init(jax.random.key(seed), jnp.zeros((1, 2)))["params"],
        model_state={},
        data=jax.tree.map(lambda points: jnp.asarray(points, jnp.float32), data),
        batches=np.broadcast_to(np.arange(INNER, dtype=np.int32), (steps, INNER)),
        loss=_loss,
        evaluate=_evaluate,
    )
