"""Pruning of a trained ResNet-20 on CIFAR-10, without fine-tuning: accuracy over sparsity for each method.

Every method sees the same images: at each recomputation, 2,048 training images of the run's seed. The
published procedure (Frantar et al., 2021) takes 64 gradients of batches of 32 from them, the others
gradients of 512 single images. Each result is measured with batch statistics frozen and estimated again
after pruning; where a method estimates them along the way, its gradients are taken with these.

    python -m benchmarks.compare_pruning --data-dir DIR

appends a line for each run to benchmarks/results/pruning.jsonl, prints all of them as tables, and draws
docs/pruning.png; without --data-dir it only prints and draws.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import mfac_jax
from benchmarks import timing
from examples import cifar10_data, resnet20, resnet20_pruning
from examples.common import json_lines, markdown, over_seeds, provenance
from examples.common.command_line import NO_DEFAULT, Count, OptionalPath, choices, parse
from examples.common.options import Pruning, Shares
from examples.prune_resnet20 import PATTERNS, WEIGHTS
from examples.resnet20 import Network
from examples.resnet20_pruning import CHUNK, PUBLISHED_GRADS

IMAGES, EXAMPLES = PUBLISHED_GRADS * CHUNK, 512  # at each recomputation
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
    "published": Method(resnet20_pruning.PUBLISHED, per_example=False, kernels_only=True),
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
    "without step limit": Method({"step_limit": math.inf}),
    "step limit 0.1": Method({"step_limit": 0.1}),
}
TABLE = ("magnitude", "published", "mfac_jax", "mfac_jax, statistics along the way")


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    data_dir: OptionalPath = None
    """folder with CIFAR-10 and resnet20_cifar10_torch.npz. Without it nothing is run"""
    methods: Annotated[tuple[str, ...], choices(METHODS)] = TABLE
    """which to run"""
    sparsities: Shares = Pruning.sparsity
    """shares of the weights to prune"""
    pattern: Annotated[str | None, choices(PATTERNS, many=False), NO_DEFAULT] = None
    """groups of weights that are pruned together; without it, single weights"""
    seeds: Count = 3
    """runs of each"""
    results: Path = RESULTS
    """file that lines are appended to"""
    picture: Path = PICTURE
    """file to draw"""


class Data(NamedTuple):
    """Images uint8 and labels, on the device."""

    images: jax.Array
    labels: jax.Array
    test_images: jax.Array
    test_labels: jax.Array


class Request(NamedTuple):
    """One pruning: a method, a sparsity, a pattern and a seed."""

    method: str
    sparsity: float
    pattern: str | None
    seed: int


def pruned(network: Network, data: Data, request: Request) -> Network:
    """Prune the network; it keeps the statistics that its last gradients were taken with."""
    method, random, stats = METHODS[request.method], np.random.default_rng(request.seed), network.stats
    masks = resnet20_pruning.prunable(network.params, request.pattern)

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
            ((images[i : i + CHUNK], labels[i : i + CHUNK]) for i in range(0, IMAGES, CHUNK)),
            EXAMPLES if method.per_example else PUBLISHED_GRADS,
            per_example=method.per_example,
        )
        return resnet20_pruning.of_kernels(grads, masks) if method.kernels_only else grads

    params, _ = mfac_jax.pruning.prune(
        network.params, gradients, request.sparsity, masks=masks, pattern=request.pattern, **method.options
    )
    return Network(params, stats)


def measure(network: Network, data: Data, request: Request) -> dict[str, Any]:
    """Prune, and measure accuracy and loss with both kinds of statistics."""
    result, seconds = timing.stopwatch(pruned, network, data, request)
    again = resnet20.with_new_stats(result, data.images[:IMAGES], jax.random.key(request.seed))
    line: dict[str, Any] = {**request._asdict(), "seconds": round(seconds, 1)}
    for name, measured in (("kept", result), ("estimated", again)):
        accuracy, loss = resnet20.accuracy_and_loss(measured, data.test_images, data.test_labels)
        line |= {f"accuracy_{name}": round(float(accuracy), 4), f"loss_{name}": round(float(loss), 4)}
    return line


def table(lines: list[dict[str, Any]], statistics: str) -> str:
    """Write the accuracies as Markdown: percent, and deviations over several seeds."""
    kinds = sorted({(line["pattern"] or "", line["sparsity"]) for line in lines})
    rows = []
    for method in METHODS:
        cells = []
        for pattern, sparsity in kinds:
            found = 100 * accuracies(lines, statistics, method, pattern, sparsity)
            spread = f" ± {over_seeds.deviation(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{found.mean():.1f}{spread}" if len(found) else "")
        if any(cells):
            rows.append([method, *cells])
    heads = [f"{sparsity:.1%} {pattern}".strip() for pattern, sparsity in kinds]
    return markdown.table([f"batch statistics {statistics}", *heads], rows)


def accuracies(
    lines: list[dict[str, Any]], statistics: str, method: str, pattern: str, sparsity: float
) -> np.ndarray:
    """Find the accuracies of all runs of a method at a sparsity; no pattern is an empty text."""
    wanted = (method, pattern, sparsity)
    own = [line for line in lines if (line["method"], line["pattern"] or "", line["sparsity"]) == wanted]
    return np.array([line[f"accuracy_{statistics}"] for line in own])


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """Draw accuracy over sparsity for the methods of `TABLE`, with both kinds of statistics."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    titles = {
        "kept": "batch statistics as the method leaves them",
        "estimated": "estimated again after pruning",
    }
    sparsities = sorted({line["sparsity"] for line in lines if not line["pattern"]})
    for axis, (statistics, title) in zip(axes, titles.items(), strict=True):
        for method in TABLE:
            found = {s: 100 * accuracies(lines, statistics, method, "", s) for s in sparsities}
            points = {100 * s: values.mean() for s, values in found.items() if len(values)}
            axis.plot(list(points), list(points.values()), "o-", label=method)
        axis.set(title=title, xlabel="sparsity in %")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on 2,000 test images in %")
    axes[0].legend()
    figure.savefig(path, dpi=110)


def read_data(data_dir: Path) -> tuple[Network, Data]:
    """Read the network and the images."""
    arrays = cifar10_data.load(data_dir)
    parts = (
        arrays.images,
        arrays.labels,
        arrays.valid_images[:TEST_IMAGES],
        arrays.valid_labels[:TEST_IMAGES],
    )
    return resnet20.read(data_dir / WEIGHTS), Data(*map(jnp.asarray, parts))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is asked for, then print and draw all results."""
    options = parse(Options, argv, __doc__)
    if options.data_dir is not None:
        network, data = read_data(options.data_dir)
        made_with = provenance.record(("jax", "jaxlib", "flax", "optax"))
        kinds = itertools.product(options.methods, options.sparsities, [options.pattern])
        for seed, kind in itertools.product(range(options.seeds), kinds):
            line = measure(network, data, Request(*kind, seed))
            print(line, flush=True)
            json_lines.append(options.results, line | made_with)
    lines = json_lines.read(options.results)
    print(table(lines, "kept"), table(lines, "estimated"), sep="\n")
    draw(lines, options.picture)


if __name__ == "__main__":
    main()
