"""The comparison of optimizers: tiny runs through its command line, and its report from made-up results."""

import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from PIL import Image

import mfac_jax
from benchmarks import (
    compare_optimizers,
    compare_pruning,
    comparison_results,
    compiled_update,
    kronecker_cost,
    optimizers,
    report_comparison,
    scaling_law,
    speed_report,
    static_algorithm,
    step_time,
    steps_to_accuracy,
    tpu_tables,
    training_share,
    weak_scaling,
)
from examples import pod_transformer as pod

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize("name", optimizers.IDEAS)
def test_every_idea_descends(name):
    tx = optimizers.IDEAS[name](optax.constant_schedule(0.05))
    params = jax.numpy.array([3.0, -2.0, 1.0])
    state, loss = tx.init(params), lambda p: jax.numpy.sum(p**2)
    step = jax.jit(lambda p, s: tx_step(tx, loss, p, s))
    for _ in range(100):
        params, state = step(params, state)
    assert loss(params) < 13.5  # 14 at the start


def tx_step(tx, loss, params, state):
    value, grads = jax.value_and_grad(loss)(params)
    updates, state = optax.with_extra_args_support(tx).update(grads, state, params, value=value)
    return optax.apply_updates(params, updates), state


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------- the real thing


@pytest.mark.slow
def test_runs_are_stored_and_not_repeated_and_a_missing_package_is_named(tmp_path, capfd):
    optimizers_wanted = ["--optimizers", "sgd", "mfac-default", "soap"]
    options = ["--problems", "digits-mlp", *optimizers_wanted, "--seeds", "2", "--steps", "4"]
    # A checkout of SOAP that cannot be imported, wherever this runs.
    (tmp_path / "soap_jax.py").write_text("raise AttributeError('made for another JAX')\n")
    options += ["--soap", str(tmp_path), "--out", str(tmp_path)]
    compare_optimizers.main(options)
    records = read(tmp_path / "runs.jsonl")
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
    again = [record for record in read(tmp_path / "runs.jsonl") if "evaluations" in record]
    assert again == runs

    report_comparison.main([str(tmp_path / "runs.jsonl"), "--out", str(tmp_path / "docs")])
    printed = capfd.readouterr().out
    assert "left out: soap on digits-mlp" in printed
    assert "(`mfac-default`) | 1 |" in printed


def test_a_data_folder_that_is_not_there_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        compare_optimizers.main(["--data-dir", str(tmp_path / "none"), "--out", str(tmp_path)])
    assert "--data-dir" in capsys.readouterr().err


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    (tmp_path / "runs.jsonl").write_text("no json\n")
    with pytest.raises(SystemExit, match="2"):
        compare_optimizers.main(["--out", str(tmp_path)])
    assert "pass another --out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        report_comparison.main([str(tmp_path / "runs.jsonl")])
    assert "compare_optimizers.py" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- its plan


def test_every_tuned_optimizer_has_five_rates_and_they_rise_in_factors_of_two_to_three():
    for name, grids in optimizers.RATES.items():
        for rates in grids.values():
            assert len(rates) == (1 if name in ("mfac-default", "mfac-published") else 5)
            ratios = np.divide(rates[1:], rates[:-1])
            assert np.all((ratios > 1.9) & (ratios < 3.5))


def test_muon_sees_kernels_as_matrices():
    params = {"kernel": np.zeros((3, 3, 4, 8)), "bias": np.zeros(8), "dense": np.zeros((4, 2))}
    dimensions = optimizers.TRANSFORMS["muon"].keywords["muon_weight_dimension_numbers"](params)
    assert dimensions["kernel"] == ((0, 1, 2), 3)
    assert dimensions["dense"] == ((0,), 1)
    assert dimensions["bias"] is None


# -------------------------------------------------------------------------------------------- its report


