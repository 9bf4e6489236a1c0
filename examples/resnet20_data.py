"""Weights of a ResNet-20 from PyTorch. Imports no JAX."""

from pathlib import Path
from typing import Any

import numpy as np

from examples.common.data import READ_ERRORS, DataError


def read_arrays(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read weights and batch statistics, as Flax names them, from an npz with a PyTorch state dict."""
    try:
        with np.load(path) as file:
            arrays = dict(file)
        params, stats = {}, {}
        for i, (conv, norm) in enumerate(_layers()):
            params[f"Conv_{i}"] = {"kernel": arrays[f"{conv}.weight"].transpose(2, 3, 1, 0)}
            params[f"BatchNorm_{i}"] = {"scale": arrays[f"{norm}.weight"], "bias": arrays[f"{norm}.bias"]}
            stats[f"BatchNorm_{i}"] = {
                "mean": arrays[f"{norm}.running_mean"],
                "var": arrays[f"{norm}.running_var"],
            }
        params["Dense_0"] = {"kernel": arrays["fc.weight"].T, "bias": arrays["fc.bias"]}
    except READ_ERRORS as error:
        raise DataError(f"cannot read a ResNet-20 from {path}: {error}") from error
    return params, stats


def _layers() -> list[tuple[str, str]]:
    """Name each convolution and the normalisation after it, as in PyTorch, in the order of Flax."""
    layers = [("conv1", "bn1")]
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"layer{stage}.{block}"
            layers += [(f"{name}.conv{i}", f"{name}.bn{i}") for i in (1, 2)]
            if stage > 1 and block == 0:
                layers.append((f"{name}.downsample.0", f"{name}.downsample.1"))
    return layers
