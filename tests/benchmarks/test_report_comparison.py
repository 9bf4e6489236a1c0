"""The report on the comparison of optimizers, from made-up results."""

import math

import numpy as np
import pytest
from PIL import Image

from benchmarks import comparison_results
from tests.benchmarks.made_up_runs import made_up, record, report, results_rows


def test_the_report_has_the_figures_of_the_runs(tmp_path):
    lines = [*made_up(), {"missing": "kron", "problem": "digits-mlp", "reason": "no module"}]
    printed = report(tmp_path, lines)
    row = results_rows(printed, "digits-mlp")
    assert "| 3 | 0.05 (end of grid) | 0.060 ± 0.014" in row["mfac"]
    assert "| 3 | 0.02 | 0.215 ± 0.021" in row["sgd"]
    assert "| 1 | diverged |" in row["muon"]
    assert "steps to 0.23" in printed  # the worst seed of SGD
    # log(2.3 / 0.23) / log(2.3 / 0.2) of the way for seed 1, the whole way for seed 2
    assert row["sgd"].endswith("| 97.1 | 0.194 |")
    assert "kron on digits-mlp: no module" in printed
    assert "processes side by side" in printed
    for name in ("curves", "sensitivity", "grid"):
        picture = tmp_path / "docs" / f"comparison_{name}.png"
        assert picture.stat().st_size < 150_000
        with Image.open(picture) as image:
            assert image.size[0] > 300


def test_the_summary_comes_first_with_the_best_in_bold_and_notes_from_the_runs(tmp_path):
    noisy = [
        record(name, 0.01, loss, problem="noisy-digits", steps=1436, seed=seed)
        for name in ("sgd", "mfac-published")
        for seed, loss in ((0, 0.7), (1, 0.5))
    ]
    untuned = [record("mfac-published", 0.001, 0.3), record("soap", 0.1, 0.2)]
    lines = [*made_up(), *noisy, untuned[0], untuned[0] | {"seed": 1}, untuned[1]]
    text = report(tmp_path, lines)
    summary = text.split("## How it was measured")[0]
    assert "| M-FAC, tuned | **0.060 ± 0.014** | - |" in summary
    assert "| SGD, Nesterov momentum | 0.215 ± 0.021 | **0.5** |" in summary
    assert "| Muon | diverged | - |" in summary
    assert "over 1 to 2 seeds" in summary
    assert "| SOAP | other seeds are missing | - |" in summary
    assert "seed 0, which is not among the seeds reported" in summary
    assert "not tuned: Muon; SOAP; M-FAC as published" in summary
    assert "512 gradients, does not fill in the 100 steps of digits-mlp." in summary
    assert "embeddings and output layer too" in summary
    assert "noisy-digits: the training loss is that of partly random labels" in summary
    section = text.split("## noisy-digits\n")[1].split("## ")[0]
    assert "does not fill" not in section
    assert "Muon" not in section
    assert "validation accuracy is what counts" in section
    assert "on all rates tried with seed 0" in text


def test_runs_on_other_data_or_of_other_length_have_sections_of_their_own(tmp_path):
    data = {"problem": "text", "data": "given"}
    lines = [record("sgd", rate, loss, **data) for rate, loss in ((0.1, 1.0), (0.2, 1.5))]
    lines += [record("sgd", 0.2, 0.3, problem="text")]
    lines += [record("sgd", 0.1, 2.0, limit=20, steps=20, **data)]
    lines += [record("adamw", 0.1, 2.0, limit=20, steps=20)]
    lines += [line | {"seed": 1} for line in lines]
    text = report(tmp_path, lines)
    for title, cells in {
        "text": "| 2 | 0.1 (end of grid) | 1 |",
        "text, default data": "| 1 | 0.2 | 0.3 |",
        "text, 20 steps": "| 1 | 0.1 | 2 |",
    }.items():
        assert cells in results_rows(text, title)["sgd"]
    assert "20 steps (cut)" in text.split("## digits-mlp\n")[1]  # the plain name where there is one alone


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
    grid = [record("mfac", 1.0, 0.5, study="grid", damping=damping) for damping in (1.0, 0.2)]
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


def test_it_says_where_the_untuned_default_is_no_worse_than_the_tuned_rivals(tmp_path):
    def runs(problem, losses):
        return [
            record(name, 0.01, loss, problem=problem, seed=seed)
            for name, loss in losses.items()
            for seed in (0, 1)
        ]

    lines = [
        *runs("text", {"mfac-default": 1.0, "muon": 1.2, "soap": 1.1, "nadamw": 1.5}),
        *runs("cifar10", {"mfac-default": 1.01, "muon": 1.0, "soap": 1.1, "nadamw": 1.5}),
        *runs("digits-mlp", {"mfac-default": 5e-8, "muon": 1e-9, "soap": 1.0, "nadamw": 1.0}),
        *runs("digits-cnn", {"mfac-default": 0.3, "muon": 0.2, "soap": None, "nadamw": 1.0}),
        *runs("poisson", {"mfac-default": 0.3, "muon": 0.2}),
    ]
    text = report(tmp_path, lines)
    assert "train loss no worse on 2 of 4 problems, within 2 % on 1 more" in text
    assert "| text | 1 | 1.1 (SOAP) | 0.909 | 1 | 1.1 (SOAP) | 0.909 |" in text
    assert "| digits-cnn | 0.3 | 0.2 (Muon) | 1.5 |" in text
    assert "| poisson | 0.3" not in text
    # A run takes 0.2 s, and falls from 2.3 on a line in log(loss): log(2.3 / 1.5) / log(2.3) of the way.
    assert "| text | 0.2 | 0.103 | 0.2 | 0.156 |" in text
    assert "| cifar10 | 0.2 | 0.104 | 0.2 | never |" in text
