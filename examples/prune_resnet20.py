"""Prune a ResNet-20 for CIFAR-10 with weights that were trained in PyTorch.

Without any training, in one step (--mode one-shot) or in several with new gradients for each (recomputed),
or between epochs of fine-tuning (gradual). Every way to prune is measured with the batch statistics that it
leaves and with those estimated anew from training images; fine-tuning makes its own. The weights are an npz
with the arrays of the PyTorch state dict.
"""

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import mfac_jax
from examples import comparison, pruning, resnet20, train_cifar10
from examples.common.workload import DataError, Workload
from examples.resnet20 import Network

SPARSITIES = (0.5, 0.75, 0.875, 0.9)
WEIGHTS = "resnet20_cifar10_torch.npz"
STATS_IMAGES = 2048  # that batch statistics are estimated from
RATE = 0.02  # of SGD, at the start of the training between prunings
STEPS = 4  # of M-FAC at each pruning between epochs: one does less, and 16 do no more
CHUNK = 32  # images in a batch that gradients are taken of
PUBLISHED_GRADS = 64  # of such batches
PUBLISHED = {"damping": 1e-5, "update": "independent", "gradient_term": 0.0, "step_limit": math.inf}
KINDS = ("statistics as they are", "statistics estimated anew")


class Images(NamedTuple):
    """Training images and labels, and what draws some of them."""

    images: jax.Array
    labels: jax.Array
    random: np.random.Generator

    def from_start(self, seed: int) -> "Images":
        """The same that draws as nobody had drawn: what is compared sees the same images."""
        return self._replace(random=np.random.default_rng(seed))

    def draw(self, number: int) -> tuple[jax.Array, jax.Array]:
        """That many images and labels, none twice in a row of all of them."""
        rounds = -(-number // len(self.images))
        chosen = np.concatenate([self.random.permutation(len(self.images)) for _ in range(rounds)])[:number]
        return self.images[chosen], self.labels[chosen]


def with_new_stats(network: Network, training: Images) -> Network:
    """The network with the batch statistics of some training images."""
    images, _ = training.draw(min(STATS_IMAGES, len(training.images)))
    return resnet20.with_new_stats(network, images, jax.random.key(training.random.integers(1 << 31)))


def gradients(network: Network, training: Images, num_grads: int, *, per_example: bool) -> optax.Params:
    """Gradients of single images or of batches of `CHUNK`, other ones at each call."""
    images, labels = training.draw(num_grads if per_example else num_grads * CHUNK)
    batches = ((images[i : i + CHUNK], labels[i : i + CHUNK]) for i in range(0, len(images), CHUNK))
    loss_fn = jax.tree_util.Partial(resnet20.loss, network.stats)  # new statistics compile nothing anew
    return mfac_jax.collect_gradients(loss_fn, network.params, batches, num_grads, per_example=per_example)


Pruned = tuple[optax.Params, Any]


def by_magnitude(network, masks, sparsity, *, training, num_grads, num_steps=1, **options: Any) -> Pruned:
    """The smallest weights go."""
    del training, num_grads, num_steps
    return pruning.by_magnitude(network.params, sparsity, masks=masks, **options)


def by_mfac(network, masks, sparsity, *, training, num_grads, **options: Any) -> Pruned:
    """The package's default; before each step the batch statistics are estimated anew."""

    def new_gradients(params):
        current = with_new_stats(network._replace(params=params), training)
        return gradients(current, training, num_grads, per_example=True)

    return mfac_jax.pruning.prune(network.params, new_gradients, sparsity, masks=masks, **options)


def of_kernels(grads: optax.Params, masks: Any) -> optax.Params:
    """The gradients, zeros where nothing is pruned: there F is diagonal, and no weight moves."""

    def kept(mask, g):
        return jnp.zeros_like(g) if mask is None else g

    return jax.tree.map(kept, masks, grads, is_leaf=lambda mask: mask is None)


def as_published(network, masks, sparsity, *, training, num_grads, num_steps=16, **options: Any) -> Pruned:
    """The procedure of M-FAC's authors: gradients of batches, of the kernels that are pruned alone."""
    del num_grads

    def new_gradients(params):
        current = network._replace(params=params)
        return of_kernels(gradients(current, training, PUBLISHED_GRADS, per_example=False), masks)

    published = PUBLISHED | {"num_steps": num_steps}
    return mfac_jax.pruning.prune(
        network.params, new_gradients, sparsity, masks=masks, **published, **options
    )


METHODS: dict[str, Callable[..., Pruned]] = {
    "magnitude": by_magnitude,
    "M-FAC": by_mfac,
    "published": as_published,
}


def prunable(params: optax.Params, pattern: str | None) -> Any:
    """Masks that keep everything, of the kernels whose inputs the groups of the pattern divide."""
    size = int(pattern.split(":")[1]) if pattern else 1

    def mask(kept, w):
        return None if kept is None or w.shape[-2] % size else kept

    masks = resnet20.masks_of_main_path(params)
    return jax.tree.map(mask, masks, params, is_leaf=lambda kept: kept is None)


def without_training(args, network: Network, training: Images, accuracy) -> tuple[dict, Any]:
    """Accuracies of each method at each sparsity with both kinds of statistics, and the last masks."""
    steps = {"num_steps": 1} if args.mode == "one-shot" else {}
    rows: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    masks = None
    with tqdm(total=len(args.methods) * len(args.sparsity), unit="network") as bar:
        for name in args.methods:
            for sparsity in args.sparsity:
                training = training.from_start(args.seed)
                prune = functools.partial(METHODS[name], training=training, num_grads=args.num_grads)
                bar.set_description(f"{name}, {sparsity:g}")
                before = prunable(network.params, args.pattern)
                params, masks = prune(network, before, sparsity, pattern=args.pattern, **steps)
                pruned = network._replace(params=params)
                for kind, result in zip(KINDS, (pruned, with_new_stats(pruned, training)), strict=True):
                    rows[kind].setdefault(name, []).append(accuracy(result))
                bar.update()
    return rows, masks


def gradually(args, problem: Workload, training: Images, accuracy) -> tuple[dict, Any, list[str]]:
    """Accuracies of each method after every epoch, the last masks, and the sparsity in every epoch."""
    steps = len(problem.batches) // args.epochs
    last = max(1, args.epochs * 2 // 3)  # pruning ends there, and the last third is for recovery
    schedule = optax.polynomial_schedule(0.0, args.sparsity[-1], power=3, transition_steps=last)
    earlier = np.asarray([schedule(epoch) for epoch in range(1, last)]).tolist()
    sparsities = [*earlier, args.sparsity[-1]]  # the last one not rounded to float32
    masks = prunable(problem.params, args.pattern)
    optimizer = optax.sgd(optax.cosine_decay_schedule(RATE, len(problem.batches)), momentum=0.9)
    tx = mfac_jax.pruning.keep_pruned(optimizer, masks)
    rows, last_masks = {}, masks
    with tqdm(total=len(args.methods) * len(problem.batches), unit="step") as bar:
        for name in args.methods:
            draws = training.from_start(args.seed)
            method = functools.partial(METHODS[name], training=draws, num_grads=args.num_grads)

            def prune(state, masks, sparsity, method=method):
                network = Network(state.params, state.model_state["batch_stats"])
                return method(network, masks, sparsity, num_steps=STEPS, pattern=args.pattern)

            def callback(state, name=name):
                bar.update()
                if not int(state.step) % steps:
                    network = Network(state.params, state.model_state["batch_stats"])
                    rows.setdefault(name, []).append(accuracy(network))
                    bar.set_postfix(accuracy=rows[name][-1])

            bar.set_description(name)
            prune_at = {epoch * steps: sparsity for epoch, sparsity in enumerate(sparsities)}
            _, last_masks = pruning.train_and_prune(
                problem, tx, masks, prune_at, prune, args.seed, callback
            )
    in_epoch = sparsities + sparsities[-1:] * (args.epochs - last)
    return rows, last_masks, [f"{i + 1}\n{sparsity:.2f}" for i, sparsity in enumerate(in_epoch)]


def make_parser() -> argparse.ArgumentParser:
    """Every option, with its default."""
    parser = pruning.make_parser("prune_resnet20", __doc__, SPARSITIES)
    add, count = parser.add_argument, comparison.count
    add(
        "--data-dir",
        type=Path,
        help=f"folder with CIFAR-10 in any of its forms and {WEIGHTS}; or an *.npz with CIFAR-10",
    )
    add("--tfds", action="store_true", help="take CIFAR-10 from tensorflow_datasets, kept in --data-dir")
    add("--weights", type=Path, help=f"npz with the weights, in place of {WEIGHTS} in --data-dir")
    add(
        "--mode",
        choices=["one-shot", "recomputed", "gradual"],
        default="recomputed",
        help="one step; 16 steps; or 4 at the start of each of the first "
        "two thirds of the epochs of training, up to the last of --sparsity on a cubic curve",
    )
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        default=list(METHODS)[:2],
        metavar="NAME",
        help=f"which to compare, of {', '.join(METHODS)}; the last one's sparsity by leaf is printed",
    )
    add(
        "--pattern",
        choices=["2:4", "block:4"],
        help="at most 2 of 4 consecutive inputs are kept, or 4 go together; without it, single weights",
    )
    add("--samples", type=count, default=10_000, metavar="N", help="use only the first N training images")
    add("--epochs", type=count, default=6, help="passes over them, when gradual")
    add("--batch-size", type=count, default=64, help="images a step of the training, when gradual")
    return parser


def weights_file(args: argparse.Namespace) -> Path:
    """The file given, or the one beside CIFAR-10."""
    if args.weights is None and args.data_dir is None:
        raise DataError(f"pass --weights, or a --data-dir with {WEIGHTS}")
    return args.weights or (args.data_dir.parent if args.data_dir.is_file() else args.data_dir) / WEIGHTS


def read(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[Network, Workload]:
    """The network, and the training of it."""
    if args.data_dir is None and not args.tfds:
        parser.error("pass --data-dir with CIFAR-10, or --tfds")
    if args.pattern == "2:4" and max(args.sparsity) > 0.5:
        parser.error("--pattern 2:4 prunes half at most: pass --sparsity 0.5")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        network = resnet20.read(weights_file(args))
        names = ("epochs", "batch_size", "samples", "data_dir", "tfds", "seed")
        problem = train_cifar10.make_workload(**{name: getattr(args, name) for name in names})
        if (
            len(problem.data["images"]) < resnet20.BATCH
            or len(problem.data["valid_images"]) < resnet20.PIECE
        ):
            raise DataError(
                f"{resnet20.BATCH} training images and {resnet20.PIECE} test images are needed, or more; "
                f"got {problem.source}"
            )
    except (DataError, OSError) as error:
        parser.error(str(error))
    return network, problem._replace(params=network.params, model_state={"batch_stats": network.stats})


def main(argv: Sequence[str] | None = None) -> None:
    """Read, prune, and report; `argv` is the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    network, problem = read(parser, args)
    plt.switch_backend("Agg")  # pictures go to files; no window is opened
    data = problem.data
    training = Images(data["images"], data["labels"], np.random.default_rng(args.seed))
    tested = len(data["valid_images"]) // resnet20.PIECE * resnet20.PIECE
    test = data["valid_images"][:tested], data["valid_labels"][:tested]

    def accuracy(network):
        return float(resnet20.accuracy_and_loss(network, *test)[0])

    before, loss = map(float, resnet20.accuracy_and_loss(network, *test))
    print(f"Data: {problem.source}")
    print(f"Before pruning: accuracy {before:.4f}, loss {loss:.4f}, on {tested:,} test images")
    masks = prunable(network.params, args.pattern)
    entries = sum(mask.size for mask in jax.tree.leaves(masks))
    print(f"{args.mode}: {entries:,} weights in {len(jax.tree.leaves(masks))} kernels take part")
    if args.mode == "gradual":
        rows, masks, ticks = gradually(args, problem, training, accuracy)
        pruning.print_table("Test accuracy after each epoch:", [t.split("\n")[1] for t in ticks], rows)
        labels = {"xlabel": "epoch, and sparsity of the kernels in it"}
    else:
        tables, masks = without_training(args, network, training, accuracy)
        ticks = [f"{sparsity:g}" for sparsity in args.sparsity]
        for kind, rows in tables.items():
            pruning.print_table(f"Test accuracy, batch {kind}:", ticks, rows)
        rows = tables[KINDS[1]]
        labels = {"xlabel": f"sparsity of the kernels; batch {KINDS[1]}"}
    print(f"\n{args.methods[-1]}, the last network:\n{mfac_jax.pruning.pruning_report(masks)}")
    path = args.out / f"{args.mode}.png"
    title = f"Pruning of a ResNet-20, {args.mode}"
    pruning.plot_accuracy(rows, ticks, before, labels | {"title": title}, path)
    print(f"\nThe picture is {path}")


if __name__ == "__main__":
    main()
