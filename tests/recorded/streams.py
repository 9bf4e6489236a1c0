"""Fixed streams of gradients through every part of the package, and a few numbers of what comes out.

`figures.json` beside this file holds these numbers as revision 2190069 gave them, before the house was
rebuilt; streams with a learned step factor are newer. `python -m tests.recorded.streams FILE` writes them
as they are now. `mfac` has the metric and the storage here that were its defaults then: QR factorisations
of the rotated metric differ between CPUs where gradients span few directions.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax

if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)

import numpy as np

from tests.recorded import optimizer, products
from tests.recorded.gradients import STREAMS

FIGURES = Path(__file__).with_name("figures.json")
SAMPLES = 24  # entries that are recorded of an array
__all__ = ["FIGURES", "STREAMS", "folded", "optimizer", "products", "sampled"]


def sampled(tree: Any) -> list[list[float]]:
    """Of each leaf some entries, and the norm; NaN and Inf as they are, which Python's JSON reads."""
    found = []
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf, np.float64).ravel()
        entries = x[np.unique(np.linspace(0, x.size - 1, min(SAMPLES, x.size)).round().astype(int))]
        found.append([float(f"{number:.9g}") for number in (*entries, np.linalg.norm(x))])
    return found


def folded(tree: Any) -> Any:
    """Streams are long: the leaves of every fourth update, and of the last."""
    updates = tree.get("updates") if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    if updates is None:
        return tree
    kept = [*updates[:-1:4], updates[-1]]
    return tree | {"updates": kept} if isinstance(tree, dict) else kept


if __name__ == "__main__":
    figures = {}
    full = {}
    for name, make in STREAMS.items():
        print(name, flush=True)
        result = make()
        figures[name] = sampled(folded(result))
        full[name] = result
    rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(found)}" for name, found in figures.items())
    Path(sys.argv[1]).write_text(f"{{\n{rows}\n}}\n")
    if len(sys.argv) > 2:
        import pickle

        Path(sys.argv[2]).write_bytes(pickle.dumps(jax.tree.map(np.asarray, full)))
