"""The handwritten digits of scikit-learn, or your own. Imports no JAX."""

import functools
from pathlib import Path

import numpy as np

from examples.common.data import READ_ERRORS, DataError


@functools.lru_cache(maxsize=1)  # every seed of a run asks for the same data
def load(data_dir: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """Load samples (n, 64), scaled to at most one, and labels 0 to 9."""
    if data_dir is None:
        from sklearn.datasets import load_digits  # takes a second, and is not needed for other data

        x, y = load_digits(return_X_y=True)
    else:
        path = data_dir / "digits.npz"
        try:
            with np.load(path) as arrays:
                x, y = arrays["x"], arrays["y"]
        except READ_ERRORS as error:
            raise DataError(f"--data-dir: cannot read x and y from {path}: {error}") from error
    where = f"--data-dir: in {data_dir}/digits.npz "
    if x.shape[1:] not in ((64,), (8, 8)) or y.shape != x.shape[:1]:
        raise DataError(
            f"{where}x must be (n, 64) or (n, 8, 8) and y (n,), they are {x.shape} and {y.shape}"
        )
    if not (np.isin(y, np.arange(10)).all() and np.isfinite(x).all() and np.max(x) > 0):
        raise DataError(f"{where}x must be finite, with positive entries, and y labels from 0 to 9")
    return (x / x.max()).reshape(-1, 64).astype(np.float32), y.astype(np.int32)
