"""What a release is made from agrees: version, changelog, citation."""

import pathlib
import re

import mfac_jax

ROOT = pathlib.Path(__file__).parents[2]
# The last release in the changelog; what is not released yet stands before it.
VERSION, DATE = re.findall(
    r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE
)[0]


def test_the_changelog_has_a_dated_section_of_this_version():
    assert mfac_jax.__version__ == VERSION


def test_the_citation_has_the_version_and_the_date_of_the_changelog():
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {VERSION}" in lines
    assert f"date-released: {DATE}" in lines
