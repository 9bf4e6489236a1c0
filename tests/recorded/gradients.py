"""The gradients of the recorded streams, and the list of streams."""

from collections.abc import Callable
from typing import Any

import numpy as np

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "vector": {"w": (37,)},
    "network": {"conv": (3, 3, 2, 4), "kernel": (8, 16), "bias": (16,), "scale": ()},
    "long": {
        "a": (12, 1024),
        "b": (300_008,),
    },  # above the length that a matrix-vector product is exact for
    "even": {"kernel": (8, 16), "table": (24, 8), "bias": (16,), "odd": (5, 3)},
}
STREAMS: dict[str, Callable[[], Any]] = {}


def gradients(shapes: dict[str, tuple[int, ...]], steps: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """A drifting direction with noise: correlated, as gradients are; of different sizes in each leaf."""
    random = np.random.default_rng(seed)
    base = {name: random.standard_normal(shape) for name, shape in shapes.items()}
    grads = []
    for _ in range(steps):
        for name, shape in shapes.items():
            base[name] = 0.8 * base[name] + 0.6 * random.standard_normal(shape)
        grads.append({name: np.asarray(x * 0.3**i, np.float32) for i, (name, x) in enumerate(base.items())})
    return grads


def stream(name: str):
    """Register a function that gives a tree of arrays."""

    def add(function):
        STREAMS[name] = function
        return function

    return add
