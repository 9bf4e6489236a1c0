"""The tables of what storages take and how far their updates are off."""

import numpy as np
import pytest

from benchmarks import memory_table, storage_accuracy
from examples.common import json_lines


def test_models_and_their_bytes(capsys, tmp_path):
    out = tmp_path / "memory.jsonl"
    memory_table.main(["--sizes", "124 million", "--metrics", "diagonal", "--out", str(out)])
    assert "| 124 million | diagonal | int8 | 16 | 2.5 | 5.0 |" in capsys.readouterr().out
    lines = {line["storage"]: line for line in json_lines.read(out)}
    assert 123e6 < lines["int8"]["parameters"] < 125e6
    copies = {storage: line["h100"] / line["parameters"] / 4 for storage, line in lines.items()}
    assert copies["float32"] == pytest.approx(17, rel=1e-3)
    assert copies["int8"] == pytest.approx(5, rel=0.01)
    assert lines["int8"]["v5p"] < 1.05 * lines["int8"]["h100"] / 64


def test_distances_are_relative():
    tree, other = {"a": np.array([3.0, 4.0])}, {"a": np.array([3.0, 4.5])}
    assert storage_accuracy.distance(other, tree) == pytest.approx(0.1)


@pytest.mark.exhaustive  # twelve programs, half a minute each
@pytest.mark.slow
def test_distances_of_a_few_steps(capsys, tmp_path):
    out = tmp_path / "storages.jsonl"
    storage_accuracy.main(["--steps", "6", "--num-grads", "4", "--out", str(out)])
    assert capsys.readouterr().out.count("float8") == 2
    for line in json_lines.read(out):
        found = line["distance"]
        assert found["float32"] == 0 < found["bfloat16"] < found["int8"] < found["float8_e5m2"] < 0.2
        assert line["window_bytes"]["int8"] < 0.27 * line["window_bytes"]["float32"]
