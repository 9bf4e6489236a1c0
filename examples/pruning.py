"""What the pruning examples share: pruning by magnitude, training with pruning, the report."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import mfac_jax
from examples.common.reporting import print_table
from examples.common.training import TrainState, bind_step, first_state, run_steps
from examples.common.workload import Workload

# Colours that colour-blind readers can tell apart (Okabe and Ito), and line styles for print.
COLORS = {"magnitude": "#D55E00", "M-FAC, one step": "#56B4E9", "M-FAC": "#0072B2", "published": "#009E73"}
FINE_TUNED = ", fine-tuned"


def by_magnitude(params: optax.Params, sparsity: float, **options: Any) -> tuple[optax.Params, Any]:
    """Prune the smallest weights as `mfac_jax.pruning.prune` does; the others do not move."""
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
      sparsities: before which steps to prune, and to which sparsity each time.
      prune: from state, masks and sparsity to new parameters and masks.
      seed: of what is random in the loss.
      callback: called with the state after each step. The next step invalidates its arrays.

    Returns:
      The last state, and the masks.
    """
    state, step, batches = first_state(workload, tx), bind_step(workload, tx, seed), workload.batches
    for start, end in itertools.pairwise([*sorted({0, *sparsities}), len(batches)]):
        if start in sparsities:
            params, masks = prune(state, masks, sparsities[start])
            # Momentum and M-FAC's window forget what they knew of the weights that went.
            opt_state = mfac_jax.pruning.set_masks(tx, state.opt_state, masks)
            state = state._replace(params=jax.tree.map(jnp.copy, params), opt_state=opt_state)
        for new_state, _ in run_steps(step, state, batches[start:end]):
            state = new_state
            callback(state)
    return state, masks


def print_accuracies(title: str, head: Sequence[str], rows: Mapping[str, Sequence[float]]) -> None:
    """Print a row of accuracies for each way to prune."""
    cells = [[name, *(f"{accuracy:.4f}" for accuracy in row)] for name, row in rows.items()]
    print_table(title, ["sparsity", *head], cells)


def plot_accuracy(
    rows: Mapping[str, Sequence[float]],
    ticks: Sequence[str],
    before: float,
    labels: dict[str, str],
    path: Path,
) -> None:
    """Draw the accuracy, one curve for each way to prune.

    Args:
      rows: accuracies. A name that starts like one in `COLORS` has that colour.
      ticks: what stands below each of them.
      before: the accuracy of the network before pruning.
      labels: `xlabel` and `title` of the picture.
      path: of the picture.
    """
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
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
