"""What a state will take, before anything is made."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mfac_jax._src.mfac.metric import Metric
from mfac_jax._src.mfac.metrics import MetricName
from mfac_jax._src.mfac.solvers import Solver, SolverName
from mfac_jax._src.mfac.state_shardings import state_shardings
from mfac_jax._src.mfac.transform import NUM_GRADS, scale_by_mfac
from mfac_jax._src.rows.blocks import Blocks
from mfac_jax._src.rows.host_memory import HOST
from mfac_jax._src.rows.memory import in_words
from mfac_jax._src.rows.mesh import named_sharding

_NO_MESH = object()  # a leaf, in place of a sharding: None would be a node of the tree


class MemoryEstimate(NamedTuple):
    """The bytes of a state of `scale_by_mfac`, by part and on each device; `print` makes a table of it.

    Attributes:
      window: of the rows and of what is kept beside them, all devices together; what several devices hold
        counts once.
      metric: of what the metric keeps.
      gram: of the m x m matrices: the Gram matrix and what the solver keeps.
      other: of all else.
      total: of the whole state.
      device: on each device.
      host: in pinned memory of each device's host.

    Example:
      >>> import jax.numpy as jnp, mfac_jax
      >>> print(mfac_jax.memory_estimate(jnp.zeros((1000, 1000)), num_grads=8, storage=jnp.int8))
      window             8.03 MB
      metric             0 bytes
      gram             256 bytes
      other             56 bytes
      total              8.03 MB
      device             8.03 MB
      host               0 bytes
    """

    window: int
    metric: int
    gram: int
    other: int
    total: int
    device: int
    host: int

    def __str__(self) -> str:
        lines = [f"{name:<10}{in_words(size):>16}" for name, size in self._asdict().items()]
        return "\n".join(lines)


def memory_estimate(
    params: optax.Params,
    num_grads: int = NUM_GRADS,
    *,
    metric: MetricName | Metric = "identity",
    solver: SolverName | Solver = "auto",
    storage: Any = None,
    blocks: Blocks = None,
    host_chunk: int | None = None,
    param_shardings: Any = None,
) -> MemoryEstimate:
    """Tell the bytes that a state of `scale_by_mfac` will take, before anything is allocated.

    A training step takes a few more copies of the parameters while it runs, some ten with the rotated
    metric on CPU. `mfac` has `metric='rotated', storage=jnp.int8` where nothing else is said.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct`. Where all lie on a mesh, their shardings count.
      num_grads: rows of the window.
      metric: as in `scale_by_mfac`, and so are the next four.
      solver: see there.
      storage: see there.
      blocks: see there.
      host_chunk: see there; with one the window is in memory of the host, as far as it can be.
      param_shardings: as `state_shardings` takes them; None for those of `params`.

    Returns:
      The bytes by part, in all, and on each device.

    Raises:
      ValueError: as `scale_by_mfac` and `state_shardings`.

    Example:
      >>> import jax, jax.numpy as jnp, mfac_jax
      >>> params = {'w': jax.ShapeDtypeStruct((1024, 1024), jnp.float32)}
      >>> estimate = mfac_jax.memory_estimate(params, num_grads=16, storage=jnp.int8)
      >>> print(round(estimate.total / (4 * 1024 ** 2), 2), 'copies of the parameters')
      4.02 copies of the parameters
    """
    tx = scale_by_mfac(
        num_grads, metric=metric, solver=solver, storage=storage, blocks=blocks, host_chunk=host_chunk
    )
    if param_shardings is None:
        own = jax.tree.map(named_sharding, params)
        is_on_mesh = len(jax.tree.leaves(own)) == len(jax.tree.leaves(params)) > 0
        param_shardings = own if is_on_mesh else None
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(jnp.shape(p), jnp.result_type(p)), params)
    jaxpr, state = jax.make_jaxpr(tx.init, return_shape=True)(shapes)
    arrays = jax.tree.unflatten(jax.tree.structure(state), jaxpr.out_avals)  # the types know the memory
    places = jax.tree.map(lambda _: _NO_MESH, state)
    if param_shardings is not None:
        places = state_shardings(tx, params, param_shardings)
    parts = {
        name: _bytes(getattr(arrays, name)) for name in ("window", "remainder", "metric", "gram", "solver")
    }
    total = _bytes(arrays)
    gram = parts["gram"] + parts["solver"]
    on_host, on_device = _on_each(arrays, places)
    window = parts["window"] + parts["remainder"]
    return MemoryEstimate(
        window=window,
        metric=parts["metric"],
        gram=gram,
        other=total - window - parts["metric"] - gram,
        total=total,
        device=on_device,
        host=on_host,
    )


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _on_each(arrays: Any, places: Any) -> tuple[int, int]:
    """The bytes in memory of the host, and of the device."""
    found = {True: 0, False: 0}
    for x, place in zip(jax.tree.leaves(arrays), jax.tree.leaves(places), strict=True):
        is_alone = place is _NO_MESH
        shape = x.shape if is_alone else place.shard_shape(x.shape)
        on_host = x.memory_space == jax.memory.Space.Host if is_alone else place.memory_kind == HOST
        found[on_host] += math.prod(shape) * x.dtype.itemsize
    return found[True], found[False]
