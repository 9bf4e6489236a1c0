"""The ResNet-20 for CIFAR-10: the model, its inputs, weights from PyTorch, and what is measured on it."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from examples.common.data import DataError
from examples.resnet20_data import read_arrays

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)  # of CIFAR-10's pixels in [0, 1]
PIECE = 200  # images evaluated at a time
BATCH = 128  # images that a set of batch statistics is taken from

Params = Any
Stats = Any


class ResNet(nn.Module):
    """The ResNet for CIFAR of He et al. 2016 with 6 `blocks` + 2 layers and projection shortcuts."""

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
    """Turn uint8 pixels into float32 with about zero mean and unit variance."""
    return (images.astype(jnp.float32) / 255 - jnp.array(MEAN)) / jnp.array(STD)


def augment(images: jax.Array, key: jax.Array, flip: bool) -> jax.Array:
    """Crop at random after padding by four pixels; with `flip`, also mirror at random."""
    crop_key, flip_key = jax.random.split(key)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (len(images), 1, 1, 1))
        images = jnp.where(mirrored, images[:, :, ::-1], images)
    padded = jnp.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    corners = jax.random.randint(crop_key, (len(images), 2), 0, 9)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (*at, 0), (32, 32, 3)))(padded, corners)


class Network(NamedTuple):
    """Weights and batch statistics, trees of Flax."""

    params: Params
    stats: Stats


def read(path: Path) -> Network:
    """Read the network from an npz with the arrays of a PyTorch state dict, kernels `(out, in, h, w)`."""
    network = jax.tree.map(jnp.asarray, Network(*read_arrays(path)))
    if jax.tree.map(jnp.shape, network) != jax.tree.map(jnp.shape, abstract()):
        raise DataError(f"{path}: the arrays do not have the shapes of a ResNet-20 for 10 classes")
    return network


def abstract() -> Network:
    """The shapes and dtypes of the network, without arrays."""

    def init(key: jax.Array) -> Any:
        return ResNet().init(key, jnp.zeros((1, 32, 32, 3)), train=False)

    variables = jax.eval_shape(init, jax.random.key(0))
    return Network(variables["params"], variables["batch_stats"])


def masks_of_main_path(params: Params) -> Any:
    """Masks that keep everything, for what M-FAC's authors prune: kernels but those of shortcuts."""

    def mask(path, w):
        takes_part = path[-1].key == "kernel" and w.shape[:2] != (1, 1)
        return jnp.ones(w.shape, bool) if takes_part else None

    return jax.tree_util.tree_map_with_path(mask, params)


def loss(stats: Stats, params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Cross-entropy of uint8 images and their labels, with batch statistics as they are."""
    images, labels = batch
    logits: Any = ResNet().apply({"params": params, "batch_stats": stats}, normalize(images), train=False)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@jax.jit
def accuracy_and_loss(
    network: Network, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Measure accuracy and mean loss on images. Their number must be a multiple of `PIECE`."""

    def piece(images_and_labels):
        images, labels = images_and_labels
        variables = {"params": network.params, "batch_stats": network.stats}
        logits: Any = ResNet().apply(variables, normalize(images), train=False)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(logits.argmax(-1) == labels), jnp.mean(losses)

    pieces = images.reshape(-1, PIECE, *images.shape[1:]), labels.reshape(-1, PIECE)
    accuracy, mean_loss = jax.lax.map(piece, pieces)
    return accuracy.mean(), mean_loss.mean()


@jax.jit
def with_new_stats(network: Network, images: jax.Array, key: jax.Array) -> Network:
    """Take new batch statistics: the mean over batches of the images, cropped and mirrored at random."""
    batches = len(images) // BATCH
    zeros = jax.tree.map(jnp.zeros_like, network.stats)

    def add(total, batch_and_key):
        batch, key = batch_and_key
        variables = {"params": network.params, "batch_stats": zeros}
        inputs = normalize(augment(batch, key, flip=True))
        _, new = ResNet().apply(variables, inputs, train=True, mutable=["batch_stats"])
        # Flax mixes a tenth of the batch's statistics into the old ones, which are zeros here.
        return jax.tree.map(lambda t, s: t + 10 * s / batches, total, new["batch_stats"]), None

    inputs = images[: batches * BATCH].reshape(-1, BATCH, *images.shape[1:]), jax.random.split(key, batches)
    return network._replace(stats=jax.lax.scan(add, zeros, inputs)[0])
