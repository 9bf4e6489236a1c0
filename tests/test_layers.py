"""The folders of the implementation are layers: a file imports from the layers below its own alone."""

import ast
from pathlib import Path

import pytest

import mfac_jax

PACKAGE = Path(mfac_jax.__file__).parent
SOURCES = PACKAGE / "_src"
BELOW = ("base", "linalg", "rows")
MAY_IMPORT = {
    "base": (),
    "linalg": BELOW[:1],
    "rows": BELOW[:2],
    "mfac": BELOW,
    "static": BELOW,
    "cgfac": BELOW,
    "pruning": (*BELOW, "mfac", "static"),
}


def imported_modules(source: str) -> set[str]:
    """The full names of all that a source imports, inside of functions too."""
    modules = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            modules |= {f"{origin}.{alias.name}" for alias in node.names}
    return modules


def wrong_imports(folder: str, source: str) -> set[str]:
    """What a file of the folder may not import: layers above, those beside, and the public names."""
    allowed = tuple(f"mfac_jax._src.{layer}." for layer in (folder, *MAY_IMPORT[folder]))
    own = {name for name in imported_modules(source) if name.split(".")[0] in ("mfac_jax", "")}
    return {name for name in own if not f"{name}.".startswith(allowed)}


def test_every_folder_is_a_layer():
    folders = {path.name for path in SOURCES.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(MAY_IMPORT)


@pytest.mark.parametrize(
    "path", sorted(SOURCES.glob("*/**/*.py")), ids=lambda path: str(path.relative_to(SOURCES))
)
def test_a_file_imports_from_the_layers_below_alone(path):
    assert wrong_imports(path.relative_to(SOURCES).parts[0], path.read_text()) == set()


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        ("base", "from mfac_jax._src.rows import mesh"),
        ("rows", "import mfac_jax._src.mfac.transform"),
        ("static", "from mfac_jax._src.mfac.transform import ihvp"),
        ("cgfac", "from mfac_jax._src import pruning"),
        ("pruning", "from mfac_jax._src.cgfac.layers import LayerFactors"),
        ("mfac", "def f():\n  from mfac_jax import ihvp"),
        ("mfac", "import mfac_jax"),
        ("mfac", "from ..cgfac import layers"),
    ],
)
def test_a_wrong_import_is_found(folder, source):
    assert len(wrong_imports(folder, source)) == 1


def test_imports_from_below_and_of_others_are_right():
    source = "import jax\nfrom mfac_jax._src.base import trees\nfrom mfac_jax._src.pruning import obs"
    assert wrong_imports("pruning", source) == set()
