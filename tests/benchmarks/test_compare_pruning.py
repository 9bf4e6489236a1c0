"""The comparison of ways to prune, on made-up results."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

import mfac_jax
from benchmarks import compare_pruning


def test_the_table_of_pruning_has_means_and_deviations_and_is_drawn(tmp_path, capsys):
    lines = [
        {"method": method, "sparsity": sparsity, "pattern": pattern, "accuracy_kept": 0.5 + seed / 10}
        | {"accuracy_estimated": 0.25, "seed": seed}
        for method in ("magnitude", "mfac_jax")
        for sparsity, pattern in ((0.5, None), (0.75, None), (0.5, "2:4"))
        for seed in (0, 1)
    ]
    results, picture = tmp_path / "pruning.jsonl", tmp_path / "pruning.png"
    results.write_text("\n".join(map(json.dumps, lines)))
    compare_pruning.main(["--results", str(results), "--picture", str(picture)])
    printed = capsys.readouterr().out
    assert "| batch statistics kept | 50.0% | 75.0% | 50.0% 2:4 |" in printed
    assert printed.count("| magnitude | 55.0 ± 7.1 | 55.0 ± 7.1 | 55.0 ± 7.1 |") == 1
    assert printed.count("| mfac_jax | 25.0 ± 0.0 |") == 1
    assert "published" not in printed
    with Image.open(picture) as image:
        assert image.size[0] > 500


@pytest.mark.slow
def test_published_pruning_moves_kernels_alone():
    kernel, bias = np.ones((3, 3, 3, 2), np.float32), np.ones(2, np.float32)
    params: Any = {"Conv_0": {"kernel": kernel}, "Dense_0": {"bias": bias}}
    masks = {"Conv_0": {"kernel": kernel > 0}, "Dense_0": {"bias": None}}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda w: rng.standard_normal((4, *w.shape)).astype(np.float32), params)
    grads = compare_pruning.resnet20_pruning.of_kernels(grads, masks)
    pruned: Any = mfac_jax.pruning.prune(params, grads, 0.5, masks=masks, gradient_term=1.0)[0]
    np.testing.assert_array_equal(pruned["Dense_0"]["bias"], bias)
    moved = np.asarray(pruned["Conv_0"]["kernel"])
    assert not np.any(moved[moved != 0] == 1)
