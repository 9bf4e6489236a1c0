"""Train a small Flax network on scikit-learn's handwritten digits with M-FAC, then prune it.

By magnitude, by M-FAC in one step, by M-FAC in sixteen steps with new gradients for each, and with some
fine-tuning that keeps pruned weights at zero. At the end of this training the gradients are so small that
one step does as magnitude does; after the first of sixteen they tell more. Takes a minute or two.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import mfac_jax
from examples import comparison, pruning, train_digits
from examples.common.optimizers import RATES, make_optimizer
from examples.common.training import train
from examples.common.workload import DataError, Workload

SPARSITIES = (0.5, 0.75, 0.875, 0.9, 0.95, 0.98)


def make_parser() -> argparse.ArgumentParser:
    """Every option, with its default."""
    parser = pruning.make_parser("prune_digits", __doc__, SPARSITIES)
    parser.set_defaults(num_grads=128)
    add, count = parser.add_argument, comparison.count
    add(
        "--model",
        choices=list(train_digits.MODELS),
        default="mlp",
        help="mlp: 64-128-10; cnn: convolutions",
    )
    add("--epochs", type=count, default=12, help="passes over the training data before pruning")
    add("--fine-tuning", type=count, default=12, metavar="EPOCHS", help="passes over them after it")
    add("--data-dir", type=Path, help="folder of a digits.npz with your x (n, 64) or (n, 8, 8) and y (n,)")
    return parser


def trained(workload: Workload, seed: int) -> optax.Params:
    """The parameters at the end of a training with M-FAC."""
    last = {}

    def keep(state, evaluation):
        last.update(evaluation, params=jax.tree.map(jnp.copy, state.params))

    steps = len(workload.batches)
    train(workload, make_mfac(steps), seed, evaluate_every=steps, callback=keep)
    print(f"Trained: {workload.source}, {steps} steps; train loss {last['train_loss']:.4f}")
    return last["params"]


def make_mfac(steps: int) -> optax.GradientTransformation:
    """M-FAC, as in the training of the digits."""
    return make_optimizer("mfac", RATES["digits"]["mfac"], steps)


def gradients_function(workload: Workload, num_grads: int, seed: int):
    """From parameters to gradients of single training images, other ones at each call."""
    random = np.random.default_rng(seed)
    data, num_grads = workload.data, min(num_grads, len(workload.data["x"]))

    def loss(params, batch):
        indices = jnp.arange(len(batch["y"]))
        return workload.loss(params, workload.model_state, batch, indices, None)[0]

    def gradients(params):
        chosen = random.permutation(len(data["x"]))[:num_grads]
        batch = {"x": data["x"][chosen], "y": data["y"][chosen]}
        return mfac_jax.collect_gradients(loss, params, [batch], num_grads, per_example=True)

    return gradients


def prune_in_all_ways(
    workload: Workload, args: argparse.Namespace, tuning: Workload, accuracy
) -> tuple[dict[str, list[float]], Any]:
    """Accuracies of each way to prune at each sparsity, and the masks of the last."""
    params = workload.params
    gradients = gradients_function(workload, args.num_grads, args.seed)
    given = gradients(params)
    all_kept = mfac_jax.pruning.kernel_masks(params)
    tx = mfac_jax.pruning.keep_pruned(make_mfac(len(tuning.batches)), all_kept)
    rows, masks = {}, all_kept
    for sparsity in tqdm(args.sparsity, unit="sparsity"):
        pruned = {
            "magnitude": pruning.by_magnitude(params, sparsity),
            "M-FAC, one step": mfac_jax.pruning.prune(params, given, sparsity),
            "M-FAC": mfac_jax.pruning.prune(params, gradients, sparsity),
        }
        for name in ("magnitude", "M-FAC"):
            start = functools.partial(lambda result, *_: result, pruned[name])
            state, masks = pruning.train_and_prune(tuning, tx, all_kept, {0: sparsity}, start, args.seed)
            pruned[name + pruning.FINE_TUNED] = state.params, masks
        for name, (weights, _) in pruned.items():
            rows.setdefault(name, []).append(accuracy(weights))
    return rows, masks


def main(argv: Sequence[str] | None = None) -> None:
    """Train, prune, and report; `argv` is the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    plt.switch_backend("Agg")  # pictures go to files; no window is opened
    make = functools.partial(train_digits.make_workload, args.model, data_dir=args.data_dir, seed=args.seed)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        workload, tuning = make(args.epochs), make(args.fine_tuning)
    except (DataError, OSError) as error:
        parser.error(str(error))
    params = trained(workload, args.seed)
    workload, tuning = workload._replace(params=params), tuning._replace(params=params)
    evaluate = jax.jit(workload.evaluate)

    def accuracy(params):
        return float(evaluate(params, workload.model_state, workload.data)["valid_accuracy"])

    before = accuracy(params)
    rows, masks = prune_in_all_ways(workload, args, tuning, accuracy)
    ticks = [f"{sparsity:g}" for sparsity in args.sparsity]
    pruning.print_table(f"Validation accuracy; {before:.4f} before pruning:", ticks, rows)
    print("M-FAC is sixteen steps, with new gradients for each; in one step it has the first ones alone.")
    print(f"\nThe last network:\n{mfac_jax.pruning.pruning_report(masks)}")
    labels = {"xlabel": "sparsity of the kernels", "title": f"{workload.name}, pruned"}
    pruning.plot_accuracy(rows, ticks, before, labels, args.out / "accuracy.png")
    print(f"\nThe picture is {args.out / 'accuracy.png'}")


if __name__ == "__main__":
    main()
