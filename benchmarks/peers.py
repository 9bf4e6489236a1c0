"""Peers' code that is used from a checkout, because no package of it is installed."""

import sys
from pathlib import Path


def make_importable(checkout: Path) -> None:
    """Let Python import the modules of a checkout, those of its folder `src` first."""
    sys.path[:0] = [str(checkout / "src"), str(checkout)]
