"""Train a small Flax network on scikit-learn's handwritten digits with M-FAC, SGD and Adam.

Every optimizer gets the same network, data, batches, steps and schedule (one epoch of warm-up, then a
cosine to zero), and a grid of as many peak learning rates; the rate with the lowest final training
loss, averaged over the seeds, is the one reported. A seed sets the split into training and test data
(80 to 20 per cent), the initial parameters and the order of the batches. Fixed by trials beforehand: the
model, the middle of each grid, and M-FAC's num_grads and damping, among 30 pairs on other seeds and then
among the best four of them on these. The momentum of SGD and M-FAC and the decay rates of Adam are the
usual ones and were not tuned.

Writes digits_curves.png, digits_fisher.png and results.json to the folder `--out`.
"""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import flax
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import mfac_jax

# Colours that colour-blind readers can tell apart (Okabe and Ito), and line styles for print.
STYLES = {
    "M-FAC": {"color": "#0072B2", "linestyle": "-"},
    "SGD": {"color": "#D55E00", "linestyle": "--"},
    "Adam": {"color": "#009E73", "linestyle": "-."},
}
MIDDLE_RATES = {"M-FAC": 0.04, "SGD": 0.4, "Adam": 0.08}  # of the default grids
TARGET = 0.95  # the test accuracy whose steps and seconds are counted


class MLP(nn.Module):
    """One hidden layer; ten classes."""

    hidden: int

    @nn.compact
    def __call__(self, x):  # noqa: D102
        return nn.Dense(10)(nn.relu(nn.Dense(self.hidden)(x)))


class Split(NamedTuple):
    """Training and test data of one seed."""

    x: jax.Array
    y: jax.Array
    x_test: jax.Array
    y_test: jax.Array


class Run(NamedTuple):
    """One training run, measured after every `--evaluate-every` steps."""

    steps: np.ndarray
    train_loss: np.ndarray
    test_accuracy: np.ndarray
    seconds: np.ndarray  # spent in training steps since the start, without compilation and evaluation
    grams: dict[int, np.ndarray]  # step -> Gram matrix of M-FAC's window, three times in the run


def make_optimizer(name: str, args: argparse.Namespace, schedule: optax.Schedule):
    """The optimizer, with its peak rate in the state: one compilation serves all rates of a grid."""

    def with_peak_rate(peak_rate):
        def learning_rate(step):
            return peak_rate * schedule(step)

        if name == "M-FAC":
            return mfac_jax.mfac(learning_rate, args.num_grads, args.damping, args.momentum)
        if name == "SGD":
            return optax.sgd(learning_rate, args.momentum)
        return optax.adam(learning_rate)

    return optax.inject_hyperparams(with_peak_rate)(peak_rate=0.0)


@functools.partial(jax.jit, static_argnames=("model", "tx"))
def create_state(model: nn.Module, tx, peak_rate: jax.Array, key: jax.Array, x: jax.Array) -> TrainState:
    """New parameters, and the optimizer's state with the peak rate put in."""
    state = TrainState.create(apply_fn=model.apply, params=model.init(key, x), tx=tx)
    return state.replace(opt_state=optax.tree.set(state.opt_state, peak_rate=peak_rate))


