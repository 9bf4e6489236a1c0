"""M-FAC and CG-FAC for JAX: second-order optimization without large matrices, as optax transforms."""

from mfac_jax._alias import cgfac as cgfac
from mfac_jax._alias import mfac as mfac
from mfac_jax._capture import nnx_value_and_grad_with_factors as nnx_value_and_grad_with_factors
from mfac_jax._capture import value_and_grad_with_factors as value_and_grad_with_factors
from mfac_jax._cgfac import ScaleByCGFACState as ScaleByCGFACState
from mfac_jax._cgfac import scale_by_cgfac as scale_by_cgfac
from mfac_jax._curvature import empirical_fisher as empirical_fisher
from mfac_jax._curvature import gauss_newton as gauss_newton
from mfac_jax._diagnostics import Diagnostics as Diagnostics
from mfac_jax._diagnostics import DiagnosticsLog as DiagnosticsLog
from mfac_jax._diagnostics import diagnostics as diagnostics
from mfac_jax._gradients import collect_gradients as collect_gradients
from mfac_jax._gradual import KeepPrunedState as KeepPrunedState
from mfac_jax._gradual import keep_pruned as keep_pruned
from mfac_jax._gradual import set_masks as set_masks
from mfac_jax._layer_fisher import LayerFactors as LayerFactors
from mfac_jax._masks import apply_masks as apply_masks
from mfac_jax._masks import kernel_masks as kernel_masks
from mfac_jax._masks import pruning_report as pruning_report
from mfac_jax._masks import sparsity as sparsity
from mfac_jax._masks import sparsity_by_leaf as sparsity_by_leaf
from mfac_jax._pruning import obs_scores as obs_scores
from mfac_jax._pruning import obs_update as obs_update
from mfac_jax._pruning import prune as prune
from mfac_jax._sharding import state_shardings as state_shardings
from mfac_jax._static import FisherInverse as FisherInverse
from mfac_jax._transform import ScaleByMFACState as ScaleByMFACState
from mfac_jax._transform import ihvp as ihvp
from mfac_jax._transform import scale_by_mfac as scale_by_mfac

__version__ = "0.1.0"
