"""The examples that prune, run as a user runs them, on settings that take seconds."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mfac_jax
from examples import (
    digits,
    prune_digits,
    prune_resnet20,
    pruning,
    resnet20,
    resnet20_data,
    resnet20_pruning,
)
from examples.common.data import DataError
from tests.examples.scripts import REAL_DATA, error_of, is_png, needs_real_data


def write_weights(path: Path, **changes) -> None:
    """Random weights with the names and shapes of PyTorch."""
    random = np.random.default_rng(0)
    arrays = {}
    channels, before = {"conv1": 16, "layer1": 16, "layer2": 32, "layer3": 64}, 3
    for conv, norm in resnet20_data._layers():
        width = channels[conv.split(".")[0]]
        size = 1 if "downsample" in conv else 3
        inputs = width // 2 if size == 1 else before
        shape = (width, inputs, size, size)
        arrays[f"{conv}.weight"] = random.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            arrays[f"{norm}.{name}"] = np.full(width, value)
        before = width
    arrays |= {"fc.weight": random.normal(0, 0.1, (10, 64)), "fc.bias": np.zeros(10)}
    np.savez(path, **{name: array.astype(np.float32) for name, array in (arrays | changes).items()})


def write_cifar_10(folder: Path, training: int = 128, test: int = 200) -> None:
    random = np.random.default_rng(0)
    arrays = {}
    for part, number in (("train", training), ("test", test)):
        arrays[f"{part}_images"] = random.integers(0, 256, (number, 32, 32, 3), dtype=np.uint8)
        arrays[f"{part}_labels"] = random.integers(0, 10, number, dtype=np.uint8)
    np.savez(folder / "images.npz", allow_pickle=False, **arrays)


@pytest.fixture
def data_dir(tmp_path) -> Path:
    write_cifar_10(tmp_path)
    write_weights(tmp_path / prune_resnet20.WEIGHTS)
    return tmp_path


def figures(printed: str, name: str) -> list[list[float]]:
    """The numbers of each row of that name in the tables."""
    rows = re.findall(rf"^ +{re.escape(name)} ((?: +[\d.]+)+) *$", printed, re.MULTILINE)
    return [[float(cell) for cell in row.split()] for row in rows]


# ---------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_the_digits_are_pruned_in_five_ways_and_m_fac_beats_magnitude(tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    prune_digits.main(["--sparsity", "0.5", "0.9", "--num-grads", "128", "--out", str(out)])
    printed = capsys.readouterr().out
    ways = ["magnitude", "M-FAC, one step", "M-FAC", "magnitude, fine-tuned", "M-FAC, fine-tuned"]
    accuracies = {}
    for name in ways:
        [accuracies[name]] = figures(printed, name)
    assert accuracies["M-FAC"][1] > accuracies["magnitude"][1] + 0.1
    assert accuracies["M-FAC, fine-tuned"][1] > accuracies["magnitude, fine-tuned"][1]
    assert accuracies["magnitude, fine-tuned"][1] > accuracies["magnitude"][1]
    assert re.search(r"^total +9,472 +947 +0.9000$", printed, re.MULTILINE)
    assert is_png(out / "accuracy.png")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param("--mode recomputed --sparsity 0.9", marks=pytest.mark.slow),
        pytest.param(
            "--mode one-shot --sparsity 0.5 --pattern 2:4 --methods magnitude published M-FAC",
            marks=pytest.mark.slow,
        ),
        pytest.param("--mode gradual --sparsity 0.9 --epochs 2 --batch-size 64", marks=pytest.mark.slow),
    ],
)
def test_the_resnet_20_is_pruned_in_each_mode(options, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(resnet20_pruning, "PUBLISHED_GRADS", 2)
    options = options.split()
    prune_resnet20.main([*options, "--num-grads", "4", "--data-dir", str(data_dir), "--out", str(data_dir)])
    printed = capsys.readouterr().out
    kinds = 1 if "gradual" in options else 2
    for name in ("magnitude", "M-FAC", *({"published"} & set(options))):
        assert len(figures(printed, name)) == kinds
    if "2:4" in options:
        assert re.search(r"^Conv_1/kernel .* 0.5000$", printed, re.MULTILINE)
        assert "267,904 weights in 19 kernels take part" in printed
        assert "Conv_0/kernel" not in printed
    else:
        assert "268,336 weights in 20 kernels take part" in printed
        assert re.search(r"^total +268,336 +26,834 +0.9000$", printed, re.MULTILINE)
    assert is_png(data_dir / f"{options[1]}.png")


@needs_real_data
def test_the_resnet_20_has_the_accuracy_and_loss_of_pytorch_on_the_real_data():
    with np.load(REAL_DATA / "cifar10_small.npz") as arrays:
        images, labels = jnp.asarray(arrays["test_images"]), jnp.asarray(arrays["test_labels"])
    network = resnet20.read(REAL_DATA / prune_resnet20.WEIGHTS)
    accuracy, loss = resnet20.accuracy_and_loss(network, images, labels.astype(jnp.int32))
    assert float(accuracy) == pytest.approx(0.8235, abs=1e-3)
    assert float(loss) == pytest.approx(0.9129, abs=1e-3)


# ----------------------------------------------------------------------------------------- procedures


def test_pruned_weights_stay_so_while_others_train_and_every_sparsity_is_met():
    problem = digits.make_workload(epochs=1, seed=0)
    masks = mfac_jax.pruning.kernel_masks(problem.params)
    tx = mfac_jax.pruning.keep_pruned(optax.sgd(0.1, momentum=0.9), masks)
    asked, seen = {0: 0.5, 11: 0.75}, []

    def prune(state, masks, sparsity):
        return pruning.by_magnitude(state.params, sparsity, masks=masks)

    def callback(state):
        kernels = [layer["kernel"] for layer in state.params.values()]
        seen.append(sum(int(jnp.sum(kernel == 0)) for kernel in kernels))

    state, masks = pruning.train_and_prune(problem, tx, masks, asked, prune, 0, callback)
    entries = sum(mask.size for mask in jax.tree.leaves(masks))
    assert seen == [entries // 2] * 11 + [entries * 3 // 4] * 11
    assert mfac_jax.pruning.sparsity(masks) == 0.75
    kept = mfac_jax.pruning.apply_masks(state.params, masks)
    jax.tree.map(np.testing.assert_array_equal, kept, state.params)


@pytest.mark.slow
def test_gradients_of_the_resnet_20_are_those_of_its_loss_with_the_statistics_it_has(data_dir):
    network = resnet20.read(data_dir / prune_resnet20.WEIGHTS)
    network = network._replace(stats=jax.tree.map(lambda s: s + 0.5, network.stats))
    with np.load(data_dir / "images.npz") as arrays:
        images, labels = jnp.asarray(arrays["train_images"]), jnp.asarray(arrays["train_labels"])
    labels = labels.astype(jnp.int32)
    training = resnet20_pruning.Images(images, labels, np.random.default_rng(3))
    again = training._replace(random=np.random.default_rng(3))
    found = resnet20_pruning.gradients(network, training, 2, per_example=True)
    images, labels = again.draw(2)
    expected = jax.grad(resnet20.loss, 1)(network.stats, network.params, (images, labels))
    for rows, mean in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert rows.shape == (2, *mean.shape)
        np.testing.assert_allclose(rows.mean(0), mean, rtol=1e-3, atol=1e-4 * float(jnp.abs(mean).max()))


# ----------------------------------------------------------------------------------- wrong arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data-dir {0}/none", "cannot read a ResNet-20 from {0}/none/resnet20_cifar10"),
        ("--data-dir {0} --weights {0}/images.npz", "from {0}/images.npz: 'conv1.weight"),
        ("--data-dir {0} --samples 100", "128 training images and 200 test images are needed"),
    ],
)
def test_data_that_do_not_fit_are_refused_with_the_cure(arguments, message, data_dir, capsys):
    given = arguments.format(data_dir).split()
    assert message.format(data_dir) in error_of("prune_resnet20", capsys, *given, "--out", data_dir)


def test_weights_of_another_network_are_refused(tmp_path):
    write_weights(tmp_path / "weights.npz", **{"fc.weight": np.zeros((100, 64))})
    with pytest.raises(DataError, match="do not have the shapes of a ResNet-20 for 10 classes"):
        resnet20.read(tmp_path / "weights.npz")
