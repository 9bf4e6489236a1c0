"""Shapes of the parameters of networks, for windows that are measured without training them."""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from examples.resnet20 import ResNet

Shapes = tuple[tuple[int, ...], ...]


def resnet20_shapes() -> Shapes:
    """The leaves of the ResNet-20 of examples/resnet20.py: 65 kernels, scales and biases."""

    def init():
        return ResNet().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)["params"]

    return tuple(leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(init)))


def transformer_shapes(width: int = 176, layers: int = 12, heads: int = 8, tokens: int = 256) -> Shapes:
    """A decoder as Flax has it: attention with biases, two dense layers four times as wide, two norms."""
    head = (heads, width // heads)
    attention = ((width, *head), head) * 3 + ((*head, width), (width,))
    dense = ((width, 4 * width), (4 * width,), (4 * width, width), (width,))
    layer = attention + dense + ((width,),) * 4
    return (tokens, width), (tokens, width), *layer * layers, (width,), (width,)


def resnet50_shapes() -> Shapes:
    """ResNet-50 for 1,000 classes: kernels, scales and biases of its convolutions, and the last layer."""

    def convolution(size: int, inputs: int, outputs: int) -> Shapes:
        return (size, size, inputs, outputs), (outputs,), (outputs,)

    shapes, inputs = convolution(7, 3, 64), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(1, inputs, width) + convolution(3, width, width)
            shapes += convolution(1, width, 4 * width)
            shapes += () if block else convolution(1, inputs, 4 * width)
            inputs = 4 * width
    return (*shapes, (inputs, 1000), (1000,))


def count(shapes: Iterable[tuple[int, ...]]) -> int:
    """How many parameters leaves of these shapes hold."""
    return sum(map(math.prod, shapes))


RESNET20 = resnet20_shapes()
RESNET20_SIZE = count(RESNET20)
