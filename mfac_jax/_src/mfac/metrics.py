"""The metrics of the package, by name."""

from typing import Literal

import optax

from mfac_jax._src.mfac.diagonal_metric import DIAGONAL
from mfac_jax._src.mfac.metric import Coordinates, Metric
from mfac_jax._src.mfac.rotated_metric import rotated_metric


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
