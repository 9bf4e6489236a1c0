"""Factorisations of batches, on few threads too."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mfac_jax._src.linalg.batches import of_each

# As many batches at a time as threads, where LAPACK for each would wait for ever.
SEVERAL = """
import os
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, mfac_jax
shapes = [(256,), (300,), (64, 40), (7,), (513,), (1000,)] * 2
grads = {f"w{i}": jax.random.normal(jax.random.key(i), (20, *s)) for i, s in enumerate(shapes)}
for _ in range(3):
    fisher = mfac_jax.FisherInverse.from_gradients(grads, 1e-3, blocks=32)
    jax.block_until_ready(jax.tree.leaves(fisher))
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux gives a process its cores")
def test_several_batches_at_a_time_end_on_two_cores():
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-c", SEVERAL]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.stdout == "done\n", run.stderr


@pytest.mark.parametrize("number", [1, 3])
def test_each_matrix_is_solved_with_its_own_right_hand_side(number):
    random = np.random.default_rng(0)
    matrices = jnp.asarray(random.standard_normal((number, 4, 4)) + 4 * np.eye(4), jnp.float32)
    columns = jnp.asarray(random.standard_normal((number, 4)), jnp.float32)
    found = jax.jit(lambda *arrays: of_each(jnp.linalg.solve, *arrays))(matrices, columns)
    np.testing.assert_allclose(jnp.einsum("kij,kj->ki", matrices, found), columns, rtol=1e-4, atol=1e-5)
