"""Every argument that is wrong is refused at once, in words that say what is allowed and what helps."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import mfac_jax
from mfac_jax import cgfac, mfac, mfac_published, scale_by_cgfac, scale_by_mfac

PARAMS = {"a": jnp.ones((3, 2)), "b": jnp.ones(2)}
NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ["1e-3", None, True, [0.1], 1j, {}, jnp.ones(2)]
CHAINS = {mfac: ("1e-2", "1.0"), mfac_published: ("1e-3", "1e-5"), cgfac: ("0.1", "0.01")}
FACTORIES = [*CHAINS, scale_by_mfac, scale_by_cgfac]
MASKS = {"a": True, "b": False}


def spelled(value) -> str:
    return f"got {re.escape(repr(value))}"


@pytest.mark.parametrize("make", CHAINS)
@pytest.mark.parametrize("value", [*NO_NUMBERS, -1, -1e-3, NAN, INF, np.float32(-1), jnp.float32(-1)])
def test_a_learning_rate_must_be_a_schedule_or_a_finite_number(make, value):
    allowed = "a finite number >= 0, or a schedule"
    message = f"^learning_rate must be {allowed}, {spelled(value)}. Pass e.g. {CHAINS[make][0]}"
    with pytest.raises((TypeError, ValueError), match=message):
        make(value)


@pytest.mark.parametrize("make", CHAINS)
@pytest.mark.parametrize(
    "value", [0, 0.0, 1, np.float32(0.1), jnp.float32(0.1), optax.constant_schedule(1.0)]
)
def test_learning_rates_of_any_kind_of_number_are_taken(make, value):
    make(value)
    if not callable(value):
        jax.eval_shape(lambda rate: make(rate).init(PARAMS), value)


@pytest.mark.parametrize("make", CHAINS)
@pytest.mark.parametrize("value", [0, -1, 10**400, *NO_NUMBERS])
def test_a_damping_is_suggested_that_suits_the_optimizer(make, value):
    allowed = "a finite number > 0, or a schedule"
    message = f"damping must be {allowed}, {spelled(value)}. Pass e.g. {CHAINS[make][1]}"
    with pytest.raises((TypeError, ValueError), match=message):
        make(damping=value)


@pytest.mark.parametrize("make", CHAINS)
@pytest.mark.parametrize("value", ["1e-3", True, [0.1], 1j, {}, jnp.ones(2), -1e-3, NAN, INF])
def test_a_weight_decay_must_be_a_schedule_or_a_finite_number(make, value):
    message = f"^weight_decay must be a finite number >= 0, or a schedule, {spelled(value)}. Pass e.g. 1e-4"
    with pytest.raises((TypeError, ValueError), match=message):
        make(0.1, weight_decay=value)


@pytest.mark.parametrize("make", CHAINS)
@pytest.mark.parametrize("mask", ["a", 3, True, {"a": 1.0, "b": 0.0}, {"a": "yes"}, jnp.ones(2)])
def test_a_mask_must_be_a_tree_of_bools_or_a_function(make, mask):
    message = "mask must be a tree of bools like the parameters, or a function .* got .* Pass e.g. lambda"
    with pytest.raises(TypeError, match=message):
        make(weight_decay=0.1, mask=mask)
    make(weight_decay=0.1, mask=MASKS)
    make(weight_decay=0.1, mask=lambda params: MASKS)


# Under inject_hyperparams: sizes are static always, others where optax takes them for numbers or schedules.
SIZES: dict[Any, tuple[str, ...]] = dict.fromkeys((mfac, mfac_published, scale_by_mfac), ("num_grads",))
SIZES |= dict.fromkeys((cgfac, scale_by_cgfac), ("max_iterations", "num_batches"))
NUMBERS = {
    "learning_rate": 0.1,
    "damping": 0.1,
    "momentum": 0.5,
    "weight_decay": 0.1,
    "window_momentum": 0.5,
    "step_adaptation": 0.2,
    "tolerance": 0.1,
    "norm_constraint": 0.5,
}
OTHERS: dict[str, Any] = {
    "metric": "diagonal",
    "solver": "inverse",
    "storage": jnp.dtype(jnp.bfloat16),
    "blocks": "leaf",
    "relative_damping": True,
    "nesterov": True,
    "mask": MASKS,
    "factors": None,
    "param_specs": None,
}
STATIC: dict[str, Any] = {
    "num_grads": 3,
    "max_iterations": 3,
    "num_batches": 1,
    "host_chunk": 2,
    "storage": jnp.bfloat16,
    "blocks": lambda path: "a",
    "mask": lambda params: jax.tree.map(lambda p: jnp.ndim(p) > 1, params),
}


def injected(make, static=(), **options):
    static_args = tuple(dict.fromkeys((*SIZES[make], *static)))
    tx = optax.inject_hyperparams(make, static_args=static_args)(**options)
    return jax.eval_shape(tx.init, PARAMS)


def takes(make, name: str) -> bool:
    return name in make.__annotations__


@pytest.mark.parametrize("make", FACTORIES)
def test_numbers_and_names_are_taken_under_inject_hyperparams(make):
    for name, value in (NUMBERS | OTHERS).items():
        if takes(make, name):
            decay = {"weight_decay": 0.1} if name == "mask" else {}
            state: Any = injected(make, **decay, **{name: value})
            assert (name in state.hyperparams) == (name in NUMBERS)
            injected(make, (name,), **decay, **{name: value})


@pytest.mark.parametrize("make", FACTORIES)
def test_what_optax_would_change_is_refused_under_inject_hyperparams_with_the_cure(make):
    for name, value in STATIC.items():
        if takes(make, name):
            options = {"weight_decay": 0.1, name: value} if name == "mask" else {name: value}
            tx = optax.inject_hyperparams(make, static_args=tuple({*SIZES[make]} - {name}))(**options)
            with pytest.raises((TypeError, ValueError), match=rf"{name} .*static_args=\('{name}',\)"):
                jax.eval_shape(tx.init, PARAMS)
            injected(make, (name,), **options)


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.complex64, bool])
def test_leaves_that_are_no_floats_are_told_to_be_split_off_by_what_can_be_applied(dtype):
    tree = {"a": jnp.ones((3, 2)), "count": jnp.ones(2, dtype)}
    uses = [
        scale_by_mfac(2).init,
        lambda tree: mfac_jax.FisherInverse.from_gradients(
            {k: x[None] for k, x in tree.items()}, damping=1.0
        ),
    ]
    for use in uses:
        with pytest.raises(TypeError, match=r"\['count'\] is .*elsewhere split it off.*eqx\.partition"):
            use(tree)


def test_state_shardings_takes_a_transform():
    with pytest.raises(TypeError, match=r"tx must be an optax\.GradientTransformation, got 3"):
        mfac_jax.state_shardings(3, PARAMS, None)  # pyright: ignore[reportArgumentType]