def record(optimizer: str, rate: float, final: float | None, **changes) -> dict:
    """A made-up run whose loss falls from 2.3 by a constant factor."""
    middle = None if final is None else math.sqrt(2.3 * final)
    evaluations = [
        {"step": 50 * i, "seconds": 0.1 * i, "train_loss": loss, "valid_loss": loss, "valid_accuracy": 0.5}
        for i, loss in enumerate((2.3, middle, final))
    ]
    defaults = {"study": "tuning", "problem": "digits-mlp", "damping": None, "seed": 0, "data": "default"}
    context = {
        "limit": None,
        "step_ms": 2.0,
        "steps": 100,
        "parameters": 10,
        "source": "made up",
        "jobs": 2,
    }
    machine = {"revision": "abc", "versions": {"jax": "1"}, "machine": {"cpus": 2}, "device": "cpu"}
    run = {"optimizer": optimizer, "rate": rate, "evaluations": evaluations}
    return defaults | context | machine | run | changes


def made_up() -> list[dict]:
    rates = (0.01, 0.02, 0.05)
    records = [record("sgd", rate, loss) for rate, loss in zip(rates, (0.5, 0.2, None), strict=True)]
    records += [record("mfac", rate, loss) for rate, loss in zip(rates, (0.4, 0.1, 0.05), strict=True)]
    records += [record("sgd", 0.02, 0.23, seed=1), record("mfac", 0.05, 0.07, seed=1)]
    records += [record("muon", 0.01, None)]
    records += [
        record("mfac", rate, rate + damping, study="grid", damping=damping)
        for rate in rates
        for damping in (0.1, 1.0)
    ]
    return [*records, *(record("adamw", rate, rate, study="grid") for rate in rates)]


def report(folder: Path, lines: list[dict]) -> str:
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_comparison.main([str(folder / "runs.jsonl"), "--out", str(folder / "docs")])
    return (folder / "docs" / "comparison.md").read_text()


def results_rows(text: str, title: str) -> dict[str, str]:
    """The lines of a section's first table by the name of the optimizer."""
    lines = text.split(f"\n## {title}\n")[1].split("\n## ")[0].splitlines()
    return {line.split("`")[1]: line for line in lines if "`" in line}


def test_the_report_has_the_figures_of_the_runs(tmp_path):
    lines = [*made_up(), {"missing": "soap", "problem": "digits-mlp", "reason": "no module"}]
    printed = report(tmp_path, lines)
    row = results_rows(printed, "digits-mlp")
    assert "| 3 | 0.05 (end of grid) | 0.060 ± 0.014" in row["mfac"]
    assert "| 3 | 0.02 | 0.215 ± 0.021" in row["sgd"]
    assert "every rate diverged" in row["muon"]
    assert "steps to 0.23" in printed  # the worst seed of SGD
    # log(2.3 / 0.23) / log(2.3 / 0.2) of the way for seed 0, the whole way for seed 1
    assert row["sgd"].endswith("| 97.1 | 0.194 |")
    assert "soap on digits-mlp: no module" in printed
    assert "processes side by side" in printed
    for name in ("curves", "sensitivity", "grid"):
        picture = tmp_path / "docs" / f"comparison_{name}.png"
        assert picture.stat().st_size < 150_000
        with Image.open(picture) as image:
            assert image.size[0] > 300


def test_the_summary_comes_first_with_the_best_in_bold_and_notes_from_the_runs(tmp_path):
    noisy = [
        record(name, 0.01, 0.5, problem="noisy-digits", steps=1436) for name in ("sgd", "mfac-published")
    ]
    lines = [*made_up(), *noisy, record("mfac-published", 0.001, 0.3)]
    text = report(tmp_path, lines)
    summary = text.split("## How it was measured")[0]
    assert "| M-FAC, tuned | **0.060 ± 0.014** | - |" in summary
    assert "| SGD, Nesterov momentum | 0.215 ± 0.021 | **0.5** |" in summary
    assert "| Muon | diverged | - |" in summary
    assert "over 1 to 2 seeds" in summary
    assert "seed 0, which is also among the seeds reported" in summary
    assert "not tuned: Muon; M-FAC as published" in summary
    assert "512 gradients, does not fill in the 100 steps of digits-mlp." in summary
    assert "embeddings and output layer too" in summary
    assert "noisy-digits: the training loss is that of partly random labels" in summary
    section = text.split("## noisy-digits\n")[1].split("## ")[0]
    assert "does not fill" not in section
    assert "Muon" not in section
    assert "validation accuracy is what counts" in section
    assert "on all rates tried with seed 0" in text


