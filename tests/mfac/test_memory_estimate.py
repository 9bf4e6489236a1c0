"""The bytes of a state are known before it is made."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mfac_jax import memory_estimate, scale_by_mfac

STORAGES = (None, jnp.float32, jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)
SHAPES = {"kernel": (64, 128), "table": (512, 16), "bias": (24,), "odd": (3, 5), "scale": ()}
SPECS = {"kernel": P("x"), "table": P(("x", "y"), None), "bias": P(), "odd": P(), "scale": P()}


def make(on_mesh: bool) -> Any:
    if not on_mesh:
        return {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    return {
        name: jax.device_put(jnp.ones(shape), NamedSharding(mesh, SPECS[name]))
        for name, shape in SHAPES.items()
    }


@pytest.mark.parametrize("on_mesh", [False, True])
@pytest.mark.parametrize("metric", ["identity", "diagonal", "rotated"])
@pytest.mark.parametrize("storage", STORAGES, ids=lambda dtype: getattr(dtype, "__name__", "None"))
def test_it_is_what_the_state_takes(storage, metric, on_mesh):
    params, options = make(on_mesh), {"storage": storage, "metric": metric}
    found = memory_estimate(params, 6, **options)
    leaves = jax.tree.leaves(scale_by_mfac(6, **options).init(params))
    assert found.total == sum(x.nbytes for x in leaves)
    assert found.device == sum(x.addressable_shards[0].data.nbytes for x in leaves)
    assert found.host == 0
    assert found.window + found.metric + found.gram + found.other == found.total
    if on_mesh:
        shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding), params)
        assert memory_estimate(shapes, 6, **options) == found
        shardings = {name: x.sharding for name, x in params.items()}
        assert memory_estimate(make(False), 6, **options, param_shardings=shardings) == found


def test_solver_blocks_and_memory_of_the_host_are_counted():
    params = make(False)
    options: dict[str, Any] = {"solver": "inverse", "blocks": "leaf", "storage": jnp.int8, "host_chunk": 2}
    found = memory_estimate(params, 6, **options)
    leaves = jax.tree.leaves(scale_by_mfac(6, **options).init(params))
    on_host = sum(x.nbytes for x in leaves if x.sharding.memory_kind == "pinned_host")
    assert (found.host, found.total) == (on_host, sum(x.nbytes for x in leaves))
    assert found.device == found.total - on_host
    assert found.gram >= 2 * len(params) * 6 * 6 * 4


def test_nodes_without_leaves_do_not_count():
    params = {"w": jnp.ones((3, 4)), "none": None}
    assert memory_estimate(params, 4).window == 4 * 12 * 4


@pytest.mark.parametrize("storage", [None, jnp.int8])
def test_memory_of_the_host_is_that_of_the_parts_on_a_mesh(storage):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    for shape, spec in (((8, 128), P(None, "x")), ((2048, 8, 128), P())):
        params = jax.device_put(jnp.ones(shape), NamedSharding(mesh, spec))
        found = memory_estimate(params, 4, storage=storage, host_chunk=2)
        leaves = jax.tree.leaves(scale_by_mfac(4, storage=storage, host_chunk=2).init(params))
        sizes = {True: 0, False: 0}
        for x in leaves:
            sizes[x.sharding.memory_kind == "pinned_host"] += x.addressable_shards[0].data.nbytes
        assert (found.host, found.device) == (sizes[True], sizes[False])


def test_it_reads_as_a_table():
    lines = str(memory_estimate({"w": jnp.ones((1000, 1000))}, 16, storage=jnp.int8)).splitlines()
    assert [line.split()[0] for line in lines] == list(memory_estimate(jnp.ones(3), 2)._fields)
    assert "16.1 MB" in lines[0]


def test_bad_arguments_are_refused_as_by_the_transform():
    with pytest.raises(ValueError, match="num_grads must be"):
        memory_estimate(jnp.ones(3), 0)
    with pytest.raises(ValueError, match="storage must be"):
        memory_estimate(jnp.ones(3), 2, storage=jnp.int16)
    with pytest.raises(TypeError, match="complex"):
        memory_estimate(jnp.ones(3, jnp.complex64), 2)
