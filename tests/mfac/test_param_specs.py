"""What is a shard and what every device holds: told by types or declared, and never guessed."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

from mfac_jax import ihvp, mfac, scale_by_mfac
from tests.mfac.on_devices import MODES, NUM_GRADS, STEPS, OnDevices, gradients, on_one_device
from tests.mfac.on_mesh import P
from tests.training_runs import relative_error

slow = pytest.mark.slow
PLACEMENTS: dict[str, dict[str, Any]] = {
    "replicated": {"kernel": P(), "table": P(), "odd": P()},
    "sharded": {"kernel": P("x"), "table": P(None, "x")},
    "mixed": {"kernel": P("x"), "table": P(), "odd": P()},
}


QUICK = [("no types", "mixed", True)]
CASES = [
    (mode, placement, inside) for mode in MODES for placement in PLACEMENTS for inside in (True, False)
]


@pytest.mark.parametrize(
    ("mode", "placement", "inside"),
    [pytest.param(*case, marks=[] if case in QUICK else slow) for case in CASES],
)
def test_declared_shards_give_the_updates_of_one_device(mode, placement, inside):
    run = OnDevices(mode, PLACEMENTS[placement], param_specs=PLACEMENTS[placement])
    for found, wanted in zip(run.updates(run.init(inside)), on_one_device(run.specs)[0], strict=True):
        assert relative_error(found, wanted) < 1e-5


@slow
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("mode", MODES)
def test_with_declared_shards_products_are_those_of_one_device(mode, placement):
    run = OnDevices(mode, PLACEMENTS[placement], param_specs=PLACEMENTS[placement])
    assert len(list(run.updates(run.init(True)))) == STEPS
    vector = gradients(run.specs)[0]
    assert relative_error(run.product(vector), ihvp(on_one_device(run.specs)[1], vector, 0.1)) < 1e-4


@slow
@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_where_types_tell_nothing_has_to_be_declared(placement, inside):
    run = OnDevices("types", PLACEMENTS[placement])
    for found, wanted in zip(run.updates(run.init(inside)), on_one_device(run.specs)[0], strict=True):
        assert relative_error(found, wanted) < 1e-5


REFUSED = "param_specs must say what (params|updates|tree) holds: leaf .* may be a shard or replicated"


@pytest.mark.parametrize("inside", [True, False], ids=["init inside", "init outside"])
@pytest.mark.parametrize(
    "placement", [pytest.param(name, marks=[] if name == "mixed" else slow) for name in PLACEMENTS]
)
@pytest.mark.parametrize("mode", MODES[1:])
def test_where_types_do_not_tell_and_nobody_declares_it_is_refused(mode, placement, inside):
    run = OnDevices(mode, PLACEMENTS[placement])
    with pytest.raises(ValueError, match=REFUSED):
        next(run.updates(run.init(inside)))


@pytest.mark.parametrize("mode", MODES[1:])
def test_without_axis_name_it_is_refused_too(mode):
    """Each device would take its shard for all parameters."""
    specs = {"kernel": P("x")}
    run = OnDevices(mode, specs)
    run.tx = mfac(0.1, NUM_GRADS, metric="diagonal", storage=None)
    with pytest.raises(ValueError, match=REFUSED):
        run.init(inside=True)
    with pytest.raises(ValueError, match=REFUSED):
        next(run.updates(run.init(inside=False)))


@slow
@pytest.mark.parametrize("mode", MODES[1:])
def test_every_device_may_hold_a_whole_window(mode):
    run = OnDevices(mode, PLACEMENTS["replicated"])
    run.tx = mfac(0.1, NUM_GRADS, metric="diagonal", param_specs=P(), storage=None)
    run.state_specs = jax.tree.map(lambda spec: P(), run.state_specs)
    for found, wanted in zip(run.updates(run.init(True)), on_one_device(run.specs)[0], strict=True):
        assert relative_error(found, wanted) < 1e-5


def test_a_window_that_is_split_over_all_devices_says_that_its_leaf_is_replicated():
    specs = {"kernel": P(), "table": P()}  # each splits over eight devices
    run = OnDevices("no types", specs)
    jax.eval_shape(lambda state: next(run.updates(state)), run.init(inside=False))


def test_ihvp_refuses_what_it_cannot_know():
    run = OnDevices("no types", {"kernel": P("x")}, param_specs=P("x"))
    specs = (run.state_specs[0], run.specs)
    state = run.init(inside=True)[0]
    with pytest.raises(ValueError, match=REFUSED):
        run.mapped(ihvp, specs, run.specs)(state, run.params)
    run.mode = "types"
    with pytest.raises(ValueError, match="axis_name must name the mesh axes of tree"):
        run.mapped(ihvp, specs, run.specs)(state, run.params)


@pytest.mark.parametrize(("declared", "really"), [(P(), P("x")), (P("x"), P())])
def test_a_declaration_that_types_contradict_is_refused(declared, really):
    run = OnDevices("types", {"kernel": really}, param_specs=declared)
    message = r"param_specs must be right about .* leaf \['kernel'\] (varies|does not vary) along \('x',\)"
    with pytest.raises(ValueError, match=message):
        run.init(inside=True)
    with pytest.raises(ValueError, match=message):
        next(run.updates(run.init(inside=False)))


def product_of_nothing(**options):
    return ihvp(scale_by_mfac(1).init(jnp.ones(2)), jnp.ones(2), **options)  # pyright: ignore


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ("x", TypeError, "param_specs must be None, or PartitionSpecs .* got 'x'"),
        ({"w": True}, TypeError, r"got True at leaf \['w'\]"),
        (P("y"), ValueError, r"axis_name must name .* got 'x' and .*'y'.* Pass axis_name=\('x', 'y'\)"),
    ],
)
@pytest.mark.parametrize("make", [scale_by_mfac, mfac, product_of_nothing])
def test_what_is_no_declaration_is_refused(make, specs, error, message):
    with pytest.raises(error, match=message):
        make(axis_name="x", param_specs=specs)


def test_a_declaration_that_leaves_out_a_leaf_is_refused():
    tx = mfac(axis_name="x", param_specs={"kernel": P()})
    with pytest.raises(ValueError, match=r"param_specs must be a tree like params.* leaf \['odd'\]"):
        tx.init({"kernel": jnp.ones(8), "odd": jnp.ones(3)})


def test_a_declaration_may_stand_at_a_node_and_for_leaves_that_are_masked_out():
    specs = {"inner": P(), "hidden": {"deep": P("x")}}
    tx: Any = optax.masked(
        scale_by_mfac(2, axis_name="x", param_specs=specs), {"inner": True, "hidden": False}
    )
    params = {
        "inner": {"a": jnp.ones((8, 16)), "b": jnp.ones((8, 3))},
        "hidden": {"deep": jnp.ones((8, 2))},
    }
    state = jax.pmap(tx.init, axis_name="x")(params)
    assert jax.tree.map(jnp.shape, state.inner_state.window["inner"]) == {"a": (8, 2, 2), "b": (8, 2, 3)}