def test_the_published_window_of_the_notes_is_that_of_the_recipe():
    transform = optimizers.make_transform("mfac-published", 10, False)
    fisher = optax.tree.get(transform.init({"w": np.zeros(3, np.float32)}), "ScaleByMFACState")
    assert {leaf.shape[0] for leaf in jax.tree.leaves(fisher.window)} == {
        report_comparison.PUBLISHED_WINDOW
    }


def test_runs_on_other_data_or_of_other_length_have_sections_of_their_own(tmp_path):
    data = {"problem": "text", "data": "given"}
    lines = [record("sgd", rate, loss, **data) for rate, loss in ((0.1, 1.0), (0.2, 1.5))]
    lines += [record("sgd", 0.2, 0.3, problem="text")]
    lines += [record("sgd", 0.1, 2.0, limit=20, steps=20, **data)]
    lines += [record("adamw", 0.1, 2.0, limit=20, steps=20)]
    text = report(tmp_path, lines)
    for title, cells in {
        "text": "| 2 | 0.1 (end of grid) | 1 |",
        "text, default data": "| 1 | 0.2 | 0.3 |",
        "text, 20 steps": "| 1 | 0.1 | 2 |",
    }.items():
        assert cells in results_rows(text, title)["sgd"]
    assert "20 steps (cut)" in text.split("## digits-mlp\n")[1]  # the plain name where there is one alone


def test_of_several_records_of_a_run_the_last_counts(tmp_path):
    lines = [record("sgd", 0.1, loss) for loss in (0.5, 0.9, 0.7)] + [record("sgd", 0.2, 0.8)]
    assert "| 2 | 0.1 (end of grid) | 0.7 |" in results_rows(report(tmp_path, lines), "digits-mlp")["sgd"]
    store = compare_optimizers.Store(tmp_path / "runs.jsonl", None)
    run = compare_optimizers.Run("tuning", "digits-mlp", "sgd", 0.1, None, 0, "default", None)
    assert store.loss(run) == 0.7
    assert store.loss(run._replace(rate=0.3)) is None


def test_entries_of_mfac_with_several_revisions_are_named_and_those_of_peers_are_not(tmp_path):
    names = ("mfac", "sgd", "mfac, damping=1")
    studies = {"mfac, damping=1": "variants"}
    lines = [
        record(name, rate, 0.5, revision=revision, study=studies.get(name, "tuning"))
        for name in names
        for rate, revision in ((0.1, "0123456789abc"), (0.2, "fedcba9876543-dirty"))
    ]
    lines += [record("mfac", 0.1, 0.5, problem="text")]
    found = [line for line in report(tmp_path, lines).splitlines() if "several revisions" in line]
    ending = "01234567, fedcba98-dirty"
    assert found == [
        f"- runs of several revisions: mfac on digits-mlp, tuning: {ending}",
        f"- runs of several revisions: mfac, damping=1 on digits-mlp, variants: {ending}",
    ]


def test_a_spread_has_the_decimals_of_its_deviation_and_counts_divergences():
    assert report_comparison.spread([0.00135, 0.00151]) == "0.00143 ± 0.00011"
    assert report_comparison.spread([2.0, 2.0]) == "2 ± 0"
    assert report_comparison.spread([2e-6, 4e-6]) == "3e-06 ± 1.4e-06"
    assert report_comparison.spread([0.5, None, 0.6]) == "1 of 3 diverged"


def test_the_width_of_a_parabola_is_that_of_its_formula():
    # log(loss) = 8 (log10(rate) + 2)^2, on a fine grid: factor f is reached at +- sqrt(log(f) / 8).
    exponents = np.linspace(-3, -1, 401)
    scan = {float(10**x): float(np.exp(8 * (x + 2) ** 2)) for x in exponents}
    for factor in (1.1, 2.0):
        decades, is_open = comparison_results.width(scan, factor)
        assert decades == pytest.approx(2 * math.sqrt(math.log(factor) / 8), rel=1e-3)
        assert not is_open


