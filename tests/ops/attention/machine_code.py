"""Reads the machine code that nvdisasm prints: instructions, and the loops that contain matrix products."""

from __future__ import annotations

import re
from dataclasses import dataclass

# HMMA multiplies registers of one warp. The other two are the ones of sm_90 and sm_100 that reach the full rate: they
# read shared memory by themselves, through the asynchronous proxy.
WARP_MMA = ("HMMA",)
WARPGROUP_MMA = ("HGMMA", "UTCHMMA")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)\s*([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_\w+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """`name` with its modifiers, such as LDG.E.128; `target`: number of the instruction that it can jump to."""

    name: str
    target: int | None
    ends: bool  # nothing after it runs, unless something jumps there

    @property
    def operation(self) -> str:
        return self.name.split(".")[0]


def instructions(text: str) -> list[Instruction]:
    """All instructions of a kernel, in the order of their addresses, without padding."""
    labels: dict[str, int] = {}
    found: list[tuple[str, str, str]] = []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif (match := _INSTRUCTION.match(line)) and match[2] != "NOP":
            found.append((match[1] or "", match[2], match[3]))
    code = []
    for predicate, name, operands in found:
        operation, target = name.split(".")[0], None
        # WARPSYNC.COLLECTIVE continues at its label, too. BSSY only notes where threads meet again.
        if operation in ("BRA", "WARPSYNC", "CALL") and (label := _TARGET.search(operands)):
            target = labels[label[1]]
        # A jump is conditional by its predicate, or by a register before its label.
        always = not predicate and operands.lstrip().startswith("`(") if operation == "BRA" else not predicate
        code.append(Instruction(name, target, always and operation in ("BRA", "EXIT", "RET")))
    return code


def matrix_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The innermost loops with matrix products, in the order of their addresses.

    A loop is a jump back to an instruction that every path to the jump passes, and all instructions on the paths
    between the two. Addresses do not tell: the assembler moves parts that rarely run behind the end of the kernel.
    """
    starts = sorted({0} | {i.target for i in code if i.target is not None} | _after_jumps(code))
    block_of = {start: number for number, start in enumerate(starts)}
    blocks = [range(start, end) for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    next_blocks: list[set[int]] = []
    for number, block in enumerate(blocks):
        last = code[block[-1]]
        following = set() if last.target is None else {block_of[last.target]}
        if not last.ends and number + 1 < len(blocks):
            following.add(number + 1)
        next_blocks.append(following)
    bodies: dict[int, set[int]] = {}
    dominators = _dominators(next_blocks)
    before = _reversed(next_blocks)
    for number, following in enumerate(next_blocks):
        for head in following & dominators.get(number, set()):
            body, waiting = bodies.setdefault(head, {head}), [number]
            while waiting:
                one = waiting.pop()
                if one not in body:
                    body.add(one)
                    waiting += before[one]
    matrix = {
        number
        for number, block in enumerate(blocks)
        if any(code[i].operation in (*WARP_MMA, *WARPGROUP_MMA) for i in block)
    }
    bodies = {head: body for head, body in bodies.items() if body & matrix}
    inner = [
        body for head, body in sorted(bodies.items()) if not any(other != head and other in body for other in bodies)
    ]
    return [[code[i] for number in sorted(body) for i in blocks[number]] for body in inner]


def count(code: list[Instruction], *operations: str) -> int:
    return sum(i.operation in operations for i in code)


def small_copies(code: list[Instruction]) -> int:
    """Asynchronous copies to shared memory of four bytes each; others copy 8 or 16."""
    return sum(i.operation == "LDGSTS" and not {"64", "128"} & set(i.name.split(".")) for i in code)


def loads_after_the_barrier(code: list[Instruction]) -> int:
    """How many loads of 16 bytes run between the barrier that follows the first stores to memory and the first matrix
    product; 0 without such stores or such a barrier."""
    first = next(n for n, i in enumerate(code) if i.operation in (*WARP_MMA, *WARPGROUP_MMA))
    before = code[:first]
    stores = [n for n, i in enumerate(before) if i.operation == "STG"]
    barriers = [n for n, i in enumerate(before) if i.operation == "BAR" and stores and n > stores[-1]]
    return sum(i.name.startswith("LDG.") and "128" in i.name for i in before[barriers[0] :]) if barriers else 0


def _after_jumps(code: list[Instruction]) -> set[int]:
    return {n + 1 for n, i in enumerate(code[:-1]) if i.ends or i.target is not None}


def _reversed(edges: list[set[int]]) -> list[set[int]]:
    back: list[set[int]] = [set() for _ in edges]
    for number, following in enumerate(edges):
        for one in following:
            back[one].add(number)
    return back


def _dominators(edges: list[set[int]]) -> dict[int, set[int]]:
    """For each block that can be reached, the blocks that every path from the start to it passes."""
    reached, waiting = {0}, [0]
    while waiting:
        for one in edges[waiting.pop()] - reached:
            reached.add(one)
            waiting.append(one)
    before = _reversed(edges)
    found = {block: set(reached) for block in reached}
    found[0] = {0}
    changed = True
    while changed:
        changed = False
        for block in sorted(reached - {0}):
            new = {block} | set.intersection(*(found[one] for one in before[block] & reached))
            if new != found[block]:
                found[block], changed = new, True
    return found
