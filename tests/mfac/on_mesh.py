"""A tree of parameters on a mesh of eight devices, in several placements."""

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

P = PartitionSpec
NUM_GRADS, STEPS = 16, 20
SHAPES: dict[str, tuple[int, ...]] = {
    "kernel": (8, 16),
    "table": (24, 4),
    "conv": (3, 3, 4, 8),
    "bias": (16,),
    "odd": (5, 3),
    "scale": (),
}
# (4, 2) devices on ("x", "y").
SPECS: dict[str, dict[str, PartitionSpec]] = {
    "replicated": dict.fromkeys(SHAPES, P()),
    "sharded": {
        "kernel": P("x", "y"),
        "table": P(("x", "y")),
        "conv": P(None, None, None, ("y", "x")),
        "bias": P("x"),
        "odd": P(),
        "scale": P(),
    },
    "mixed": {
        "kernel": P("x"),
        "table": P(None, "y"),
        "conv": P(),
        "bias": P(),
        "odd": P(),
        "scale": P(),
    },
}
AXES = ("x", "y")


def make_mesh(axis_type: AxisType, names=("x", "y"), sizes=(4, 2)):
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(names))


def start() -> dict[str, np.ndarray]:
    return {name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}


def named(mesh, placement: str) -> dict[str, NamedSharding]:
    """With an entry for each axis: explicit axes spell types so, and another spelling compiles anew."""
    specs = SPECS[placement].items()
    padded = {name: [*spec, *[None] * (len(SHAPES[name]) - len(spec))] for name, spec in specs}
    return {name: NamedSharding(mesh, P(*spec)) for name, spec in padded.items()}


def assert_sharded_as(tree, shardings) -> None:
    for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim), (leaf.shape, leaf.sharding, sharding)
