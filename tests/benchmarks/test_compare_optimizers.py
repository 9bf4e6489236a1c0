"""Tiny runs of the comparison of optimizers through its command line."""

import pytest

from benchmarks import compare_optimizers, comparison_pool, comparison_run, report_comparison
from examples.common import json_lines
from tests.benchmarks.made_up_runs import record, report, results_rows


@pytest.mark.slow
def test_runs_are_stored_and_not_repeated_and_a_missing_package_is_named(tmp_path, capfd):
    optimizers_wanted = ["--optimizers", "sgd", "mfac-default", "soap"]
    options = ["--problems", "digits-mlp", *optimizers_wanted, "--seeds", "2", "--steps", "4"]
    # A checkout of SOAP that cannot be imported, wherever this runs.
    (tmp_path / "soap_jax.py").write_text("raise AttributeError('made for another JAX')\n")
    options += ["--soap", str(tmp_path), "--out", str(tmp_path)]
    compare_optimizers.main(options)
    records = json_lines.read(tmp_path / "runs.jsonl")
    runs = [record for record in records if "evaluations" in record]
    assert [record["missing"] for record in records if "missing" in record] == ["soap"]
    assert "made for another JAX" in capfd.readouterr().err

    counts = {name: sum(run["optimizer"] == name for run in runs) for name in ("sgd", "mfac-default")}
    assert counts == {"sgd": 6, "mfac-default": 2}  # the grid, and seed 1 at the best rate
    sgd = [run for run in runs if run["optimizer"] == "sgd"]
    best = min(sgd[:5], key=lambda run: run["evaluations"][-1]["train_loss"])
    assert (sgd[5]["rate"], sgd[5]["seed"]) == (best["rate"], 1)
    for run in runs:
        steps = [evaluation["step"] for evaluation in run["evaluations"]]
        assert steps == [0, 1, 2, 3, 4]
        assert all(set(e) >= {"seconds", "train_loss", "valid_loss"} for e in run["evaluations"])
        assert run["step_ms"] > 0
        assert run["jobs"] == 1
        assert {"revision", "versions", "machine"} <= set(run)
    # Peak rates are in the state: other rates are other runs, from the same start.
    assert len({run["evaluations"][0]["train_loss"] for run in sgd[:5]}) == 1
    assert len({run["evaluations"][-1]["train_loss"] for run in sgd[:5]}) == 5

    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"study": "tuni')  # as an interrupted write leaves it
    compare_optimizers.main(options)
    again = [record for record in json_lines.read(tmp_path / "runs.jsonl") if "evaluations" in record]
    assert again == runs

    report_comparison.main([str(tmp_path / "runs.jsonl"), "--out", str(tmp_path / "docs")])
    printed = capfd.readouterr().out
    assert "left out: soap on digits-mlp" in printed
    assert "(`mfac-default`) | 1 |" in printed


def test_a_data_folder_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_optimizers.main(["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert "--data-dir: must be a folder that exists" in capsys.readouterr().err


def test_a_number_below_one_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_optimizers.main(["--seeds", "0"])
    assert "--seeds: must be a whole number, at least 1, got '0'" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text("no json\n")
    with pytest.raises(SystemExit, match="2"):
        compare_optimizers.main(["--out", str(tmp_path)])
    assert "pass another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        report_comparison.main([str(tmp_path / "runs.jsonl")])
    assert "`compare_optimizers` writes it" in capsys.readouterr().err


def test_of_several_records_of_a_run_the_last_counts(tmp_path):
    lines = [record("sgd", 0.1, loss) for loss in (0.5, 0.9, 0.7)] + [record("sgd", 0.2, 0.8)]
    assert "| 2 | 0.1 (end of grid) | 0.7 |" in results_rows(report(tmp_path, lines), "digits-mlp")["sgd"]
    store = comparison_pool.Store(tmp_path / "runs.jsonl", None)
    run = comparison_run.Run("tuning", "digits-mlp", "sgd", 0.1, None, 0, "default", None)
    assert store.loss(run) == 0.7
    assert store.loss(run._replace(rate=0.3)) is None
