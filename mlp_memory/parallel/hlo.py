"""A compiled program's text: its computations, and how often each one runs.

XLA's own cost analysis counts the body of a loop once, and a scan over layers is a loop. So
the text is read here, and what stands in a loop's body counts as often as the loop turns.
"""

import collections
import dataclasses
import math
import re

import numpy as np

BYTES = {
    **dict.fromkeys(("pred", "s8", "u8", "s4", "u4", "s2", "u2", "f8e4m3fn", "f8e5m2"), 1),
    **dict.fromkeys(("s16", "u16", "f16", "bf16"), 2),
    **dict.fromkeys(("s32", "u32", "f32"), 4),
    **dict.fromkeys(("s64", "u64", "f64", "c64"), 8),
    "c128": 16,
    "token": 0,
}
"""Element type -> bytes; what is narrower than a byte counts as one."""

_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\](\{[^{}]*\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array: element type, sizes, and whether it lies in a chip's scratch memory, not in its HBM."""

    dtype: str
    sizes: tuple[int, ...]
    scratch: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.sizes)

    @property
    def bytes(self) -> int:
        return self.elements * BYTES[self.dtype]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name, kind: of the line, "all-reduce.3", and of what it does, "all-reduce".
      shapes: of its result, the leaves of a tuple in order.
      operands: names; the literal of a constant, the number of a parameter.
      attributes: the rest of the line.
      is_root: it is its computation's result.
    """

    name: str
    kind: str
    shapes: tuple[Shape, ...]
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def named(self, attribute: str) -> str | None:
        """The computation that `attribute=%name` names."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found.group(1) if found else None

    def numbers(self, attribute: str) -> list[int] | None:
        """The list of `attribute={1,2}`."""
        found = re.search(rf"\b{attribute}=\{{([0-9,]*)\}}", self.attributes)
        return [int(n) for n in found.group(1).split(",") if n] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, and how often each runs in one run of the program.

    Attributes:
      computations: every one, callees before callers.
      times: how often it runs; 0 for what only reductions call, element by element.
      fused: those that are parts of one kernel; what is computed inside has no buffer.
    """

    computations: dict[str, Computation]
    times: dict[str, int]
    fused: frozenset[str]

    def instructions(self, fused: bool) -> list[tuple[int, Computation, Instruction]]:
        """(times, computation, instruction) of all that runs; `fused` takes kernels' insides in."""
        return [
            (self.times[name], computation, instruction)
            for name, computation in self.computations.items()
            if self.times[name] and (fused or name not in self.fused)
            for instruction in computation.values()
        ]


def parse(text: str) -> Program:
    """Reads `compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation, or a loop's turns cannot be told.
    """
    computations: dict[str, Computation] = {}
    entry, current = None, {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header.group(2), {})
            entry = header.group(2) if header.group(1) else entry
        elif name := _NAME.match(line):
            current[name.group(2)] = _instruction(line[name.end() :], name.group(2), bool(name.group(1)))
    if entry is None:
        raise ValueError("no ENTRY computation in this text")
    times, fused = collections.Counter({entry: 1}), set()
    for name in reversed(computations):  # callers come before what they call
        for instruction in computations[name].values():
            for callee, count in _calls(instruction, computations[name], computations):
                times[callee] += count * times[name]
                if instruction.kind == "fusion" or name in fused:
                    fused.add(callee)
    return Program(computations, {name: times[name] for name in computations}, frozenset(fused))


def _instruction(rest: str, name: str, is_root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind_at = end + 1
    opening = rest.index("(", kind_at)
    closing = _closing(rest, opening)
    operands = [part.split()[-1].lstrip("%") for part in _split(rest[opening + 1 : closing])]
    return Instruction(
        name, rest[kind_at:opening], _shapes(rest[:end]), tuple(operands), rest[closing + 1 :], is_root
    )


def _closing(text: str, opening: int) -> int:
    depth = 0
    for at in range(opening, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at
    raise ValueError(f"an unclosed bracket: {text[:80]}")


def _split(text: str) -> list[str]:
    """Operands, apart at commas outside of brackets."""
    parts, depth, start = [], 0, 0
    text = re.sub(r"/\*.*?\*/", "", text)
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return [part for part in (*parts, text[start:]) if part.strip()]


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(n.lstrip("<=")) for n in sizes.split(",") if n), "S(1)" in (layout or ""))
        for dtype, sizes, layout in _SHAPE.findall(text)
        if dtype in BYTES
    )


