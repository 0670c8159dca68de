"""Compiles a slice's step programs on a machine that has no such chip, and reads what the compiler says.

TPUs: libtpu brings the whole compiler, and jax.experimental.topologies describes a slice to it. H200: the
CUDA plugin does, from a description of the card. What is read is what a launch there would get: buffers,
code, collectives. Time is only estimated (estimate.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
from flax import nnx
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding

from jaxserve.blueprint import Blueprint
from jaxserve.kernels_pallas.shards import Shards
from jaxserve.planning.chips import Chip
from jaxserve.planning.estimate import count_collectives, count_cycles, find_largest_copy, find_sum_gaps
from jaxserve.planning.slices import Slice
from jaxserve.runner.batch import packed_size
from jaxserve.runner.buckets import Shape
from jaxserve.runner.device_state import DeviceState, make_state, state_specs
from jaxserve.runner.images import ImageSizes, lower_encoder
from jaxserve.runner.programs import lower_step
from jaxserve.runner.xla_flags import chosen_options
from jaxserve.weights.placement import Placement, make_placement

H200_CONFIG = Path(__file__).parent / "h200_target_config.textproto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramReport:
    """One compiled program. Bytes are of one device."""

    shape: Shape | str  # or what else it is for
    compile_s: float
    code_bytes: int
    argument_bytes: int
    temp_bytes: int
    alias_bytes: int
    state_bytes: int  # of the donated state, as counted from shapes; at least so many must be aliased
    largest_copy_bytes: int  # of an array that the program only copies
    collectives: dict[str, int]  # of a step in which nobody samples or asks for scores, by name
    estimate_s: float | None  # the compiler's, of a TPU's step without collectives and what attention reads
    sum_gaps_s: tuple[float, ...] = ()  # of each sum of a layer, what goes on beside it, by the same clock
    problem: str = ""  # why it did not compile; then the figures are 0


def find_missing_compiler(where: Slice) -> str:
    """Why nothing can be compiled for that slice here; empty if it can."""
    if where.chip.platform == "tpu":
        return "" if importlib.util.find_spec("libtpu") else "libtpu is not installed (pip install libtpu)"
    if jax.__version_info__ < (0, 11):
        return f"the GPU kernels need jax 0.11.2 or later, and this is {jax.__version__}"
    if not all(importlib.util.find_spec(name) for name in ("jax_plugins", "jax_plugins.xla_cuda13")):
        return "jax-cuda13-plugin and jax-cuda13-pjrt are not installed (pip install --no-deps both)"
    return ""


def choose_programs(blueprint: Blueprint) -> list[Shape]:
    """The decode programs of fewest and of most rows, and the longest chunk: speed, and the most memory."""
    shapes = blueprint.ladder.shapes
    decode = [shape for shape in shapes if not shape.num_tokens and shape.window == 1]
    prefill = [shape for shape in shapes if not shape.num_rows]
    return list(dict.fromkeys([min(decode), max(decode), max(prefill)]))


def compile_programs(blueprint: Blueprint, where: Slice, shapes: list[Shape]) -> list[ProgramReport]:
    """Each program compiled for the devices of one copy of the model. One that does not compile says why."""
    sketch = blueprint.sketch
    devices = _describe_devices(where.find_part(sketch.tp_size))[: sketch.tp_size]
    placement = make_placement(devices)
    alone = SingleDeviceSharding(devices[0])  # of all arrays, where there is no mesh
    checkpoint = replace(sketch.checkpoint, placement=placement)
    graphdef, params = nnx.split(checkpoint.describe_model())
    make = partial(
        make_state,
        checkpoint.local_cfg,
        blueprint.pool,
        sketch.kv_dtype,
        Shards(placement.num_devices),
        checkpoint.kernels.make_kv,
    )
    specs = state_specs(blueprint.pool)
    state = jax.eval_shape(placement.spread(make, in_specs=(), out_specs=specs))
    if placement.mesh is None:
        params, state = jax.tree.map(partial(_place, alone), (params, state))
    else:
        state = _place_state(placement, specs, state)
    everywhere = placement.make_sharding(()) if placement.mesh is not None else alone
    features = []
    if sketch.images is not None:
        size = (sketch.images.num_rows, sketch.images.width)
        features = [jax.ShapeDtypeStruct(size, "float32", sharding=everywhere)]
    reports = []
    num_loops = checkpoint.cfg.num_layers if checkpoint.stacks_layers else 1
    for shape in shapes:
        size = packed_size(shape, blueprint.pool.table_width, takes_images=bool(features))
        packed = jax.ShapeDtypeStruct((size,), "int32", sharding=everywhere)
        lower = partial(
            lower_step, graphdef, shape, blueprint.pool, placement, params, state, packed, *features
        )
        with _lowering_for(devices[0], placement):
            is_halved = checkpoint.kernels.halves(shape.num_tokens)
            reports.append(_compile(shape, lower, count_bytes(state), num_loops, where.chip, is_halved))
    if sketch.images is not None:
        vision = cast(Any, nnx.merge(graphdef, params)).vision
        reports += _compile_encoder(vision, sketch.images, placement, features[0], where.chip)
    return reports


def _compile_encoder(
    vision: Any, sizes: ImageSizes, placement: Placement, features: Any, chip: Chip
) -> list[ProgramReport]:
    """The vision encoder's programs for the largest image."""
    num_patches = sizes.buckets[-1]
    lowered = lower_encoder(vision, sizes, num_patches, placement, features)
    programs = [("patches in", lowered.embed, 0)]
    programs += [(f"a block of {len(lowered.blocks)}", block, 0) for block in lowered.distinct_blocks]
    programs.append(("features out", lowered.merge, count_bytes(features)))
    name = f"image of {num_patches} patches"
    return [
        _compile(f"{name}, {part}", lambda program=program: program, state_bytes, 1, chip)
        for part, program, state_bytes in programs
    ]


