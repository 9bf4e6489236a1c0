"""Which states are refused: each by a message with the field, what it must be, what it is, and the cure.

Shapes, dtypes and nodes are known before tracing, so all of this runs under jit and outside alike.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.dtypes import canonicalize_dtype

from mfac_jax._src.base import numerics
from mfac_jax._src.base.fields import CURE, check_field, dtype_of, shape_of
from mfac_jax._src.mfac.state import Kinds, ScaleByMFACState, labels
from mfac_jax._src.mfac.step_length import AdaptedStepState
from mfac_jax._src.rows import storage_kinds, storages
from mfac_jax._src.rows.blocks import number_of_blocks
from mfac_jax._src.rows.storages import Storage


def as_state(state: Any) -> ScaleByMFACState:
    """The state, if it is one."""
    if not isinstance(state, ScaleByMFACState):
        raise TypeError(
            f"state must be a ScaleByMFACState, got {type(state).__name__}. In the state of a chain, "
            f"optax.tree.get(state, 'ScaleByMFACState') finds it. {CURE}"
        )
    kinds = state.made_with
    known = [str(key).split("=")[0] for key in kinds] if isinstance(kinds, dict) else []
    if sorted(known) != sorted(Kinds._fields) or jax.tree.leaves(kinds):
        raise ValueError(
            f"state.made_with must be a dict with a key for each of {', '.join(Kinds._fields)} and no "
            f"leaves, got {kinds!r}. {CURE}"
        )
    return state


def on_device(state: ScaleByMFACState) -> ScaleByMFACState:
    """The state with jax arrays in the place of NumPy's, and all others as they are."""
    return jax.tree.map(lambda x: x if isinstance(x, jax.Array) else jnp.asarray(x), state)


def check_made_with(state: ScaleByMFACState, kinds: Kinds) -> None:
    """Raise for a state that was made with other kinds, by a message with both."""
    made, expected = set(state.made_with), set(kinds.names())
    if made != expected:
        raise ValueError(
            f"state must be that of a transform with {', '.join(sorted(expected - made))}, got "
            f"{', '.join(sorted(made - expected))}. Pass what the state was made with, or call init again."
        )


def check_sizes(state: ScaleByMFACState, blocks: Sequence[int], num_grads: int) -> None:
    """Raise for a state with another window or another number of blocks."""
    expected, found = (number_of_blocks(blocks), num_grads), state.gram.shape[:2]
    if found != expected:
        raise ValueError(
            f"state must be that of a transform with num_grads={num_grads} and {expected[0]} block(s), got "
            f"num_grads={found[1]} and {found[0]} block(s). After changing them call init again."
        )


def has_blocks(state: ScaleByMFACState, updates: optax.Updates, blocks: Sequence[int]) -> Any:
    """Whether the state has these blocks. Raises if not; an array if the state's labels are traced."""
    expected = labels(blocks)
    if isinstance(state.block_of_leaf, Tracer):
        return jnp.all(state.block_of_leaf == expected)
    found = np.asarray(state.block_of_leaf)
    different = np.flatnonzero(found != expected)
    if len(different):
        path, _ = jax.tree_util.tree_leaves_with_path(updates)[different[0]]
        raise ValueError(
            f"state must have the blocks of the transform, but leaf {jax.tree_util.keystr(path)} was in "
            f"block {found[different[0]]}, and is in block {expected[different[0]]} by blocks. Pass the "
            "blocks that the state was made with, or call init again."
        )
    return True


def kind_of(state: ScaleByMFACState, argument: str) -> str:
    """The name of the component that the state was made with."""
    prefix = f"{argument}="
    return next(kind for kind in state.made_with if kind.startswith(prefix)).removeprefix(prefix)


def storage_of(state: ScaleByMFACState, storage: Storage | None) -> Storage:
    """The storage of the state's window, if it is the package's; else the one that is given."""
    name = kind_of(state, "storage")
    found = storage or storage_kinds.by_name(name)
    if found is None or found.name != name:
        raise ValueError(
            f"storage must be the one that the state was made with, {name!r}, got "
            f"{storage and storage.name!r}. Pass the Storage that scale_by_mfac was given."
        )
    return found


class Holder(NamedTuple):
    """What a state has to fit, beside itself.

    Attributes:
      storage: of the window.
      tree: what is to meet the window: updates, or a vector.
      params: the parameters, or None. Those of another tree than `tree` do not count.
      kinds: the components, or None where their states do not matter.
      local: whether a device has parts of the rows, of other shapes than the leaves.
    """

    storage: Storage
    tree: Any
    params: Any = None
    kinds: Kinds | None = None
    local: bool = False

    def known_params(self) -> list[jax.ShapeDtypeStruct] | None:
        """The leaves of the parameters."""
        if self.params is None or jax.tree.structure(self.params) != jax.tree.structure(self.tree):
            return None
        return list(map(_canonical, jax.tree.leaves(self.params)))


