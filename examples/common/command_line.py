"""Command lines from dataclasses, by tyro: kinds of options, and errors of one line.

tyro draws its errors as boxes, and some of them name Python types. Here an option keeps its error until all
options are read; the first error is then printed in one line.
"""

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

T = TypeVar("T")
USAGE_ERROR = 2  # the exit status that says: the command line is wrong, do not try it again


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
            if not words or len(words) > 1 and not many:
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
    module = options.__module__
    spec = sys.modules["__main__"].__spec__ if module == "__main__" else None
    prog = f"python -m {spec.name if spec else module}"
    values, unknown = tyro.cli(
        options, prog=prog, description=description, args=argv, return_unknown_args=True
    )
    fields: Any = dataclasses.fields(values)
    names = {field.name: f"--{field.name.replace('_', '-')}" for field in fields}
    if unknown:
        known = difflib.get_close_matches(unknown[0].split("=")[0], names.values(), n=1)
        hint = f"did you mean {known[0]}?" if known else "--help lists all options"
        refuse(f"unknown argument {unknown[0]!r}: {hint}")
    for name, typed in names.items():
        value = getattr(values, name)
        if isinstance(value, _Invalid):
            refuse(f"{typed}: {value.message}")
    return values


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


# Kinds of options. An optional one is None if it is not given, and its help shows no default.
NO_DEFAULT = tyro.conf.arg(help_behavior_hint="")
Count = Annotated[int, option(number(1), "N")]
OptionalCount = Annotated[int | None, option(number(1), "N"), NO_DEFAULT]
Seed = Annotated[int, option(number(0), "N")]
OptionalPath = Annotated[Path | None, option(Path, "PATH"), NO_DEFAULT]
Folder = Annotated[Path, option(output_folder, "FOLDER")]
OptionalFolder = Annotated[Path | None, option(output_folder, "FOLDER"), NO_DEFAULT]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, NO_DEFAULT]
