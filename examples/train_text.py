"""Train a character transformer in Flax nnx.

The text is that of --text or --data-dir, by default the sources of Python's standard library. Nine tenths
of it are for training. A seed sets the initial parameters and the batches. The windows of text that losses
are measured on are always the same.
"""

import dataclasses
import functools
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples import comparison
from examples.common import command_line
from examples.common.command_line import Count, Folder, OptionalPath
from examples.common.optimizers import RATES
from examples.common.workload import DataError, Workload

LIBRARY_BYTES = 1_000_000  # about what Tiny Shakespeare has
WINDOWS = 1024  # windows of each part that the losses are measured on


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextOptions:
    """The options that `read_text` takes."""

    data_dir: OptionalPath = None
    """folder of the text: its tinyshakespeare.txt, or else all its *.txt"""
    text: OptionalPath = None
    """text file, in place of --data-dir"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(comparison.Options, TextOptions):
    """What the user can choose."""

    problem: ClassVar[str] = "text"

    optimizers: Annotated[tuple[str, ...], comparison.names(problem)] = comparison.Options.optimizers
    rates: comparison.Rates = (*RATES[problem].items(),)
    seeds: Count = 1
    evaluations: Count = 6
    out: Folder = Path("out", "text")
    steps: Count = 600
    """training steps"""
    batch_size: Count = 32
    """windows of text a step"""
    layers: Count = 3
    """transformer blocks"""
    width: Count = 96
    """features of a character"""
    heads: Count = 4
    """attention heads; must divide --width"""
    context: Count = 64
    """characters in a window"""


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


def read_text(data_dir: Path | None = None, text: Path | None = None) -> tuple[bytes, str]:
    """Read the text of the file, the folder, or else Python's library; return also where it is from."""
    if text is not None:
        paths, source = [text], str(text)
    elif data_dir is not None:
        shakespeare = data_dir / "tinyshakespeare.txt"
        paths = [shakespeare] if shakespeare.exists() else sorted(data_dir.glob("*.txt"))
        source = ", ".join(str(path) for path in paths)
        if not paths:
            raise DataError(f"--data-dir: neither {shakespeare} nor another *.txt in that folder")
    else:
        library = Path(sysconfig.get_paths()["stdlib"])
        paths, source = sorted(library.glob("*.py")), f"Python's standard library, {library}/*.py"
        if not paths:
            raise DataError(f"no *.py in Python's library {library}: pass --text or --data-dir")
    try:
        content = b"".join(path.read_bytes() for path in paths)
    except OSError as error:
        raise DataError(f"cannot read the text: {error}") from error
    return (content[:LIBRARY_BYTES] if text is None and data_dir is None else content), source


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
    content, source = read_text(data_dir, text)
    vocabulary, ids = np.unique(np.frombuffer(content, np.uint8), return_inverse=True)
    train, valid = np.split(ids.astype(np.int32), [int(0.9 * len(ids))])
    if len(valid) <= context + 1:
        raise DataError(
            f"a tenth of the text must exceed --context {context}, it has {len(valid)} characters: "
            "pass a longer text or a smaller --context"
        )
    model = Transformer(len(vocabulary), context, width, heads, layers, nnx.Rngs(seed))
    graph, params, model_state = nnx.split(model, nnx.Param, ...)
    loss, evaluate = loss_and_evaluate(graph, context)

    def windows(part: np.ndarray, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
        return random.integers(0, len(part) - context, shape, dtype=np.int32)

    fixed = np.random.default_rng(0)
    data = {
        "train": train,
        "valid": valid,
        "train_windows": windows(train, (WINDOWS,), fixed),
        "valid_windows": windows(valid, (WINDOWS,), fixed),
    }
    return Workload(
        name="text",
        source=f"{source}: {len(ids):,} characters, {len(vocabulary)} different ones",
        params=nnx.to_pure_dict(params),
        model_state=nnx.to_pure_dict(model_state),
        data=jax.tree.map(jnp.asarray, data),
        batches=windows(train, (steps, batch_size), np.random.default_rng(seed)),
        loss=loss,
        evaluate=evaluate,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    if options.width % options.heads:
        command_line.refuse(
            f"--heads must divide --width, got {options.heads} heads and a width of {options.width}"
        )
    names = ("steps", "batch_size", "layers", "width", "heads", "context", "data_dir", "text")
    settings = {name: getattr(options, name) for name in names}
    comparison.run(options, lambda seed: make_workload(**settings, seed=seed))


if __name__ == "__main__":
    main()
