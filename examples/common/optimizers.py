"""The optimizers of the examples by name, and the schedule that all share."""

import functools
from collections.abc import Callable

import optax
import optax.contrib

import mfac_jax


class NeedsFactors(optax.GradientTransformationExtraArgs):
    """An optimizer that wants the factors of the layers, as `curvature`, beside the gradient."""


# From a learning-rate schedule to an optimizer. What is not given here is the default of its library.
OPTIMIZERS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "mfac": mfac_jax.mfac,
    "cgfac": lambda schedule: NeedsFactors(*mfac_jax.cgfac(schedule)),
    "sgd": functools.partial(optax.sgd, momentum=0.9),
    "adamw": optax.adamw,
    "nadamw": optax.nadamw,
    "muon": optax.contrib.muon,
}


def warmup_cosine(rate: float, steps: int) -> optax.Schedule:
    """A tenth of the steps as warm-up to the rate, then a cosine to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, rate, max(1, steps // 10), max(2, steps))


def make_optimizer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    """Make the optimizer of that name, with `rate` at the peak of the shared schedule."""
    return OPTIMIZERS[name](warmup_cosine(rate, steps))