def test_a_width_that_ends_with_the_grid_is_marked_and_a_divergence_ends_it():
    assert comparison_results.width({0.1: 2.0, 1.0: 1.0}, 1.5) == (
        pytest.approx(math.log(1.5) / math.log(2)),
        True,
    )
    assert comparison_results.width({0.1: 1.0, 1.0: 1.0, 10.0: math.inf}, 2.0) == (pytest.approx(1.0), True)
    assert comparison_results.width({0.1: math.inf, 1.0: 1.0, 10.0: math.inf}, 2.0) == (0.0, False)
    assert math.isnan(comparison_results.width({0.1: 2.0, 1.0: 3.0}, 1.5)[0])  # never as low


def test_the_rates_of_the_grid_at_the_default_damping_count_for_the_width():
    grid = [record("mfac", 1.0, 0.5, study="grid", damping=damping) for damping in (0.2, 1.0)]
    grid[1]["evaluations"][-1]["train_loss"] = 0.1
    tuning = [record("mfac", 0.1, 0.4), record("mfac", 0.1, 9.0, seed=1), record("sgd", 0.1, 0.3)]
    assert comparison_results.full_scans(tuning, grid) == {"mfac": {0.1: 0.4, 1.0: 0.5}}


def test_the_time_to_a_loss_is_interpolated_on_a_logarithmic_scale():
    run = record("sgd", 0.1, 0.023)  # a tenth of the loss every 50 steps
    for target, step in ((2.3, 0), (0.23, 50), (2.3 * 10**-1.5, 75)):
        assert comparison_results.first_at(run, target, "step") == pytest.approx(step)
        assert comparison_results.first_at(run, target, "seconds") == pytest.approx(step / 500)
    assert comparison_results.first_at(run, 0.01, "step") == math.inf
    assert comparison_results.first_at(record("sgd", 0.1, None), 0.01, "step") == math.inf


# ------------------------------------------------------------------------------------------------ scaling


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


# ------------------------------------------------------------------------------------------------ steps


