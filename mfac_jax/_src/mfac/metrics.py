"""The metrics of the package, by name."""

from typing import Literal

import optax

from mfac_jax._src.mfac.diagonal_metric import DIAGONAL
from mfac_jax._src.mfac.metric import Coordinates, Metric
from mfac_jax._src.mfac.rotated_metric import rotated_metric
from mfac_jax._src.mfac.tiles import BLOCK_SIZES


def _unchanged(tree: optax.Updates) -> optax.Updates:
    return tree


# The paper's: gradients as they are.
IDENTITY = Metric(
    name="identity",
    init=lambda new: (),
    update=lambda state, gradients, count: (state, Coordinates(_unchanged, _unchanged)),
    elementwise=True,
)

MetricName = Literal["identity", "diagonal", "rotated"]
METRICS = {metric.name: metric for metric in (IDENTITY, DIAGONAL, rotated_metric())}


def by_name(name: str) -> Metric | None:
    """The metric that a state of this name was made with; None where it is a user's own."""
    known = (*METRICS.values(), *map(rotated_metric, BLOCK_SIZES))
    return {metric.name: metric for metric in known}.get(name)
