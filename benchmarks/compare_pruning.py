"""Pruning of a trained ResNet-20 on CIFAR-10, without fine-tuning: accuracy over sparsity for each method.

Every method sees the same images: at each recomputation, 2,048 training images of the run's seed. The
published procedure (Frantar et al., 2021) takes 64 gradients of batches of 32 from them, the others
gradients of 512 single images. Each result is measured with batch statistics frozen and estimated again
after pruning; where a method estimates them along the way, its gradients are taken with these.

    python benchmarks/compare_pruning.py --data-dir DIR

appends a line for each run to benchmarks/results/pruning.jsonl, prints all of them as tables, and draws
docs/pruning.png; without --data-dir it only prints and draws.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mfac_jax
from benchmarks.provenance import provenance
from examples import cifar10_data, prune_resnet20, resnet20
from examples.resnet20 import Network

SPARSITIES = (0.5, 0.75, 0.875, 0.9)
IMAGES, BATCH, EXAMPLES = 2048, 32, 512  # at each recomputation
TEST_IMAGES = 2000
RESULTS = Path(__file__).parent / "results" / "pruning.jsonl"
PICTURE = Path(__file__).parents[1] / "docs" / "pruning.png"


class Method(NamedTuple):
    """A way to prune.

    Attributes:
      options: of `mfac_jax.pruning.prune`.
      per_example: whether gradients are of single images, else of batches.
      kernels_only: whether only the kernels that are pruned have gradients, and move.
      stats_along: whether batch statistics are estimated anew before the gradients are taken.
    """

    options: dict[str, Any]
    per_example: bool = True
    kernels_only: bool = False
    stats_along: bool = False


METHODS = {
    "magnitude": Method({"num_steps": 1}),
    "published": Method(prune_resnet20.PUBLISHED, per_example=False, kernels_only=True),
    "mfac_jax": Method({}),
    "mfac_jax, statistics along the way": Method({}, stats_along=True),
    # What makes the difference: the default with one thing changed.
    "without gradient term": Method({"gradient_term": 0.0}),
    "independent, without gradient term": Method({"gradient_term": 0.0, "update": "independent"}),
    "gradients of batches": Method({}, per_example=False),
    "kernels only": Method({}, kernels_only=True),
    "8 recomputations": Method({"num_steps": 8}),
    "damping 1e-3": Method({"damping": 1e-3}),
    "damping 1e-1": Method({"damping": 1e-1}),
    "gradient term 0.1": Method({"gradient_term": 0.1}),
    "gradient term 1": Method({"gradient_term": 1.0}),
    "linear steps": Method({"spacing": "linear"}),
    "per leaf": Method({"per_leaf": True}),
    "without step limit": Method({"step_limit": math.inf}),
    "step limit 0.1": Method({"step_limit": 0.1}),
}
TABLE = ("magnitude", "published", "mfac_jax", "mfac_jax, statistics along the way")


class Data(NamedTuple):
    """Images uint8 and labels, on the device."""

    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class Request(NamedTuple):
    """What is asked for."""

    method: str
    sparsity: float
    pattern: str | None
    seed: int


def pruned(network: Network, data: Data, request: Request) -> Network:
    """The pruned network, with the statistics that its last gradients were taken with."""
    method, random, stats = METHODS[request.method], np.random.default_rng(request.seed), network.stats
    masks = prune_resnet20.prunable(network.params, request.pattern)

    def gradients(params):
        nonlocal stats
        if request.method == "magnitude":  # zeros: F is a multiple of the identity, and nothing moves
            return jax.tree.map(lambda w: jnp.zeros((1, *w.shape)), params)
        chosen = random.permutation(len(data.images))[:IMAGES]
        images, labels = data.images[chosen], data.labels[chosen]
        if method.stats_along:
            key = jax.random.key(random.integers(2**31))
            stats = resnet20.with_new_stats(Network(params, stats), images, key).stats
        grads = mfac_jax.collect_gradients(
            jax.tree_util.Partial(resnet20.loss, stats),
            params,
            ((images[i : i + BATCH], labels[i : i + BATCH]) for i in range(0, IMAGES, BATCH)),
            EXAMPLES if method.per_example else IMAGES // BATCH,
            per_example=method.per_example,
        )
        return prune_resnet20.of_kernels(grads, masks) if method.kernels_only else grads

    params, _ = mfac_jax.pruning.prune(
        network.params, gradients, request.sparsity, masks=masks, pattern=request.pattern, **method.options
    )
    return Network(params, stats)


def measure(network: Network, data: Data, request: Request) -> dict[str, Any]:
    """Accuracy and loss of a method's result, with its statistics and with statistics estimated again."""
    start = time.perf_counter()
    result = jax.block_until_ready(pruned(network, data, request))
    seconds = time.perf_counter() - start
    again = resnet20.with_new_stats(result, data.images[:IMAGES], jax.random.key(request.seed))
    line: dict[str, Any] = {**request._asdict(), "seconds": round(seconds, 1)}
    for name, measured in (("kept", result), ("estimated", again)):
        accuracy, loss = resnet20.accuracy_and_loss(measured, data.test_images, data.test_labels)
        line |= {f"accuracy_{name}": round(float(accuracy), 4), f"loss_{name}": round(float(loss), 4)}
    return line


