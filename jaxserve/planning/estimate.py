"""What a step runs of a program, read from its text: operations between devices, and a TPU's cycles.

XLA's TPU compiler writes beside each operation how many cycles it takes it for, memory included. Here they
are added up as a decode step runs: the loop over layers as often as it turns, and where there is a choice the
cheaper branch, which is that of a step in which nobody asks for penalties, sampling or scores; other loops
belong to those. Operations between devices are counted along the same way; their time is roofline.py's.

Pallas kernels have no such figure. A launch is taken for as long as the compiler's smallest operations
(`Chip.launch_cycles`) and for the time that the bytes which it declares (`pl.CostEstimate`) need at the peak
of the memory, though small arrays lie in VMEM. Attention declares none, as what it reads is the sequences':
its keys and values are roofline.py's as well.

A sum that goes on beside other operations is begun by one and waited for by another. What the schedule has
between the two is all that can hide it (`find_sum_gaps`).

Cycles are not the chip's: how many of them are a second says the compiler as well, of one large product
(`Chip.estimate_hz`, from `optimal_seconds` of its cost analysis). Knows no model.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
BRANCHES = re.compile(r" conditional\(.*branch_computations=\{([^}]*)\}")
BODY = re.compile(r" while\(.*body=(%[\w.-]+)")
# Of a tpu7x's sparse cores, which take over sums, gathers and copies.
CALL = re.compile(r" (?:custom-)?call-start\(.*(?:to_apply=|called_computations=\{)(%[\w.-]+)")
KERNEL = 'custom_call_target="tpu_custom_call"'
KERNEL_BYTES = re.compile(r'"cost_estimate":\{[^}]*"bytes_accessed":"(\d+)"')
COLLECTIVE = re.compile(
    r"= .*? (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)
# Sums that go on within products, and those on sparse cores: begun, and waited for.
SUM_BEGINS = re.compile(r"^\s+%(?:async-collective-start([\w.]*)|(all-reduce[\w.-]*)\.call-update[\w.]*) = ")
SUM_ENDS = re.compile(r"^\s+%(?:async-collective-done([\w.]*)|(all-reduce[\w.-]*)\.call-done[\w.]*) = ")
COPY = re.compile(r"= (\w+?)(\d*)\[([\d,]*)\]\S* copy\(")


@dataclass(slots=True)
class _Computation:
    cycles: float = 0
    collectives: Counter[str] = field(default_factory=Counter)
    has_layer: bool = False
    begun: dict[str, float] = field(default_factory=dict)
    gaps: list[float] = field(default_factory=list)
    bodies: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    choices: list[list[str]] = field(default_factory=list)


def count_cycles(text: str, num_loops: int, launch_cycles: int, bytes_per_cycle: float) -> int:
    """Cycles of a step in which nobody asks for anything; 0 for a program that is no TPU's.

    `text` is an optimised program, `num_loops` how often its loop over layers turns: the one with kernels. Of
    those a launch takes `launch_cycles`, and its bytes take theirs.
    """
    return round(_add_up(text, num_loops, launch_cycles, bytes_per_cycle)[0])


def count_collectives(text: str, num_loops: int) -> dict[str, int]:
    """Operations between devices of such a step, by name."""
    return dict(_add_up(text, num_loops)[1])


def find_sum_gaps(text: str, launch_cycles: int, bytes_per_cycle: float) -> list[float]:
    """Of each sum over devices in a turn of the loop over layers, the cycles of operations between its begin
    and its end; 0 where nothing goes on beside it."""
    found, _ = _read_computations(text, launch_cycles, bytes_per_cycle)
    return next((here.gaps for here in found.values() if here.has_layer and here.gaps), [])


def _add_up(
    text: str, num_loops: int, launch_cycles: int = 0, bytes_per_cycle: float = math.inf
) -> tuple[float, Counter[str]]:
    found, entry = _read_computations(text, launch_cycles, bytes_per_cycle)
    if not any(here.has_layer for here in found.values()):  # XLA attends: a layer takes longest
        bodies = [found[body] for body in found[entry].bodies]
        max(bodies, key=lambda body: body.cycles, default=found[entry]).has_layer = True

    def add_up(name: str) -> tuple[float, Counter[str]]:
        here = found.get(name, _Computation())
        parts = [min(map(add_up, branches), key=lambda part: part[0]) for branches in here.choices]
        parts += [add_up(body) for body in here.bodies if found[body].has_layer] * num_loops
        collectives = sum((part[1] for part in parts), here.collectives)
        collectives = sum((add_up(call)[1] for call in here.calls), collectives)  # their cycles: unknown
        return here.cycles + sum(part[0] for part in parts), collectives

    return add_up(entry)


def _follow_sums(line: str, here: _Computation) -> None:
    if begin := SUM_BEGINS.match(line):
        here.begun[begin[1] or begin[2] or ""] = here.cycles
        here.collectives["all-reduce"] += begin[2] is None  # a sparse core's is counted where it is called
    elif end := SUM_ENDS.match(line):
        here.gaps.append(here.cycles - here.begun.pop(end[1] or end[2] or ""))
    elif " all-reduce(" in line:
        here.gaps.append(0.0)


def find_largest_copy(text: str) -> int:
    """Bytes of the largest array that an operation of the program writes only to copy it."""
    largest = 0
    for kind, bits, dims in COPY.findall(text):
        num_bytes = max(int(bits or 8) // 8, 1) if kind != "pred" else 1
        for dim in dims.split(","):
            num_bytes *= int(dim or 1)
        largest = max(largest, num_bytes)
    return largest


def _read_computations(
    text: str, launch_cycles: int, bytes_per_cycle: float
) -> tuple[dict[str, _Computation], str]:
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
        _follow_sums(line, here)
        if KERNEL in line:
            here.has_layer = True
            declared = KERNEL_BYTES.search(line)
            here.cycles += launch_cycles + (int(declared[1]) / bytes_per_cycle if declared else 0)
        if body := BODY.search(line):
            here.bodies.append(body[1])
        if call := CALL.search(line):
            here.calls.append(call[1])
        if branches := BRANCHES.search(line):
            here.choices.append([name.strip() for name in branches[1].split(",")])
    return found, entry
