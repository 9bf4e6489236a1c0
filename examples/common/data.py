"""Which data the examples refuse, and the order of the batches. Imports no JAX."""

import pickle
import zipfile
import zlib

import numpy as np

from examples.common.command_line import RefusedError

# What numpy and pickle raise on files that are missing, cut short, or of another kind.
READ_ERRORS = (
    *(OSError, ValueError, KeyError, TypeError, EOFError),
    *(pickle.UnpicklingError, zipfile.BadZipFile, zlib.error),
)


class DataError(RefusedError):
    """Data that cannot be used. The message says what was looked for and what to do."""


def check_batch(samples: int, batch_size: int) -> None:
    """Refuse a batch that is larger than the data."""
    if batch_size > samples:
        raise DataError(f"a batch of {batch_size} needs as many samples, got {samples}: lower --batch-size")


def epoch_batches(samples: int, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """Draw the indices `(steps, batch)`: each epoch has a new order and drops its incomplete batch."""
    check_batch(samples, batch_size)
    random = np.random.default_rng(seed)
    per_epoch = samples // batch_size
    orders = [random.permutation(samples)[: per_epoch * batch_size] for _ in range(epochs)]
    return np.concatenate(orders).reshape(-1, batch_size).astype(np.int32)
