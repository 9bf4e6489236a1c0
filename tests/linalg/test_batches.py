"""Factorisations of batches, on as few threads as a process can have."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax._src.linalg.batches import of_each

# Several at a time: as many batches as threads, where LAPACK for a batch would wait for ever.
SEVERAL = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import jax, jax.numpy as jnp, mfac_jax, optax
sizes = dict(zip("abcd", (40, 33, 64, 7)))
grads = {name: jax.random.normal(jax.random.key(0), (5, size)) for name, size in sizes.items()}
fisher = mfac_jax.FisherInverse.from_gradients(grads, 1e-3, blocks=16)
jax.block_until_ready(fisher.diagonal())
first = jax.tree.map(lambda g: g[0], grads)
each = {label: mfac_jax.mfac(0.1, 4, blocks="leaf", metric="rotated") for label in "xy"}
tx = optax.partition(each, dict(zip("abcd", "xxyy")))
jax.block_until_ready(jax.jit(tx.update)(first, tx.init(first), first))
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux gives a process its cores")
def test_several_batches_at_a_time_end_on_one_core():
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-c", SEVERAL]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert run.stdout == "done\n", run.stderr


@pytest.mark.parametrize("number", [1, 3])
def test_each_matrix_is_solved_with_its_own_right_hand_side(number):
    random = np.random.default_rng(0)
    matrices = jnp.asarray(random.standard_normal((number, 4, 4)) + 4 * np.eye(4), jnp.float32)
    columns = jnp.asarray(random.standard_normal((number, 4)), jnp.float32)
    found = jax.jit(lambda *arrays: of_each(jnp.linalg.solve, *arrays))(matrices, columns)
    np.testing.assert_allclose(jnp.einsum("kij,kj->ki", matrices, found), columns, rtol=1e-4, atol=1e-5)