def _compile(
    shape: Shape | str,
    lower: Callable[[], jax.stages.Lowered],
    state_bytes: int,
    num_loops: int,
    chip: Chip,
    is_halved: bool = False,
) -> ProgramReport:
    start_s = time.perf_counter()
    try:
        options = chosen_options(chip.platform, chip.device_kind, is_halved)
        program = lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        return _failed(shape, time.perf_counter() - start_s, str(error))
    return _read_report(shape, time.perf_counter() - start_s, program, state_bytes, num_loops, chip)


def _lowering_for(device: Any, placement: Placement) -> Any:
    """A context in which Pallas knows the TPU that it lowers for; where there is a mesh, that says it."""
    if placement.mesh is not None or device.platform != "tpu":
        return contextlib.nullcontext()
    kind = AbstractDevice(device_kind=device.device_kind, num_cores=device.num_cores, platform="tpu")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=kind))


def count_bytes(tree: Any) -> int:
    """Of one device's part of the arrays that a tree of shapes describes."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def _describe_devices(where: Slice) -> Any:
    if where.chip.platform == "tpu":
        return topologies.get_topology_desc(str(where), "tpu").devices
    config = H200_CONFIG.read_text()
    grid = f"1x1x{where.num_devices}"
    return topologies.get_topology_desc("", "cuda", target_config=config, topology=grid).devices


def _place_state(placement: Placement, specs: DeviceState, state: DeviceState) -> DeviceState:
    """The state with the shardings that `specs` names; one of them is for all leaves of the pool."""

    def place(spec: Any, tree: Any) -> Any:
        sharding = NamedSharding(cast(Mesh, placement.mesh), spec)
        return jax.tree.map(partial(_place, sharding), tree)

    return DeviceState(*(place(spec, tree) for spec, tree in zip(specs, state, strict=True)))


def _place(sharding: jax.sharding.Sharding, leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _read_report(
    shape: Shape | str, compile_s: float, program: Any, state_bytes: int, num_loops: int, chip: Chip
) -> ProgramReport:
    memory, text = program.memory_analysis(), program.as_text()
    num_cycles, gaps = 0, []
    if chip.estimate_hz:
        bytes_per_cycle = chip.hbm_bytes_per_s / chip.estimate_hz
        num_cycles = count_cycles(text, num_loops, chip.launch_cycles, bytes_per_cycle)
        gaps = find_sum_gaps(text, chip.launch_cycles, bytes_per_cycle)
    return ProgramReport(
        shape=shape,
        compile_s=compile_s,
        code_bytes=memory.generated_code_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        state_bytes=state_bytes,
        largest_copy_bytes=find_largest_copy(text),
        collectives=count_collectives(text, num_loops),
        estimate_s=num_cycles / chip.estimate_hz if num_cycles else None,
        sum_gaps_s=tuple(gap / chip.estimate_hz for gap in gaps),
    )


def _failed(shape: Shape | str, compile_s: float, message: str) -> ProgramReport:
    return ProgramReport(
        shape=shape,
        compile_s=compile_s,
        code_bytes=0,
        argument_bytes=0,
        temp_bytes=0,
        alias_bytes=0,
        state_bytes=0,
        largest_copy_bytes=0,
        collectives={},
        estimate_s=None,
        problem=message.partition("\n")[0],
    )
