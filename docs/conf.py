"""How Sphinx builds the site: `make docs`."""

import os
import sys
from pathlib import Path

import jupytext

import mfac_jax

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import stored_tables  # noqa: E402

# Pages that can be downloaded as notebooks.
NOTEBOOKS = ("start", "guides/pruning", "guides/diagnostics")

project = "mfac_jax"
author = "the mfac_jax authors"
project_copyright = author
version = release = mfac_jax.__version__

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx-mathjax-offline",
    "sphinx_copybutton",
    "sphinx_design",
]

nitpicky = True  # a name in a docstring that leads nowhere is a warning
nitpick_ignore_regex = [
    ("py:.*", r"(jax|optax|jnp|chex|flax|numpy|np|collections|typing)\..*"),
    ("py:class", r"ArrayTree|mfac_jax\._src\..*"),  # types of fields that have no page
    ("py:obj", "(?s).*"),  # names in docstrings: links where they lead somewhere, else code
]
default_role = "py:obj"

# Cells run in the build; what they write to stderr is an error.
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "error"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that cells make
nb_ipywidgets_js = {}  # would load scripts from the network
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
os.environ |= {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

autodoc_member_order = "bysource"
autosummary_generate = False
maximum_signature_line_length = 88
autodoc_typehints = "none"  # the texts say it in words
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "sphinx_book_theme"
html_title = "mfac_jax"
html_context = {"default_mode": "auto"}
html_favicon = "_static/logo.svg"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["../out/extra"]
html_theme_options = {
    "show_toc_level": 2,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search stands in the side bar already
}


def write_notebooks() -> None:
    """Write the notebooks that pages offer for download."""
    folder = ROOT / "out" / "extra" / "notebooks"
    for name in NOTEBOOKS:
        path = folder / f"{Path(name).name}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        jupytext.write(jupytext.read(ROOT / "docs" / f"{name}.md"), path)


write_notebooks()
stored_tables.write(ROOT / "out" / "tables")
