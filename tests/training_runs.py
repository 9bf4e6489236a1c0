"""Short trainings that are made in two ways and compared: their gradients, their step, their difference."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax


def correlated_gradients(
    shapes: Mapping[str, tuple[int, ...]], steps: int, refused: str
) -> list[dict[str, np.ndarray]]:
    """Gradients with a common part; the fifth has a NaN in the leaf `refused`."""
    random = np.random.default_rng(0)
    common = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    stream = [
        {name: (c + random.standard_normal(c.shape)).astype(np.float32) for name, c in common.items()}
        for _ in range(steps)
    ]
    stream[4][refused].flat[3] = np.nan
    return stream


def train_step(tx, params, state, grads):
    """A step that leaves the parameters where the gradient is refused, on any device."""
    rejected = optax.tree.get(state, "grads_rejected")
    updates, state = tx.update(grads, state, params)
    accepted = optax.tree.get(state, "grads_rejected") == rejected
    moved = optax.apply_updates(params, updates)
    return jax.tree.map(lambda new, old: jnp.where(accepted, new, old), moved, params), state


def relative_error(tree, expected) -> float:
    """Of all entries together."""

    def flattened(tree):
        return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])

    flat, expected = flattened(tree), flattened(expected)
    return float(np.linalg.norm(flat - expected) / np.linalg.norm(expected))
