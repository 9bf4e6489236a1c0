"""States from elsewhere: NumPy arrays work, and what `init` would not make is refused by its name."""

import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax import components, diagnostics, ihvp, mfac, mfac_published, scale_by_mfac
from tests.mfac.test_components import HALF

PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
KINDS: dict[str, Any] = {
    "solver": "inverse",
    "blocks": "leaf",
    "metric": "diagonal",
    "step_adaptation": 0.5,
}
TX: Any = scale_by_mfac(4, 0.5, **KINDS)
STATE: Any = TX.init(PARAMS)
CHAIN: Any = mfac_published(0.1, 4, momentum=0.5)  # momentum comes third


def update(state, params=None):
    return TX.update(PARAMS, state, params)


USES = {
    "update": update,
    "update with params": lambda state: update(state, PARAMS),
    "update in jit": lambda state: jax.eval_shape(update, state, PARAMS),
    "ihvp": lambda state: ihvp(state, PARAMS),
    "diagnostics": diagnostics,
}
SMALL = ("grads_seen", "gram")
READ = {
    "ihvp": (*SMALL, "window", "block_of_leaf"),
    "diagnostics": (
        *SMALL,
        "grads_rejected",
        "next_row",
        "coefficients",
        "shift",
        "log_step",
        "step_length",
    ),
}


def damaged(x) -> dict[str, Any]:
    """What may have become of an array."""
    other = jnp.float16 if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    # Under jit a Python number is an array as any other.
    shorter = (
        {"one entry less": x[..., :-1], "one row less": x[:-1], "a list": x.tolist()} if x.ndim else {}
    )
    return {
        "an axis more": x[None],
        "another dtype": x.astype(other),
        "float64": np.asarray(x, np.float64),
        "None": None,
        "a tuple": (x,),
        **shorter,
    }


LEAVES = dict(jax.tree_util.tree_leaves_with_path(STATE))
DAMAGED = [(path, kind) for path, x in LEAVES.items() for kind in damaged(x)]


def with_leaf(path, value):
    """The state with another value in the place of one leaf."""
    leaves = [value if p == path else x for p, x in LEAVES.items()]
    return jax.tree.unflatten(jax.tree.structure(STATE), leaves)


def place_of(use: str, path, kind: str) -> str:
    """What a message has to name, for one leaf and damage; empty where nobody can know of it."""
    field = path[0].name
    if field not in READ.get(use, STATE._fields):
        return ""
    if use == "update in jit" and kind == "float64":
        return ""  # jit makes float32 of it, exactly as it was before
    if field == "window" and use in ("update", "ihvp"):
        # Without parameters nobody knows how rows are: then the updates do not fit, or the metric.
        names = {
            "one entry less": "(shapes of the parameters given to init|state.metric)",
            "another dtype": "",
        }
        names["a tuple"] = "(tree of the parameters given to init|state.metric|state.window)"
        return names.get(kind, "state.window")
    return f"state.{field}"


def said(use: str, state) -> str:
    try:
        USES[use](state)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize("use", USES)
def test_every_damaged_field_is_refused_by_its_name(use):
    cure = r"got .*\. (Restore a checkpoint into tx\.init|Call init again)|Call init again"
    for path, kind in DAMAGED:
        place = place_of(use, path, kind)
        if place:
            message = said(use, with_leaf(path, damaged(LEAVES[path])[kind]))
            assert re.search(place, message), (path, kind, message)
            assert re.search(cure, message), message


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("window", {"a": STATE.window["a"]}, r"state\.window\['b'\] must be float32 .* got nothing there"),
        ("window", {**STATE.window, "c": jnp.ones((4, 2))}, r"state\.window must have no leaf \['c'\]"),
        ("window", None, r"state\.window\['a'\] must be .* got nothing there"),
        ("metric", (), r"state\.metric\.second_moment\['a'\] must be .* got nothing there"),
        ("metric", tuple(STATE.metric), r"state\.metric\.second_moment\['a'\] must be .* got nothing"),
        ("metric", STATE.metric._replace(second_moment=jnp.zeros(())), "second_moment.* got nothing there"),
        ("solver", (), r"state\.solver\..* must be float32 .* got nothing there"),
        ("step_length", (), r"state\.step_length\.mean_cosine must be float32 .* got nothing there"),
        ("made_with", None, r"state\.made_with must be a dict .* got None"),
        ("made_with", dict.fromkeys(list(STATE.made_with)[1:], ()), r"state\.made_with must be a dict"),
        ("made_with", dict.fromkeys(STATE.made_with, 0), r"state\.made_with must be a dict .* no leaves"),
    ],
)
def test_every_damaged_tree_is_refused_by_its_name(use, field, value, message):
    if field in READ.get(use, STATE._fields) or field == "made_with":
        with pytest.raises(ValueError, match=message):
            USES[use](STATE._replace(**{field: value}))