def test_steps_are_checked_and_timed_beside_two_readings(tmp_path, capsys, monkeypatch):
    shapes = ((300,),), ((20, 5), (3,), ())
    cases = tuple(map(step_time.Case, ("one leaf", "three leaves"), (8, 8), shapes))
    monkeypatch.setattr(step_time, "CASES", cases)
    out = tmp_path / "steps.jsonl"
    step_time.main(["--rounds", "2", "--original", str(tmp_path), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "has no optim.py" in printed
    assert "| three leaves | 8 | 104 |" in printed
    for line, case in zip(read(out), cases, strict=True):
        assert line["parameters"] == case.parameters
        assert line["relative_errors"][step_time.OURS] < 1e-4
        assert set(line["seconds"]) == {step_time.OURS, "read", *step_time.PARTS}
        assert line["compilations"] == 1
        assert all(0 < s["min"] <= s["median"] <= s["max"] for s in line["seconds"].values())
    step_time.main(["--grid", "--gigabytes", "0"])
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
def test_training_steps_are_timed_and_speed_is_reported_in_tables_and_pictures(
    tmp_path, capsys, monkeypatch
):
    small = functools.partial(training_share.train_text.make_workload, 4, 2, 1, 8, 2, 8, seed=0)
    monkeypatch.setattr(training_share, "WORKLOADS", {"transformer": small})
    monkeypatch.setattr(training_share, "OTHERS", ("adamw", "lbfgs", "soap"))
    monkeypatch.setattr(training_share, "NUM_GRADS", (2,))
    monkeypatch.setattr(training_share.optimizers, "why_missing", {"soap": "not installed"}.get)
    training_share.main(["--rounds", "2", "--out", str(tmp_path / "training.jsonl")])
    assert "text without soap: not installed" in capsys.readouterr().out
    (line,) = read(tmp_path / "training.jsonl")
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
    assert "| one leaf | 8 | 300 | cholesky |" in printed
    assert len(re.findall("^(?:cholesky|inverse): .* s x m\\^3 .* residual", printed, re.MULTILINE)) == 2
    for name in ("steps", "scaling", "training"):
        assert (tmp_path / f"speed_{name}.png").read_bytes().startswith(b"\x89PNG")


# --------------------------------------------------------------------------------- the static algorithm


def test_the_static_algorithm_is_checked_and_timed_and_what_is_missing_is_named(tmp_path, capsys):
    out = tmp_path / "static.jsonl"
    options = ["--num-grads", "40", "--parameters", "300", "--block", "128", "--rounds", "1"]
    static_algorithm.main([*options, "--original", str(tmp_path), "--out", str(out)])
    printed = capsys.readouterr().out
    assert "has no prun.py" in printed
    (row,) = read(out)
    recursion = static_algorithm.RECURSION
    assert set(row["one_block"]) == {static_algorithm.OURS, recursion, f"{recursion}, 32 rows a buffer"}
    for method in (*row["one_block"].values(), *row["blocks"].values()):
        assert max(method["errors"].values()) < 1e-3
        assert set(method["seconds"]) == {"precompute", "diagonal", "product", "entry", "64 products"}
        assert all(0 < s["min"] <= s["median"] <= s["max"] for s in method["seconds"].values())
    assert {"revision", "versions", "machine", "cores"} <= set(row)


def test_what_is_not_the_inverse_is_not_timed(monkeypatch):
    wrong = static_algorithm.in_jax(1e-5, 40)._replace(diagonal=lambda groups: jax.numpy.ones(300))
    monkeypatch.setattr(static_algorithm, "in_jax", lambda damping, length: wrong)
    with pytest.raises(ValueError, match="recursion in JAX is not the inverse"):
        static_algorithm.main(["--num-grads", "40", "--parameters", "300"])


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
    assert printed.count("| magnitude | 55.0 ± 5.0 (2) | 55.0 ± 5.0 (2) | 55.0 ± 5.0 (2) |") == 1
    assert printed.count("| mfac_jax | 25.0 ± 0.0 (2) |") == 1
    assert "published" not in printed
    with Image.open(picture) as image:
        assert image.size[0] > 500


def test_published_pruning_moves_kernels_alone():
    kernel, bias = np.ones((3, 3, 3, 2), np.float32), np.ones(2, np.float32)
    params: Any = {"Conv_0": {"kernel": kernel}, "Dense_0": {"bias": bias}}
    masks = {"Conv_0": {"kernel": kernel > 0}, "Dense_0": {"bias": None}}
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda w: rng.standard_normal((4, *w.shape)).astype(np.float32), params)
    grads = compare_pruning.prune_resnet20.of_kernels(grads, masks)
    pruned: Any = mfac_jax.pruning.prune(params, grads, 0.5, masks=masks, gradient_term=1.0)[0]
    np.testing.assert_array_equal(pruned["Dense_0"]["bias"], bias)
    moved = np.asarray(pruned["Conv_0"]["kernel"])
    assert not np.any(moved[moved != 0] == 1)


# ----------------------------------------------------------------------------------------------- CG-FAC


def test_the_cost_of_a_layer_is_measured_and_a_wrong_solution_refused(monkeypatch, tmp_path, capsys):
    cases = (kronecker_cost.Case("wide", (24, 20), (8,)), kronecker_cost.Case("narrow", (6, 5), (4, 9)))
    monkeypatch.setattr(kronecker_cost, "CASES", cases)
    out = tmp_path / "kronecker.jsonl"
    kronecker_cost.main(["--rounds", "1", "--out", str(out)])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
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
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["optimizer"] for line in lines] == list(steps_to_accuracy.RATES)
    assert all(0 < line["steps"] < 200 and line["seconds"] < line["all_seconds"] for line in lines)
    assert "| mlp | cgfac | 0.1 | 1 of 1 |" in capsys.readouterr().out
