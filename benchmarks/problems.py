"""The problems of the comparison of optimizers, by name."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.workloads import autoencoder, least_squares, poisson
from examples import cifar10, digits, finetune, finetune_data, text
from examples.common.workload import Workload

NOISE = 0.3  # share of random labels in noisy-digits


class Problem(NamedTuple):
    """A problem, and how it is run.

    Attributes:
      make: makes the workload of a `seed`.
      evaluations: a run whose course is reported measures losses before the first step and so many times;
        others before the first step and at the end.
      reads_data_dir: `make` takes the folder of --data-dir as `data_dir`; others have their data with them.
      float64: whether it runs in float64.
      why_missing: why it cannot be made without packages that are not there; None if it can.
    """

    make: Callable[..., Workload]
    evaluations: int
    reads_data_dir: bool = False
    float64: bool = False
    why_missing: Callable[[], str | None] = lambda: None


def noisy_digits(*, seed: int) -> Workload:
    """The MLP on batches of 4 images; a share of the training labels is random, none of the others."""
    workload = digits.make_workload(epochs=4, batch_size=4, seed=seed)
    rng = np.random.default_rng(seed)
    labels = np.array(workload.data["y"])
    is_random = rng.random(len(labels)) < NOISE
    labels[is_random] = rng.integers(0, 10, is_random.sum())
    source = f"{workload.source}, {100 * NOISE:g} % of the training labels at random"
    return workload._replace(data=workload.data | {"y": jax.numpy.asarray(labels)}, source=source)


def _digits(model: str, epochs: int) -> Problem:
    return Problem(functools.partial(digits.make_workload, model, epochs), evaluations=22)


def _cifar10(epochs: int, evaluations: int) -> Problem:
    make = functools.partial(cifar10.make_workload, epochs, batch_size=64, samples=10_000)
    return Problem(make, evaluations, reads_data_dir=True)


def _finetune(*, seed: int) -> Workload:
    """Smaller than the example: an optimizer's step with three layers takes a core up to two seconds."""
    return finetune.make_workload(batch_size=32, samples=2000, layers=2, seed=seed)


def _text(steps: int) -> Problem:
    return Problem(functools.partial(text.make_workload, steps), evaluations=10, reads_data_dir=True)


# A name ends in its number of steps, or of epochs for cifar10, where a problem comes in several lengths.
PROBLEMS = {
    "digits-mlp": _digits("mlp", epochs=12),
    "digits-cnn": _digits("cnn", epochs=12),
    "noisy-digits": Problem(noisy_digits, evaluations=12),
    "cifar10": _cifar10(epochs=2, evaluations=6),
    "text": _text(steps=600),
    "digits-mlp-44": _digits("mlp", epochs=2),
    "digits-cnn-44": _digits("cnn", epochs=2),
    "digits-mlp-1320": _digits("mlp", epochs=60),
    "digits-cnn-1320": _digits("cnn", epochs=60),
    "text-3000": _text(steps=3000),
    "cifar10-10": _cifar10(epochs=10, evaluations=10),
    "cifar10-30": _cifar10(epochs=30, evaluations=10),
    "autoencoder": Problem(autoencoder.make_workload, evaluations=20),
    "poisson": Problem(poisson.make_workload, evaluations=20),
    "least-squares": Problem(least_squares.make_workload, evaluations=20, float64=True),
    "finetune": Problem(_finetune, evaluations=6, why_missing=finetune_data.why_missing),
}
