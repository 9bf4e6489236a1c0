"""Train a ResNet-20 in Flax linen on CIFAR-10.

Without --data-dir, on scikit-learn's digits enlarged to 32 x 32 x 3, so that it runs anywhere. Images are
cropped at random, and CIFAR-10's also mirrored, on the device. A seed sets the initial parameters, the
order of the batches, and crops and mirrors. The training loss is measured as the validation loss is: with
running batch statistics, without crops, on 4,000 training images (all, where there are fewer).
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from examples import cifar10_data, comparison
from examples.common.workload import Workload, epoch_batches

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's pixels in [0, 1]
EVALUATED = 4000  # training images, picked at random once, that the training loss is measured on
PIECE = 200  # images evaluated at a time


class ResNet(nn.Module):
    """The ResNet for CIFAR of He et al. 2016, 6 `blocks` + 2 layers, with projection shortcuts."""

    width: int = 16
    blocks: int = 3

    @nn.compact
    def __call__(self, x, train: bool):  # noqa: D102
        he = nn.initializers.he_normal()
        conv = functools.partial(nn.Conv, use_bias=False, kernel_init=he)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        x = nn.relu(norm()(conv(self.width, (3, 3), padding=1)(x)))
        for stage in range(3):
            width = self.width * 2**stage
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                h = nn.relu(norm()(conv(width, (3, 3), stride, padding=1)(x)))
                h = norm()(conv(width, (3, 3), padding=1)(h))
                if stride > 1:
                    x = norm()(conv(width, (1, 1), stride)(x))
                x = nn.relu(x + h)
        return nn.Dense(10)(x.mean(axis=(1, 2)))


def normalize(images: jax.Array) -> jax.Array:
    """uint8 pixels to float32 with about zero mean and unit variance."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


def augment(images: jax.Array, key: jax.Array, flip: bool) -> jax.Array:
    """Random crops after padding by four pixels and, with `flip`, random mirror images."""
    crop_key, flip_key = jax.random.split(key)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 9)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (32, 32, 3)))(padded, corners)


@functools.cache
def loss_and_evaluate(width: int, blocks: int, flip: bool):
    """The two functions of the workload; the same objects for equal arguments."""
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
    epochs: int = 4,
    batch_size: int = 128,
    samples: int | None = None,
    width: int = 16,
    blocks: int = 3,
    data_dir: Path | None = None,
    tfds: bool = False,
    *,
    seed: int,
) -> Workload:
    """CIFAR-10, or digits enlarged to its size; the seed sets parameters and batches."""
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


def make_parser() -> argparse.ArgumentParser:
    """Every option, with its default."""
    optimizers = ["mfac", "sgd", "adamw"]
    parser = comparison.make_parser("cifar10", __doc__, optimizers=optimizers, seeds=1, evaluations=4)
    add, count = parser.add_argument, comparison.count
    add("--epochs", type=count, default=4, help="passes over the training data")
    add("--batch-size", type=count, default=128, help="images a step")
    add("--samples", type=count, metavar="N", help="use only the first N training images")
    add("--width", type=count, default=16, help="channels of the first stage")
    add(
        "--blocks",
        type=count,
        default=3,
        help="blocks in each of three stages; 3 is ResNet-20",
    )
    add(
        "--data-dir",
        type=Path,
        help="folder that holds cifar-10-batches-bin, cifar-10-batches-py or an *.npz; or an *.npz itself",
    )
    add(
        "--tfds",
        action="store_true",
        help="take the data from tensorflow_datasets, which keeps them in --data-dir",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    parser = make_parser()
    args = parser.parse_args(argv)
    names = ("epochs", "batch_size", "samples", "width", "blocks", "data_dir", "tfds")
    settings = {name: getattr(args, name) for name in names}
    comparison.run(parser, args, lambda seed: make_workload(**settings, seed=seed))


if __name__ == "__main__":
    main()
