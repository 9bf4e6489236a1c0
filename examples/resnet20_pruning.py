"""A ResNet-20 for CIFAR-10, pruned in one step, in several, or between epochs of training."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import mfac_jax
from examples import cifar10, cifar10_data, pruning, resnet20
from examples.common.data import DataError
from examples.common.files import replacing
from examples.common.workload import Workload
from examples.prune_resnet20 import Options, weights_file
from examples.resnet20 import Network

STATS_IMAGES = 2048  # that batch statistics are estimated from
RATE = 0.02  # of SGD, at the start of the training between prunings
STEPS = 4  # of M-FAC at each pruning between epochs: one does less, and 16 do no more
CHUNK = 32  # images in a batch that gradients are taken of
PUBLISHED_GRADS = 64  # of such batches
PUBLISHED = {"damping": 1e-5, "update": "independent", "gradient_term": 0.0, "step_limit": math.inf}
KINDS = ("statistics as they are", "statistics estimated anew")


class Images(NamedTuple):
    """Training images and labels, and a random generator that draws some of them."""

    images: jax.Array
    labels: jax.Array
    random: np.random.Generator

    def from_start(self, seed: int) -> "Images":
        """Start the draws again, so that all methods see the same images."""
        return self._replace(random=np.random.default_rng(seed))

    def draw(self, number: int) -> tuple[jax.Array, jax.Array]:
        """Draw images and labels; none comes again before all others came."""
        rounds = -(-number // len(self.images))
        chosen = np.concatenate([self.random.permutation(len(self.images)) for _ in range(rounds)])[:number]
        return self.images[chosen], self.labels[chosen]


def with_new_stats(network: Network, training: Images) -> Network:
    """Take new batch statistics from some training images."""
    images, _ = training.draw(min(STATS_IMAGES, len(training.images)))
    return resnet20.with_new_stats(network, images, jax.random.key(training.random.integers(1 << 31)))


def gradients(network: Network, training: Images, num_grads: int, *, per_example: bool) -> optax.Params:
    """Collect gradients of single images or of batches of `CHUNK`, others at each call."""
    images, labels = training.draw(num_grads if per_example else num_grads * CHUNK)
    batches = ((images[i : i + CHUNK], labels[i : i + CHUNK]) for i in range(0, len(images), CHUNK))
    loss_fn = jax.tree_util.Partial(resnet20.loss, network.stats)  # new statistics compile nothing anew
    return mfac_jax.collect_gradients(loss_fn, network.params, batches, num_grads, per_example=per_example)


Pruned = tuple[optax.Params, Any]


def by_magnitude(network, masks, sparsity, *, training, num_grads, num_steps=1, **options: Any) -> Pruned:
    """Prune the smallest weights."""
    del training, num_grads, num_steps
    return pruning.by_magnitude(network.params, sparsity, masks=masks, **options)


def by_mfac(network, masks, sparsity, *, training, num_grads, **options: Any) -> Pruned:
    """Prune by the package's default; before each step the batch statistics are estimated anew."""

    def new_gradients(params):
        current = with_new_stats(network._replace(params=params), training)
        return gradients(current, training, num_grads, per_example=True)

    return mfac_jax.pruning.prune(network.params, new_gradients, sparsity, masks=masks, **options)


def of_kernels(grads: optax.Params, masks: Any) -> optax.Params:
    """Set gradients to zero where nothing is pruned: there F is diagonal, and no weight moves."""

    def kept(mask, g):
        return jnp.zeros_like(g) if mask is None else g

    return jax.tree.map(kept, masks, grads, is_leaf=lambda mask: mask is None)


def as_published(network, masks, sparsity, *, training, num_grads, num_steps=16, **options: Any) -> Pruned:
    """Prune as M-FAC's authors do: with gradients of batches, and only of the kernels that are pruned."""
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
    """Masks that keep everything, for kernels whose number of inputs the pattern's groups divide."""
    size = int(pattern.split(":")[1]) if pattern else 1

    def mask(kept, w):
        return None if kept is None or w.shape[-2] % size else kept

    masks = resnet20.masks_of_main_path(params)
    return jax.tree.map(mask, masks, params, is_leaf=lambda kept: kept is None)


def without_training(options: Options, network: Network, training: Images, accuracy) -> tuple[dict, Any]:
    """Prune by each method to each sparsity; return accuracies for each kind of statistics, and masks."""
    steps = {"num_steps": 1} if options.mode == "one-shot" else {}
    rows: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    masks = None
    with tqdm(total=len(options.methods) * len(options.sparsity), unit="network") as bar:
        for name in options.methods:
            for sparsity in options.sparsity:
                training = training.from_start(options.seed)
                prune = functools.partial(METHODS[name], training=training, num_grads=options.num_grads)
                bar.set_description(f"{name}, {sparsity:g}")
                before = prunable(network.params, options.pattern)
                params, masks = prune(network, before, sparsity, pattern=options.pattern, **steps)
                pruned = network._replace(params=params)
                for kind, result in zip(KINDS, (pruned, with_new_stats(pruned, training)), strict=True):
                    rows[kind].setdefault(name, []).append(accuracy(result))
                bar.update()
    return rows, masks


