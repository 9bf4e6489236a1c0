"""The example scripts, run as a user runs them, on settings that take seconds."""

import functools
import json
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from examples import cifar10, comparison, digits, text, train_digits
from examples.common import training
from examples.common.optimizers import OPTIMIZERS, NeedsFactors, make_optimizer
from examples.common.run_folders import CheckpointError
from tests.examples.scripts import ENVIRONMENT, REAL_DATA, SCRIPTS, error_of, is_png, needs_real_data

# Of the shapes of `tiny_workload`, so that most programs are compiled once.
TINY = {
    "digits": "--seeds 2 --epochs 1 --evaluations 3 --optimizers mfac sgd adamw nadamw muon",
    "cifar10": "--width 2 --blocks 1 --samples 48 --batch-size 16 --epochs 1 --evaluations 2"
    " --optimizers sgd",
    "text": "--layers 1 --width 8 --heads 2 --context 8 --batch-size 2 --steps 8 --evaluations 2"
    " --optimizers mfac",
}


# ---------------------------------------------------------------------------------------- whole runs


@pytest.mark.parametrize(
    "name", ["digits", *(pytest.param(name, marks=pytest.mark.slow) for name in ("cifar10", "text"))]
)
def test_an_example_prints_a_row_for_each_optimizer_and_writes_its_report(name, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    options = TINY[name].split()
    optimizers = options[options.index("--optimizers") + 1 :]
    SCRIPTS[f"train_{name}"].main([*options, "--rates", f"{optimizers[0]}=0.01", "--out", str(out)])
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{name}: {'2 runs' if name == 'digits' else 'one run'} of each of {', '.join(optimizers)}; "
    )
    for optimizer in optimizers:
        assert re.search(rf"^ +{optimizer} +[\d.]+ +\d[\d.e-]* ± \d[\d.e-]* ", printed, re.MULTILINE)
    assert is_png(out / "curves.png")
    assert (out / "fisher.png").exists() == (name == "digits")

    results = json.loads((out / "results.json").read_text())
    assert results["settings"]["rates"][optimizers[0]] == 0.01
    assert {"mfac_jax", "jax", "flax", "optax", "python"} <= set(results["versions"])
    assert set(results["machine"]) == {"platform", "processor", "cpus"}
    assert "revision" in results
    assert list(results["optimizers"]) == optimizers
    for figures in results["optimizers"].values():
        last = [evaluations[-1] for evaluations in figures["evaluations"]]
        assert len(last) == (2 if name == "digits" else 1)
        for metric in ("train_loss", "valid_loss", "seconds"):
            assert figures["final"][metric]["mean"] == pytest.approx(np.mean([e[metric] for e in last]))
        assert ("valid_accuracy" in figures["final"]) == (name != "text")


