"""The oracle: F = damping I + G^T G / n as a dense float64 matrix, in NumPy.

`grads` is G, the gradients in the window as rows `(k, d)`, oldest first, k being at most `num_grads`: rows
that are not in use have no part in F.
"""

from collections.abc import Sequence

import numpy as np


def inverse_product(
    grads: np.ndarray,
    x: np.ndarray,
    damping: float,
    count: int,
    blocks: Sequence[slice | np.ndarray] = (slice(None),),
) -> np.ndarray:
    """F^-1 x from the eigenvectors of F; each of the `blocks` of coordinates has its own F."""
    answer = np.empty(x.shape)
    for block in blocks:
        rows = grads[:, block].astype(np.float64)
        fisher = damping * np.eye(rows.shape[1]) + rows.T @ rows / count
        s, v = np.linalg.eigh(fisher)
        answer[block] = v @ (v.T @ x[block] / s)
    return answer


def mean_by_age(grads: np.ndarray, momentum: float) -> np.ndarray:
    """The mean of the rows with weights proportional to momentum^age: the newest row where it is 0."""
    weights = momentum ** np.arange(len(grads) - 1, -1, -1.0)
    return weights @ grads / weights.sum()


def inverse_of_newest(grads: np.ndarray, damping: float, count: int) -> np.ndarray:
    """F^-1 of the last row in float64 through the m x m system, for d that has no dense matrix."""
    grads = grads.astype(np.float64)
    newest = np.eye(len(grads))[-1]
    return grads.T @ np.linalg.solve(grads @ grads.T / count + damping * np.eye(len(grads)), newest)


def published_inverse_of_newest(grads: np.ndarray, damping: float, count: int) -> np.ndarray:
    """The published form in the dtype of `grads`: (g - G^T (G G^T + n damping I)^-1 G g) / damping."""
    newest, dtype = grads[-1], grads.dtype
    system = grads @ grads.T + np.asarray(count * damping, dtype) * np.eye(len(grads), dtype=dtype)
    inside = grads.T @ np.linalg.solve(system, grads @ newest)
    return (newest - inside) / np.asarray(damping, dtype)


def condition_numbers(grads: np.ndarray, dampings: np.ndarray, count: int) -> np.ndarray:
    """cond(G G^T + n damping I) for each damping, in float64."""
    s = np.linalg.eigvalsh(grads.astype(np.float64) @ grads.T.astype(np.float64))
    return (s[-1] + count * dampings) / (s[0] + count * dampings)


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of `expected`, in float64."""
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))