def mean_loss(state: TrainState, params, x: jax.Array, y: jax.Array) -> jax.Array:
    """Cross-entropy of `params` on the samples."""
    logits = state.apply_fn(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


# The state is donated, so that M-FAC's window of gradients is updated in place.
@functools.partial(jax.jit, donate_argnames="state")
def train_steps(state: TrainState, data: Split, batches: jax.Array) -> TrainState:
    """One optimizer step for each row of `batches`, the indices of its samples."""

    def step(state, rows):
        grads = jax.grad(mean_loss, argnums=1)(state, state.params, data.x[rows], data.y[rows])
        return state.apply_gradients(grads=grads), None

    return jax.lax.scan(step, state, batches)[0]


@jax.jit
def evaluate(state: TrainState, data: Split) -> tuple[jax.Array, jax.Array]:
    """Training loss and test accuracy."""
    predicted = state.apply_fn(state.params, data.x_test).argmax(axis=-1)
    return mean_loss(state, state.params, data.x, data.y), (predicted == data.y_test).mean()


def gram_by_age(state: mfac_jax.ScaleByMFACState) -> np.ndarray:
    """Inner products of the gradients in M-FAC's window, oldest first."""
    seen = min(int(state.grads_seen), state.gram.shape[-1])
    return np.roll(np.asarray(state.gram[0]), -int(state.next_row), axis=(0, 1))[-seen:, -seen:]


def train(state: TrainState, data: Split, chunks: np.ndarray) -> Run:
    """Train on `chunks` (evaluations, steps, samples) and measure after each of them."""
    measured, seconds, grams = [], [], {}
    snapshots = {len(chunks) // 4, len(chunks) // 2, len(chunks) - 1}
    for number, batches in enumerate(chunks):
        start = time.perf_counter()
        state = jax.block_until_ready(train_steps(state, data, batches))
        seconds.append(time.perf_counter() - start)
        measured.append(jax.device_get(evaluate(state, data)))
        mfac_state = optax.tree.get(state.opt_state, "ScaleByMFACState")
        if mfac_state is not None and number in snapshots:
            grams[int(state.step)] = gram_by_age(mfac_state)
    steps = chunks.shape[1] * (1 + np.arange(len(chunks)))
    losses, accuracies = np.array(measured).T
    return Run(steps, losses, accuracies, np.cumsum(seconds), grams)


def batch_indices(seed: int, samples: int, args: argparse.Namespace) -> np.ndarray:
    """Indices `(evaluations, steps, batch)`: every epoch in a new order, its incomplete batch left out."""
    random = np.random.default_rng(seed)
    per_epoch = samples // args.batch_size
    epochs = [random.permutation(samples)[: per_epoch * args.batch_size] for _ in range(args.epochs)]
    batches = np.concatenate(epochs).reshape(-1, args.batch_size)
    steps = args.evaluate_every
    return batches[: len(batches) // steps * steps].reshape(-1, steps, args.batch_size)


def search(name, splits: list[Split], chunks: list[np.ndarray], args, bar: tqdm) -> dict[float, list[Run]]:
    """For every peak rate of the optimizer's grid, a run for every seed."""
    steps = chunks[0][..., 0].size
    warmup = min(len(splits[0].x) // args.batch_size, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, steps)
    model, tx = MLP(args.hidden), make_optimizer(name, args, schedule)

    def run(rate: float, seed: int, evaluations: int | None = None) -> Run:
        state = create_state(model, tx, jnp.float32(rate), jax.random.key(seed), splits[seed].x[:1])
        return train(state, splits[seed], chunks[seed][:evaluations])

    runs = {rate: [] for rate in vars(args)[name]}
    bar.set_description(f"{name}: compiling")
    run(min(runs), 0, evaluations=1)  # so that no measured run has to compile
    for rate in runs:
        bar.set_description(f"{name}: rate {rate:g}")
        for seed in range(args.seeds):
            runs[rate].append(run(rate, seed))
            bar.update()
    return runs


def summarize(runs: dict[float, list[Run]]) -> dict:
    """The figures of the rate with the lowest final training loss, averaged over the seeds."""
    losses = [float(np.mean([run.train_loss[-1] for run in group])) for group in runs.values()]
    best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))  # NaN where a run diverged
    group = list(runs.values())[best]
    final_loss = np.array([run.train_loss[-1] for run in group], np.float64)
    final_accuracy = np.array([run.test_accuracy[-1] for run in group], np.float64)
    reached = np.array([run.test_accuracy >= TARGET for run in group])
    first = reached.argmax(axis=1)
    seconds_to_target = [run.seconds[evaluation] for run, evaluation in zip(group, first, strict=True)]
    all_reached = reached.any(axis=1).all()
    return {
        "rates": list(runs),
        "loss_of_rate": [loss if np.isfinite(loss) else None for loss in losses],
        "best_rate": list(runs)[best],
        "best_rate_is_at_an_end": best in (0, len(runs) - 1),
        "train_loss": {"mean": final_loss.mean(), "std": final_loss.std()},
        "test_accuracy": {"mean": final_accuracy.mean(), "std": final_accuracy.std()},
        "seconds": np.mean([run.seconds[-1] for run in group]),
        "steps_to_target": group[0].steps[first].mean() if all_reached else None,
        "seconds_to_target": np.mean(seconds_to_target) if all_reached else None,
    }


def print_report(summaries: dict[str, dict]) -> None:
    """The grids, then the optimizers side by side at their best rates."""
    print("\nFinal training loss for each peak learning rate, mean over the seeds:")
    for name, summary in summaries.items():
        pairs = zip(summary["rates"], summary["loss_of_rate"], strict=True)
        cells = [f"{rate:g}: {'NaN' if loss is None else f'{loss:.2g}'}" for rate, loss in pairs]
        print(f"  {name:6s}" + "".join(f"{cell:>16s}" for cell in cells))
        if summary["best_rate_is_at_an_end"]:
            print(f"  Note: the best rate of {name} is at an end of its grid: widen the grid.")
    print(f"\n{'best rate':>16s}{'train loss':>18s}{'test accuracy %':>18s}   to 95%: steps  seconds")
    for name, summary in summaries.items():
        loss, accuracy = summary["train_loss"], summary["test_accuracy"]
        steps, seconds = summary["steps_to_target"], summary["seconds_to_target"]
        print(
            f"{name:6s}{summary['best_rate']:10.3g}{loss['mean']:9.4f} ± {loss['std']:.4f}"
            f"{100 * accuracy['mean']:11.2f} ± {100 * accuracy['std']:.2f}"
            + ("           never    never" if steps is None else f"{steps:16.0f}{seconds:9.3f}")
        )


def plot_curves(best_runs: dict[str, list[Run]], args: argparse.Namespace) -> None:
    """Training loss and test accuracy against steps: the mean, and the range over the seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, runs in best_runs.items():
        losses = np.array([run.train_loss for run in runs])
        accuracies = 100 * np.array([run.test_accuracy for run in runs])
        for axes, values in ((left, losses), (right, accuracies)):
            axes.plot(runs[0].steps, values.mean(axis=0), label=name, linewidth=2, **STYLES[name])
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(runs[0].steps, low, high, color=STYLES[name]["color"], alpha=0.15, lw=0)
    left.set(yscale="log", xlabel="step", ylabel="training loss", title="Training loss")
    right.set(xlabel="step", ylabel="test accuracy (%)", title="Test accuracy", ylim=(85, 100))
    right.axhline(100 * TARGET, color="0.5", linewidth=0.8, linestyle=":")
    left.legend(loc="lower left")
    left.grid(alpha=0.25)
    right.grid(alpha=0.25)
    figure.suptitle(f"Handwritten digits: mean and range over {args.seeds} seeds, best rate of each grid")
    figure.savefig(args.out / "digits_curves.png", dpi=100)


def plot_fisher(run: Run, args: argparse.Namespace) -> None:
    """Eigenvalues of the window's Fisher matrix, and the cosines between its gradients."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (step, gram), shade in zip(run.grams.items(), ("#56B4E9", "#0072B2", "#000000"), strict=False):
        eigenvalues = np.linalg.eigvalsh(gram.astype(np.float64))[::-1] / args.num_grads
        ranks = 1 + np.arange(len(eigenvalues))
        left.plot(ranks, eigenvalues, color=shade, linewidth=2, label=f"after {step} steps")
    left.axhline(args.damping, color="#D55E00", linestyle="--", label="damping")
    left.set(yscale="log", xlabel="eigenvalue, largest first", ylabel="mean squared gradient along it")
    left.set_title(f"Fisher spectrum of the last {args.num_grads} gradients")
    left.grid(alpha=0.25)
    left.legend()

    last = list(run.grams.values())[-1]
    norms = np.sqrt(np.maximum(np.diag(last), np.finfo(last.dtype).tiny))
    colors = plt.get_cmap("RdBu_r", 21)  # steps of colour make the file a third of its size
    image = right.imshow(last / norms / norms[:, None], colors, vmin=-1, vmax=1, interpolation="nearest")
    right.set(xlabel="gradient, oldest first", ylabel="gradient, oldest first")
    right.set_title(f"The last {len(last)} gradients, at the end")
    figure.colorbar(image, ax=right, label="cosine similarity")
    figure.suptitle("What M-FAC sees: read off the Gram matrix in its state (one run, best rate)")
    figure.savefig(args.out / "digits_fisher.png", dpi=100)


def load(data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Samples (n, 64), scaled to at most one, and labels 0 to 9."""
    if data_dir is None:
        x, y = load_digits(return_X_y=True)
    else:
        with np.load(data_dir / "digits.npz") as arrays:
            x, y = arrays["x"], arrays["y"]
    if x.shape[1:] not in ((64,), (8, 8)) or y.shape != x.shape[:1]:
        raise ValueError(f"x must be (n, 64) or (n, 8, 8) and y (n,), they are {x.shape} and {y.shape}")
    if not (np.isin(y, np.arange(10)).all() and np.isfinite(x).all() and np.max(x) > 0):
        raise ValueError("x must be finite, with positive entries, and y must hold labels from 0 to 9")
    return (x / x.max()).reshape(-1, 64).astype(np.float32), y.astype(np.int32)


def split_for_seed(x: np.ndarray, y: np.ndarray, seed: int) -> Split:
    """Four fifths for training, the rest for the test, each with its share of every digit."""
    x_train, x_test, y_train, y_test = train_test_split(x, y, test_size=0.2, stratify=y, random_state=seed)
    return Split(jnp.asarray(x_train), jnp.asarray(y_train), jnp.asarray(x_test), jnp.asarray(y_test))


def number(kind: type, upper: float = float("inf")):
    """For argparse: a parser of numbers above zero and below `upper`."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < upper:
            raise argparse.ArgumentTypeError(f"must be above 0 and below {upper:g}, got {text}")
        return value

    return parse


def make_parser() -> argparse.ArgumentParser:
    """Every option, with its default."""
    defaults = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=defaults)
    add, count = parser.add_argument, number(int)
    add("--optimizers", nargs="+", choices=list(STYLES), default=list(STYLES), help="which to compare")
    add("--seeds", type=count, default=5, help="runs for each rate; the seeds are 0, 1, 2, ...")
    add("--epochs", type=count, default=12, help="passes over the training data")
    add("--batch-size", type=count, default=64, help="samples a step")
    add("--evaluate-every", type=count, default=8, help="steps between two points of the curves")
    add("--hidden", type=count, default=128, help="units of the hidden layer")
    add("--num-grads", type=count, default=128, help="M-FAC: gradients in the window")
    add("--damping", type=number(float), default=3e-3, help="M-FAC: multiple of the identity in the Fisher")
    add("--momentum", type=number(float, 1), default=0.9, help="M-FAC and SGD: decay of past updates")
    for name, middle in MIDDLE_RATES.items():
        flag, grid = f"--{name.lower().replace('-', '')}-rates", [middle * 2**k for k in range(-3, 4)]
        add(flag, type=number(float), nargs="+", default=grid, dest=name, metavar="RATE", help="peak rates")
    add("--data-dir", type=Path, help="folder with your digits.npz: x (n, 64) or (n, 8, 8) and y (n,)")
    add("--out", type=Path, default=Path("out"), help="folder for the pictures and results.json")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        x, y = load(args.data_dir)
        splits = [split_for_seed(x, y, seed) for seed in range(args.seeds)]
    except (OSError, KeyError, ValueError) as error:
        parser.error(f"cannot use the data of {args.data_dir or 'scikit-learn'}: {error}")
    chunks = [batch_indices(seed, len(splits[0].x), args) for seed in range(args.seeds)]
    if not chunks[0].size:
        parser.error("not one step fits: lower --batch-size or --evaluate-every, or raise --epochs")
    plt.switch_backend("Agg")  # pictures go to files; no window is opened
    args.out.mkdir(parents=True, exist_ok=True)

    with tqdm(total=args.seeds * sum(len(vars(args)[name]) for name in args.optimizers), unit="run") as bar:
        runs = {name: search(name, splits, chunks, args, bar) for name in args.optimizers}
    summaries = {name: summarize(runs[name]) for name in runs}
    best_runs = {name: runs[name][summaries[name]["best_rate"]] for name in runs}
    print_report(summaries)
    plot_curves(best_runs, args)
    if "M-FAC" in best_runs:
        plot_fisher(best_runs["M-FAC"][0], args)
    versions = {module.__name__: module.__version__ for module in (mfac_jax, jax, flax, optax)}
    results = {"settings": vars(args), "versions": versions, "optimizers": summaries}
    (args.out / "results.json").write_text(json.dumps(results, indent=2, default=str) + "\n")
    print(f"\nPictures and results.json are in {args.out}")


if __name__ == "__main__":
    main()
