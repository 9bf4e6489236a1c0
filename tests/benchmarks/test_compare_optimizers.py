"""Tiny runs of the comparison of optimizers through its command line."""

import math
import types
from typing import Any

import pytest

from benchmarks import compare_optimizers, comparison_pool, comparison_run, report_comparison
from examples.common import json_lines
from tests.benchmarks.made_up_runs import record, report, results_rows


@pytest.mark.slow
def test_runs_are_stored_and_not_repeated_and_a_missing_package_is_named(tmp_path, capfd, monkeypatch):
    optimizers_wanted = ["--optimizers", "sgd", "mfac-default", "kron"]
    options = ["--problems", "digits-mlp", *optimizers_wanted, "--seeds", "1", "--steps", "4"]
    # A package that cannot be imported, wherever this runs.
    (tmp_path / "psgd_jax.py").write_text("raise AttributeError('made for another JAX')\n")
    monkeypatch.syspath_prepend(tmp_path)
    options += ["--out", str(tmp_path)]
    compare_optimizers.main(options)
    records = json_lines.read(tmp_path / "runs.jsonl")
    runs = [record for record in records if "evaluations" in record]
    assert [record["missing"] for record in records if "missing" in record] == ["kron"]
    assert "made for another JAX" in capfd.readouterr().err

    counts = {name: sum(run["optimizer"] == name for run in runs) for name in ("sgd", "mfac-default")}
    sgd = [run for run in runs if run["optimizer"] == "sgd"]
    trials = [run for run in sgd if run["seed"] == 0]
    assert 5 <= len(trials) <= 7
    assert counts == {"sgd": len(trials) + 1, "mfac-default": 2}  # the trials, and seed 1 at the best rate
    best = min(trials, key=lambda run: run["evaluations"][-1]["train_loss"])
    assert (sgd[-1]["rate"], sgd[-1]["seed"]) == (best["rate"], 1)
    for run in runs:
        steps = [evaluation["step"] for evaluation in run["evaluations"]]
        assert steps == ([0, 1, 2, 3, 4] if run["seed"] else [0, 4])  # the course is that of reported seeds
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
    assert "left out: kron on digits-mlp" in printed
    assert "(`mfac-default`) | 1 |" in printed


GRIDS = {"1, 2, 5": (0.05, 0.1, 0.2, 0.5, 1.0), "1, 3": (0.003, 0.01, 0.03, 0.1, 0.3)}


@pytest.mark.parametrize(("grid", "low", "high"), [("1, 2, 5", 0.02, 2.0), ("1, 3", 0.001, 1.0)])
def test_a_grid_goes_on_beyond_the_end_that_is_best(grid, low, high):
    rates = GRIDS[grid]
    assert compare_optimizers.beyond({rate: rate for rate in rates}) == low
    assert compare_optimizers.beyond({rate: -rate for rate in rates}) == high
    assert compare_optimizers.beyond({rate: abs(rate - rates[1]) for rate in rates}) is None
    assert compare_optimizers.beyond(dict.fromkeys(rates, math.inf)) == low


class MadeUpRunner:
    """Runs end with a loss that falls with the rate, but for SGD's, whose best is inside its grid."""

    def __init__(self, path):
        self.store, self.rounds = comparison_pool.Store(path), []

    def run(self, runs, description):
        del description
        self.rounds.append([(run.optimizer, run.rate, run.seed) for run in runs])
        for run in runs:
            loss = abs(run.rate - 0.2) if run.optimizer == "sgd" else 1 / run.rate
            made_up = record(run.optimizer, run.rate, loss, damping=run.damping, seed=run.seed)
            self.store.records.append(made_up)

    def missing(self, optimizers, problems):
        del optimizers, problems
        return set()


def test_tuning_adds_two_rates_at_most_and_its_seed_is_not_reported(tmp_path):
    runner: Any = MadeUpRunner(tmp_path / "runs.jsonl")
    names = ("sgd", "soap", "mfac-default")
    options = compare_optimizers.Options(problems=("digits-mlp",), optimizers=names, seeds=2)
    compare_optimizers.compare(options, runner)
    grids, second, third, reported = runner.rounds
    assert len(grids) == 5 + 5 + 1
    assert {seed for *_, seed in grids} == {0}
    assert (second, third) == ([("soap", 3.0, 0)], [("soap", 10.0, 0)])
    assert [(name, rate) for name, rate, seed in reported if seed == 1][:2] == [
        ("sgd", 0.2),
        ("soap", 10.0),
    ]
    assert sorted(seed for *_, seed in reported) == [1, 1, 1, 2, 2, 2]


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
    assert "`compare_optimizers` writes such files" in capsys.readouterr().err


def test_of_rates_with_equal_losses_the_lowest_is_run_with_other_seeds():
    """As the report chooses; rates beyond the grid, tried last, are among them."""
    store = types.SimpleNamespace(loss=lambda run: 0.0)
    runner: Any = types.SimpleNamespace(store=store, run=lambda runs, description: None)
    (best,) = compare_optimizers.tune(compare_optimizers.Options(), runner, "digits-mlp", ["muon"])
    assert best.rate == 0.002


def test_of_several_records_of_a_run_the_last_counts(tmp_path):
    lines = [record("sgd", 0.1, loss) for loss in (0.5, 0.9, 0.7)] + [record("sgd", 0.2, 0.8)]
    lines.append(record("sgd", 0.1, 0.7, seed=1))
    assert "| 2 | 0.1 (end of grid) | 0.7 |" in results_rows(report(tmp_path, lines), "digits-mlp")["sgd"]
    store = comparison_pool.Store(tmp_path / "runs.jsonl")
    run = comparison_run.Run("tuning", "digits-mlp", "sgd", 0.1, None, 0, "default", None)
    assert store.loss(run) == 0.7
    assert store.loss(run._replace(rate=0.3)) is None
