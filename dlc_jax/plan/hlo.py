"""Optimized HLO as text: computations, their instructions, and how many times each executes.

The forms differ by compiler: only a GPU's text has the trips of a loop, only a TPU's has cycles and
work set aside for the SparseCore.
"""

import dataclasses
import math
import re


@dataclasses.dataclass(frozen=True)
class Instruction:
    shape: str
    opcode: str
    operands: tuple[str, ...]
    line: str


@dataclasses.dataclass(frozen=True)
class Computation:
    name: str
    text: str
    aside: bool  # runs on the SparseCore, beside the rest
    instructions: dict[str, Instruction]
    root: str


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: str


_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(")
_LINE = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*?[\]})]) ([a-z][\w\-]*)\(([^)]*)\)")


def parse(text: str) -> Module:
    computations, entry = {}, ""
    for block in re.split(r"\n(?=%|ENTRY )", text):
        head = _HEAD.match(block)
        if head is None:
            continue
        instructions, root = {}, ""
        for line in block.splitlines()[1:]:
            if match := _LINE.match(line):
                is_root, name, shape, opcode, operands = match.groups()
                listed = re.sub(r"/\*.*?\*/", "", operands).split(",")
                names = tuple(operand.strip().rpartition("%")[2] for operand in listed)
                instructions[name] = Instruction(shape, opcode, names, line)
                root = name if is_root else root
        name = head.group(2)
        aside = 'execution_thread="' in block[block.rfind("\n}") :]
        computations[name] = Computation(name, block, aside, instructions, root)
        entry = name if head.group(1) else entry
    return Module(computations, entry)


def walk(module: Module):
    """(computation, how many times a step runs it, whether it is inside a fusion), from the entry.

    Only what the entry reaches is walked.
    """
    todo = [(module.entry, 1, False)] if module.entry else []
    while todo:
        name, weight, fused = todo.pop()
        computation = module.computations[name]
        yield computation, weight, fused
        for instruction in computation.instructions.values():
            for called, times, inside in _called(module, computation, instruction):
                todo.append((called, weight * times, fused or inside))


def _called(module, computation, instruction):
    """The computations that an instruction runs as such: not the sums inside a reduction."""
    opcode, line = instruction.opcode, instruction.line
    if opcode == "while":
        condition, body = (
            re.search(rf"{key}=%?([\w.\-]+)", line).group(1) for key in ("condition", "body")
        )
        yield body, _trips(module, computation, instruction, condition, body), False
    elif opcode == "conditional":
        branches = re.search(r"branch_computations=\{([^}]*)\}", line)
        names = (
            branches.group(1).split(",")
            if branches
            else re.findall(r"(?:true|false)_computation=(%?[\w.\-]+)", line)
        )
        yield from ((name.strip().lstrip("%"), 1, False) for name in names)
    elif opcode in ("call", "call-start", "async-start"):
        yield from (
            (name, 1, False) for name in re.findall(r"(?:to_apply|calls)=%?([\w.\-]+)", line)[:1]
        )
    elif opcode == "fusion":
        yield from ((name, 1, True) for name in re.findall(r"calls=%?([\w.\-]+)", line)[:1])


def _trips(module, computation, loop, condition, body) -> int:
    """The trips of a while loop: written down on GPU; on TPU read from the loop's own code.

    That code compares a counter with a bound; trips follow from the counter's first value and its
    step. 1 where they cannot be read.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.line):
        return int(known.group(1))
    condition, body = module.computations[condition], module.computations[body]
    test = condition.instructions.get(condition.root)
    if test is None or test.opcode != "compare" or "direction=LT" not in test.line:
        return 1
    counter = condition.instructions.get(test.operands[0])
    index = re.search(r"index=(\d+)", counter.line) if counter else None
    bound = _constant(condition, test.operands[1])
    if index is None or bound is None:
        return 1
    index = int(index.group(1))
    first = _constant(computation, _item(computation, loop.operands[0], index))
    last = body.instructions.get(_item(body, body.root, index))
    addends = last.operands if last and last.opcode == "add" else ()
    step = next((step for operand in addends if (step := _constant(body, operand))), 1)
    return max(0, math.ceil((bound - (first or 0)) / step))


def _item(computation, name, index):
    """The name of what stands at `index` in a tuple; "" where that is unknown."""
    found = computation.instructions.get(name)
    is_tuple = found and found.opcode == "tuple"
    return found.operands[index] if is_tuple and index < len(found.operands) else ""


def _constant(computation, name) -> int | None:
    found = computation.instructions.get(name)
    while found and found.opcode in ("copy", "bitcast", "copy-done", "copy-start"):
        found = computation.instructions.get(found.operands[0])
    digits = found.operands[0] if found and found.opcode == "constant" else ""
    return int(digits) if re.fullmatch(r"-?\d+", digits) else None


def size(shape: str) -> int:
    """Bytes of a shape as HLO writes it; of a tuple, of all that is in it."""
    total = 0
    for dtype, sides in re.findall(r"\b([a-z][a-z0-9]*)\[([\d,]*)\]", shape):
        bits = 8 if dtype == "pred" else int((re.findall(r"\d+", dtype) or ["0"])[0])
        total += bits * math.prod(int(side) for side in sides.split(",") if side) // 8
    return total
