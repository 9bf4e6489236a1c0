"""The pages of the site and README.md, as they are written; `make docs` builds them."""

import pathlib
import re

import pytest

from benchmarks import stored_tables
from mfac_jax import __all__ as names
from mfac_jax import components, pruning

ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").rglob("*.md"))
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)]*)?\)")
INCLUDED = re.compile(r"```\{include\} \S*out/tables/(\w+)\.md")


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_that_exist(page):
    links = [found[0] for found in LINK.findall(page.read_text())]
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_tables_are_those_of_the_stored_results():
    made = stored_tables.tables()
    assert stored_tables.filled(README, made) == README, "run `python -m benchmarks.stored_tables`"
    included = {name for page in PAGES for name in INCLUDED.findall(page.read_text())}
    assert included <= set(made)


@pytest.mark.parametrize(
    ("namespace", "public"),
    [
        ("mfac_jax", names),
        ("mfac_jax.pruning", pruning.__all__),
        ("mfac_jax.components", components.__all__),
    ],
)
def test_every_public_name_stands_in_the_reference(namespace, public):
    documented = set()
    for page in (ROOT / "docs" / "api").glob("*.md"):
        text = page.read_text()
        if f".. currentmodule:: {namespace}\n" in text:
            documented |= set(re.findall(r"^\.\. auto\w+:: (\w+)", text, flags=re.MULTILINE))
    assert set(public) - {"components", "pruning"} == documented
