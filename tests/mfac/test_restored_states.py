"""A state that comes back under other settings is refused by a message that names both.

`python -m tests.mfac.test_restored_states` prints what is said, as a table.
"""

import pickle
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import serialization

from mfac_jax import scale_by_mfac

PARAMS = {"a": jnp.ones((8, 128)), "b": jnp.ones(3), "c": jnp.ones(2)}
GRADS = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), PARAMS)
TABLE_LENGTH = 160  # of a message in the table


def first_alone(path):
    return "['a']" in str(path[0])


def last_alone(path):
    return "['c']" in str(path[0])


MADE_WITH: dict[str, Any] = {"num_grads": 4, "blocks": first_alone, "step_adaptation": 0.5}
# Each other setting, and what a message about it has to name.
OTHERS: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "num_grads=5": ({"num_grads": 5}, ("num_grads=5", "num_grads=4")),
    "metric='diagonal'": ({"metric": "diagonal"}, ("metric=diagonal", "metric=identity")),
    "solver='inverse'": ({"solver": "inverse"}, ("solver=inverse", "solver=cholesky")),
    "storage=jnp.bfloat16": ({"storage": jnp.bfloat16}, ("storage=bfloat16", "storage=None")),
    "step_adaptation=0": ({"step_adaptation": 0}, ("step_adaptation=none", "step_adaptation=adapted")),
    "blocks=None": ({"blocks": None}, ("1 block", "2 block")),
    "blocks='leaf'": ({"blocks": "leaf"}, ("3 block", "2 block")),
    "blocks of other labels": ({"blocks": last_alone}, ("leaf ['b'] was in block 1", "in block 0")),
    "host_chunk=2": ({"host_chunk": 2}, ("pinned memory of the host", "host_chunk=2")),
}
# Kinds that stand in the structure of the state: libraries refuse it, with the names of both.
IN_STRUCTURE = ("metric='diagonal'", "solver='inverse'", "storage=jnp.bfloat16", "step_adaptation=0")


def transform(options):
    return scale_by_mfac(**(MADE_WITH | options))


def state_to_restore():
    """After some steps."""
    tx = transform({})
    state, update = tx.init(PARAMS), jax.jit(tx.update)
    for power in (1, 2, 3):
        _, state = update(jax.tree.map(lambda g, p=power: g**p, GRADS), state)
    return state


STATE = state_to_restore()


def said(function, *args) -> str:
    """The message of what is refused; empty if nothing is."""
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def by_flax(options):
    return serialization.from_bytes(transform(options).init(PARAMS), serialization.to_bytes(STATE))


def by_orbax(options, folder: Path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", STATE)
        checkpointer.wait_until_finished()
        return checkpointer.restore(folder / "state", transform(options).init(PARAMS))


@pytest.mark.parametrize("name", OTHERS)
def test_a_state_of_other_settings_is_refused_by_a_message_that_names_both(name):
    options, both = OTHERS[name]
    message = said(transform(options).update, GRADS, STATE)
    assert all(part in message for part in both), message
    unpickled = pickle.loads(pickle.dumps(STATE))
    assert said(transform(options).update, GRADS, unpickled) == message


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "blocks of other labels"])
def test_it_is_refused_under_jit_too(name):
    options, both = OTHERS[name]
    message = said(jax.jit(transform(options).update), GRADS, STATE)
    assert all(part in message for part in both), message


def test_labels_that_are_traced_give_updates_that_nobody_overlooks_and_keep_the_state():
    options, _ = OTHERS["blocks of other labels"]
    updates, state = jax.jit(transform(options).update)(GRADS, STATE)
    assert all(bool(jnp.isnan(u).all()) for u in jax.tree.leaves(updates))
    assert int(state.grads_rejected) == 1
    jax.tree.map(np.testing.assert_array_equal, state._replace(grads_rejected=STATE.grads_rejected), STATE)


@pytest.mark.parametrize("name", IN_STRUCTURE)
def test_libraries_that_restore_into_another_structure_name_the_kinds(name, tmp_path):
    options, (wanted, made) = OTHERS[name]
    assert wanted in said(by_flax, options)
    message = said(by_orbax, options, tmp_path)
    assert wanted in message
    assert made in message


def test_a_state_of_the_same_settings_comes_back_and_goes_on(tmp_path):
    updates, expected = jax.jit(transform({}).update)(GRADS, STATE)
    # Labels that are spelled otherwise, and split the leaves alike.
    alike = {"blocks": lambda path: 7 if first_alone(path) else "rest"}
    for options in ({}, alike):
        step = jax.jit(transform(options).update)
        for restored in (by_flax(options), by_orbax(options, tmp_path / str(len(options)))):
            found, state = step(GRADS, restored)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), found, updates)
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), state, expected)


def main() -> None:
    from examples.common import markdown

    rows = []
    for name, (options, _) in OTHERS.items():
        with tempfile.TemporaryDirectory() as folder:
            messages = (
                said(transform(options).update, GRADS, STATE),
                said(jax.jit(transform(options).update), GRADS, STATE)
                or "updates are NaN, state unchanged",
                said(by_flax, options) or "restored; refused by the first step",
                said(by_orbax, options, Path(folder)) or "restored; refused by the first step",
            )
        rows.append((name, *(" ".join(message.split())[:TABLE_LENGTH] for message in messages)))
    print(markdown.table(("restored under", "update", "update in jit", "flax", "Orbax"), rows))


if __name__ == "__main__":
    main()
