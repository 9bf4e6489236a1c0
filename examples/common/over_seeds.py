"""The mean over seeds and its spread, as every table has them."""

import math
from collections.abc import Sequence

import numpy as np


def deviation(values: Sequence[float] | np.ndarray) -> float:
    """Sample standard deviation (n - 1); 0 for a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def text(values: Sequence[float | None] | np.ndarray) -> str:
    """Write mean ± standard deviation; this has two digits, the mean as many decimals."""
    numbers = np.array(values, float)  # None, JSON's NaN, becomes one
    diverged = int(np.sum(~np.isfinite(numbers)))
    if diverged:
        return f"{diverged} of {len(numbers)} diverged"
    mean, spread = numbers.mean(), deviation(numbers)
    if len(numbers) == 1:
        return f"{mean:.4g}"
    if mean < 1e-4 or spread < 1e-4 * mean:
        return f"{mean:.2g} ± {spread:.2g}" if mean < 1e-4 else f"{mean:.4g} ± {spread:.2g}"
    decimals = max(0, 1 - math.floor(math.log10(spread)))
    return f"{mean:.{decimals}f} ± {spread:.{decimals}f}"
