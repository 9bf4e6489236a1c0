"""A character transformer in Flax nnx: the model, its loss, and what is measured on it."""

import functools
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import comparison
from examples.common.workload import Workload
from examples.text_data import read_parts
from examples.train_text import Options

WINDOWS = 1024  # windows of each part that the losses are measured on


class Block(nnx.Module):
    """Causal self-attention and a GELU network, each after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, layers: int, rngs: nnx.Rngs):
        def linear(fan_in: int, fan_out: int, scale: float = 1.0) -> nnx.Linear:
            init = nnx.initializers.normal(scale / math.sqrt(fan_in))
            return nnx.Linear(fan_in, fan_out, use_bias=False, kernel_init=init, rngs=rngs)

        shrink = 1 / math.sqrt(2 * layers)  # the sum of all layers' outputs then starts near one
        self.heads = heads
        self.norm_attention = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.query_key_value = linear(width, 3 * width)
        self.attention_out = linear(width, width, shrink)
        self.up = linear(width, 4 * width)
        self.down = linear(4 * width, width, shrink)

    def __call__(self, x):  # noqa: D102
        split = (*x.shape[:-1], 3, self.heads, x.shape[-1] // self.heads)
        q, k, v = jnp.moveaxis(self.query_key_value(self.norm_attention(x)).reshape(split), -3, 0)
        x += self.attention_out(jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


class Transformer(nnx.Module):
    """Logits of the next character, `(batch, context, vocabulary)`."""

    def __init__(self, vocabulary: int, context: int, width: int, heads: int, layers: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(0.02)
        self.embedding = nnx.Embed(vocabulary, width, embedding_init=init, rngs=rngs)
        self.position = nnx.Param(init(rngs.params(), (context, width)))
        self.blocks = nnx.List([Block(width, heads, layers, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, vocabulary, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, ids):  # noqa: D102
        x = self.embedding(ids) + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x))


@functools.cache
def loss_and_evaluate(graph: nnx.GraphDef, context: int):
    """Make the two functions of the workload; equal models give the same objects."""

    def cross_entropy(params, model_state, text, starts):
        windows = text[starts[:, None] + jnp.arange(context + 1)]
        logits = nnx.merge(graph, params, model_state)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def loss(params, model_state, data, indices, key):
        del key  # nothing is random
        return cross_entropy(params, model_state, data["train"], indices), model_state

    def evaluate(params, model_state, data):
        def mean(text, starts):
            pieces = starts.reshape(-1, 128)  # all at once would need gigabytes
            return jax.lax.map(lambda piece: cross_entropy(params, model_state, text, piece), pieces).mean()

        return {
            "train_loss": mean(data["train"], data["train_windows"]),
            "valid_loss": mean(data["valid"], data["valid_windows"]),
        }

    return loss, evaluate


def make_workload(
    steps: int = Options.steps,
    batch_size: int = Options.batch_size,
    layers: int = Options.layers,
    width: int = Options.width,
    heads: int = Options.heads,
    context: int = Options.context,
    data_dir: Path | None = None,
    text: Path | None = None,
    *,
    seed: int,
) -> Workload:
    """Next characters; the seed sets parameters and batches, the evaluated windows are always the same."""
    parts = read_parts(context, data_dir, text)
    model = Transformer(parts.vocabulary, context, width, heads, layers, nnx.Rngs(seed))
    graph, params, model_state = nnx.split(model, nnx.Param, ...)
    loss, evaluate = loss_and_evaluate(graph, context)

    def windows(part: np.ndarray, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        return random.integers(0, len(part) - context, shape, dtype=np.int32)

    fixed = np.random.default_rng(0)
    data = {
        "train": parts.train,
        "valid": parts.valid,
        "train_windows": windows(parts.train, (WINDOWS,), fixed),
        "valid_windows": windows(parts.valid, (WINDOWS,), fixed),
    }
    return Workload(
        name="text",
        source=parts.source,
        params=nnx.to_pure_dict(params),
        model_state=nnx.to_pure_dict(model_state),
        data=jax.tree.map(jnp.asarray, data),
        batches=windows(parts.train, (steps, batch_size), np.random.default_rng(seed)),
        loss=loss,
        evaluate=evaluate,
    )


def run(options: Options, folders: Mapping[tuple[str, int], Path]) -> None:
    """Run the comparison; the folders are for checkpoints."""
    names = ("steps", "batch_size", "layers", "width", "heads", "context", "data_dir", "text")
    settings = {name: getattr(options, name) for name in names}
    comparison.run(options, folders, lambda seed: make_workload(**settings, seed=seed))
