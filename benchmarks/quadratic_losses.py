"""What the updates of the Optimal Brain Surgeon leave of the quadratic loss, on random cases.

The same weights go in each case: those with the lowest scores. The loss is that of the model which the
updates come from, 1/2 delta^T F delta, so that the joint update has the lowest there is.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mfac_jax
from examples.common import markdown
from examples.common.command_line import Count, Seed, parse

SHAPES = ((12, 60), (40, 24))  # gradients, weights; one program each
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user can choose."""

    seed: Seed = 0
    """of all cases"""
    cases: Count = 1000
    """how many to draw"""


class Losses(NamedTuple):
    """The increase of the loss, for each case."""

    joint: Any
    independent: Any
    zeroing: Any


def random_losses(seed: int, cases: int) -> Losses:
    """Draw so many cases, and compute their losses in float64."""
    with jax.enable_x64(True):
        keys = jax.random.split(jax.random.key(seed), (len(SHAPES), -(-cases // len(SHAPES))))
        found = [_losses_of_cases(some, *shape) for some, shape in zip(keys, SHAPES, strict=True)]
        return Losses(*(np.concatenate(losses)[:cases] for losses in zip(*found, strict=True)))


@functools.partial(jax.jit, static_argnums=(1, 2))
@functools.partial(jax.vmap, in_axes=(0, None, None))
def _losses_of_cases(key: jax.Array, m: int, d: int) -> Losses:
    """Of a case with any sparsity, damping (in units of the mean squared gradient) and correlation."""
    keys = jax.random.split(key, 7)
    weights = jax.random.normal(keys[0], (1, d))
    common = jax.random.normal(keys[1], (4, d)) * 10 ** jax.random.uniform(keys[2], (4, 1), minval=-1)
    grads = jax.random.normal(keys[3], (m, 4)) @ common
    grads += jax.random.uniform(keys[4]) * jax.random.normal(keys[5], (m, d))
    sparsity, exponent = jax.random.uniform(keys[6], (2,))
    damping = 10 ** (-6 * exponent) * jnp.mean(grads**2)
    grads = grads[:, None]
    scores = mfac_jax.pruning.obs_scores(weights, grads, damping)
    masks = jnp.argsort(jnp.argsort(scores)) >= jnp.ceil(0.95 * sparsity * d)

    def loss(new):
        move = new - weights
        return (damping * jnp.sum(move**2) + jnp.mean((grads @ move[0]) ** 2)) / 2

    def updated(update):
        return mfac_jax.pruning.obs_update(weights, grads, masks, damping, update=update, gradient_term=0.0)

    zeros = mfac_jax.pruning.apply_masks(weights, masks)
    return Losses(*map(loss, (updated("joint"), updated("independent"), zeros)))


def main(argv: Sequence[str] | None = None) -> None:
    """Print quantiles of the ratios of the losses; `argv` is the command line."""
    options = parse(Options, argv, __doc__)
    losses = random_losses(options.seed, options.cases)
    rows = []
    for above, below in (("joint", "independent"), ("joint", "zeroing"), ("independent", "zeroing")):
        ratios = np.quantile(getattr(losses, above) / getattr(losses, below), QUANTILES)
        rows.append([f"{above} / {below}", *(f"{ratio:.3g}" for ratio in ratios)])
    print(markdown.table(["loss of", *(f"{100 * q:g} %" for q in QUANTILES)], rows), end="")


if __name__ == "__main__":
    main()
