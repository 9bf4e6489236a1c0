"""Small Flax networks for scikit-learn's handwritten digits, and a picture of their Fisher matrix."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from sklearn.model_selection import train_test_split

import mfac_jax
from examples import comparison
from examples.common.data import DataError, epoch_batches
from examples.common.files import replacing
from examples.common.workload import Workload
from examples.digits_data import load
from examples.train_digits import Options


class MLP(nn.Module):
    """One hidden layer; ten classes."""

    hidden: int = 128

    @nn.compact
    def __call__(self, x):  # noqa: D102
        return nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x)))


class CNN(nn.Module):
    """Two convolutions, one pooling; ten classes."""

    @nn.compact
    def __call__(self, x):  # noqa: D102
        x = x.reshape(-1, 8, 8, 1)
        for features in (16, 32):
            x = nn.relu(nn.Conv(features, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


MODELS = {"mlp": MLP(), "cnn": CNN()}


@functools.cache
def loss_and_evaluate(model: nn.Module):
    """Make the two functions of the workload; equal arguments give the same objects."""

    def cross_entropy(params, x, y):
        logits: Any = model.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), logits

    def loss(params, model_state, data, indices, key):
        del key  # nothing is random
        return cross_entropy(params, data["x"][indices], data["y"][indices])[0], model_state

    def evaluate(params, model_state, data):
        del model_state
        valid_loss, logits = cross_entropy(params, data["x_valid"], data["y_valid"])
        return {
            "train_loss": cross_entropy(params, data["x"], data["y"])[0],
            "valid_loss": valid_loss,
            "valid_accuracy": jnp.mean(logits.argmax(axis=-1) == data["y_valid"]),
        }

    return loss, evaluate


def make_workload(
    model: str = Options.model,
    epochs: int = Options.epochs,
    batch_size: int = Options.batch_size,
    data_dir: Path | None = Options.data_dir,
    *,
    seed: int,
) -> Workload:
    """Make the workload; the seed sets the split into training and validation data, parameters, batches."""
    x, y = load(data_dir)
    try:  # a fifth is for validation, with its share of every digit
        x, x_valid, y, y_valid = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    except ValueError as error:
        raise DataError(f"the digits cannot be split into training and validation data: {error}") from error
    loss, evaluate = loss_and_evaluate(MODELS[model])
    data = {"x": x, "y": y, "x_valid": x_valid, "y_valid": y_valid}
    return Workload(
        name=f"digits-{model}",
        source=f"{data_dir or 'scikit-learn'}: {len(x):,} training and {len(x_valid):,} validation images",
        params=MODELS[model].init(jax.random.key(seed), x[:1])["params"],
        model_state={},
        data=jax.tree.map(jnp.asarray, data),
        batches=epoch_batches(len(x), batch_size, epochs, seed),
        loss=loss,
        evaluate=evaluate,
    )


def gram_by_age(state: mfac_jax.ScaleByMFACState) -> np.ndarray:
    """Order the inner products of the gradients in M-FAC's window, oldest first."""
    seen = min(int(state.grads_seen), state.gram.shape[-1])
    return np.roll(np.asarray(state.gram[0]), -int(state.next_row), axis=(0, 1))[-seen:, -seen:]


def plot_fisher(records: Sequence[dict[str, Any]], last: np.ndarray, path: Path) -> None:
    """Draw eigenvalues of the window's Fisher matrix, and cosines between its last gradients.

    Args:
      records: diagnostics of the run.
      last: `gram_by_age` at its end.
      path: of the picture.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for position, shade in ((0.25, "#56B4E9"), (0.5, "#0072B2"), (1, "#000000")):
        record = records[max(0, round(position * len(records)) - 1)]
        eigenvalues = record["spectrum"][0][: record["rows_used"]]
        numbers, label = 1 + np.arange(len(eigenvalues)), f"step {record['step']}"
        left.plot(numbers, eigenvalues, color=shade, linewidth=2, label=label)
    left.set(yscale="log", xlabel="eigenvalue, largest first", ylabel="mean squared gradient along it")
    left.set_title("Fisher spectrum of the gradients in the window")
    left.grid(alpha=0.25)
    left.legend()

    norms = np.sqrt(np.maximum(np.diag(last), np.finfo(last.dtype).tiny))
    colors = matplotlib.colormaps["RdBu_r"].resampled(
        21
    )  # steps of colour make the file a third of its size
    image = right.imshow(last / norms / norms[:, None], colors, vmin=-1, vmax=1, interpolation="nearest")
    right.set(xlabel="gradient, oldest first", ylabel="gradient, oldest first")
    right.set_title(f"The last {len(last)} gradients, at the end")
    figure.colorbar(image, ax=right, label="cosine similarity")
    figure.savefig(path, dpi=100)


def run(options: Options, folders: Mapping[tuple[str, int], Path]) -> None:
    """Run the comparison; the folders are for checkpoints."""
    last = {}

    def workload(seed: int) -> Workload:
        return make_workload(options.model, options.epochs, options.batch_size, options.data_dir, seed=seed)

    def keep_gram(name, seed, state):
        if (name, seed) == ("mfac", 0):
            last["gram"] = gram_by_age(optax.tree.get(state.opt_state, "ScaleByMFACState"))

    def draw(records):
        with replacing(options.out / "fisher.png") as path:
            plot_fisher(records, last["gram"], path)

    comparison.run(options, folders, workload, keep_gram, draw)
