"""Fine-tuning of a pretrained BERT encoder in Flax linen: model, loss, and what is measured on it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from examples import comparison, finetune_data
from examples.common.data import epoch_batches
from examples.common.workload import Workload
from examples.finetune_data import LABELS, Encoder
from examples.train_finetune import Options

EPSILON = 1e-12  # of the norms, as in BERT
EVALUATED = 1000  # training texts that the loss is measured on
PIECE = 50  # texts evaluated at once


class Layer(nn.Module):
    """Self-attention and a GELU network, each beside a shortcut and before a norm."""

    heads: int

    @nn.compact
    def __call__(self, x, is_text):  # noqa: D102
        width = x.shape[-1]
        split = (*x.shape[:-1], self.heads, width // self.heads)
        q, k, v = (nn.Dense(width, name=name)(x).reshape(split) for name in ("query", "key", "value"))
        seen = jax.nn.dot_product_attention(q, k, v, mask=is_text[:, None, None, :]).reshape(x.shape)
        x = nn.LayerNorm(EPSILON, name="attention_norm")(x + nn.Dense(width, name="attention_out")(seen))
        wide = nn.gelu(nn.Dense(4 * width, name="up")(x), approximate=False)
        return nn.LayerNorm(EPSILON, name="norm")(x + nn.Dense(width, name="down")(wide))


class Classifier(nn.Module):
    """Logits of texts `(batch, tokens, width)`, from the mean over their tokens behind the layers."""

    layers: int
    heads: int

    @nn.compact
    def __call__(self, x, is_text):  # noqa: D102
        for i in range(self.layers):
            x = Layer(self.heads, name=f"layer_{i}")(x, is_text)
        return nn.Dense(len(LABELS), kernel_init=nn.initializers.normal(0.02), name="head")(
            mean(x, is_text)
        )


def mean(x, is_text):
    """The mean over a text's tokens, without those that fill it up."""
    weights = is_text[..., None].astype(x.dtype)
    return jnp.sum(x * weights, axis=1) / jnp.sum(weights, axis=1)


def embed(embeddings, ids):
    """What the first layer reads."""
    x = embeddings["words"][ids] + embeddings["positions"][: ids.shape[-1]] + embeddings["kind"]
    return nn.standardize(x, epsilon=EPSILON) * embeddings["scale"] + embeddings["bias"]


@functools.cache
def loss_and_evaluate(layers: int, heads: int):
    """Make the two functions of the workload; equal arguments give the same objects."""
    model = Classifier(layers, heads)

    def cross_entropy(params, data, ids, labels):
        logits: Any = model.apply({"params": params}, embed(data["embeddings"], ids), ids > 0)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels), logits.argmax(-1) == labels

    def loss(params, model_state, data, indices, key):
        del key  # nothing is random: there is no dropout
        losses, _ = cross_entropy(params, data, data["train"][indices], data["train_labels"][indices])
        return losses.mean(), model_state

    def evaluate(params, model_state, data):
        del model_state

        def measure(ids, labels):
            def one(text):
                return cross_entropy(params, data, *(part[None] for part in text))

            losses, right = jax.lax.map(one, (ids, labels), batch_size=PIECE)
            return losses.mean(), right.mean()

        train_loss, _ = measure(data["train"][:EVALUATED], data["train_labels"][:EVALUATED])
        valid_loss, valid_accuracy = measure(data["valid"], data["valid_labels"])
        return {"train_loss": train_loss, "valid_loss": valid_loss, "valid_accuracy": valid_accuracy}

    return loss, evaluate


def at_random(encoder: Encoder, seed: int) -> Encoder:
    """Draw all weights as BERT's authors did before they trained: what pretraining gives is lost."""
    random = np.random.default_rng(seed)

    def draw(path, x):
        if x.ndim == 2:
            return 0.02 * random.standard_normal(x.shape, np.float32)
        return np.ones_like(x) if path[-1].key == "scale" else np.zeros_like(x)

    embeddings, layers = jax.tree_util.tree_map_with_path(draw, (encoder.embeddings, encoder.layers))
    return Encoder(embeddings, layers, encoder.heads)


def make_workload(
    epochs: int = Options.epochs,
    batch_size: int = Options.batch_size,
    samples: int = Options.samples,
    tokens: int = Options.tokens,
    layers: int = Options.layers,
    scratch: bool = Options.scratch,
    data_dir: Path | None = Options.data_dir,
    *,
    seed: int,
) -> Workload:
    """Make the workload; the seed sets the head and the batches. The embeddings stay as they are."""
    encoder = finetune_data.read_encoder(finetune_data.folders(data_dir)[0], layers)
    texts = finetune_data.read_texts(data_dir, samples, tokens)
    if scratch:
        encoder = at_random(encoder, seed)
    width = encoder.embeddings["words"].shape[-1]
    model, one = Classifier(layers, encoder.heads), jnp.zeros((1, 2, width))
    head = jax.jit(model.init)(jax.random.key(seed), one, jnp.ones((1, 2), bool))["params"]["head"]
    loss, evaluate = loss_and_evaluate(layers, encoder.heads)
    counts = f"{len(texts.train):,} training and {len(texts.valid):,} validation texts"
    return Workload(
        name="finetune",
        source=f"{data_dir or finetune_data.TEXT_PACKAGE}: {counts}, {layers} layers of "
        f"{'random weights' if scratch else data_dir or finetune_data.MODEL_PACKAGE}",
        params=jax.tree.map(jnp.asarray, encoder.layers) | {"head": head},
        model_state={},
        data=jax.tree.map(jnp.asarray, texts._asdict() | {"embeddings": encoder.embeddings}),
        batches=epoch_batches(len(texts.train), batch_size, epochs, seed),
        loss=loss,
        evaluate=evaluate,
    )


def run(options: Options, folders: Mapping[tuple[str, int], Path]) -> None:
    """Run the comparison; the folders are for checkpoints."""
    names = ("epochs", "batch_size", "samples", "tokens", "layers", "scratch", "data_dir")
    settings = {name: getattr(options, name) for name in names}
    comparison.run(options, folders, lambda seed: make_workload(**settings, seed=seed))
