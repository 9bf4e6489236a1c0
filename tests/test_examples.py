"""The example scripts, run as a user runs them, on settings that take seconds."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).parents[1] / "examples" / "train_digits.py"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
TINY = (
    "--seeds 1 --epochs 2 --hidden 8 --num-grads 7 --mfac-rates 0.01 0.02 --sgd-rates 0.4 --adam-rates 0.08"
)


def run_script(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error", SCRIPT, *arguments]
    # A terminal of this width keeps each option's help in one piece, and no GPU is looked for.
    environment = os.environ | {"COLUMNS": "200", "JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(SCRIPT))["main"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("digits") / "new" / "folder"
    return out, run_script(*TINY.split(), "--out", out)


def test_the_digits_example_prints_one_row_of_figures_for_each_optimizer(tiny_run):
    _, process = tiny_run
    assert process.returncode == 0, process.stderr
    table = process.stdout.split("best rate ")[-1]
    for name in ("M-FAC", "SGD", "Adam"):
        assert re.search(rf"^{name} +[\d.]+ +\d+\.\d+ ± \d\.\d+ +\d+\.\d+ ± \d\.\d+", table, re.MULTILINE)


def test_the_digits_example_says_when_the_best_rate_is_at_an_end_of_its_grid(tiny_run):
    _, process = tiny_run
    assert process.stdout.count("is at an end of its grid") == 3


def test_the_digits_example_writes_two_pictures(tiny_run):
    out, _ = tiny_run
    for name in ("digits_curves.png", "digits_fisher.png"):
        assert (out / name).read_bytes().startswith(PNG_SIGNATURE)


def test_the_digits_example_writes_its_settings_and_figures_as_json(tiny_run):
    out, _ = tiny_run
    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["num_grads"] == 7
    assert set(results["versions"]) == {"mfac_jax", "jax", "flax", "optax"}
    assert set(results["optimizers"]) == {"M-FAC", "SGD", "Adam"}
    figures = results["optimizers"]["M-FAC"]
    losses = dict(zip(figures["rates"], figures["loss_of_rate"], strict=True))
    assert list(losses) == [0.01, 0.02]
    assert figures["best_rate"] == min(losses, key=lambda rate: losses[rate])
    assert figures["train_loss"]["mean"] == pytest.approx(min(losses.values()))
    assert 0 <= figures["test_accuracy"]["mean"] <= 1


def test_the_digits_example_trains_on_the_users_data_as_on_the_bundled_copy(main, tiny_run, tmp_path):
    out, _ = tiny_run
    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "digits.npz", x=x.reshape(-1, 8, 8), y=y)
    main([*TINY.split(), "--optimizers", "SGD", "--data-dir", str(tmp_path), "--out", str(tmp_path)])
    mine, bundled = (
        json.loads((folder / "results.json").read_text())["optimizers"]["SGD"] for folder in (tmp_path, out)
    )
    assert mine["loss_of_rate"] == pytest.approx(bundled["loss_of_rate"])
    assert not (tmp_path / "digits_fisher.png").exists()  # no M-FAC, no window


def test_help_lists_every_option_with_an_explanation():
    process = run_script("--help")
    assert process.returncode == 0
    for option in (
        *(
            "optimizers",
            "seeds",
            "epochs",
            "batch-size",
            "evaluate-every",
            "hidden",
            "num-grads",
            "damping",
        ),
        *("momentum", "mfac-rates", "sgd-rates", "adam-rates", "data-dir", "out"),
    ):
        assert re.search(
            rf"^  --{option}\b.*\S  +\S|^  --{option}\b.*\n {{20,}}\S", process.stdout, re.MULTILINE
        )


def test_a_folder_without_the_data_is_refused_with_the_file_that_is_missing(tmp_path):
    process = run_script("--data-dir", tmp_path)
    assert process.returncode == 2
    assert f"No such file or directory: '{tmp_path / 'digits.npz'}'" in process.stderr
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((20, 64))}, "y is not a file"),
        ({"x": np.ones((20, 63)), "y": np.zeros(20, int)}, r"x must be \(n, 64\) or \(n, 8, 8\)"),
        ({"x": np.full((20, 64), np.nan), "y": np.zeros(20, int)}, "x must be finite"),
        ({"x": np.ones((20, 64)), "y": np.full(20, 10)}, "labels from 0 to 9"),
    ],
)
def test_data_that_is_not_digits_is_refused_by_its_fault(main, tmp_path, capsys, arrays, message):
    np.savez(tmp_path / "digits.npz", **arrays)
    with pytest.raises(SystemExit, match="2"):
        main(["--data-dir", str(tmp_path)])
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--num-grads", "0"),
        ("--damping", "nan"),
        ("--momentum", "1"),
        ("--batch-size", "2000"),
        ("--seeds", "x"),
    ],
)
def test_a_setting_out_of_range_is_refused_with_its_name(main, capsys, option, value):
    with pytest.raises(SystemExit, match="2"):
        main([option, value])
    assert option in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_mfac_reaches_97_percent_and_the_lowest_training_loss_on_the_default_settings(tmp_path):
    process = run_script("--out", tmp_path)
    assert process.returncode == 0, process.stderr
    figures = json.loads((tmp_path / "results.json").read_text())["optimizers"]
    losses = {name: figure["train_loss"]["mean"] for name, figure in figures.items()}
    assert figures["M-FAC"]["test_accuracy"]["mean"] >= 0.97
    assert losses["M-FAC"] <= min(losses["SGD"], losses["Adam"])
    assert not any(figure["best_rate_is_at_an_end"] for figure in figures.values())
