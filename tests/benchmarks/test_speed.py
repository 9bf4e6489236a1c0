"""Times of steps: measured on tiny cases, checked, and reported."""

import functools
import re

import jax
import numpy as np
import pytest

from benchmarks import (
    kronecker_cost,
    metric_share,
    old_and_new,
    scaling_law,
    speed_report,
    static_algorithm,
    step_time,
    steps_to_accuracy,
    timing,
    training_share,
    weak_scaling,
)
from benchmarks.parameter_trees import RESNET20, count
from examples.common import json_lines


@pytest.mark.slow
def test_what_a_device_holds_moves_and_sends_does_not_grow_with_the_devices():
    runs = [weak_scaling.prepare("jit", devices, num_grads=8, rows=4) for devices in (2, 8)]
    few, many = (run.row for run in runs)
    assert many["parameters"] == 4 * few["parameters"]
    assert many["window_bytes"] == few["window_bytes"]
    assert many["update_traffic"] < 1.02 * few["update_traffic"]
    assert many["update_temporaries"] < 1.02 * few["update_temporaries"] + 4096
    assert list(many["update_collectives"]) == ["all-reduce"]
    assert many["update_collectives"]["all-reduce"][1] <= weak_scaling.LEAVES * (8 + 1) * 4
    seconds = weak_scaling.time_steps(runs, repeats=1)
    rows = [run.row | {"seconds": s} for run, s in zip(runs, seconds, strict=True)]
    assert len(weak_scaling.table(rows).splitlines()) == 4