def gradually(
    options: Options, problem: Workload, training: Images, accuracy
) -> tuple[dict, Any, list[float]]:
    """Train and prune by each method; return accuracies, the last masks, and the sparsity of each epoch."""
    steps = len(problem.batches) // options.epochs
    last = max(1, options.epochs * 2 // 3)  # pruning ends there, and the last third is for recovery
    schedule = optax.polynomial_schedule(0.0, options.sparsity[-1], power=3, transition_steps=last)
    earlier = np.asarray([schedule(epoch) for epoch in range(1, last)]).tolist()
    sparsities = [*earlier, options.sparsity[-1]]  # the last one not rounded to float32
    masks = prunable(problem.params, options.pattern)
    optimizer = optax.sgd(optax.cosine_decay_schedule(RATE, len(problem.batches)), momentum=0.9)
    tx = mfac_jax.pruning.keep_pruned(optimizer, masks)
    rows, last_masks = {}, masks
    with tqdm(total=len(options.methods) * len(problem.batches), unit="step") as bar:
        for name in options.methods:
            draws = training.from_start(options.seed)
            method = functools.partial(METHODS[name], training=draws, num_grads=options.num_grads)

            def prune(state, masks, sparsity, method=method):
                network = Network(state.params, state.model_state["batch_stats"])
                return method(network, masks, sparsity, num_steps=STEPS, pattern=options.pattern)

            def callback(state, name=name):
                bar.update()
                if not int(state.step) % steps:
                    network = Network(state.params, state.model_state["batch_stats"])
                    rows.setdefault(name, []).append(accuracy(network))
                    bar.set_postfix(accuracy=rows[name][-1])

            bar.set_description(name)
            prune_at = {epoch * steps: sparsity for epoch, sparsity in enumerate(sparsities)}
            _, last_masks = pruning.train_and_prune(
                problem, tx, masks, prune_at, prune, options.seed, callback
            )
    return rows, last_masks, sparsities + sparsities[-1:] * (options.epochs - last)


def read(options: Options) -> tuple[Network, Workload]:
    """Read the network, and make the workload that trains it."""
    network = resnet20.read(weights_file(options))
    arrays = cifar10_data.load(options.data_dir, options.tfds)
    training, tested = len(arrays.images[: options.samples]), len(arrays.valid_images)
    if training < resnet20.BATCH or tested < resnet20.PIECE:
        raise DataError(
            f"{resnet20.BATCH} training images and {resnet20.PIECE} test images are needed, or more; got "
            f"{training} and {tested} from {arrays.source}"
        )
    names = ("epochs", "batch_size", "samples", "data_dir", "tfds", "seed")
    problem = cifar10.make_workload(**{name: getattr(options, name) for name in names})
    return network, problem._replace(params=network.params, model_state={"batch_stats": network.stats})


class Comparison(NamedTuple):
    """What came out.

    Attributes:
      masks: of the last network.
      tables: of accuracies, each with the title and the head that go before its rows.
      rows: what is drawn.
      ticks: what stands below each point.
      xlabel: what stands below the picture.
    """

    masks: Any
    tables: list[tuple[str, list[str], dict[str, list[float]]]]
    rows: dict[str, list[float]]
    ticks: list[str]
    xlabel: str


def compare(options: Options, network: Network, problem: Workload, accuracy) -> Comparison:
    """Prune in the mode that was chosen."""
    data = problem.data
    training = Images(data["images"], data["labels"], np.random.default_rng(options.seed))
    if options.mode == "gradual":
        rows, masks, sparsities = gradually(options, problem, training, accuracy)
        head = [f"{sparsity:.2f}" for sparsity in sparsities]
        ticks = [f"{epoch}\n{sparsity}" for epoch, sparsity in enumerate(head, start=1)]
        tables = [("Test accuracy after each epoch", head, rows)]
        return Comparison(masks, tables, rows, ticks, "epoch, and sparsity of the kernels in it")
    kinds, masks = without_training(options, network, training, accuracy)
    ticks = [f"{sparsity:g}" for sparsity in options.sparsity]
    tables = [(f"Test accuracy, batch {kind}", ticks, rows) for kind, rows in kinds.items()]
    xlabel = f"sparsity of the kernels; batch {KINDS[1]}"
    return Comparison(masks, tables, kinds[KINDS[1]], ticks, xlabel)


def run(options: Options) -> None:
    """Read, prune, and report."""
    network, problem = read(options)
    tested = len(problem.data["valid_images"]) // resnet20.PIECE * resnet20.PIECE
    test = problem.data["valid_images"][:tested], problem.data["valid_labels"][:tested]

    def accuracy(network):
        return float(resnet20.accuracy_and_loss(network, *test)[0])

    before, loss = map(float, resnet20.accuracy_and_loss(network, *test))
    print(f"Data: {problem.source}")
    print(f"Before pruning: accuracy {before:.4f}, loss {loss:.4f}, on {tested:,} test images")
    kernels = jax.tree.leaves(prunable(network.params, options.pattern))
    entries = sum(mask.size for mask in kernels)
    print(f"{options.mode}: {entries:,} weights in {len(kernels)} kernels take part")
    found = compare(options, network, problem, accuracy)
    path = options.out / f"{options.mode}.png"
    labels = {"xlabel": found.xlabel, "title": f"Pruning of a ResNet-20, {options.mode}"}
    with replacing(path) as draft:
        pruning.plot_accuracy(found.rows, found.ticks, before, labels, draft)
    for title, head, rows in found.tables:
        pruning.print_accuracies(title, head, rows)
    print(f"\n{options.methods[-1]}, the last network:\n{mfac_jax.pruning.pruning_report(found.masks)}")
    print(f"\nThe picture is {path}")