def check_fields(
    state: ScaleByMFACState, fields: Sequence[str], function: str, holder: Holder | None = None
) -> None:
    """Raise for a field of another structure, shape or dtype than `init` gives it.

    Where fields contradict each other, the odd one is named. `function` is what takes the state of one
    optimizer. Without a holder only fields that do not depend on leaves and components can be checked.
    """
    several = shape_of(state.grads_seen)
    if several and shape_of(state.gram)[: len(several)] == several == shape_of(state.log_step):
        raise ValueError(
            f"state must be that of one optimizer, with a gram of 3 axes, got {shape_of(state.gram)}. "
            f"After jax.vmap(tx.init) call jax.vmap({function})."
        )
    coefficients, gram, shift = map(shape_of, (state.coefficients, state.gram, state.shift))
    lengths = [shape_of(x)[0] for x in jax.tree.leaves(state.window) if shape_of(x)]
    num_grads = _most([*coefficients[1:2], *gram[2:3], *([_most(lengths)] if lengths else [])])
    blocks = _most([*coefficients[:1], *gram[:1], *shift[:1]])
    dtype = _dtype_of_sums(state, holder)
    count = jax.ShapeDtypeStruct((), jnp.int32)
    mean_cosine: Any = jax.ShapeDtypeStruct((), dtype)
    expected: dict[str, Any] = {
        "grads_seen": count,
        "grads_rejected": count,
        "next_row": count,
        "gram": jax.ShapeDtypeStruct((blocks, num_grads, num_grads), dtype),
        "coefficients": jax.ShapeDtypeStruct((blocks, num_grads), dtype),
        "shift": jax.ShapeDtypeStruct((blocks,), dtype),
        "log_step": jax.ShapeDtypeStruct((), dtype),
        "step_length": AdaptedStepState(mean_cosine),  # if it is that of the package
    }
    if holder is not None:
        expected |= _with_leaves(state, holder, blocks, num_grads, dtype)
    for name in fields:
        check_field(f"state.{name}", getattr(state, name), expected[name])


def _with_leaves(
    state: ScaleByMFACState, holder: Holder, blocks: int, num_grads: int, dtype: Any
) -> dict[str, Any]:
    """What the fields have to be that have to do with the leaves of the parameters."""
    rows = _rows(state, holder)
    # Sums are float64 where a parameter is; so is no row without them.
    too_wide = {jnp.dtype(jnp.float64): dtype}
    window = jax.tree.map(
        lambda row: jax.ShapeDtypeStruct((num_grads, *row.shape), too_wide.get(row.dtype, row.dtype)), rows
    )
    structure = jax.tree.structure(storages.first_tree(holder.storage, rows))
    shapes = [
        storages.shape_of_leaf(holder.storage, leaf) for leaf in storages.split(holder.storage, window)
    ]
    like = structure.unflatten([jax.ShapeDtypeStruct(shape, dtype) for shape in shapes])
    leaves = max(1, len(shapes))
    remainder = like if holder.storage.keeps_remainder else ()
    expected = {
        "window": window,
        "remainder": remainder,
        "block_of_leaf": jax.ShapeDtypeStruct((leaves,), jnp.int32),
    }
    if holder.kinds is None:
        return expected
    metric, solver, _, step_adaptation = holder.kinds

    def states(like):
        def zeros(shape):
            return jnp.zeros(shape, dtype)

        return {
            "metric": metric.init(lambda: like),
            "solver": solver.init(zeros, blocks, num_grads),
            "step_length": step_adaptation.init(zeros),
        }

    return expected | jax.eval_shape(states, like)


def _rows(state: ScaleByMFACState, holder: Holder) -> Any:
    """What a row of the window has to be.

    It follows from the parameters where they are known. Otherwise the window's own leaves count, unless
    their number tells that the tree fits the rest of the state and the window does not.
    """
    storage, window = holder.storage, state.window
    leaves, structure = jax.tree.flatten(holder.tree)
    count = len(jax.tree.leaves(_first_tree(storage, window)))
    labels = shape_of(state.block_of_leaf)
    like = holder.known_params()
    if like is None and labels == (max(1, len(leaves)),) != (max(1, count),):
        like = list(map(_canonical, leaves))
    if like is None:
        own = [_own_row(storage, rows) for rows in storages.split(storage, window)]
        structure = jax.tree.structure(storages.first_tree(storage, window))
    else:
        own = list(map(storage.row, like))
    rows = storages.join(storage, structure, own)
    if holder.local and jax.tree.structure(rows) == jax.tree.structure(window):
        return jax.tree.map(lambda row, x: jax.ShapeDtypeStruct(shape_of(x)[1:], row.dtype), rows, window)
    return rows


def _first_tree(storage: Storage, window: Any) -> Any:
    """The tree of the rows' first arrays; raises where the window has not the structure of the storage."""
    try:
        storages.split(storage, window)
        return storages.first_tree(storage, window)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"state.window must have a tree like the parameters for each array of a row in the storage "
            f"{storage.name!r}, got {type(window).__name__}: {error} {CURE}"
        ) from None


def _own_row(storage: Storage, rows: storages.Rows) -> Any:
    """A row of a leaf of the window, in the dtypes that its storage would have it in."""
    if storage_kinds.by_name(storage.name) is not storage:
        return jax.tree.map(lambda x: _without_rows(x, dtype_of(x) or jnp.float32), rows)
    *_, last = map(dtype_of, jax.tree.leaves(rows))  # that of the scales, where there are some
    is_floating = last is not None and jnp.issubdtype(last, jnp.floating)
    return storage.row(
        jax.ShapeDtypeStruct(storages.shape_of_leaf(storage, rows), last if is_floating else jnp.float32)
    )


def _without_rows(x: Any, dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape_of(x)[1:], dtype)


def _dtype_of_sums(state: ScaleByMFACState, holder: Holder | None) -> Any:
    """The dtype of the Gram matrix and what follows from it."""
    params: Any = holder and holder.known_params()
    if params is not None:
        return numerics.accumulation_dtype(params)
    arrays = (state.coefficients, state.gram, state.shift, state.log_step)
    is_double = _most([dtype_of(x) == jnp.float64 for x in arrays])
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)


def _most(values: Sequence[Any]) -> Any:
    """The value that comes most often, of several the first; zero of none."""
    return Counter(values).most_common(1)[0][0] if values else 0


def _canonical(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(x), canonicalize_dtype(jnp.result_type(x)))
