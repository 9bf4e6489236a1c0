"""M-FAC and CG-FAC for JAX: second-order optimization without large matrices, as optax transforms."""

from mfac_jax import components, pruning
from mfac_jax._src.cgfac.alias import cgfac
from mfac_jax._src.cgfac.capture import value_and_grad_with_factors
from mfac_jax._src.cgfac.layers import KernelLayout, LayerFactors
from mfac_jax._src.cgfac.nnx import nnx_value_and_grad_with_factors
from mfac_jax._src.cgfac.operators import empirical_fisher, gauss_newton
from mfac_jax._src.cgfac.state import ScaleByCGFACState
from mfac_jax._src.cgfac.transform import scale_by_cgfac
from mfac_jax._src.mfac.alias import mfac, mfac_published
from mfac_jax._src.mfac.diagnostics import Diagnostics, diagnostics
from mfac_jax._src.mfac.diagnostics_log import DiagnosticsLog
from mfac_jax._src.mfac.ihvp import ihvp
from mfac_jax._src.mfac.memory_estimate import MemoryEstimate, memory_estimate
from mfac_jax._src.mfac.state import ScaleByMFACState
from mfac_jax._src.mfac.state_shardings import state_shardings
from mfac_jax._src.mfac.transform import scale_by_mfac
from mfac_jax._src.static.collect import collect_gradients
from mfac_jax._src.static.fisher_inverse import FisherInverse

__version__ = "0.1.0"

__all__ = [
    "Diagnostics",
    "DiagnosticsLog",
    "FisherInverse",
    "KernelLayout",
    "LayerFactors",
    "MemoryEstimate",
    "ScaleByCGFACState",
    "ScaleByMFACState",
    "cgfac",
    "collect_gradients",
    "components",
    "diagnostics",
    "empirical_fisher",
    "gauss_newton",
    "ihvp",
    "memory_estimate",
    "mfac",
    "mfac_published",
    "nnx_value_and_grad_with_factors",
    "pruning",
    "scale_by_cgfac",
    "scale_by_mfac",
    "state_shardings",
    "value_and_grad_with_factors",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


def __getattr__(name: str):
    """Names of pruning from before it had a namespace, with a warning."""
    if name not in pruning.__all__:
        raise AttributeError(f"module 'mfac_jax' has no attribute {name!r}")
    import warnings

    warnings.warn(
        f"mfac_jax.{name} is mfac_jax.pruning.{name} now.", category=DeprecationWarning, stacklevel=2
    )
    return getattr(pruning, name)
