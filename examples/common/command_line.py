"""Command lines from dataclasses, by tyro: kinds of options, and errors of one line.

tyro draws its errors as boxes, and some of them name Python types. Here an option keeps its error until all
options are read; the first error is then printed in one line.
"""

import contextlib
import dataclasses
import difflib
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")
USAGE_ERROR = 2  # the exit status that says: the command line is wrong, do not try it again


class RefusedError(Exception):
    """What the user asked for cannot be done. The message says why, and what to do."""


def refuse(message: object) -> NoReturn:
    """Print an error about the command line or the data, and exit with status 2."""
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(USAGE_ERROR)


class _Invalid(NamedTuple):
    """In place of an option's value: what is wrong with what was typed."""

    message: str


def option(
    read: Callable[[str], Any], metavar: str, *, many: bool = False, show: Callable[[Any], str] = str
) -> PrimitiveConstructorSpec[Any]:
    """Describe a kind of option; stands in `typing.Annotated`.

    Args:
      read: from what was typed to the value. A ValueError says what is wrong.
      metavar: what stands for the value in the help.
      many: whether the option takes several values, at least one, and makes a tuple.
      show: from a value to how it is typed.
    """

    def read_all(words: Sequence[str]) -> Any:
        try:
            if not words or (len(words) > 1 and not many):
                raise ValueError(f"needs {'at least ' * many}one value, got {len(words)}")
            return tuple(map(read, words)) if many else read(words[0])
        except ValueError as error:
            return _Invalid(str(error))

    return PrimitiveConstructorSpec(
        nargs="*",  # also for one value: tyro would report a missing one in a box
        metavar=f"{metavar} ..." if many else metavar,
        instance_from_str=read_all,
        is_instance=lambda value: True,
        str_from_instance=lambda value: list(map(show, value if many else [value])),
    )


def parse(options: type[T], argv: Sequence[str] | None, description: str | None) -> T:
    """Read the command line into the dataclass `options`; refuse what is wrong.

    Args:
      options: a dataclass with a default and a docstring for each field, annotated with kinds of options.
      argv: the words after the command, None for those of this process.
      description: what the help starts with.
    """
    values, unknown = _read(options, argv, description)
    if unknown:
        names = [_typed(field.name) for field in dataclasses.fields(values)]
        known = difflib.get_close_matches(unknown[0].split("=")[0], names, n=1)
        hint = f"did you mean {known[0]}?" if known else "--help lists all options"
        refuse(f"unknown argument {unknown[0]!r}: {hint}")
    return values


def parse_known(options: type[T], argv: Sequence[str] | None) -> tuple[T, list[str]]:
    """As `parse`, and return the words that it does not know, --help among them, unread."""
    return _read(options, argv, None, add_help=False)


def _read(
    options: type[T], argv: Sequence[str] | None, description: str | None, add_help: bool = True
) -> tuple[Any, list[str]]:
    module = options.__module__
    spec = sys.modules["__main__"].__spec__ if module == "__main__" else None
    values, unknown = tyro.cli(
        options,
        prog=f"python -m {spec.name if spec else module}",
        description=description,
        args=argv,
        return_unknown_args=True,
        add_help=add_help,
    )
    for field in dataclasses.fields(values):  # pyright: ignore[reportArgumentType]
        value = getattr(values, field.name)
        if isinstance(value, _Invalid):
            refuse(f"{_typed(field.name)}: {value.message}")
    return values, unknown


def _typed(name: str) -> str:
    """The option of a field, as users type it."""
    return f"--{name.replace('_', '-')}"


def number(low: int) -> Callable[[str], int]:
    """Read a whole number that is not below `low`."""

    def read(text: str) -> int:
        with contextlib.suppress(ValueError):
            if int(text) >= low:
                return int(text)
        raise ValueError(f"must be a whole number, at least {low}, got {text!r}")

    return read


def choices(names: Iterable[str], *, many: bool = True) -> PrimitiveConstructorSpec[Any]:
    """Describe an option that takes one or, by default, several of the names."""
    allowed = tuple(names)

    def read(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"invalid choice {text!r}: choose from {', '.join(allowed)}")
        return text

    return option(read, f"{{{','.join(allowed)}}}", many=many)


def output_folder(text: str) -> Path:
    """Read a folder, which need not exist."""
    for path in (Path(text), *Path(text).parents):
        if os.path.exists(path) and not os.path.isdir(path):
            raise ValueError(f"must be a folder, but {path} is a file: pass another path")
    return Path(text)


def positive(text: str) -> float:
    """Read a finite number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise ValueError(f"must be a number above 0, got {text!r}")


# Kinds of options. An optional one is None if it is not given, and its help shows no default.
NO_DEFAULT = tyro.conf.arg(help_behavior_hint="")
Count = Annotated[int, option(number(1), "N")]
OptionalCount = Annotated[int | None, option(number(1), "N"), NO_DEFAULT]
Seed = Annotated[int, option(number(0), "N")]
OptionalSeed = Annotated[int | None, option(number(0), "N"), NO_DEFAULT]
OptionalText = Annotated[str | None, option(str, "TEXT"), NO_DEFAULT]
Positive = Annotated[float, option(positive, "X")]
OptionalPath = Annotated[Path | None, option(Path, "PATH"), NO_DEFAULT]
Folder = Annotated[Path, option(output_folder, "FOLDER")]
OptionalFolder = Annotated[Path | None, option(output_folder, "FOLDER"), NO_DEFAULT]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, NO_DEFAULT]