def test_a_run_that_diverges_ends_early_and_its_results_are_valid_json(tmp_path, capsys):
    options = "--epochs 1 --seeds 1 --optimizers sgd adamw --rates sgd=1e30 --evaluations 4"
    train_digits.main([*options.split(), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert re.search(r"^ +sgd +1e\+30 +nan.* 6 *$", printed, re.MULTILINE)
    assert re.search(r"^ +adamw .* 22 *$", printed, re.MULTILINE)
    assert "\nsgd: a run diverged; pass --rates NAME=RATE with a lower rate." in printed
    optimizers = json.loads((tmp_path / "results.json").read_text())["optimizers"]
    assert optimizers["sgd"]["final"]["train_loss"]["mean"] is None
    assert [len(optimizers[name]["evaluations"][0]) for name in ("sgd", "adamw")] == [1, 4]


@pytest.mark.slow
def test_mfac_reaches_97_percent_and_the_lowest_training_loss_on_the_default_settings(tmp_path):
    train_digits.main(["--out", str(tmp_path)])
    optimizers = json.loads((tmp_path / "results.json").read_text())["optimizers"]
    losses = {name: figures["final"]["train_loss"]["mean"] for name, figures in optimizers.items()}
    assert optimizers["mfac"]["final"]["valid_accuracy"]["mean"] >= 0.97
    assert losses["mfac"] == min(losses.values())


@pytest.mark.slow
@needs_real_data
def test_the_examples_train_on_the_real_data(tmp_path, capsys):
    for name in ("cifar10", "text"):
        SCRIPTS[f"train_{name}"].main(
            [*TINY[name].split(), "--data-dir", str(REAL_DATA), "--out", str(tmp_path)]
        )
    printed = capsys.readouterr().out
    assert f"{REAL_DATA / 'cifar10_small.npz'}: 48 training and 2,000 validation images" in printed
    assert f"{REAL_DATA / 'tinyshakespeare.txt'}: 1,115,394 characters, 65 different ones" in printed


# --------------------------------------------------------------------------------------- checkpoints


class InterruptionError(Exception):
    """Raised between two evaluations, in place of the end of the process."""


def tiny_workload(name: str):
    if name in ("mlp", "cnn"):
        return digits.make_workload(name, epochs=1, seed=1)
    if name == "text":
        return text.make_workload(steps=8, batch_size=2, layers=1, width=8, heads=2, context=8, seed=1)
    return cifar10.make_workload(epochs=2, batch_size=16, samples=48, width=2, blocks=1, seed=1)


@pytest.mark.parametrize(
    ("name", "optimizer"),
    [
        ("mlp", "mfac"),
        pytest.param("mlp", "nadamw", marks=pytest.mark.slow),
        pytest.param("cnn", "sgd", marks=pytest.mark.slow),
        pytest.param("text", "muon", marks=pytest.mark.slow),
        pytest.param("cifar10", "mfac", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(name, optimizer, tmp_path):
    problem = tiny_workload(name)
    tx = make_optimizer(optimizer, 0.01, len(problem.batches))

    def train(interrupt_at=None, **options):
        states = {}

        def keep(state, evaluation):
            if evaluation["step"] == interrupt_at:
                raise InterruptionError
            states[evaluation["step"]] = jax.tree.map(np.array, state)
            return comparison.diagnose(state) if optimizer == "mfac" else None

        return training.train(problem, tx, 1, evaluate_every=2, callback=keep, **options), states

    history, states = train()
    with pytest.raises(InterruptionError):
        train(interrupt_at=6, checkpoint_dir=tmp_path)
    resumed_history, resumed_states = train(checkpoint_dir=tmp_path)
    again, _ = train(checkpoint_dir=tmp_path)  # finished: nothing is left to do
    [data] = (tmp_path / str(len(problem.batches)) / "record").glob("metadata")
    data.write_text("{")
    repaired, repaired_states = train(checkpoint_dir=tmp_path)

    assert min(resumed_states) == 4
    assert resumed_history.losses == history.losses
    assert resumed_history.records == history.records
    assert len(history.records) == len(history.evaluations)
    assert len(history.losses) == len(problem.batches)
    last = max(states)
    jax.tree.map(np.testing.assert_array_equal, resumed_states[last], states[last])
    assert again == resumed_history
    assert len(repaired_states) == 2  # that of the checkpoint before, and what follows
    jax.tree.map(np.testing.assert_array_equal, repaired_states[last], states[last])
    assert repaired.losses == history.losses
    for mine, theirs in zip(resumed_history.evaluations, history.evaluations, strict=True):
        assert mine | {"seconds": 0} == theirs | {"seconds": 0}


@pytest.mark.slow
def test_a_killed_run_leaves_checkpoints_that_resume(tmp_path, monkeypatch):
    options = ["--epochs", "1", "--seeds", "1", "--optimizers", "mfac", "--evaluations", "11"]
    checkpoints = ["--checkpoint-dir", str(tmp_path / "checkpoints")]
    folder = tmp_path / "checkpoints" / "mfac-seed0"
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "examples.train_digits", *options, *checkpoints],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    while process.poll() is None and not (folder / "6").exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert b"Warning" not in process.communicate()[1]
    assert process.returncode == -signal.SIGKILL

    drawn = []

    def plot_fisher(records, gram, path):
        drawn.append((records, gram))
        path.touch()

    monkeypatch.setattr(digits, "plot_fisher", plot_fisher)
    train_digits.main([*options, *checkpoints, "--resume", "--out", str(tmp_path / "resumed")])
    train_digits.main([*options, *checkpoints, "--resume", "--out", str(tmp_path / "finished")])
    train_digits.main([*options, "--out", str(tmp_path / "whole")])
    for records, gram in drawn:
        assert [record["step"] for record in records] == list(range(2, 23, 2))
        np.testing.assert_allclose(gram, drawn[-1][1], rtol=1e-3, atol=1e-4)
    np.testing.assert_equal(drawn[0], drawn[1])
    resumed, whole = (
        json.loads((tmp_path / name / "results.json").read_text())["optimizers"]["mfac"]["evaluations"][0]
        for name in ("resumed", "whole")
    )
    assert [e["step"] for e in resumed] == [e["step"] for e in whole] == list(range(2, 23, 2))
    assert resumed[-1]["train_loss"] == pytest.approx(whole[-1]["train_loss"], rel=1e-3)
    assert len([path for path in folder.iterdir() if path.name.isdigit()]) == 2


def test_checkpoints_are_continued_only_on_demand_and_only_with_their_settings(tmp_path, capsys):
    options = ["--epochs", "1", "--seeds", "1", "--optimizers", "sgd", "--evaluations", "1"]
    options += ["--checkpoint-dir", tmp_path / "checkpoints", "--out", tmp_path]
    train_digits.main([str(option) for option in options])
    message = error_of("train_digits", capsys, *options)
    assert "pass --resume to continue them, or pass another --checkpoint-dir" in message

    options += ["--resume"]
    train_digits.main([str(option) for option in [*options, "--seeds", "2"]])  # more seeds may be added
    message = error_of("train_digits", capsys, *options, "--epochs", "2", "--rates", "sgd=0.1")
    assert "epochs was 1, is 2, rate was 0.2, is 0.1. Pass the same settings, or pass another" in message

    settings = tmp_path / "checkpoints" / "sgd-seed0" / "settings.json"
    settings.write_text("{")
    assert f"cannot read {settings}" in error_of("train_digits", capsys, *options)


def test_checkpoints_of_another_state_are_refused_with_their_folder(tmp_path):
    problem = tiny_workload("mlp")
    sgd, adamw = (make_optimizer(name, 0.01, len(problem.batches)) for name in ("sgd", "adamw"))
    training.train(problem, sgd, 0, evaluate_every=99, checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match=f"cannot restore {tmp_path}"):
        training.train(problem, adamw, 0, evaluate_every=99, checkpoint_dir=tmp_path)


# ------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("name", ["digits", "text", pytest.param("cifar10", marks=pytest.mark.slow)])
def test_workloads_of_all_seeds_share_their_functions_and_shapes(name):
    make = {
        "digits": lambda seed: digits.make_workload(seed=seed),
        "text": lambda seed: text.make_workload(layers=1, width=8, heads=2, context=8, seed=seed),
        "cifar10": lambda seed: cifar10.make_workload(samples=200, width=2, blocks=1, seed=seed),
    }[name]
    first, second = make(0), make(1)
    assert first.loss is second.loss
    assert first.evaluate is second.evaluate
    assert not np.array_equal(first.batches, second.batches)
    for attribute in ("params", "model_state", "data", "batches"):
        shapes = [jax.tree.map(jnp.shape, getattr(w, attribute)) for w in (first, second)]
        assert shapes[0] == shapes[1]
    again = make(0)
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    np.testing.assert_array_equal(again.batches, first.batches)


def test_the_optimizer_gets_the_loss_of_its_step_as_value():
    problem = tiny_workload("mlp")
    init, update = optax.sgd(0.1)

    def keep_value(updates, state, params=None, **extra_args):
        updates, inner = update(updates, state[0], params)
        return updates, (inner, extra_args["value"])

    values = []
    history = training.train(
        problem,
        optax.GradientTransformationExtraArgs(lambda params: (init(params), jnp.zeros(())), keep_value),
        0,
        evaluate_every=1,
        callback=lambda state, _: values.append(float(state.opt_state[1])),
    )
    assert values == history.losses
    assert history.losses[-1] < history.losses[0]


@pytest.mark.slow
def test_every_optimizer_warms_up_and_ends_at_zero():
    params = jnp.ones(())
    for name in OPTIMIZERS:
        tx = make_optimizer(name, 0.1, 20)
        extra = {"curvature": lambda v: v} if isinstance(tx, NeedsFactors) else {}
        update = jax.jit(functools.partial(tx.update, **extra))
        state, sizes = tx.init(params), []
        for _ in range(21):
            updates, state = update(jnp.ones(()), state, params)
            sizes.append(abs(float(updates)))
        assert sizes[0] == 0
        assert 0 < sizes[1] < sizes[2]
        assert sizes[20] == pytest.approx(0, abs=1e-6)
