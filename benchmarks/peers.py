"""Code that is used from a checkout, because no package of it is installed."""

import sys
from pathlib import Path
from typing import Annotated

from examples.common.command_line import NO_DEFAULT, option


def existing_folder(text: str) -> Path:
    """Read a folder that has to be there."""
    if not Path(text).is_dir():
        raise ValueError(f"must be a folder that exists, got {text!r}")
    return Path(text)


# Kinds of options.
ExistingFolder = Annotated[Path, option(existing_folder, "FOLDER")]
OptionalExistingFolder = Annotated[Path | None, option(existing_folder, "FOLDER"), NO_DEFAULT]


def make_importable(checkout: Path) -> None:
    """Let Python import the modules of a checkout, those of its folder `src` first."""
    sys.path[:0] = [str(checkout / "src"), str(checkout)]