def test_steps_are_checked_and_timed_beside_two_readings(tmp_path, capsys, monkeypatch):
    shapes = ((300,),), ((20, 5), (3,), ())
    cases = tuple(map(step_time.Case, ("one leaf", "three leaves"), (8, 8), shapes))
    monkeypatch.setattr(step_time, "CASES", cases)
    out = tmp_path / "steps.jsonl"
    step_time.main(["--rounds", "2", "--original", str(tmp_path), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "has no optim.py" in printed
    assert "| three leaves | 8 | 104 |" in printed
    for line, case in zip(json_lines.read(out), cases, strict=True):
        assert line["parameters"] == case.parameters
        assert line["relative_errors"][step_time.OURS] < 1e-4
        assert set(line["seconds"]) == {step_time.OURS, "read", step_time.SOLVE}
        assert line["compilations"] == 1
        assert all(0 < s["min"] <= s["median"] <= s["max"] for s in line["seconds"].values())
    step_time.main(["--grid", "--gigabytes", "1e-9"])
    assert "one leaf" not in capsys.readouterr().out


def test_a_step_that_is_wrong_is_not_timed():
    rows, gradient = step_time.draw(step_time.Case("one leaf", 8, ((300,),)))
    step = step_time.Step(step_time.Case("one leaf", 8, ((300,),)), rows(jax.random.key(0)))
    with pytest.raises(ValueError, match=r"zeros is no inverse: relative error 1\.0e\+00"):
        step_time.check(step, {"zeros": lambda _: np.zeros(300)}, gradient(jax.random.key(1)))


def test_the_scaling_law_is_found_and_no_term_is_negative():
    m, d = (x.ravel() for x in np.meshgrid([32, 128, 512, 2048], [1e5, 1e6, 1e7]))
    law = np.array([3e-10, 0.0, 2e-12, 1e-4])  # without m^2
    noisy = (scaling_law.terms(m, d) @ law) * np.random.default_rng(0).uniform(0.99, 1.01, len(m))
    found = scaling_law.fit(scaling_law.terms(m, d), noisy)
    np.testing.assert_allclose(found.seconds[[0, 2, 3]], law[[0, 2, 3]], rtol=0.1)
    assert np.all(found.seconds >= 0)
    assert np.max(np.abs(found.residuals)) < 0.05


@pytest.mark.slow
def test_the_share_of_the_rotated_metric_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(metric_share, "COUNTED", 2)
    metric_share.main(["--widths", "8", "--num-grads", "2", "--out", str(tmp_path / "metric.jsonl")])
    (line,) = json_lines.read(tmp_path / "metric.jsonl")
    assert set(line["seconds"]) == {"rotated", "diagonal"}
    assert "| 8 |" in capsys.readouterr().out


@pytest.mark.slow
def test_training_steps_are_timed_and_speed_is_reported_in_tables_and_pictures(
    tmp_path, capsys, monkeypatch
):
    small = functools.partial(training_share.text.make_workload, 4, 2, 1, 8, 2, 8, seed=0)
    monkeypatch.setattr(training_share, "WORKLOADS", {"transformer": small})
    monkeypatch.setattr(training_share, "OTHERS", ("adamw", "lbfgs", "soap"))
    monkeypatch.setattr(training_share, "NUM_GRADS", (2,))
    monkeypatch.setattr(training_share.optimizers, "why_missing", {"soap": "not installed"}.get)
    training_share.main(["--rounds", "2", "--out", str(tmp_path / "training.jsonl")])
    assert "text without soap: not installed" in capsys.readouterr().out
    (line,) = json_lines.read(tmp_path / "training.jsonl")
    whole = {"adamw", "lbfgs", "mfac, m = 2"}
    assert set(line["seconds"]) == whole | {name + training_share.ALONE for name in whole}

    monkeypatch.setattr(step_time, "CASES", (step_time.Case("one leaf", 8, ((300,),)),))
    monkeypatch.setattr(step_time, "GRID", ((4, 100), (8, 100), (4, 200), (8, 200)))
    steps = ["--rounds", "1", "--out", str(tmp_path / "steps.jsonl")]
    for options in ([], ["--grid"], ["--grid", "--solver", "inverse"]):
        step_time.main([*steps, *options])
    capsys.readouterr()
    speed_report.main(["--results", str(tmp_path), "--pictures", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "| one leaf | 8 | 300 | auto |" in printed
    assert len(re.findall("^(?:auto|inverse): .* s x m\\^3 .* residual", printed, re.MULTILINE)) == 2
    for name in ("steps", "scaling", "training"):
        assert (tmp_path / f"speed_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_static_algorithm_is_checked_and_timed_and_what_is_missing_is_named(tmp_path, capsys):
    out = tmp_path / "static.jsonl"
    options = ["--num-grads", "40", "--parameters", "300", "--block", "128", "--rounds", "1"]
    static_algorithm.main([*options, "--original", str(tmp_path), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "has no prun.py" in printed
    (row,) = json_lines.read(out)
    recursion = static_algorithm.RECURSION
    assert set(row["one_block"]) == {static_algorithm.OURS, recursion, f"{recursion}, 32 rows a buffer"}
    for method in (*row["one_block"].values(), *row["blocks"].values()):
        assert max(method["errors"].values()) < 1e-3
        assert set(method["seconds"]) == {"precompute", "diagonal", "product", "entry", "64 products"}
        assert all(0 < s["min"] <= s["median"] <= s["max"] for s in method["seconds"].values())
    assert {"revision", "versions", "machine", "cores"} <= set(row)


@pytest.mark.slow
def test_what_is_not_the_inverse_is_not_timed(monkeypatch):
    wrong = static_algorithm.in_jax(1e-5, 40)._replace(diagonal=lambda groups: jax.numpy.ones(300))
    monkeypatch.setattr(static_algorithm, "in_jax", lambda damping, length: wrong)
    with pytest.raises(ValueError, match="recursion in JAX is not the inverse"):
        static_algorithm.main(["--num-grads", "40", "--parameters", "300"])


@pytest.mark.slow
def test_the_cost_of_a_layer_is_measured_and_a_wrong_solution_refused(monkeypatch, tmp_path, capsys):
    cases = (kronecker_cost.Case("wide", (24, 20), (8,)), kronecker_cost.Case("narrow", (6, 5), (4, 9)))
    monkeypatch.setattr(kronecker_cost, "CASES", cases)
    out = tmp_path / "kronecker.jsonl"
    kronecker_cost.main(["--rounds", "1", "--out", str(out)])
    lines = json_lines.read(out)
    assert [line["name"] for line in lines] == ["wide", "narrow"]
    for line in lines:
        assert set(line["milliseconds"]) == {
            kronecker_cost.CG,
            kronecker_cost.EXPLICIT,
            kronecker_cost.EXACT,
            kronecker_cost.SPAN,
        }
        assert 0 < line["error"] < 0.1
    assert "| wide | 8 |" in capsys.readouterr().out
    monkeypatch.setattr(kronecker_cost, "TOLERANCE", 1e-9)
    with pytest.raises(RuntimeError, match="wide: the solution is off by"):
        kronecker_cost.main([])


@pytest.mark.slow
def test_steps_to_an_accuracy_are_counted(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(steps_to_accuracy, "SEEDS", range(1))
    monkeypatch.setattr(steps_to_accuracy, "SEEDS_FOR_RATES", range(2, 3))
    monkeypatch.setattr(steps_to_accuracy, "RATES", dict.fromkeys(("cgfac", "cgfac, 4 batches"), (0.1,)))
    out = tmp_path / "accuracy.jsonl"
    steps_to_accuracy.main(["--optimizers", *steps_to_accuracy.RATES, "--out", str(out)])
    lines = json_lines.read(out)
    assert [line["optimizer"] for line in lines] == list(steps_to_accuracy.RATES)
    assert all(0 < line["steps"] < 200 and line["seconds"] < line["all_seconds"] for line in lines)
    assert "| mlp | cgfac | 0.1 | 1 of 1 |" in capsys.readouterr().out


def test_what_is_timed_in_turn_meets_every_input_and_the_first_round_does_not_count():
    calls = []
    functions = {name: lambda x, name=name: calls.append((name, x)) for name in ("a", "b")}
    seconds = timing.in_turn(functions, range(3))
    assert calls == [(name, x) for x in range(3) for name in ("a", "b")]
    assert {name: len(rounds) for name, rounds in seconds.items()} == {"a": 2, "b": 2}


def test_the_tree_of_the_resnet_has_the_size_of_the_published_network():
    assert (len(RESNET20), count(RESNET20)) == (65, 272_474)


@pytest.mark.slow
def test_a_revision_is_timed_beside_another_and_a_folder_without_one_is_refused(
    monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(old_and_new, "TREES", {"two leaves": ((3, 2), (5,))})
    out = tmp_path / "steps.jsonl"
    options = ["--num-grads", "8", "--rounds", "2", "--steps", "1", "--out", str(out)]
    old_and_new.main(["--old", str(old_and_new.NEW), *options])
    assert "two leaves" in capsys.readouterr().out
    lines = json_lines.read(out)
    assert [line["optimizer"] for line in lines] == list(old_and_new.OPTIMIZERS)
    assert all(len(line["seconds"][name]) == 2 for line in lines for name in ("old", "new"))
    with pytest.raises(RuntimeError, match="has no mfac_jax"):
        old_and_new.main(["--old", str(tmp_path), *options])
