"""One optimizer on eight devices, inside of shard_map and pmap, beside the same on one."""

import functools
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding

from mfac_jax import ihvp, mfac, state_shardings
from tests.mfac.on_mesh import P, make_mesh

NUM_GRADS, STEPS, DEVICES = 3, 5, 8
MODES = ("types", "no types", "pmap")
SHAPES: dict[str, tuple[int, ...]] = {
    "kernel": (16, 3),
    "table": (3, 24),
    "odd": (3,),
    # Of these a one-byte row has several scales.
    "rows": (8, 256),
    "columns": (256, 8),
    "conv": (3, 8, 8, 32),
}


def gradients(specs) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    return [
        {name: rng.standard_normal(SHAPES[name]).astype(np.float32) for name in specs} for _ in range(STEPS)
    ]


@functools.cache
def _on_one_device(specs, storage) -> tuple[list[Any], Any]:
    tx = mfac(0.1, NUM_GRADS, metric="diagonal", storage=storage)  # as with axis_name
    grads = gradients([name for name, _ in specs])
    state, step, updates = tx.init(grads[0]), jax.jit(tx.update), []
    for g in grads:
        u, state = step(g, state, g)
        updates.append(u)
    return updates, optax.tree.get(state, "ScaleByMFACState")


def on_one_device(specs: dict[str, Any], storage: Any = None) -> tuple[list[Any], Any]:
    """The updates, and the state after them."""
    return _on_one_device(tuple(specs.items()), storage)


def stacked(x, spec, rows: int = 0):
    """As pmap has it: a part for each device in front; `rows` axes of a window stay whole."""
    if "x" not in spec:
        return np.broadcast_to(x, (DEVICES, *x.shape))
    return np.stack(np.split(x, DEVICES, axis=rows + tuple(spec).index("x")))


def unstacked(x, spec):
    return np.concatenate(x, axis=tuple(spec).index("x")) if "x" in spec else np.asarray(x[5])


class OnDevices:
    """One optimizer on eight devices, in one of the modes."""

    def __init__(self, mode: str, specs: dict[str, Any], storage: Any = None, **options):
        self.mode, self.specs = mode, specs
        self.tx: Any = mfac(0.1, NUM_GRADS, axis_name="x", storage=storage, **options)
        self.mesh = make_mesh(AxisType.Auto, ("x",), (DEVICES,))
        params = {name: np.ones(SHAPES[name], np.float32) for name in specs}
        shardings = {name: NamedSharding(self.mesh, spec) for name, spec in specs.items()}
        self.params = params
        self.state_specs = jax.tree.map(lambda s: s.spec, state_shardings(self.tx, params, shardings))

    def mapped(self, function, in_specs, out_specs):
        if self.mode == "pmap":
            return jax.pmap(function, axis_name="x")
        options = {"mesh": self.mesh, "check_vma": self.mode == "types"}
        return jax.jit(jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, **options))

    def placed(self, tree):
        return jax.tree.map(stacked, tree, self.specs) if self.mode == "pmap" else tree

    def init(self, inside: bool):
        if inside:
            return self.mapped(self.tx.init, (self.specs,), self.state_specs)(self.placed(self.params))
        state = self.tx.init(self.params)
        if self.mode != "pmap":
            return state
        preconditioner = state[0]
        parts = jax.tree.map(lambda x: stacked(x, P()), preconditioner)._replace(
            window=jax.tree.map(lambda x, s: stacked(x, s, 1), preconditioner.window, self.specs),
            metric=jax.tree.map(
                stacked, preconditioner.metric, preconditioner.metric._replace(second_moment=self.specs)
            ),
        )
        return (parts, *jax.tree.map(lambda x: stacked(x, P()), state[1:]))

    def updates(self, state):
        specs = (self.specs, self.state_specs)
        step = self.mapped(self.tx.update, (*specs, self.specs), specs)
        for g in gradients(self.specs):
            g = self.placed(g)
            u, state = step(g, state, g)
            u = jax.device_get(u)
            yield jax.tree.map(unstacked, u, self.specs) if self.mode == "pmap" else u
        self.state = state

    def product(self, tree):
        def product(state, tree):
            return ihvp(state, tree, 0.1, axis_name="x", param_specs=self.specs)

        mapped = self.mapped(product, (self.state_specs[0], self.specs), self.specs)
        found = jax.device_get(mapped(self.state[0], self.placed(tree)))
        return jax.tree.map(unstacked, found, self.specs) if self.mode == "pmap" else found
