"""What a compiled update holds, moves and sends, of one device."""

import collections
import math
import re
from typing import Any

import jax
import optax

BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2}
COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(text: str) -> dict[str, list[int]]:
    """Count each collective operation in a compiled program, and the bytes of its results."""
    found: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    for shapes, operation in COLLECTIVE.findall(text):
        size = 0
        for dtype, dimensions in re.findall(r"([a-z]+\d*)\[([\d,]*)\]", shapes):
            size += BYTES.get(dtype, 4) * math.prod(int(n) for n in dimensions.split(",") if n)
        found[operation][0] += 1
        found[operation][1] += size
    return dict(found)


def placed(tree: Any, shardings: Any) -> Any:
    """Attach the shardings to the shapes."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)


def bytes_on_device(tree: Any) -> int:
    """Count the bytes that one device holds of sharded arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def split_updates(params: Any, window: Any) -> int:
    """Count one device's bytes of the updates whose window is split further than the parameters."""
    size, leaves = 0, jax.tree.leaves(params)
    main = jax.tree.leaves(window)[: len(leaves)]  # scales come behind
    for param, rows in zip(leaves, main, strict=True):
        own = param.sharding.shard_shape(param.shape)
        if own != rows.sharding.shard_shape(rows.shape)[1:]:
            size += math.prod(own) * param.dtype.itemsize
    return size


def figures(compiled: Any, params: Any, state: Any) -> dict[str, Any]:
    """Collect the figures of a compiled `update` with donated state, from its sharded arguments."""
    memory, window = compiled.memory_analysis(), optax.tree.get(state, "window")
    return {
        "leaves": len(jax.tree.leaves(params)),
        "window_bytes": bytes_on_device(window),
        "split_updates": split_updates(params, window),
        "state_bytes": bytes_on_device(state),
        "update_temporaries": memory.temp_size_in_bytes,
        "update_traffic": compiled.cost_analysis()["bytes accessed"],
        "update_alias": memory.alias_size_in_bytes,
        "update_collectives": collectives(compiled.as_text()),
    }
