"""A ResNet-20 in Flax linen on CIFAR-10: its loss, and what is measured on it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples import cifar10_data, comparison
from examples.common.data import epoch_batches
from examples.common.workload import Workload
from examples.resnet20 import PIECE, ResNet, augment, normalize
from examples.train_cifar10 import Options

EVALUATED = 4000  # training images, picked at random once, that the training loss is measured on


@functools.cache
def loss_and_evaluate(width: int, blocks: int, flip: bool):
    """Make the two functions of the workload; equal arguments give the same objects."""
    model = ResNet(width, blocks)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels

    def loss(params, model_state, data, indices, key):
        images = normalize(augment(data["images"][indices], key, flip))
        variables = {"params": params, **model_state}
        logits, model_state = model.apply(variables, images, train=True, mutable=list(model_state))
        return cross_entropy(logits, data["labels"][indices]).mean(), model_state

    def evaluate(params, model_state, data):
        def logits(images):
            pad = -len(images) % PIECE
            pieces = jnp.pad(images, ((0, pad), (0, 0), (0, 0), (0, 0))).reshape(-1, PIECE, 32, 32, 3)
            variables = {"params": params, **model_state}

            def piece_logits(piece) -> Any:
                return model.apply(variables, normalize(piece), train=False)

            rows = jax.lax.map(piece_logits, pieces)
            return rows.reshape(-1, 10)[: len(images)]

        train, valid = logits(data["images"][data["evaluated"]]), logits(data["valid_images"])
        return {
            "train_loss": cross_entropy(train, data["labels"][data["evaluated"]]).mean(),
            "valid_loss": cross_entropy(valid, data["valid_labels"]).mean(),
            "valid_accuracy": jnp.mean(valid.argmax(axis=-1) == data["valid_labels"]),
        }

    return loss, evaluate


def make_workload(
    epochs: int = Options.epochs,
    batch_size: int = Options.batch_size,
    samples: int | None = Options.samples,
    width: int = Options.width,
    blocks: int = Options.blocks,
    data_dir: Path | None = Options.data_dir,
    tfds: bool = Options.tfds,
    *,
    seed: int,
) -> Workload:
    """Make the workload; the seed sets parameters and batches."""
    arrays = cifar10_data.load(data_dir, tfds)
    images, labels = arrays.images[:samples], arrays.labels[:samples]
    batches = epoch_batches(len(images), batch_size, epochs, seed)
    evaluated = np.random.default_rng(0).permutation(len(images))[:EVALUATED]
    variables = ResNet(width, blocks).init(jax.random.key(seed), jnp.zeros((1, 32, 32, 3)), train=False)
    loss, evaluate = loss_and_evaluate(width, blocks, arrays.can_be_flipped)
    data = {
        "images": images,
        "labels": labels,
        "evaluated": evaluated,
        "valid_images": arrays.valid_images,
        "valid_labels": arrays.valid_labels,
    }
    counts = f"{len(images):,} training and {len(arrays.valid_images):,} validation images"
    return Workload(
        name="cifar10",
        source=f"{arrays.source}: {counts}",
        params=variables["params"],
        model_state={"batch_stats": variables["batch_stats"]},
        data=jax.tree.map(jnp.asarray, data),
        batches=batches,
        loss=loss,
        evaluate=evaluate,
    )


def run(options: Options, folders: Mapping[tuple[str, int], Path]) -> None:
    """Run the comparison; the folders are for checkpoints."""
    names = ("epochs", "batch_size", "samples", "width", "blocks", "data_dir", "tfds")
    settings = {name: getattr(options, name) for name in names}
    comparison.run(options, folders, lambda seed: make_workload(**settings, seed=seed))
