"""What XLA for GPU makes of the update, compiled for GPUs that are not here."""

import importlib.util
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import mfac_jax
from benchmarks import compile_for_gpu as gpu
from benchmarks import compiled_update, gpu_cases, gpu_targets
from benchmarks.parameter_trees import transformer_shapes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.gpu,
    pytest.mark.skipif(
        importlib.util.find_spec(gpu.PLUGIN) is None, reason="needs pip install '.[gpu-compile]'"
    ),
]
LAYER = "one layer of a transformer"


@pytest.fixture(autouse=True)
def short_tree(monkeypatch):
    """In place of a deep network, which takes a minute to compile."""
    monkeypatch.setitem(gpu.TREES, LAYER, gpu_cases.Tree(64, transformer_shapes(256, 1, 8, 512)))


def check_in_place(row: dict) -> None:
    """Two readings of the window, a row written, no copy; beside them some passes over the gradient.

    A gradient is as large as four rows of one byte. The host waits for nothing, and with a kept inverse for
    one look at the result.
    """
    window, gradient = row["window_bytes"], row["gradient_bytes"]
    passes = 6 * gradient if row["storage"] == "int8" else 0
    assert row["copied"] == 0
    assert row["temporaries"] < 0.1 * window + 2 * (row["mode"] == "pmap") * gradient
    assert row["alias"] >= row["state_bytes"]
    if row["mode"] == "pmap":  # the whole gradient and update beside an eighth of the window
        assert row["traffic"]["read"] < 2.3 * window + 3 * gradient
        assert row["traffic"]["written"] < 0.2 * window + 3 * gradient
    else:
        assert row["traffic"]["read"] < 2.3 * window + passes
        assert row["traffic"]["written"] < 0.2 * window + passes
    assert row["launches"]["graphs"] >= 1
    assert row["launches"]["waits"] == row["transform"].endswith("inverse")


ONE_LEAF = "272,474 in one leaf"


@pytest.mark.parametrize(
    ("target", "tree", "transform", "storage"),
    [
        ("h100", ONE_LEAF, "scale_by_mfac", "float32"),
        ("h100", ONE_LEAF, "mfac", "bfloat16"),
        ("a100", ONE_LEAF, "mfac", "float32"),
        ("h100", ONE_LEAF, "mfac, inverse", "float32"),
        ("h100", LAYER, "mfac", "float32"),
        ("a100", LAYER, "scale_by_mfac", "bfloat16"),
        ("h100", LAYER, "scale_by_mfac", "int8"),
    ],
)
def test_on_one_gpu_a_step_reads_the_window_twice_and_writes_a_row(target, tree, transform, storage):
    check_in_place(gpu.measure(gpu.Case(target, "one GPU", tree, transform, storage)))


@pytest.mark.parametrize(
    ("mode", "storage"),
    [
        case
        for case in itertools.product(gpu.MODES[1:], ("float32", "bfloat16", "int8"))
        if gpu.exists(*case)
    ],
)
def test_on_eight_gpus_too_and_only_sums_and_split_updates_are_sent(mode, storage):
    row = gpu.measure(gpu.Case("h100", mode, LAYER, "mfac", storage))
    check_in_place(row)
    sums = row["leaves"] * (row["num_grads"] + 1) * 4
    if storage == "int8":  # the largest entries of groups that lie on several devices
        sums += row["gradient_bytes"] * gpu.SEVERAL / 128
    # The parts that are gathered are counted too.
    gathered = row["gradient_bytes"] * (1 + 1 / gpu.SEVERAL) if mode == "pmap" else 0
    assert set(row["collectives"]) <= {"all-reduce", "all-gather"}
    assert sum(size for _, size in row["collectives"].values()) <= sums + gathered


def test_rows_of_low_rank_take_little_with_their_copies_and_the_host_waits_for_nothing():
    """Their factors are converted for products of matrices, a leaf at a time."""
    row = gpu.measure(gpu.Case("h100", "one GPU", LAYER, "scale_by_mfac", "low rank"))
    assert row["launches"]["waits"] == 0
    assert row["alias"] >= row["state_bytes"]
    assert row["window_bytes"] + row["temporaries"] < 0.15 * 4 * 64 * row["parameters"]  # of float32 rows


def sent_on_mesh(tx: Any, specs: dict[str, Any], shape: tuple[int, ...]) -> dict[str, list[int]]:
    """The collectives of an update of leaves of this shape on eight GPUs, two along fsdp."""
    devices = np.asarray(gpu_targets.devices("h100", 8)).reshape(2, 4)
    mesh = Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params: Any = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name in specs}
    shardings = {name: NamedSharding(mesh, PartitionSpec(*spec)) for name, spec in specs.items()}
    lowered = gpu_cases.lower_jit(
        tx.update,
        params,
        jax.eval_shape(tx.init, params),
        shardings,
        mfac_jax.state_shardings(tx, params, shardings),
    )
    return compiled_update.collectives(lowered.update.compile().as_text())


def test_leaves_of_one_shape_and_different_shardings_are_not_exchanged():
    """As on TPU, where XLA merged what such leaves share."""
    specs = {"query": ("fsdp", "tensor"), "key": ("fsdp", "tensor"), "out": ("tensor", "fsdp")}
    sent = sent_on_mesh(mfac_jax.mfac(3e-3, 64, metric="diagonal"), specs, (512, 512))
    assert set(sent) == {"all-reduce"}
    assert sent["all-reduce"][1] <= 2 * len(specs) * (64 + 1) * 4


def test_a_rotated_metric_within_each_device_sends_nothing():
    specs = {"query": (None, "fsdp", "tensor"), "out": (None, "tensor", "fsdp")}
    tx = mfac_jax.mfac(1e-2, 8, metric=mfac_jax.components.rotated_metric(block_size=128))
    sent = sent_on_mesh(tx, specs, (2, 1024, 1024))
    assert set(sent) == {"all-reduce"}
    assert sent["all-reduce"][1] <= 2 * len(specs) * (8 + 1) * 4


def test_long_leaves_on_explicit_axes_compile_for_a_mesh_that_is_not_here(monkeypatch):
    """Where this machine has one device, and its own way with long rows."""
    monkeypatch.setitem(gpu.TREES, "long", gpu_cases.Tree(8, ((3, 3, 256, 256),)))
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    check = gpu.measure(gpu.Case("h100", "explicit", "long", "mfac", "float32"))
    assert check["copied"] == 0
