"""Time of one `scale_by_mfac` step beside the time of reading its window twice, on this machine.

Two windows of about the same size: one flat vector of 272,474 parameters, and a tree of 59 leaves
shaped like a ResNet-20. Everything is timed interleaved in one process; medians are printed.
"""

import argparse
import importlib.metadata
import math
import os
import platform
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # LAPACK's threads spin where cores are shared

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import mfac_jax


def resnet20_shapes() -> list[tuple[int, ...]]:
    """Convolutions, normalisation scales and biases, and the classifier: 59 leaves."""
    shapes, width_in = [(3, 3, 3, 16), (16,), (16,)], 16
    for width in (16, 32, 64):
        for _ in range(3):
            for fan_in in (width_in, width):
                shapes += [(3, 3, fan_in, width), (width,), (width,)]
            width_in = width
    return [*shapes, (64, 10), (10,)]


def full_state(num_grads: int, params, transform):
    """A state whose window and Gram matrix are those of random gradients: as after many steps."""
    keys = iter(jax.random.split(jax.random.key(0), len(params)))
    window = [jax.random.normal(next(keys), (num_grads, *p.shape)) for p in params]
    rows = [leaf.reshape(num_grads, -1) for leaf in window]
    gram = sum(np.asarray(leaf) @ np.asarray(leaf).T for leaf in rows)
    seen = jnp.asarray(num_grads, jnp.int32)
    return transform.init(params)._replace(window=window, gram=jnp.asarray(gram)[None], grads_seen=seen)


@jax.jit
def draw(key, params):
    """A new gradient: one that repeats would take the slower path of a singular Gram matrix."""
    keys = jax.random.split(key, len(params) + 1)
    gradient = [jax.random.normal(k, p.shape) for k, p in zip(keys[1:], params, strict=True)]
    return keys[0], gradient


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-grads", type=int, default=1024, help="rows of the window (default 1024)")
    parser.add_argument("--repeats", type=int, default=31, help="steps timed (default 31)")
    args = parser.parse_args()

    transform = mfac_jax.scale_by_mfac(args.num_grads, 1e-3)
    update = jax.jit(transform.update, donate_argnums=1)
    read = jax.jit(lambda window: [jnp.sum(leaf) for leaf in window])
    trees = {"flat vector": [(272_474,)], "59 leaves": resnet20_shapes()}
    grads = {name: [jnp.ones(shape) for shape in shapes] for name, shapes in trees.items()}
    states = {name: full_state(args.num_grads, grads[name], transform) for name in trees}
    seconds = {(name, what): [] for name in trees for what in ("step", "read")}

    def timed(key, function, *inputs):
        start = time.perf_counter()
        result = jax.block_until_ready(function(*inputs))
        seconds[key].append(time.perf_counter() - start)
        return result

    key = jax.random.key(1)
    for _ in tqdm(range(args.repeats + 1), desc="timing", unit="round"):
        for name in trees:
            timed((name, "read"), read, states[name].window)
            key, gradient = jax.block_until_ready(draw(key, grads[name]))
            _, states[name] = timed((name, "step"), update, gradient, states[name])
            timed((name, "read"), read, states[name].window)

    median = {key: np.median(values[2:]) for key, values in seconds.items()}
    device = jax.devices()[0]
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "optax")
    )
    print(f"{device.device_kind}, {os.cpu_count()} cores, {platform.machine()}; {versions}")
    print(f"{'window':<12} {'parameters':>10} {'step ms':>8} {'read ms':>8} {'step / 2 reads':>15}")
    for name, shapes in trees.items():
        step, once = median[name, "step"], median[name, "read"]
        size = sum(math.prod(shape) for shape in shapes)
        print(f"{name:<12} {size:>10,} {step * 1e3:>8.1f} {once * 1e3:>8.1f} {step / 2 / once:>15.2f}")
    ratio = median["59 leaves", "step"] / median["flat vector", "step"]
    print(f"59 leaves / flat vector: {ratio:.2f}")


if __name__ == "__main__":
    main()