@pytest.mark.parametrize("use", [use for use in USES if use != "diagnostics"])
@pytest.mark.parametrize("state", [None, tuple(STATE), STATE._asdict(), list(STATE)])
def test_what_is_no_state_is_refused(use, state):
    message = (
        rf"state must be a ScaleByMFACState, got {type(state).__name__}\. .* Restore a checkpoint into"
    )
    with pytest.raises(TypeError, match=message):
        USES[use](state)


@pytest.mark.parametrize("make", [mfac, mfac_published])
def test_a_chain_refuses_what_is_no_state_of_its_own(make):
    tx: Any = make(0.1)
    state = jax.eval_shape(tx.init, PARAMS)
    for other in (None, state[:-1], list(state), {"0": state}):
        with pytest.raises(TypeError, match=r"state must be a tuple of \d, one for each part of the chain"):
            tx.update(PARAMS, other, PARAMS)
    with pytest.raises(ValueError, match=r"state\[\d\]\.count must be int32 .* got nothing there"):
        jax.eval_shape(make(lambda count: 0.1).update, PARAMS, state, PARAMS)
    reordered = (*state[1:], state[0])
    with pytest.raises((TypeError, ValueError), match=r"state(\[\d\])? must (be|have)"):
        jax.eval_shape(tx.update, PARAMS, reordered, PARAMS)


def test_the_parts_of_a_chain_are_not_taken_for_each_other():
    """Momentum of updates would be lost where weight decay stands in its place."""
    state = jax.eval_shape(mfac_published(0.1, 4, weight_decay=None).init, PARAMS)
    other = mfac(0.1, 4, weight_decay=1e-3, metric="identity", step_adaptation=0.0)
    with pytest.raises(ValueError, match=r"state\[1\] must have no leaf \.count, got int32"):
        jax.eval_shape(other.update, PARAMS, state, PARAMS)


def test_a_chain_refuses_damaged_momentum():
    state = CHAIN.init(PARAMS)
    ema = state[2]._replace(ema={**state[2].ema, "b": jnp.ones(3)})
    with pytest.raises(
        ValueError, match=r"state\[2\]\.ema\['b'\] must be float32 of shape \(2,\), got .*3"
    ):
        CHAIN.update(PARAMS, (*state[:2], ema, *state[3:]), PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tx",
    [mfac(0.1, 3), CHAIN, mfac(0.1, 3, solver="inverse", storage=HALF, weight_decay=0.1)],
    ids=["mfac", "mfac_published", "inverse and storage"],
)
def test_numpy_states_go_on_as_those_of_jax_do(tx):
    params = jax.tree.map(lambda p: p * 0.5, PARAMS)
    state = other = tx.init(params)
    steps = {"jit": jax.jit(tx.update), "as it is": tx.update}
    for step in steps.values():
        for scale in (1.0, -0.5):
            grads = jax.tree.map(lambda p, s=scale: p * s, PARAMS)
            updates, state = tx.update(grads, state, params)
            stored = pickle.loads(pickle.dumps(jax.device_get(other)))
            assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(stored))
            found, other = step(grads, stored, params)
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), found, updates
            )
        assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(other))
    inner, stored = (optax.tree.get(s, "ScaleByMFACState") for s in (state, jax.device_get(state)))
    jax.tree.map(np.testing.assert_array_equal, diagnostics(inner), diagnostics(stored))
    if tx is not CHAIN:
        storage = HALF if "float16" in str(inner.made_with) else None
        products = (ihvp(s, PARAMS, storage=storage) for s in (inner, stored))
        jax.tree.map(np.testing.assert_array_equal, *products)


def test_the_state_of_other_parameters_is_refused_where_they_are_passed():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx: Any = mfac(0.1, 3, storage=None)
    with pytest.raises(
        ValueError, match=r"window\['a'\] must be bfloat16 .* got float32 of shape \(3, 3, 2\)"
    ):
        tx.update(half, tx.init(PARAMS), half)
    with pytest.raises(ValueError, match=r"window\['a'\] must be float32 .* got bfloat16"):
        jax.jit(tx.update)(PARAMS, tx.init(half), PARAMS)


def test_a_component_of_ones_own_makes_its_state():
    metric = components.Metric("own", lambda new: {"sum": new()}, lambda *args: args)  # pyright: ignore
    tx: Any = scale_by_mfac(3, metric=metric)
    state = jax.eval_shape(tx.init, PARAMS)
    with pytest.raises(ValueError, match=r"state\.metric\['sum'\]\['a'\] must be float32 .* got nothing"):
        jax.eval_shape(tx.update, PARAMS, state._replace(metric={"sum": {}}))
