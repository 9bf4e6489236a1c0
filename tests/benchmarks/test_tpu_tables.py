"""What compiled programs for TPUs hold and send, and what is predicted from that."""

import functools
import json
from typing import Any

import jax
import pytest

from benchmarks import compiled_update, tpu_tables
from examples import pod_transformer as pod


def test_collectives_are_counted_with_their_bytes():
    text = """
      %a = f32[1,1024]{1,0} all-reduce(%x), replica_groups={}
      %b = (f32[8,2]{1,0}, bf16[3]{0}) all-reduce-start(%y, %z)
      %c = (f32[8,2]{1,0}, bf16[3]{0}) all-reduce-done(%b)
      %d = pred[] all-gather(%p)
      %e = f32[7]{0} add(%all-reduce, %all-reduce)
    """
    assert compiled_update.collectives(text) == {"all-reduce": [2, 4096 + 64 + 6], "all-gather": [1, 1]}


def compiled_row(**changes) -> dict:
    """Made up: a billion parameters on two v5p chips."""
    size = {"vocabulary": 1000, "context": 100, "width": 50, "layers": 3, "heads": 5}
    return {
        "topology": "v5p:1x2x1",
        "chips": 2,
        "devices": 2,
        "mesh": {"fsdp": 2, "tensor": 1},
        "size": size,
        "parameters": 10**9,
        "num_grads": 64,
        "sequences": 8,
        "leaves": 9,
        "split_updates": 500,
        "window_bytes": 2**30,
        "state_bytes": 2**30,
        "step_temporaries": 2**20,
        "step_peak": 95 * 2**30 - 1,
        "update_temporaries": 2**20,
        "update_traffic": 2765e6,  # a millisecond
        "update_collectives": {"all-reduce": [3, 2000], "all-gather": [1, 1000]},
        "compile_seconds": 1.4,
    } | changes


def test_the_prediction_is_the_arithmetic_of_the_published_figures():
    row = compiled_row()
    predicted = tpu_tables.predict(row)
    assert predicted.passes == pytest.approx(1e-3)
    assert predicted.network == pytest.approx(2 * 3000 / 600e9 + 4 * (1 + 2 + 1) * 1e-6)
    assert predicted.solve == pytest.approx(64**3 / 3 * 6 / 459e12)
    flops = 800 * (3 * (88 * 50**2 + 16 * 100 * 50) + 6 * 50 * 1000)
    assert predicted.model == pytest.approx(flops / 2 / (0.4 * 459e12))
    enough = tpu_tables.tokens_for(row, 0.1) / 100
    assert tpu_tables.predict(row | {"sequences": enough}).share == pytest.approx(0.1)

    half = tpu_tables.predict(compiled_row(topology="tpu7x:1x1x1"))  # two devices a chip
    assert half.passes == pytest.approx(2765e6 / 3690e9)
    assert half.model == pytest.approx(flops / 2 / (0.4 * 2307e12 / 2))
    assert tpu_tables.hbm(compiled_row(topology="tpu7x:1x1x1")) == 96 * 2**30


def test_operations_of_the_model_are_those_that_xla_counts():
    size = pod.Size(vocabulary=512, context=128, width=128, layers=1, heads=4)  # XLA counts a loop once
    graph, shapes = pod.abstract(size, jax.numpy.dtype("float32"))
    tokens = jax.ShapeDtypeStruct((4, size.context + 1), "int32")
    loss = functools.partial(pod.loss, graph)
    cost: Any = jax.jit(jax.value_and_grad(loss)).lower(shapes, tokens).cost_analysis()
    # What is not a product of matrices takes the rest.
    assert tpu_tables.model_flops(size._asdict(), 4 * 128) == pytest.approx(cost["flops"], rel=0.03)


def test_the_tables_say_what_does_not_fit_and_what_is_predicted(tmp_path, capsys):
    rows = [compiled_row(), compiled_row(step_peak=96 * 2**30)]
    (tmp_path / "tpu.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tpu_tables.main([str(tmp_path / "tpu.jsonl")])
    lines = capsys.readouterr().out.splitlines()
    fitting, too_large = (line for line in lines if line.startswith("| v5p:1x2x1 (2 x 1)"))
    assert "| 97,280 |" in fitting
    assert "| 97,280, too little |" in too_large
    assert "3 all-reduce, 2 KiB; 1 all-gather, 1 KiB | 3 KiB | 1 |" in fitting  # 9 x 65 x 4 + 500 bytes
    assert any("predicted" in line for line in lines)
    assert any(line.startswith("Predicted, not measured.") for line in lines)
