"""Pruning of trained networks by the Optimal Brain Surgeon, and training of pruned ones."""

from mfac_jax._src.pruning.keep_pruned import KeepPrunedState, keep_pruned
from mfac_jax._src.pruning.masks import apply_masks, kernel_masks
from mfac_jax._src.pruning.prune import obs_scores, obs_update, prune
from mfac_jax._src.pruning.report import pruning_report, sparsity, sparsity_by_leaf
from mfac_jax._src.pruning.set_masks import set_masks

__all__ = [
    "KeepPrunedState",
    "apply_masks",
    "keep_pruned",
    "kernel_masks",
    "obs_scores",
    "obs_update",
    "prune",
    "pruning_report",
    "set_masks",
    "sparsity",
    "sparsity_by_leaf",
]


def __dir__() -> list[str]:
    return list(__all__)
