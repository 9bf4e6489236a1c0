"""What the pruning examples share: options, pruning by magnitude, training with pruning, the report."""

import argparse
import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import mfac_jax
from examples import comparison
from examples.common.training import TrainState, train_step
from examples.common.workload import Workload

# Colours that colour-blind readers can tell apart (Okabe and Ito), and line styles for print.
COLORS = {"magnitude": "#D55E00", "M-FAC, one step": "#56B4E9", "M-FAC": "#0072B2", "published": "#009E73"}
FINE_TUNED = ", fine-tuned"


def make_parser(name: str, description: str | None, sparsities: Sequence[float]) -> argparse.ArgumentParser:
    """The options that all examples of pruning have."""
    parser = argparse.ArgumentParser(description=description, formatter_class=comparison.HelpFormatter)
    add = parser.add_argument
    add("--sparsity", nargs="+", type=share, default=[*sparsities], metavar="S", help="shares to prune")
    add("--num-grads", type=comparison.count, default=512, help="gradients that a step of M-FAC sees")
    # A str, which argparse converts as it converts what is typed; a 0 would not be shown.
    add("--seed", type=seed, default="0", help="of all that is drawn at random")
    add("--out", type=comparison.output_folder, default=f"out/{name}", help="folder for the picture")
    return parser


def share(text: str) -> float:
    """For argparse: a number in [0, 1)."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number from 0 to below 1, got {text!r}: write e.g. 0.9")


def seed(text: str) -> int:
    """For argparse: an int >= 0."""
    if text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number, at least 0, got {text!r}")


def by_magnitude(params: optax.Params, sparsity: float, **options: Any) -> tuple[optax.Params, Any]:
    """`mfac_jax.pruning.prune` without second order: the smallest weights go, and nothing else moves."""
    no_grads = jax.tree.map(lambda w: jnp.zeros((1, *w.shape), w.dtype), params)
    return mfac_jax.pruning.prune(params, no_grads, sparsity, **options)


def train_and_prune(
    workload: Workload,
    tx: optax.GradientTransformation,
    masks: Any,
    sparsities: Mapping[int, float],
    prune: Callable[[TrainState, Any, float], tuple[optax.Params, Any]],
    seed: int,
    callback: Callable[[TrainState], object] = lambda state: None,
) -> tuple[TrainState, Any]:
    """Train on all batches of the workload, and prune on the way.

    Args:
      workload: what to train, from its parameters on.
      tx: the optimizer with `keep_pruned` around it.
      masks: what is kept at the start.
      sparsities: from the steps before which the network is pruned to the sparsity it then gets.
      prune: from state, masks and sparsity to new parameters and masks.
      seed: of what is random in the loss.
      callback: called with the state after each step, which invalidates its arrays.

    Returns:
      The last state, and the masks.
    """
    params, model_state = jax.tree.map(jnp.copy, (workload.params, workload.model_state))
    state = TrainState(jnp.zeros((), jnp.int32), params, model_state, tx.init(params))
    key = jax.random.key(seed)
    for step, indices in enumerate(workload.batches):
        if step in sparsities:
            params, masks = prune(state, masks, sparsities[step])
            # Momentum and M-FAC's window forget what they knew of the weights that went.
            opt_state = mfac_jax.pruning.set_masks(tx, state.opt_state, masks)
            state = state._replace(params=jax.tree.map(jnp.copy, params), opt_state=opt_state)
        state, loss = train_step(workload.loss, tx, state, workload.data, indices, key)
        jax.block_until_ready(loss)
        callback(state)
    return state, masks


def print_table(title: str, head: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
    """Accuracies, a row for each way to prune."""
    width = 2 + max(map(len, ["sparsity", *rows]))
    print(f"\n{title}\n{'sparsity':{width}}" + "".join(f"{cell:>8}" for cell in head))
    for name, accuracies in rows.items():
        print(f"{name:{width}}" + "".join(f"{accuracy:8.4f}" for accuracy in accuracies))


def plot_accuracy(
    rows: Mapping[str, Sequence[float]],
    ticks: Sequence[str],
    before: float,
    labels: dict[str, str],
    path: Path,
) -> None:
    """Accuracy, a curve for each way to prune.

    Args:
      rows: accuracies; a name that starts as one in `COLORS` has that colour.
      ticks: what stands below each of them.
      before: the accuracy of the network that was not pruned yet.
      labels: `xlabel` and `title` of the picture.
      path: of the picture.
    """
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.axhline(before, color="0.5", linewidth=1, label="not pruned")
    places = np.arange(len(ticks))
    for name, accuracies in rows.items():
        color = COLORS[max((key for key in COLORS if name.startswith(key)), key=len)]
        line = "--" if FINE_TUNED in name else "-"
        axes.plot(places, accuracies, line, color=color, marker="o", markersize=4, linewidth=2, label=name)
    axes.set_xticks(places, ticks)
    axes.set(ylabel="accuracy", **labels)
    axes.grid(alpha=0.25)
    axes.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
