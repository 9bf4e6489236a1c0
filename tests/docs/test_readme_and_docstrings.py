"""The code in README.md and in the docstrings runs as it stands."""

import doctest
import importlib
import pathlib
import pkgutil
import re

import pytest

import mfac_jax

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
STATIC = ("FisherInverse", "collect_gradients")
PRUNING = (
    "apply_masks",
    "keep_pruned",
    "kernel_masks",
    "obs_scores",
    "obs_update",
    "prune",
    "pruning_report",
    "set_masks",
    "sparsity",
    "sparsity_by_leaf",
)
CGFAC = (
    "LayerFactors",
    "cgfac",
    "empirical_fisher",
    "gauss_newton",
    "nnx_value_and_grad_with_factors",
    "scale_by_cgfac",
    "value_and_grad_with_factors",
)
MODULES = [module.name for module in pkgutil.walk_packages(mfac_jax.__path__, "mfac_jax.")]


@pytest.mark.parametrize("snippet", SNIPPETS, ids=[s.strip().splitlines()[0] for s in SNIPPETS])
def test_readme_code_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_every_public_function_has_a_docstring_example():
    for name in (
        "scale_by_mfac",
        "mfac",
        "ihvp",
        "state_shardings",
        "diagnostics",
        "DiagnosticsLog",
        *STATIC,
        *PRUNING,
        *CGFAC,
    ):
        assert ">>>" in getattr(mfac_jax, name).__doc__


def test_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
