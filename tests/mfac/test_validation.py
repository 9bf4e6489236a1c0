"""Bad input is refused before anything is compiled, with the value, what is allowed and the cure."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mfac_jax import components, ihvp, mfac, mfac_published, scale_by_mfac

PARAMS = {"layer": {"bias": jnp.ones(4), "kernel": jnp.ones((2, 3))}, "scale": jnp.ones(())}
TX = scale_by_mfac(2, 0.1)
STATE: Any = TX.init(PARAMS)
NAN, INF = float("nan"), float("inf")

NOT_NUMBERS = [
    "0.1",
    "float32",
    None,
    b"1",
    1j,
    True,
    [0.1],
    {},
    object(),
    np.array([0.1, 0.2]),
    jnp.ones(1),
]


def with_leaf(path: str, value) -> dict:
    """PARAMS with another value for the leaf of the layer."""
    return {**PARAMS, "layer": {**PARAMS["layer"], path: value}}


def spelled(value) -> str:
    return f"got {re.escape(repr(value))}"


@pytest.fixture(params=["called", "traced"])
def call(request):
    """Calls a function as it is, or under a trace that never reaches the compiler."""
    return {"called": lambda f, *args: f(*args), "traced": jax.eval_shape}[request.param]


@pytest.mark.parametrize("factory", [scale_by_mfac, lambda n: mfac(0.1, n)], ids=["scale_by_mfac", "mfac"])
@pytest.mark.parametrize("value", [0, -3, True])
def test_num_grads_must_be_positive(factory, value):
    with pytest.raises(ValueError, match=f"num_grads must be an int >= 1, {spelled(value)}.*Pass e.g. 32"):
        factory(value)


@pytest.mark.parametrize("value", [4.0, 2.5, "64", None, np.array([4])])
def test_num_grads_must_be_an_int(value):
    with pytest.raises(TypeError, match=f"num_grads must be an int >= 1, {spelled(value)}.*Pass e.g. 32"):
        scale_by_mfac(value)


def test_num_grads_may_be_a_numpy_integer():
    state: Any = scale_by_mfac(np.int64(3)).init(PARAMS)  # pyright: ignore
    assert state.gram.shape == (1, 3, 3)


def test_num_grads_cannot_be_a_jax_array(call):
    message = r"num_grads .* must be a Python int, got .*int32.* pass static_args=\('num_grads',\)"
    with pytest.raises(TypeError, match=message):
        call(lambda n: scale_by_mfac(n).init(PARAMS), jnp.asarray(4))


@pytest.mark.parametrize("factory", [scale_by_mfac, mfac])
def test_inject_hyperparams_is_told_of_static_args(call, factory):
    tx = optax.inject_hyperparams(factory)(**{"learning_rate": 0.1} if factory is mfac else {}, num_grads=4)
    with pytest.raises(TypeError, match=r"inject_hyperparams pass static_args=\('num_grads',\)"):
        call(tx.init, PARAMS)


@pytest.mark.parametrize("value", [0, 0.0, -1e-3, NAN, INF, np.float64(-1), jnp.float32(0)])
@pytest.mark.parametrize("use", [scale_by_mfac, mfac, ihvp])
def test_damping_must_be_positive(use, value):
    arguments = {scale_by_mfac: (2,), mfac: (0.1, 2), ihvp: (STATE, PARAMS)}[use]
    allowed = "a finite number > 0" if use is ihvp else "a finite number > 0, or a schedule"
    with pytest.raises(ValueError, match=rf"damping must be {allowed}, {spelled(value)}.*Pass e.g."):
        use(*arguments, damping=value)


@pytest.mark.parametrize("value", NOT_NUMBERS)
def test_damping_must_be_a_number(value):
    message = rf"damping must be a finite number > 0, or a schedule, {spelled(value)}.*Pass e.g."
    with pytest.raises(TypeError, match=message):
        scale_by_mfac(2, value)


def test_a_traced_damping_must_be_a_scalar():
    with pytest.raises(TypeError, match=r"damping must be a finite number > 0, .*, got .*Pass e\.g\."):
        jax.eval_shape(lambda damping: scale_by_mfac(2, damping).init(PARAMS), jnp.ones(2))


def test_ihvp_takes_no_schedule_for_damping():
    with pytest.raises(TypeError, match="damping must be a finite number > 0, got <function"):
        ihvp(STATE, PARAMS, damping=optax.linear_schedule(1.0, 0.1, 10))  # pyright: ignore


@pytest.mark.parametrize("value", [-0.1, 1.0, 1.5, NAN, INF])
@pytest.mark.parametrize(
    ("make", "name"),
    [(scale_by_mfac, "window_momentum"), (mfac, "momentum"), (mfac_published, "momentum")],
)
def test_momenta_must_be_in_the_unit_interval(make, name, value):
    message = f"^{name} must be a finite number >= 0 and < 1, {spelled(value)}.*Pass e.g."
    with pytest.raises(ValueError, match=message):
        make(**{name: value})


@pytest.mark.parametrize("make", [scale_by_mfac, mfac])
@pytest.mark.parametrize("value", [-0.1, 1.1, NAN, INF])
def test_step_adaptation_must_be_in_the_closed_unit_interval(make, value):
    allowed = "a finite number >= 0 and <= 1, or a schedule"
    message = f"^step_adaptation must be {allowed}, {spelled(value)}.*Pass e.g."
    with pytest.raises(ValueError, match=message):
        make(step_adaptation=value)


@pytest.mark.parametrize("make", [mfac, mfac_published])
def test_a_mask_needs_weight_decay(make):
    with pytest.raises(ValueError, match=r"mask says where weight_decay acts, .* Pass"):
        make(weight_decay=None, mask=lambda params: params)


@pytest.mark.parametrize("make", [scale_by_mfac, mfac])
@pytest.mark.parametrize("value", ["other", None, 3, ["diagonal"], components.StepLength])
@pytest.mark.parametrize(
    ("name", "kind", "known"),
    [
        ("metric", "Metric", "'identity', 'diagonal', 'rotated'"),
        ("solver", "Solver", "'auto', 'cholesky', 'inverse'"),
    ],
)
def test_components_must_be_names_or_components(make, name, kind, known, value):
    options: dict[str, Any] = {name: value}
    message = f"{name} must be one of {known} or a mfac_jax.components.{kind}, {spelled(value)}"
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("name", ["relative_damping", "nesterov"])
def test_switches_must_be_bools(name):
    options: dict[str, Any] = {name: "no"}
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'no'"):
        scale_by_mfac(**options)


@pytest.mark.parametrize("name", ["step_adaptation", "momentum"])
@pytest.mark.parametrize("value", ["0.1", True, 1j, [0.1]])
def test_other_numbers_must_be_numbers(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be a finite number .*{spelled(value)}.*Pass e.g."):
        mfac(0.1, **{name: value})


@pytest.mark.parametrize("value", ["layer", 3, ["leaf"], np.ones(2)])
def test_blocks_must_be_one_of_its_names_or_a_function(value):
    message = f"blocks must be one of None, 'leaf', or a function of a leaf's key path, {spelled(value)}"
    with pytest.raises(ValueError, match=message):
        scale_by_mfac(blocks=value)


@pytest.mark.parametrize("use", [TX.update, lambda tree, state: ihvp(state, tree)], ids=["update", "ihvp"])
@pytest.mark.parametrize(
    ("tree", "leaf"),
    [
        ({"layer": PARAMS["layer"]}, "['scale']"),
        ({**PARAMS, "shift": jnp.ones(2)}, "['shift']"),
        (with_leaf("bias", None), "['layer']['bias']"),
        (with_leaf("bias", optax.MaskedNode()), "['layer']['bias']"),
        (None, "['layer']['bias']"),
    ],
    ids=["missing leaf", "new leaf", "None", "MaskedNode", "None at the root"],
)
def test_trees_must_be_that_of_init(call, use, tree, leaf):
    message = rf"must have the tree .* given to init, .*{re.escape(leaf)}.* Call init again"
    with pytest.raises(ValueError, match=message):
        call(use, tree, STATE)


@pytest.mark.parametrize("use", [TX.update, lambda tree, state: ihvp(state, tree)], ids=["update", "ihvp"])
@pytest.mark.parametrize("shape", [(), (5,), (4, 1), (0,), (2, 2)])
def test_shapes_must_be_those_of_init(call, use, shape):
    message = re.escape(
        f"given to init, but leaf ['layer']['bias'] is {shape} and was (4,). Call init again"
    )
    with pytest.raises(ValueError, match=message):
        call(use, with_leaf("bias", jnp.ones(shape)), STATE)


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.uint8, bool])
@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("params", lambda tree: TX.init(tree)),
        ("updates", lambda tree: TX.update(tree, STATE)),
        ("tree", lambda tree: ihvp(STATE, tree)),
    ],
    ids=["init", "update", "ihvp"],
)
def test_leaves_must_be_real_floating_point_arrays(call, name, use, dtype):
    message = rf"{name} must be real floating-point arrays, but leaf \['layer'\]\['bias'\] is "
    message += rf"{jnp.dtype(dtype)}.*optax\.masked"
    with pytest.raises(TypeError, match=message):
        call(use, with_leaf("bias", jnp.ones(4, dtype)))


def test_python_numbers_are_no_parameters():
    with pytest.raises(TypeError, match=r"leaf \['layer'\]\['bias'\] is float.*jnp\.asarray"):
        TX.init(with_leaf("bias", 1.0))


def test_ihvp_refuses_the_state_of_a_chain():
    state = mfac(0.1).init(PARAMS)
    message = r"must be a ScaleByMFACState, got tuple.*optax\.tree\.get\(state, 'ScaleByMFACState'\)"
    with pytest.raises(TypeError, match=message):
        ihvp(state, PARAMS)  # pyright: ignore


def test_ihvp_refuses_another_storage_than_the_states():
    other: Any = components.Storage("other", *[None] * 5)  # pyright: ignore
    with pytest.raises(
        ValueError, match=r"storage must be the one .* 'None', got 'other'\. Pass the Storage"
    ):
        ihvp(STATE, PARAMS, storage=other)
