"""Paths of leaves: each leaf has its own, in every tree, and a mask hides no other leaf."""

import collections
import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from mfac_jax import scale_by_cgfac, value_and_grad_with_factors
from mfac_jax._src.base import trees
from mfac_jax.pruning import kernel_masks, pruning_report, sparsity_by_leaf

HIDDEN = optax.MaskedNode()


class QKV(NamedTuple):
    query: Any
    key: Any
    value: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Box:
    """Called like a box of linen, and of one child, but none of Flax's."""

    value: Any


@jax.tree_util.register_pytree_node_class
class Unnamed(list):
    """A node without names of its own."""

    def tree_flatten(self):
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(children)


class Twins(NamedTuple):
    left: Any
    right: Any


jax.tree_util.register_pytree_with_keys(
    collections.UserList,
    lambda node: ([(jax.tree_util.DictKey("same"), x) for x in node], None),
    lambda aux, children: collections.UserList(children),
)

ORDINARY = {
    "a bare array": (1, [""]),
    "linen": ({"Dense_0": {"bias": 1, "kernel": 2}}, ["Dense_0/bias", "Dense_0/kernel"]),
    "lists": ({"layers": [{"w": 1}, {"w": 2}]}, ["layers/0/w", "layers/1/w"]),
    "Haiku": ({"mlp": {"w": 1}, "mlp/~/linear": {"w": 2}}, ["mlp/w", "mlp/~/linear/w"]),
    "dots": ({"a.b": 1, "a": {"b": 2}}, ["a/b", "a.b"]),
    "fields": ({"a": QKV(1, 2, 3)}, ["a/query", "a/key", "a/value"]),
    "a dataclass": ({"a": Box(1)}, ["a/value"]),
    "a node without names": ({"a": Unnamed([1, 2])}, ["a/0", "a/1"]),
    "nnx": (nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), ["bias", "kernel"]),
    "a box of linen": ({"dense": {"kernel": nn.Partitioned(1, (None,))}}, ["dense/kernel"]),
    "a box alone": (nn.Partitioned(1, (None,)), ["value"]),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_paths_of_ordinary_trees_are_their_keys_joined(name):
    tree, expected = ORDINARY[name]
    assert list(trees.paths_and_leaves(tree)) == expected
    assert list(trees.paths_and_leaves(tree).values()) == jax.tree.leaves(tree)


KEYS = st.sampled_from(["a", "b", "a/b", "", ".", "['a']", "value", 0, 1, "0", "a/b/a"])


def nodes(children):
    return st.one_of(
        st.dictionaries(KEYS, children, max_size=3).map(collections.OrderedDict),
        st.lists(children, max_size=2),
        st.builds(QKV, children, children, children),
        st.builds(Box, children),
        st.builds(nn.Partitioned, children, st.just((None,))),
        st.lists(children, max_size=2).map(Unnamed),
    )


TREES = st.recursive(st.just(0) | st.just(HIDDEN), nodes, max_leaves=8)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(TREES)
def test_every_leaf_of_any_tree_has_a_path_of_its_own(tree):
    numbered = jax.tree.unflatten(jax.tree.structure(tree), range(len(jax.tree.leaves(tree))))
    found = trees.paths_and_leaves(numbered)
    assert list(found.values()) == jax.tree.leaves(numbered)
    find = trees.path_finder(numbered)
    assert [find(path) for path in found] == list(found)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(TREES, st.randoms(use_true_random=False))
def test_a_mask_hides_its_leaves_and_no_others(tree, random):
    """A path of the whole tree finds its leaf in what is left, or is known to be hidden."""
    leaves, structure = jax.tree.flatten(tree)
    whole = jax.tree.unflatten(structure, range(len(leaves)))
    is_shown = [random.random() < 0.6 for _ in leaves]
    masked = jax.tree.unflatten(structure, [n if shown else HIDDEN for n, shown in enumerate(is_shown)])
    find, left = trees.path_finder(masked), trees.paths_and_leaves(masked)
    for path, number in trees.paths_and_leaves(whole).items():
        found = find(path)
        assert (found is not None) == is_shown[number]
        assert found is None or left[found] == number


