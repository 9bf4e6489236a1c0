"""What a training problem is, and which data it refuses."""

import pickle
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

# What numpy and pickle raise on files that are missing, cut short, or of another kind.
READ_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


class DataError(Exception):
    """Data that cannot be used. The message says what was looked for and what to do."""


class Workload(NamedTuple):
    """A training problem.

    Workloads that differ only in their seed share `loss` and `evaluate`, so jit compiles them once.

    Attributes:
      name: what reports call it.
      source: where the data are from, in words.
      params: initial parameters.
      model_state: batch statistics and the like, `{}` where the model has none.
      data: arrays on the device. They are an argument of the functions: XLA folds constants of a closure.
      batches: what each step trains on, indices `(steps, batch)` int32.
      loss: `(params, model_state, data, indices, key)` to the loss of the batch and the new model state.
      evaluate: `(params, model_state, data)` to `train_loss`, `valid_loss` and, for classifiers,
        `valid_accuracy`.
    """

    name: str
    source: str
    params: Any
    model_state: Any
    data: dict[str, jax.Array]
    batches: np.ndarray
    loss: Callable[..., tuple[jax.Array, Any]]
    evaluate: Callable[..., dict[str, jax.Array]]

    @property
    def parameters(self) -> int:
        """The number of the model's parameters."""
        return sum(x.size for x in jax.tree.leaves(self.params))


def epoch_batches(samples: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """Draw the indices `(steps, batch)`: each epoch has a new order and drops its incomplete batch."""
    if batch_size > samples:
        raise DataError(f"a batch of {batch_size} needs as many samples, got {samples}: lower --batch-size")
    random = np.random.default_rng(seed)
    per_epoch = samples // batch_size
    orders = [random.permutation(samples)[: per_epoch * batch_size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, batch_size).astype(np.int32)
