"""What a step runs of a program, read from its text: operations between devices, and a TPU's cycles.

XLA's TPU compiler writes beside each operation how many cycles it takes it for, memory included. Here they
are added up as a decode step runs: the loop over layers as often as it turns, and where there is a choice the
cheaper branch, which is that of a step in which nobody asks for penalties, sampling or scores; other loops
belong to those. Kernels and sums over devices have no such figure and are not in it: roofline.py has theirs.
Operations between devices are counted along the same way.

Cycles are not the chip's: how many of them are a second says the compiler as well, of one large product
(`Chip.estimate_hz`; `optimal_seconds` of its cost analysis). Knows no model.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
BODY = re.compile(r" while\(.*body=(%[\w.-]+)")
# Of a tpu7x's sparse cores, which take over sums, gathers and copies.
CALL = re.compile(r" (?:custom-)?call-start\(.*(?:to_apply=|called_computations=\{)(%[\w.-]+)")
KERNEL = 'custom_call_target="tpu_custom_call"'
COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
COPY = re.compile(r"= (\w+?)(\d*)\[([\d,]*)\]\S* copy\(")


@dataclass(slots=True)
class _Computation:
    cycles: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    has_layer: bool = False
    bodies: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    choices: list[list[str]] = field(default_factory=list)


def count_cycles(text: str, num_loops: int) -> int:
    """Cycles of a step in which nobody asks for anything; 0 for a program that is no TPU's.

    `text` is an optimised program, `num_loops` how often its loop over layers turns: the one with kernels.
    """
    return _add_up(text, num_loops)[0]


def count_collectives(text: str, num_loops: int) -> dict[str, int]:
    """Operations between devices of such a step, by name."""
    return dict(_add_up(text, num_loops)[1])


def _add_up(text: str, num_loops: int) -> tuple[int, Counter[str]]:
    found, entry = _read_computations(text)
    if not any(here.has_layer for here in found.values()):  # XLA attends: a layer takes longest
        bodies = [found[body] for body in found[entry].bodies]
        max(bodies, key=lambda body: body.cycles, default=found[entry]).has_layer = True

    def add_up(name: str) -> tuple[int, Counter[str]]:
        here = found.get(name, _Computation())
        parts = [min(map(add_up, branches), key=lambda part: part[0]) for branches in here.choices]
        parts += [add_up(body) for body in here.bodies if found[body].has_layer] * num_loops
        collectives = sum((part[1] for part in parts), here.collectives)
        collectives = sum((add_up(call)[1] for call in here.calls), collectives)  # their cycles: unknown
        return here.cycles + sum(part[0] for part in parts), collectives

    return add_up(entry)


def find_largest_copy(text: str) -> int:
    """Bytes of the largest array that an operation of the program writes only to copy it."""
    largest = 0
    for kind, bits, dims in COPY.findall(text):
        num_bytes = max(int(bits or 8) // 8, 1) if kind != "pred" else 1
        for dim in dims.split(","):
            num_bytes *= int(dim or 1)
        largest = max(largest, num_bytes)
    return largest


def _read_computations(text: str) -> tuple[dict[str, _Computation], str]:
    found: dict[str, _Computation] = {}
    here, entry = _Computation(), ""
    for line in text.splitlines():
        if line and not line[0].isspace():
            name = line.removeprefix("ENTRY ").partition(" ")[0]
            here = found[name] = _Computation()
            if line.startswith("ENTRY "):
                entry = name
            continue
        if cycles := CYCLES.search(line):
            here.cycles += int(cycles[1])
        here.collectives.update(COLLECTIVE.findall(line))
        here.has_layer |= KERNEL in line
        if body := BODY.search(line):
            here.bodies.append(body[1])
        if call := CALL.search(line):
            here.calls.append(call[1])
        if branches := BRANCHES.search(line):
            here.choices.append([name.strip() for name in branches[1].split(",")])
    return found, entry
