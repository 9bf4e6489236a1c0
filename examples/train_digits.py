"""Train a small Flax network on scikit-learn's handwritten digits.

A seed sets the split into training and validation data (80 to 20 per cent), the initial parameters and the
order of the batches. With mfac among the optimizers, fisher.png shows its Fisher matrix.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax import linen as nn
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import mfac_jax
from examples import comparison
from examples.common import command_line
from examples.common.command_line import Count, Folder, OptionalPath
from examples.common.optimizers import RATES
from examples.common.workload import READ_ERRORS, DataError, Workload, epoch_batches


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
Model = Annotated[str, command_line.choices(MODELS, many=False)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(comparison.Options):
    """What the user can choose."""

    problem: ClassVar[str] = "digits"

    optimizers: Annotated[tuple[str, ...], comparison.names(problem)] = comparison.Options.optimizers
    rates: comparison.Rates = (*RATES[problem].items(),)
    seeds: Count = 3
    evaluations: Count = 22
    out: Folder = Path("out", "digits")
    model: Model = "mlp"
    """mlp: 64-128-10; cnn: two convolutions"""
    epochs: Count = 12
    """passes over the training data"""
    batch_size: Count = 64
    """images a step"""
    data_dir: OptionalPath = None
    """folder of a digits.npz with your x (n, 64) or (n, 8, 8) and y (n,)"""


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


def load(data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Load samples (n, 64), scaled to at most one, and labels 0 to 9."""
    if data_dir is None:
        x, y = load_digits(return_X_y=True)
    else:
        path = data_dir / "digits.npz"
        try:
            with np.load(path) as arrays:
                x, y = arrays["x"], arrays["y"]
        except READ_ERRORS as error:
            raise DataError(f"--data-dir: cannot read x and y from {path}: {error}") from error
    where = f"--data-dir: in {data_dir}/digits.npz "
    if x.shape[1:] not in ((64,), (8, 8)) or y.shape != x.shape[:1]:
        raise DataError(
            f"{where}x must be (n, 64) or (n, 8, 8) and y (n,), they are {x.shape} and {y.shape}"
        )
    if not (np.isin(y, np.arange(10)).all() and np.isfinite(x).all() and np.max(x) > 0):
        raise DataError(f"{where}x must be finite, with positive entries, and y labels from 0 to 9")
    return (x / x.max()).reshape(-1, 64).astype(np.float32), y.astype(np.int32)


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


def plot_fisher(records: list[dict[str, Any]], last: np.ndarray, path: Path) -> None:
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


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    last = {}

    def workload(seed: int) -> Workload:
        return make_workload(options.model, options.epochs, options.batch_size, options.data_dir, seed=seed)

    def keep_gram(name, seed, state):
        if (name, seed) == ("mfac", 0):
            last["gram"] = gram_by_age(optax.tree.get(state.opt_state, "ScaleByMFACState"))

    records = comparison.run(options, workload, keep_gram)
    if records:
        plot_fisher(records, last["gram"], options.out / "fisher.png")


if __name__ == "__main__":
    main()
