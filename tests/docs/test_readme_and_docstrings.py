"""The code in README.md and in the docstrings runs as it stands; which names are public."""

import doctest
import importlib
import inspect
import pathlib
import pkgutil
import re

import jax
import pytest

import mfac_jax
from mfac_jax import components, pruning

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
MODULES = [module.name for module in pkgutil.walk_packages(mfac_jax.__path__, "mfac_jax.")]
NAMESPACES = (mfac_jax, pruning, components)
LONGEST_HELP = 60  # lines; what needs more belongs on a page
# Classes that functions return, or hand to a user's own.
RETURNED = ("Diagnostics", "StepView")


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda s: s.strip().splitlines()[-1])
def test_readme_code_runs(snippet):
    exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    """Run outside of jit, each leaves hundreds of small programs in memory."""
    jax.clear_caches()
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def has_to_have_an_example(name: str, value) -> bool:
    is_returned = name in RETURNED or name.endswith("State")
    return not inspect.ismodule(value) and not is_returned


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_every_public_function_and_class_has_a_docstring_example(namespace):
    public = {name: getattr(namespace, name) for name in namespace.__all__}
    expected = {name: x for name, x in public.items() if has_to_have_an_example(name, x)}
    assert [name for name, value in expected.items() if ">>>" not in value.__doc__] == []


def helps(namespace) -> dict[str, str]:
    """The help texts of public functions and classes, and of the methods and properties of these."""
    public = {name: getattr(namespace, name) for name in namespace.__all__}
    members = {
        f"{name}.{member}": getattr(value, member)
        for name, value in public.items()
        if inspect.isclass(value)
        for member in vars(value)
        if not member.startswith("_")
    }
    own = {name: value for name, value in members.items() if callable(value) or isinstance(value, property)}
    return {name: inspect.getdoc(value) or "" for name, value in (public | own).items()}


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_help_is_short_and_readable_in_a_terminal(namespace):
    for name, text in helps(namespace).items():
        first, *rest = text.splitlines()
        assert len([first, *rest]) <= LONGEST_HELP, name
        assert first.endswith("."), name
        assert not rest or not rest[0], name
        assert not re.search(r":[a-z]+:`|\.\. [a-z]+::|\\", text), name


def test_returned_classes_are_public():
    public = {name for namespace in NAMESPACES for name in namespace.__all__}
    assert public.issuperset(RETURNED)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_dir_lists_public_names_alone(namespace):
    listed = set(dir(namespace)) - {"__version__"}
    assert listed == set(namespace.__all__)
    assert not any(name.startswith("_") for name in listed)
    assert namespace.__all__ == sorted(namespace.__all__)


@pytest.mark.parametrize("namespace", NAMESPACES, ids=lambda module: module.__name__)
def test_all_has_every_public_name_and_a_star_brings_these_alone(namespace):
    found = {name for name in vars(namespace) if not name.startswith("_")}
    brought: dict[str, object] = {}
    exec(f"from {namespace.__name__} import *", brought)
    assert found == set(namespace.__all__) == brought.keys() - {"__builtins__"}


@pytest.mark.parametrize("name", pruning.__all__)
def test_names_of_pruning_still_come_from_the_package_with_a_warning(name):
    with pytest.warns(DeprecationWarning, match=rf"mfac_jax\.{name} is mfac_jax\.pruning\.{name} now"):
        assert getattr(mfac_jax, name) is getattr(pruning, name)


def test_other_names_are_not_there():
    with pytest.raises(AttributeError, match="module 'mfac_jax' has no attribute 'shampoo'"):
        _ = mfac_jax.shampoo
