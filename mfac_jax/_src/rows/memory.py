"""How many bytes a window takes, and whether they are there: asked before the memory is spent."""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, Mesh

from mfac_jax._src.rows import host_memory, zeros
from mfac_jax._src.rows.manual_axes import ManualAxes
from mfac_jax._src.rows.scaled import scaled
from mfac_jax._src.rows.storage_kinds import floats
from mfac_jax._src.rows.storages import Storage

_NONE = ManualAxes()
_MACHINE = "this machine"
_FLOATS, _BYTES = floats(jnp.dtype(jnp.float32)), scaled(jnp.dtype(jnp.int8))
_SPARE_ROWS = 4  # float32 rows that a step needs beside the window: left free by what messages suggest


class Bytes(NamedTuple):
    """What a part of a window takes for each device of a mesh.

    Attributes:
      device: in memory of the device.
      host: in pinned memory of the device's host.
    """

    device: int
    host: int


def window_bytes(
    params: optax.Params,
    num_grads: int,
    storage: Storage,
    axes: ManualAxes = _NONE,
    on_host: bool = False,
) -> dict[Mesh | AbstractMesh | None, Bytes]:
    """The bytes of a window on each device, by the mesh that the parameters are on; None: on no mesh.

    Args:
      params: arrays, or `jax.ShapeDtypeStruct` with the shardings that count.
      num_grads: rows of the window.
      storage: of the rows.
      axes: those of a shard_map or pmap around this.
      on_host: whether the window is kept on the host, as far as it can be.
    """
    found: dict[Mesh | AbstractMesh | None, Bytes] = {}
    rows = zeros.rows_like(params, storage, axes)
    for row in jax.tree.leaves(rows, is_leaf=lambda node: isinstance(node, zeros.Array)):
        mesh, shape = None if row.sharding is None else row.sharding.mesh, row.on_device()
        size = num_grads * math.prod(shape) * row.dtype.itemsize
        to_host = on_host and host_memory.may_be_on_host(shape)
        device, host = found.get(mesh, Bytes(0, 0))
        found[mesh] = Bytes(device, host + size) if to_host else Bytes(device + size, host)
    return found


def bytes_limit(device: Any) -> int | None:
    """The memory of a device, where its backend tells."""
    try:
        stats = device.memory_stats()
    except (jax.errors.JaxRuntimeError, NotImplementedError):  # devices that are only compiled for
        return None
    return (stats or {}).get("bytes_limit")


def machine_bytes() -> int | None:
    """The memory of this machine with its swap space, where the system tells."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with open("/proc/meminfo", encoding="ascii") as lines:
            swap = next((int(line.split()[1]) for line in lines if line.startswith("SwapTotal:")), 0)
    except (AttributeError, ValueError, OSError):
        return None
    return memory + 1024 * swap if memory > 0 else None


@contextlib.contextmanager
def enough_for_window(
    params: optax.Params, num_grads: int, storage: Storage, axes: ManualAxes, on_host: bool
) -> Iterator[None]:
    """Raise before a window is made that cannot fit, and where the device cannot make it.

    Only for arrays that are made now: a trace may be for other devices, or for shapes alone. What other
    arrays and programs hold does not count before, because they may give it back.
    """
    probe = jnp.zeros(())
    if any(isinstance(x, Tracer) for x in (probe, *jax.tree.leaves(params))):
        yield
        return

    def message(place):
        floats, scaled = of_rows(_FLOATS)[place], of_rows(_BYTES)[place]
        asked = _Asked(num_grads, rows[place], floats, scaled, held[place], _limit(place))
        may_move = not on_host and axes.names is None and place != _MACHINE
        return _message(place, asked, may_move)

    def of_rows(storage):
        return _of_rows(window_bytes(params, 1, storage, axes, on_host), probe)

    rows, held = of_rows(storage), _of_arrays(params)
    for place in rows:
        limit = _limit(place)
        if limit is not None and held[place] + num_grads * rows[place] > limit:
            raise ValueError(message(place))
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "UNIMPLEMENTED" in str(error):
            raise ValueError(
                f"storage must be one that the device has arrays of, got {storage.name!r}. Pass "
                f"jnp.float32, jnp.bfloat16 or jnp.int8: {error}"
            ) from error
        if "RESOURCE_EXHAUSTED" not in str(error) or not rows:
            raise
        raise ValueError(message(max(rows, key=lambda place: rows[place]))) from error


def _place_of(device: Any) -> Any:
    """The memory of a device: its own, or that of the machine."""
    return _MACHINE if device.platform == "cpu" else device


def _limit(place: Any) -> int | None:
    return machine_bytes() if place == _MACHINE else bytes_limit(place)


def _of_rows(rows: dict[Any, Bytes], probe: jax.Array) -> Counter:
    """The bytes by place; what is on no mesh is where the probe is."""
    found = Counter()
    for mesh, (of_device, of_host) in rows.items():
        for device in probe.devices() if mesh is None else mesh.local_devices:
            found[_place_of(device)] += of_device
            found[_MACHINE] += of_host
    return found


def _of_arrays(params: optax.Params) -> Counter:
    """The bytes that the parameters have by now, by place."""
    found = Counter()
    for leaf in jax.tree.leaves(params):
        if isinstance(leaf, jax.Array):
            size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for device in leaf.sharding.addressable_devices:
                found[_place_of(device)] += size
    return found


class _Asked(NamedTuple):
    """What is asked of a memory.

    Attributes:
      num_grads: rows of the window.
      row: bytes of a row.
      float_row: the same in float32.
      byte_row: the same in int8.
      held: bytes of the parameters.
      limit: bytes of the memory; None where they are not known.
    """

    num_grads: int
    row: int
    float_row: int
    byte_row: int
    held: int
    limit: int | None

    def most(self, row: int) -> int:
        """The most rows of so many bytes that leave room for a step."""
        free = (self.limit or 0) - self.held - _SPARE_ROWS * self.float_row
        return max(0, free // max(1, row))


def _message(place: Any, asked: _Asked, may_move: bool) -> str:
    """What does not fit, and what would."""
    cures = [f"num_grads={asked.most(asked.row)}"] if asked.most(asked.row) else []
    if asked.byte_row < asked.row and asked.most(asked.byte_row):
        cures.append(f"storage=jnp.int8 with num_grads up to {asked.most(asked.byte_row)}")
    if may_move:
        cures.append("host_chunk=8 for a window in memory of the host")
    cures.append("parameters that are sharded over more devices")
    size = "" if asked.limit is None else f", {in_words(asked.limit)}"
    held = f" beside {in_words(asked.held)} of parameters" if asked.held else ""
    total = f"{asked.num_grads} x {in_words(asked.row)} = {in_words(asked.num_grads * asked.row)}"
    return (
        f"num_grads must be small enough for the memory of {place}{size}, got {asked.num_grads}: the "
        f"window takes {total}{held}. Pass {', or '.join(cures)}."
    )


def in_words(size: int) -> str:
    """Bytes as people read them: 1,500,000 bytes are 1.5 MB."""
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB")):
        if size >= unit:
            return f"{size / unit:,.3g} {name}"
    return f"{size:,} bytes"
