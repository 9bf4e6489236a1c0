"""What a program compiled for GPU reads, writes, copies and launches, from the texts that XLA writes of it.

Of a conditional the branch counts that moves less: the others are for cases that are rare. Of a loop the
body counts once, as only the data tell how often it runs.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.compiled_update import BYTES

_ARRAY = re.compile(r"([a-z]+\d*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (.+?) ([a-z][\w-]*)\((.*)$")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) .*\{$")
_CALLED = re.compile(r"(?:calls|to_apply|condition|body|true_computation|false_computation)=%([\w.-]+)")
_THUNK = re.compile(r"^( *)\d+: (k\w+)", re.MULTILINE)
_MOVES_NOTHING = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}
_GROUPS = {"kCommandBuffer", "kSequential"}
_WAITS = {"kConditional", "kWhile"}


class Traffic(NamedTuple):
    """Bytes of operands and of results."""

    read: int = 0
    written: int = 0


class Instruction(NamedTuple):
    """One line of a computation."""

    is_root: bool
    name: str
    type: str
    operation: str
    rest: str

    @property
    def operands(self) -> list[str]:
        """Their names, in order."""
        return re.findall(r"%([\w.-]+)", self.rest.split(")")[0])

    @property
    def called(self) -> list[str]:
        """The computations that it calls."""
        branches = re.search(r"branch_computations=\{(.*?)\}", self.rest)
        return _CALLED.findall(self.rest) + (re.findall(r"%([\w.-]+)", branches[1]) if branches else [])

    @property
    def size(self) -> int:
        """The bytes of the result."""
        return sum(BYTES.get(dtype, 4) * _count(numbers) for dtype, numbers in _ARRAY.findall(self.type))


Computation = dict[str, Instruction]


def _count(dimensions: str) -> int:
    return math.prod(int(n) for n in dimensions.split(",") if n)


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """Read an optimized program: its computations, and the name of the first to run."""
    found: dict[str, Computation] = {}
    entry = name = ""
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            name = header[1]
            found[name] = {}
            entry = name if line.startswith("ENTRY") else entry
        elif (match := _INSTRUCTION.match(line)) and name:
            found[name][match[2]] = Instruction(bool(match[1]), *match.groups()[1:])
    return found, entry


def traffic(text: str) -> Traffic:
    """The bytes that a program reads and writes: the operands and results of its kernels."""
    found, entry = computations(text)
    return _of_computation(found, entry)


def _of_computation(found: dict[str, Computation], name: str) -> Traffic:
    return _sum(_of_instruction(found, found[name], each) for each in found[name].values())


def _sum(parts: Iterable[Traffic]) -> Traffic:
    return Traffic(*map(sum, zip(Traffic(), *parts, strict=True)))


def _of_instruction(found: dict[str, Computation], own: Computation, each: Instruction) -> Traffic:
    if each.operation in _MOVES_NOTHING or each.operation.endswith("-done"):
        return Traffic()
    if each.operation == "fusion":
        return _of_fusion(found[each.called[0]])
    if each.operation == "conditional":
        return min((_of_computation(found, name) for name in each.called), key=sum)
    if each.operation in ("while", "call"):
        return _sum(_of_computation(found, name) for name in each.called)
    if each.operation == "dynamic-update-slice":
        return Traffic(own[each.operands[1]].size, own[each.operands[1]].size)
    return Traffic(sum(own[name].size for name in each.operands if name in own), each.size)


def _of_fusion(inner: Computation) -> Traffic:
    """Of an operand that is only sliced the slices count, of one that is written in place the new part."""
    results = _results(inner)
    in_place = [each for each in results if each.operation == "dynamic-update-slice"]
    read = sum(_read(inner, each, in_place) for each in inner.values() if each.operation == "parameter")
    whole = sum(each.size for each in results if each not in in_place)
    return Traffic(read, whole + sum(inner[each.operands[1]].size for each in in_place))


def _results(inner: Computation) -> list[Instruction]:
    """What the computation returns, before it is called by another shape."""
    root = next(each for each in inner.values() if each.is_root)
    results = [inner[name] for name in root.operands] if root.operation == "tuple" else [root]
    while any(each.operation == "bitcast" for each in results):
        results = [inner[each.operands[0]] if each.operation == "bitcast" else each for each in results]
    return results


def _read(inner: Computation, array: Instruction, in_place: Sequence[Instruction]) -> int:
    """The bytes that the computation reads of the array."""
    size = 0
    for user in (each for each in inner.values() if array.name in each.operands):
        is_first = user.operands[0] == array.name
        if user.operation == "bitcast":
            size += _read(inner, user, in_place)
        elif user.operation in _SLICES and is_first:
            size += user.size
        elif not (user in in_place and is_first):
            return array.size
    return min(size, array.size)


def copied(text: str, shapes: Iterable[Sequence[int]]) -> int:
    """The bytes of copies and transposes of arrays of these shapes, in any order of their axes.

    Axes behind the first may be merged. Other arrays may have as many entries: gradients, say.
    """
    matrices = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    forms, total = set(map(_form, [*shapes, *matrices])), 0
    for computation in computations(text)[0].values():
        for each in computation.values():
            if each.operation in ("copy", "copy-start", "transpose"):
                dimensions = _ARRAY.findall(each.type)[0][1].split(",")
                total += each.size if _form([int(n) for n in dimensions if n]) in forms else 0
    return total


def _form(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted(n for n in shape if n != 1))


class Launches(NamedTuple):
    """What the host starts, and waits for.

    Attributes:
      kernels: kernels, copies and calls of libraries, without those inside of conditionals and loops.
      graphs: CUDA graphs.
      launches: graphs, and kernels outside of them.
      waits: conditionals and loops outside of graphs: there the host waits for the device, at least once.
    """

    kernels: int
    graphs: int
    launches: int
    waits: int


def launches(sequence: str) -> Launches:
    """Count in the sequence of thunks that XLA writes; its indentation says what stands inside of what."""
    kernels = graphs = outside = waits = 0
    around: list[tuple[int, str]] = []
    # The first thunk of a group may stand on the line of the group.
    for indent, kind in _THUNK.findall(re.sub(r"\](\s+\d+: k)", r"]\n\1", sequence)):
        while around and around[-1][0] >= len(indent):
            around.pop()
        kinds = {name for _, name in around}
        around.append((len(indent), kind))
        if kinds & _WAITS:
            continue
        in_graph = "kCommandBuffer" in kinds
        graphs += kind == "kCommandBuffer"
        waits += kind in _WAITS and not in_graph
        kernels += kind not in _GROUPS | _WAITS
        outside += kind not in _GROUPS | _WAITS and not in_graph
    return Launches(kernels, graphs, graphs + outside, waits)
