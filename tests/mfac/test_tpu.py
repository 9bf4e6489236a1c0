"""What XLA for TPU makes of the update, compiled with libtpu for chips that are not here."""

import importlib.util
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import mfac_jax
from benchmarks import compile_for_tpu as tpu
from benchmarks import tpu_tables

pytestmark = [
    pytest.mark.slow,
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs pip install '.[tpu]'"),
]


def check_collectives(row: dict, axes: int = 1) -> None:
    """Sums of products, over mesh axes one after the other, and updates whose window is split."""
    assert set(row["update_collectives"]) <= {"all-reduce", "all-gather"}
    sent = sum(size for _, size in row["update_collectives"].values())
    assert sent <= axes * tpu_tables.allowed(row)


def check_memory(row: dict) -> None:
    """Two passes over the window, and no copy of it."""
    assert row["update_temporaries"] < max(64 * 2**20, 0.01 * row["window_bytes"])
    assert row["update_traffic"] < 1.1 * 2 * row["window_bytes"]
    assert row["update_alias"] >= row["state_bytes"]


def test_leaves_of_one_shape_and_different_shardings_are_not_exchanged():
    """XLA would merge the broadcasts of the coefficients over such leaves, and exchange their rows."""
    mesh = tpu.make_mesh("v5p:4x4x4", tensor=4)
    specs = {"query": ("fsdp", "tensor"), "key": ("fsdp", "tensor"), "out": ("tensor", "fsdp")}
    shapes = {name: jax.ShapeDtypeStruct((8, 2048, 2048), jnp.bfloat16) for name in specs}
    shardings = {name: NamedSharding(mesh, PartitionSpec(None, *spec)) for name, spec in specs.items()}
    row = tpu.measure_update(mfac_jax.mfac(3e-3, 1024, metric="diagonal", storage=None), shapes, shardings)
    check_collectives(row | {"num_grads": 1024}, axes=2)
    check_memory(row)


@pytest.mark.parametrize("topology", ["v5p:4x4x4", "v6e:16x16"])
def test_a_rotated_metric_within_each_device_sends_nothing(topology):
    mesh = tpu.make_mesh(topology, tensor=4)
    specs = {"query": ("fsdp", "tensor"), "out": ("tensor", "fsdp")}
    side = 128 * max(mesh.shape.values())
    shapes = {name: jax.ShapeDtypeStruct((2, side, side), jnp.float32) for name in specs}
    shardings = {name: NamedSharding(mesh, PartitionSpec(None, *spec)) for name, spec in specs.items()}
    tx = mfac_jax.mfac(1e-2, 8, metric=mfac_jax.components.rotated_metric(block_size=128))
    row = tpu.measure_update(tx, shapes, shardings)
    check_collectives(row | {"num_grads": 8})


@pytest.mark.parametrize("topology", ["v5e:2x4", "tpu7x:2x2x2", "v5p:8x8x16"])  # 8, 8 and 1024 chips
def test_only_sums_and_split_updates_are_sent(topology):
    case = tpu.CASES[topology]
    *_, shapes, shardings = tpu.transformer(topology, tpu.SIZES[case.size], case.tensor)
    row = tpu.measure_update(
        mfac_jax.mfac(3e-3, case.num_grads, metric="diagonal", storage=None), shapes, shardings
    )
    check_collectives(row | {"num_grads": case.num_grads})
    assert row["update_temporaries"] < 0.1 * row["window_bytes"]  # no copy of it


def test_a_step_of_a_large_transformer_on_a_pod():
    row = tpu.measure("v6e:16x16", tpu.SIZES["1b"], num_grads=1024, tensor=4, batch=4)
    assert row["parameters"] > 1e9
    check_collectives(row)
    check_memory(row)
    assert row["step_temporaries"] < 2 * 2**30  # activations of all sequences would take 7 GB
    assert row["step_peak"] < tpu_tables.hbm(row)


@pytest.mark.parametrize("storage", [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_of_a_window_on_the_host_only_chunks_come_to_the_device(sharded, storage):
    mesh = tpu.make_mesh("v5e:2x2", tensor=1)
    spec = PartitionSpec("fsdp") if sharded else PartitionSpec()
    leaves = {"w": (1024, 1024), "v": (1024, 512), "bias": (1024,), "odd": (5, 3), "scale": ()}
    shapes: Any = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}
    shardings = {name: NamedSharding(mesh, spec if name in "wv" else PartitionSpec()) for name in shapes}
    num_grads, host_chunk = 64, 7
    tx = mfac_jax.mfac(3e-3, num_grads, metric="diagonal", storage=storage, host_chunk=host_chunk)
    state_shardings = mfac_jax.state_shardings(tx, shapes, shardings)
    params = tpu.placed(shapes, shardings)
    init: Any = jax.jit(tx.init, out_shardings=state_shardings).lower(params).compile()
    state = tpu.placed(jax.eval_shape(tx.init, shapes), state_shardings)
    update = jax.jit(tx.update, donate_argnums=1, out_shardings=(shardings, state_shardings))
    compiled: Any = update.lower(params, state, params).compile()

    row = 4 * 1024 * 1024 // mesh.size  # bytes of `w` on one chip, in float32
    of_rows = 1.5 * row * jnp.dtype(storage).itemsize // 4  # of `w` and `v`, on one chip
    for program in (init, compiled):
        memory = program.memory_analysis()
        assert memory.host_output_size_in_bytes == num_grads * of_rows
        assert memory.host_temp_size_in_bytes == 0
    assert init.memory_analysis().temp_size_in_bytes < 8 * row
    memory = compiled.memory_analysis()
    assert memory.host_alias_size_in_bytes == memory.host_argument_size_in_bytes == num_grads * of_rows
    # A chunk of the largest leaf and a few rows; where the window alone is split, the gathered update too.
    assert memory.temp_size_in_bytes < (host_chunk + 10) * row + (0 if sharded else 3 * mesh.size * row)
