"""A small Flax network for the handwritten digits, trained with M-FAC and pruned in several ways."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import mfac_jax
from examples import digits, pruning
from examples.common.files import replacing
from examples.common.optimizers import make_optimizer
from examples.common.options import RATES
from examples.common.training import train
from examples.common.workload import Workload
from examples.prune_digits import Options


def trained(workload: Workload, seed: int) -> optax.Params:
    """Train with M-FAC, and return the last parameters."""
    last = {}

    def keep(state, evaluation):
        last.update(evaluation, params=jax.tree.map(jnp.copy, state.params))

    steps = len(workload.batches)
    train(workload, make_mfac(steps), seed, evaluate_every=steps, callback=keep)
    print(f"Trained: {workload.source}, {steps} steps; train loss {last['train_loss']:.4f}")
    return last["params"]


def make_mfac(steps: int) -> optax.GradientTransformation:
    """M-FAC with the rate of the training of the digits."""
    return make_optimizer("mfac", RATES["digits"]["mfac"], steps)


def gradients_function(workload: Workload, num_grads: int, seed: int):
    """Make a function from parameters to gradients of single training images, other images at each call."""
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
    workload: Workload, options: Options, tuning: Workload, accuracy
) -> tuple[dict[str, list[float]], Any]:
    """Prune in each way; return the accuracies at each sparsity, and the masks of the last."""
    params = workload.params
    gradients = gradients_function(workload, options.num_grads, options.seed)
    given = gradients(params)
    all_kept = mfac_jax.pruning.kernel_masks(params)
    tx = mfac_jax.pruning.keep_pruned(make_mfac(len(tuning.batches)), all_kept)
    rows, masks = {}, all_kept
    for sparsity in tqdm(options.sparsity, unit="sparsity"):
        pruned = {
            "magnitude": pruning.by_magnitude(params, sparsity),
            "M-FAC, one step": mfac_jax.pruning.prune(params, given, sparsity),
            "M-FAC": mfac_jax.pruning.prune(params, gradients, sparsity),
        }
        for name in ("magnitude", "M-FAC"):
            start = functools.partial(lambda result, *_: result, pruned[name])
            state, masks = pruning.train_and_prune(tuning, tx, all_kept, {0: sparsity}, start, options.seed)
            pruned[name + pruning.FINE_TUNED] = state.params, masks
        for name, (weights, _) in pruned.items():
            rows.setdefault(name, []).append(accuracy(weights))
    return rows, masks


def run(options: Options) -> None:
    """Train, prune, and report."""
    make = functools.partial(
        digits.make_workload, options.model, data_dir=options.data_dir, seed=options.seed
    )
    workload, tuning = make(options.epochs), make(options.fine_tuning)
    params = trained(workload, options.seed)
    workload, tuning = workload._replace(params=params), tuning._replace(params=params)
    evaluate = jax.jit(workload.evaluate)

    def accuracy(params):
        return float(evaluate(params, workload.model_state, workload.data)["valid_accuracy"])

    before = accuracy(params)
    rows, masks = prune_in_all_ways(workload, options, tuning, accuracy)
    ticks = [f"{sparsity:g}" for sparsity in options.sparsity]
    labels = {"xlabel": "sparsity of the kernels", "title": f"{workload.name}, pruned"}
    path = options.out / "accuracy.png"
    with replacing(path) as draft:
        pruning.plot_accuracy(rows, ticks, before, labels, draft)
    pruning.print_accuracies(f"Validation accuracy; {before:.4f} before pruning", ticks, rows)
    print("M-FAC takes sixteen steps, with new gradients for each. One step has only the first gradients.")
    print(f"\nThe last network:\n{mfac_jax.pruning.pruning_report(masks)}")
    print(f"\nThe picture is {path}")