def _calls(
    instruction: Instruction, computation: Computation, computations: dict[str, Computation]
) -> list[tuple[str, int]]:
    """(computation, how often) that one run of an instruction runs."""
    kind = instruction.kind
    if kind == "while":
        turns = _turns(instruction, computation, computations)
        return [(instruction.named("body"), turns), (instruction.named("condition"), turns + 1)]
    if kind in ("fusion", "async-start"):
        return [(instruction.named("calls"), 1)]
    if kind in ("call", "call-start"):
        return [(instruction.named("to_apply"), 1)]
    if kind == "conditional":  # each branch counts; one of them runs
        found = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
        names = found.group(1).split(",") if found else []
        names += [instruction.named(f"{side}_computation") or "" for side in ("true", "false")]
        return [(name.strip().lstrip("%"), 1) for name in names if name]
    return []


def _turns(loop: Instruction, computation: Computation, computations: dict[str, Computation]) -> int:
    """How often a loop turns: as the compiler notes it, or by its condition i < bound."""
    if noted := re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(noted.group(1))
    condition, body = (computations[loop.named(name)] for name in ("condition", "body"))
    root = next(i for i in condition.values() if i.is_root)
    if root.kind == "fusion":
        inner = next(i for i in computations[root.named("calls")].values() if i.is_root)
        parameters = {
            i.name: int(i.operands[0])
            for i in computations[root.named("calls")].values()
            if i.kind == "parameter"
        }
        operands = [root.operands[parameters[name]] for name in inner.operands]
    else:
        inner, operands = root, root.operands
    try:
        index = int(re.search(r"index=(\d+)", condition[operands[0]].attributes).group(1))
        start_tuple = computation[loop.operands[0]]
        bound = _constant(condition[operands[1]], condition, start_tuple, computation)
        start = _constant(computation[start_tuple.operands[index]], computation, start_tuple, computation)
        result = next(i for i in body.values() if i.is_root)
        step = body[result.operands[index]]
        steps = [int(body[name].operands[0]) for name in step.operands if body[name].kind == "constant"]
        known = inner.kind == "compare" and "direction=LT" in inner.attributes
        known = known and step.kind in ("add", "fusion") and steps[:1] != [0]
    except (AttributeError, KeyError, IndexError, ValueError):
        known = False
    if not known:
        raise ValueError(f"cannot tell how often the loop {loop.name} turns: {loop.attributes[:200]}")
    return max(0, -(-(bound - start) // (steps[0] if steps else 1)))


def _constant(instruction: Instruction, scope: Computation, start: Instruction, outside: Computation) -> int:
    """The value of a scalar, also of one that a loop carries along unchanged."""
    while instruction.kind in ("copy", "bitcast", "convert"):
        instruction = scope[instruction.operands[0]]
    if instruction.kind == "get-tuple-element" and scope is not outside:
        index = int(re.search(r"index=(\d+)", instruction.attributes).group(1))
        return _constant(outside[start.operands[index]], outside, start, outside)
    if instruction.kind != "constant":
        raise ValueError(f"{instruction.name} is no constant")
    return int(instruction.operands[0])


def matmul_flops(instruction: Instruction, computation: Computation) -> int:
    """FLOPs of a `dot` or `convolution`, 2 per multiplication; 0 for anything else."""
    if instruction.kind == "dot":
        left = computation[instruction.operands[0]].shapes[0]
        contracted = instruction.numbers("lhs_contracting_dims") or []
        return 2 * instruction.shapes[0].elements * math.prod(left.sizes[i] for i in contracted)
    if instruction.kind == "convolution":
        return _convolution_flops(instruction, computation)
    return 0


def _convolution_flops(instruction: Instruction, computation: Computation) -> int:
    left, right = (computation[name].shapes[0] for name in instruction.operands[:2])
    inputs, kernels, outputs = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    fields = dict(part.split("=") for part in window.group(1).split()) if window else {}
    result = instruction.shapes[0]
    flops = 2 * right.sizes[kernels.index("i")]
    flops *= result.sizes[outputs.index("b")] * result.sizes[outputs.index("f")]
    for axis in range(len(inputs) - 2):
        place = str(axis)

        def field(name: str, default: str, axis: int = axis) -> str:
            return fields[name].split("x")[axis] if name in fields else default

        low = int(field("pad", "0_0").split("_")[0])
        stride, spread, grown = (int(field(n, "1")) for n in ("stride", "rhs_dilate", "lhs_dilate"))
        out, kernel, size = (
            shape.sizes[labels.index(place)]
            for shape, labels in ((result, outputs), (right, kernels), (left, inputs))
        )
        # Multiplications with padding are not counted.
        at = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * spread - low
        flops *= int(((at >= 0) & (at <= (size - 1) * grown) & (at % grown == 0)).sum())
    return flops
