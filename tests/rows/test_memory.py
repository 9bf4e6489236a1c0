"""Bytes of a window are known before it is made, and one that cannot fit is refused with what would."""

import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mfac_jax import mfac, scale_by_mfac
from mfac_jax._src.rows import memory, zeros
from mfac_jax._src.rows.storage_kinds import as_storage, floats
from mfac_jax._src.rows.storages import Storage

HALF = jnp.dtype(jnp.bfloat16)
SPECS = {"kernel": P("x"), "table": P(("x", "y"), None), "bias": P(), "odd": P()}
SHAPES = {"kernel": (32, 128), "table": (64, 128), "bias": (24,), "odd": (3, 5)}


def params_on_mesh(axis_type: AxisType = AxisType.Auto):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    return {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, SPECS[name]))
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def limits(monkeypatch):
    """Devices with a memory of their own, of as many bytes as the list holds."""
    limit: list[int | None] = [None]
    monkeypatch.setattr(memory, "_place_of", lambda device: device)
    monkeypatch.setattr(memory, "bytes_limit", lambda device: limit[0])
    return limit


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [None, HALF, jnp.int8])
@pytest.mark.parametrize("host_chunk", [None, 2])
def test_the_bytes_of_a_window_are_those_of_its_arrays_on_each_device(axis_type, dtype, host_chunk):
    params = params_on_mesh(axis_type)
    tx = scale_by_mfac(6, storage=dtype, host_chunk=host_chunk)
    window = optax.tree.get(tx.init(params), "window")
    (found,) = memory.window_bytes(params, 6, as_storage(dtype), on_host=host_chunk is not None).values()
    expected = {"device": 0, "pinned_host": 0}
    for leaf in jax.tree.leaves(window):
        kind = leaf.sharding.memory_kind
        expected[kind if kind == "pinned_host" else "device"] += leaf.addressable_shards[0].data.nbytes
    assert found == memory.Bytes(expected["device"], expected["pinned_host"])
    assert (found.host > 0) == (host_chunk is not None)


def test_shapes_without_arrays_and_rows_of_two_arrays_are_counted():
    scaled = Storage(
        "scaled",
        row=lambda leaf: (
            jax.ShapeDtypeStruct(leaf.shape, jnp.int8),
            jax.ShapeDtypeStruct((), jnp.float32),
        ),
        encode=lambda x, rows: rows,
        decode=lambda row: row[0],
        dots=lambda rows, x, dtype: x,
        combine=lambda c, rows: c,
    )
    shapes: Any = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    entries = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert memory.window_bytes(shapes, 10, scaled) == {None: memory.Bytes(10 * (entries + 4 * 4), 0)}
    assert memory.window_bytes({}, 10, scaled) == {}


def test_what_fits_exactly_is_made_and_a_row_more_is_refused(limits):
    params = params_on_mesh()
    (row,) = memory.window_bytes(params, 1, floats(None)).values()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in params.values())
    limits[0] = held + 20 * row.device
    scale_by_mfac(20).init(params)
    with pytest.raises(
        ValueError, match=r"^num_grads must be .*memory of .*, got 21: .*21 x .*Pass "
    ) as error:
        scale_by_mfac(21).init(params)
    message = str(error.value)
    assert f"21 x {row.device:,} bytes = {21 * row.device:,} bytes beside {held:,} bytes" in message
    # What it suggests leaves room for four rows of a step.
    assert "Pass num_grads=16, or storage=jnp.int8 with num_grads up to 61, or host_chunk=8" in message


@pytest.mark.parametrize("storage", [None, jnp.bfloat16])
def test_what_the_message_suggests_fits(limits, storage):
    params = {"w": jnp.ones((64, 128), jnp.float32)}
    limits[0] = 50 * 64 * 128 * 4
    with pytest.raises(ValueError, match="got 1000: ") as error:
        mfac(num_grads=1000, storage=storage).init(params)
    numbers = [int(n) for n in re.findall(r"num_grads(?:=| up to )(\d+)", str(error.value))]
    assert numbers == ([45, 174] if storage is None else [90, 174])
    mfac(num_grads=numbers[0], storage=storage).init(params)
    mfac(num_grads=numbers[-1], storage=jnp.int8).init(params)


def test_a_window_on_the_host_is_not_asked_of_the_device(limits):
    params = {"w": jnp.ones((64, 128))}
    limits[0] = 10 * 64 * 128 * 4
    with pytest.raises(ValueError, match="host_chunk=8"):
        scale_by_mfac(16).init(params)
    scale_by_mfac(16, host_chunk=4).init(params)


def test_a_window_that_no_machine_holds_is_refused_on_cpu():
    with pytest.raises(
        ValueError, match=r"memory of this machine, .*B, got 10000000000000: the window takes"
    ):
        mfac(num_grads=10**13).init({"w": jnp.ones(1000)})


def test_tracing_never_asks_for_memory(limits):
    limits[0] = 1
    params = {"w": jnp.ones((8, 16))}
    tx = mfac(num_grads=4)
    shapes = jax.eval_shape(tx.init, params)
    assert jax.eval_shape(lambda: tx.init(params)) == shapes  # also where the parameters are known
    jax.jit(tx.init).lower(params)
    jax.make_jaxpr(tx.init)(params)
    jax.vmap(tx.init)({"w": jnp.ones((2, 8, 16))})
    with pytest.raises(ValueError, match="num_grads must be"):
        tx.init(params)


def test_running_out_of_memory_says_the_same(limits, monkeypatch):
    """Other arrays may leave too little room, which no limit tells."""

    def exhausted(*args):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes.")

    monkeypatch.setattr(zeros, "empty_window", exhausted)
    params = {"w": jnp.ones((8, 16))}
    with pytest.raises(ValueError, match="got 5: the window takes 5 x 512 bytes = 2,560 bytes") as error:
        scale_by_mfac(5).init(params)
    assert "RESOURCE_EXHAUSTED" in str(error.value.__cause__)


def test_a_storage_that_the_device_lacks_is_named(monkeypatch):
    def lacking(*args):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: no arrays of f8e5m2")

    monkeypatch.setattr(zeros, "empty_window", lacking)
    cure = "storage must be one that the device has arrays of, got 'float8_e5m2'. Pass jnp.float32"
    with pytest.raises(ValueError, match=cure):
        scale_by_mfac(5, storage=jnp.float8_e5m2).init({"w": jnp.ones((8, 16))})


def test_other_errors_stay_as_they_are(monkeypatch):
    def broken(*args):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(zeros, "empty_window", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        scale_by_mfac(5).init({"w": jnp.ones(4)})


def raising():
    raise jax.errors.JaxRuntimeError("UNIMPLEMENTED: not a real device")


@pytest.mark.parametrize(
    ("stats", "expected"),
    [(lambda: {"bytes_limit": 7}, 7), (lambda: {"other": 7}, None), (lambda: None, None), (raising, None)],
)
def test_devices_that_do_not_tell_their_memory_are_not_asked_again(stats, expected):
    assert memory.bytes_limit(SimpleNamespace(memory_stats=stats)) == expected


def test_machines_that_do_not_tell_their_memory_refuse_nothing(monkeypatch):
    assert (memory.machine_bytes() or 0) > 2**30
    monkeypatch.delattr("os.sysconf")
    assert memory.machine_bytes() is None
    state: Any = scale_by_mfac(3).init({"w": jnp.ones(4)})
    assert optax.tree.get(state, "window")["w"].shape == (3, 4)