def table(lines: list[dict[str, Any]], statistics: str) -> str:
    """Accuracies in percent, mean and standard deviation over the seeds, as Markdown."""
    kinds = sorted({(line["pattern"] or "", line["sparsity"]) for line in lines})
    heads = [f"{sparsity:.1%} {pattern}".strip() for pattern, sparsity in kinds]
    rows = [f"| batch statistics {statistics} | {' | '.join(heads)} |", "|---" * (len(kinds) + 1) + "|"]
    for method in METHODS:
        cells = []
        for kind in kinds:
            found = [
                100 * line[f"accuracy_{statistics}"]
                for line in lines
                if line["method"] == method and (line["pattern"] or "", line["sparsity"]) == kind
            ]
            cells.append(f"{np.mean(found):.1f} ± {np.std(found):.1f} ({len(found)})" if found else "")
        if any(cells):
            rows.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(rows)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracy over sparsity of the methods of the table, with both kinds of statistics."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    titles = {
        "kept": "batch statistics as the method leaves them",
        "estimated": "estimated again after pruning",
    }
    for axis, (statistics, title) in zip(axes, titles.items(), strict=True):
        for method in TABLE:
            points = {
                sparsity: np.mean(
                    [
                        line[f"accuracy_{statistics}"]
                        for line in lines
                        if (line["method"], line["sparsity"], line["pattern"]) == (method, sparsity, None)
                    ]
                )
                for sparsity in sorted(
                    {x["sparsity"] for x in lines if x["method"] == method and not x["pattern"]}
                )
            }
            axis.plot([100 * s for s in points], [100 * a for a in points.values()], "o-", label=method)
        axis.set(title=title, xlabel="sparsity in %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 2,000 test images in %")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def read_data(data_dir: Path) -> tuple[Network, Data]:
    """The network and the images."""
    arrays = cifar10_data.load(data_dir)
    parts = (
        arrays.images,
        arrays.labels,
        arrays.valid_images[:TEST_IMAGES],
        arrays.valid_labels[:TEST_IMAGES],
    )
    return resnet20.read(data_dir / "resnet20_cifar10_torch.npz"), Data(*map(jnp.asarray, parts))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for, then print and draw all results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder with CIFAR-10 and resnet20_cifar10_torch.npz")
    add(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=TABLE,
        metavar="NAME",
        help=f"of {', '.join(METHODS)}",
    )
    add("--sparsities", nargs="+", type=float, default=SPARSITIES)
    add("--pattern", help="2:4 or block:4")
    add("--seeds", type=int, default=3, help="runs of each")
    add("--results", type=Path, default=RESULTS, help="file that lines are appended to")
    add("--picture", type=Path, default=PICTURE)
    args = parser.parse_args(argv)
    if args.data_dir is not None:
        network, data = read_data(args.data_dir)
        lineage = provenance(["jax", "jaxlib", "flax", "optax"])
        requests = itertools.product(args.methods, args.sparsities, [args.pattern], range(args.seeds))
        for request in sorted(itertools.starmap(Request, requests), key=lambda request: request.seed):
            line = measure(network, data, request)
            print(line, flush=True)
            with args.results.open("a") as file:
                file.write(json.dumps(line | lineage) + "\n")
    lines = [json.loads(line) for line in args.results.read_text().splitlines()]
    print(table(lines, "kept"), table(lines, "estimated"), sep="\n\n")
    draw(lines, args.picture)


if __name__ == "__main__":
    main()