@pytest.mark.parametrize(
    ("tree", "paths"),
    [
        ({"a/b": 1, "a": HIDDEN}, {"['a/b']": "a/b", "['a']['b']": None}),
        ({"a/b": HIDDEN, "a": {"b": 1}}, {"['a/b']": None, "['a']['b']": "['a']['b']"}),
        ({"mlp": HIDDEN, "mlp/~/linear": {"w": 1}}, {"mlp/w": None, "mlp/~/linear/w": "mlp/~/linear/w"}),
        ({"a": Twins(1, HIDDEN), "ab": 1}, {"a/left": "a/left", "a/right": None, "ab": "ab"}),
        ({"a": QKV(1, 2, HIDDEN)}, {"a/query": "a/query", "a/value": None, "other": "other"}),
    ],
)
def test_a_mask_may_hide_whole_nodes(tree, paths):
    find = trees.path_finder(tree)
    assert {path: find(path) for path in paths} == paths


def test_children_with_one_key_are_refused():
    with pytest.raises(ValueError, match=r"must have a path for each leaf, but \['same'\] is that of two"):
        trees.paths_and_leaves(collections.UserList([1, 2]))


def test_sparsity_tells_leaves_apart_whose_keys_join_to_one():
    half, none = jnp.array([[True, False]]), jnp.ones((1, 2), bool)
    masks = {"a/b": half, "a": {"b": none}, "c": QKV(half, none, half)}
    expected = {"['a']['b']": 0.0, "['a/b']": 0.5, "c/query": 0.5, "c/key": 0.0, "c/value": 0.5}
    assert sparsity_by_leaf(masks) == expected
    assert [line.split()[0] for line in pruning_report(masks).splitlines()] == ["leaf", *expected, "total"]


def test_a_field_called_value_is_judged_by_its_own_name():
    params = {"scale": QKV(jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones((2, 2)))}
    assert len(jax.tree.leaves(kernel_masks(params))) == 3


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


X = drawn(6, 5)


def of_attention(params):
    a = params["a"]
    return jnp.mean((((X @ a.query) * jnp.tanh(X @ a.key) + jnp.sin(X @ a.value)) @ params["out"]) ** 2)


def test_hiding_a_field_called_value_hides_no_sibling():
    params = {"a": QKV(drawn(5, 4), drawn(5, 4) + 1, drawn(5, 4) - 1), "out": drawn(4, 2)}
    _, gradient, factors = jax.jit(value_and_grad_with_factors(of_attention))(params)
    assert set(factors) == {"a/query", "a/key", "a/value", "out"}
    tx: Any = optax.masked(scale_by_cgfac(), {"a": QKV(True, True, False), "out": True})
    updates, state = jax.jit(tx.update)(gradient, tx.init(params), params, curvature=factors)
    assert np.all(np.asarray(state.inner_state.iterations) > 0)
    np.testing.assert_array_equal(updates["a"].value, gradient["a"].value)


def of_two(params):
    return jnp.mean(jnp.tanh(jnp.tanh(X @ params["a/b"]) @ params["a"]["b"]) ** 2) + jnp.sum(
        params["c"] ** 2
    )


def test_leaves_whose_keys_join_to_one_path_have_their_own_factors():
    params = {"a/b": drawn(5, 4), "a": {"b": drawn(4, 4)}, "c": drawn(4, 4)}
    _, gradient, factors = jax.jit(value_and_grad_with_factors(of_two))(params)
    assert set(factors) == {"['a/b']", "['a']['b']"}
    for path, leaf in (("['a/b']", gradient["a/b"]), ("['a']['b']", gradient["a"]["b"])):
        rows = factors[path]
        np.testing.assert_allclose(rows.inputs.T @ rows.output_grads / 6, leaf, rtol=1e-4, atol=1e-6)
    tx = scale_by_cgfac()
    _, state = jax.jit(tx.update)(gradient, tx.init(params), curvature=factors)
    np.testing.assert_array_equal(np.asarray(state.iterations) > 0, [True, True, False])
