"""What a training problem is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np


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
