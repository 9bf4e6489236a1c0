"""A network with few weights and its gradients; what a dense matrix makes of them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mfac_jax.pruning import prune

# Shapes, and a number of gradients, that most tests share: each other one is compiled anew.
SHAPES = {"conv": {"bias": (3,), "kernel": (2, 4, 3)}, "out": (8, 5)}
NUM_GRADS, DAMPING = 12, 0.05
MASKED = np.concatenate([np.zeros(3, bool), np.ones(64, bool)])  # the leaves that take part


def as_flat(tree) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def as_tree(flat) -> Any:
    flat = np.asarray(flat)
    return {
        "conv": {
            "bias": jnp.asarray(flat[..., :3]),
            "kernel": jnp.asarray(flat[..., 3:27].reshape(*flat.shape[:-1], 2, 4, 3)),
        },
        "out": jnp.asarray(flat[..., 27:].reshape(*flat.shape[:-1], 8, 5)),
    }


def as_masks(flat) -> Any:
    """Biases take no part."""
    tree = as_tree(np.asarray(flat, bool))
    return {"conv": {"bias": None, "kernel": tree["conv"]["kernel"]}, "out": tree["out"]}


def weights_and_gradients(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Flat, with gradients that have a direction in common; in float32's numbers."""
    random = np.random.default_rng(seed)
    w, common = random.standard_normal((2, 67)).astype(np.float32)
    grads = random.standard_normal((NUM_GRADS, 67)).astype(np.float32) + 2 * common
    return w.astype(np.float64), grads.astype(np.float64)


W, G = weights_and_gradients()
BEFORE = np.random.default_rng(1).random(67) > 0.2 * MASKED
AFTER = BEFORE & (np.random.default_rng(2).random(67) > 0.5 * MASKED)
ALL = np.ones(67, bool)


def fisher(alive: np.ndarray) -> np.ndarray:
    return DAMPING * np.eye(67) + (G * alive).T @ (G * alive) / NUM_GRADS


def constrained_minimiser(before, after, gradient_term: float) -> np.ndarray:
    """From the KKT system of min q(delta) with w + delta zero where `after` is not, of what was alive."""
    alive = np.flatnonzero(before)
    constraints = np.eye(67)[before & ~after][:, alive]
    matrix = np.block(
        [
            [fisher(before)[np.ix_(alive, alive)], constraints.T],
            [constraints, np.zeros((len(constraints),) * 2)],
        ]
    )
    slope = gradient_term * G.mean(0)[alive]
    solution = np.linalg.solve(matrix, np.concatenate([-slope, -constraints @ W[alive]]))
    moved = np.zeros(67)
    moved[alive] = W[alive] + solution[: len(alive)]
    return moved


def sum_of_independent_updates(before, after, gradient_term: float) -> np.ndarray:
    inverse = np.linalg.inv(fisher(before))
    v = np.where(before & ~after, W / np.diag(inverse), 0)
    return np.where(after, W - inverse @ (v + gradient_term * G.mean(0) * before), 0)


def pruned(*args, **options) -> tuple[Any, Any]:
    """`prune` on the shared shapes, with the shared damping."""
    return prune(*args, **({"damping": DAMPING} | options))


def gradients_at(params) -> Any:
    """They move with the parameters."""
    return jax.tree.map(lambda g, w: g + 0.1 * w, as_tree(G.astype(np.float32)), params)
