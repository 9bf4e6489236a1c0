"""The parts that `scale_by_mfac` is made of, to build your own: metrics, solvers, storages, step lengths.

Each is a NamedTuple of pure functions. The package's own are passed by name, as in `metric='diagonal'`.
`rotated_metric` makes one with blocks of another size, `low_rank` is a storage of thin factors.
"""

from mfac_jax._src.mfac.metric import Coordinates, Metric
from mfac_jax._src.mfac.rotated_metric import rotated_metric
from mfac_jax._src.mfac.solvers import Solver
from mfac_jax._src.mfac.step_length import StepLength, StepView
from mfac_jax._src.rows.low_rank import low_rank
from mfac_jax._src.rows.storages import Storage

__all__ = [
    "Coordinates",
    "Metric",
    "Solver",
    "StepLength",
    "StepView",
    "Storage",
    "low_rank",
    "rotated_metric",
]


def __dir__() -> list[str]:
    return list(__all__)
