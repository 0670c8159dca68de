"""One step program at a time, without an engine around it: how near it comes to what the device can do.

    python scripts/bench_step.py --model-path benchmarks/shapes/qwen2.5-7b --rows 1 8 64 256
    python scripts/bench_step.py --model-path ... --quantization fp8 --rows 1 --context 4096 --prefill 8192
    python scripts/bench_step.py --model-path ... --rows 1 64 --prefill --try-xla-flags

Needs a config.json only: weights and cache hold random values that are made on the device. Each program is
compiled, run until it is warm, then launched many times in a row, as the engine does it, and waited for at
the end. A decode row attends to `--context` tokens whose pages lie scattered over the pool; a prefill is one
chunk with nothing before it. The ceilings, a large copy and a large product of bf16 matrices, are measured in
the same process. --try-xla-flags runs the rows again under each setting of jaxserve/runner/xla_flags.py that
was not measured. Prints each program's figures as they come, then a Markdown table; the last line is one
JSON object.

Bytes counted: every weight but the embedding's unused rows and experts that nobody would choose at random,
and K and V of the context, once a step. FLOPs: two a weight and token (the head's for one token a sequence,
those of chosen experts), and four a query head, channel and attended token.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_workload import describe_machine, print_table, show
from device_rates import Ceilings, add_ceiling_flags, measure_ceilings, time_calls
from flax import nnx

from jaxserve.build import read_machine
from jaxserve.kernels_pallas.dispatch import KernelTarget, choose_kernels
from jaxserve.models.experts import describe_experts
from jaxserve.models.interface import ModelConfig, ParamSpec
from jaxserve.models.quant import bind_kernels
from jaxserve.models.registry import find_family
from jaxserve.runner.batch import pack_step, slot_params
from jaxserve.runner.buckets import Ladder, Shape
from jaxserve.runner.device_state import DeviceState, PoolSize, kv_bytes_per_token
from jaxserve.runner.grouping import group_layers, mark_groups
from jaxserve.runner.programs import Programs
from jaxserve.runner.xla_flags import untried_settings
from jaxserve.scheduler.plan import DecodeRow, PrefillChunk
from jaxserve.types import TokenParams
from jaxserve.weights.served import count_served_bytes, describe_params

PAGE_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """Of one program. `launch_ms` is what the host spends on a launch while the device is busy."""

    shape: str
    xla_flags: str  # besides those that are always chosen
    num_rows: int
    num_tokens: int
    context: int
    compile_s: float
    step_ms: float
    launch_ms: float
    tokens_per_s: float
    bytes: int
    flops: float
    copy_share: float  # bytes a second, as a share of the copy's
    matmul_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedStep:
    shape: str
    xla_flags: str
    failed: str


@partial(jax.jit, static_argnames=("shape", "dtype"))
def make_random(key: jax.Array, *, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Values of about the size of real weights: normal, or all of int8's."""
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return (0.02 * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


class StepBench:
    """A model of random weights, its pool, and the compiled programs that are asked for."""

    def __init__(self, arguments: argparse.Namespace):
        hf_config = json.loads((arguments.model_path / "config.json").read_text())
        self._family = find_family(hf_config)
        self.cfg: ModelConfig = self._family.Config.from_hf(hf_config)
        self._num_chosen = hf_config.get("num_experts_per_tok", 1)
        specs = self._family.param_specs(self.cfg)
        self._specs: list[ParamSpec] = mark_groups(specs, group_layers(specs))  # of int4
        self._precision = {"dtype": arguments.dtype, "quantization": arguments.quantization}
        self._kv_dtype = jnp.dtype(arguments.kv_cache_dtype)
        most_rows = max([*arguments.rows, 1])
        longest = max([arguments.context, *arguments.prefill])
        pages_per_row = -(-arguments.context // PAGE_SIZE)
        num_pages = 1 + max(most_rows * pages_per_row, -(-longest // PAGE_SIZE))
        self._pool = PoolSize(
            num_pages=num_pages,
            page_size=PAGE_SIZE,
            num_slots=most_rows,
            table_width=-(-longest // PAGE_SIZE),
        )
        self._context = arguments.context
        self.tried_options: dict[str, str | int | bool] = {}  # XLA's, of the programs to come
        params = describe_params(self._specs, **self._precision)
        self.kernels = choose_kernels(self._describe_target())
        model = self._family.Model(self.cfg, bind_kernels(params, self.kernels), self.kernels)
        ladder = Ladder((), 0)  # programs are compiled one by one here
        self._programs = Programs(model, self.cfg, self._pool, self._kv_dtype, ladder)
        keys = iter(jax.random.split(jax.random.key(2), 8 * len(self._specs)))
        self._params = jax.tree.map(
            lambda x: make_random(next(keys), shape=x.shape, dtype=x.dtype), nnx.split(model)[1]
        )
        self._state = self._fill(self._programs.allocate())
        greedy_F = slot_params(TokenParams(max_new_tokens=1), 0)
        self._params_XF = np.tile(greedy_F, (most_rows + 1, 1))

    def _describe_target(self) -> KernelTarget:
        machine = read_machine()
        return KernelTarget(
            platform=machine.platform,
            head_dim=self.cfg.head_dim,
            num_kv_heads=self.cfg.num_kv_heads,
            page_size=PAGE_SIZE,
            kv_dtype=self._kv_dtype.name,
            compute_capability=machine.compute_capability,
            device_kind=machine.device_kind,
            experts=describe_experts(self.cfg, **self._precision),
        )

    def _fill(self, state: DeviceState) -> DeviceState:
        """Random K and V, and for each slot its own pages in random order."""
        keys = iter(jax.random.split(jax.random.key(3), len(jax.tree.leaves(state.kv))))
        kv = jax.tree.map(lambda x: make_random(next(keys), shape=x.shape, dtype=x.dtype), state.kv)
        pages = np.random.default_rng(4).permutation(np.arange(1, self._pool.num_pages))
        table_XW = np.zeros(state.table_XW.shape, np.int32)
        pages_per_row = -(-self._context // PAGE_SIZE)
        for slot in range(self._pool.num_slots):
            table_XW[slot, :pages_per_row] = pages[slot * pages_per_row : (slot + 1) * pages_per_row]
        self._table_XW = table_XW
        return state._replace(kv=kv, table_XW=jnp.asarray(table_XW))

    def run_decode(self, num_rows: int, ceilings: Ceilings) -> StepFigures:
        position = self._context - 1
        rows = [
            DecodeRow(slot, slot, 0, position, int(self._table_XW[slot, position // PAGE_SIZE]), token_id=1)
            for slot in range(num_rows)
        ]
        return self._measure(Shape(num_rows, 0), rows, [], self._context, ceilings)

    def run_prefill(self, num_tokens: int, ceilings: Ceilings) -> StepFigures:
        num_pages = -(-num_tokens // PAGE_SIZE)
        pages = np.random.default_rng(5).permutation(np.arange(1, self._pool.num_pages))[:num_pages]
        chunk = PrefillChunk(0, 0, 0, 0, list(range(100, 100 + num_tokens)), pages.tolist(), True)
        return self._measure(Shape(0, num_tokens), [], [chunk], num_tokens, ceilings)

    def _measure(
        self,
        shape: Shape,
        rows: list[DecodeRow],
        chunks: list[PrefillChunk],
        context: int,
        ceilings: Ceilings,
    ) -> StepFigures:
        start_s = time.perf_counter()
        self._programs.tried_options = self.tried_options
        self._programs.compile_one(shape)
        compile_s = time.perf_counter() - start_s
        program = self._programs.ready[shape]
        launches: list[float] = []

        def launch() -> Any:
            start_s = time.perf_counter()
            packed = pack_step(shape, rows, chunks, self._params_XF, PAGE_SIZE, self._pool.table_width)
            self._state, arrays = program(self._params, self._state, packed)
            launches.append(time.perf_counter() - start_s)
            return arrays

        step_s = time_calls(launch)
        num_new = len(rows) or shape.num_tokens
        num_bytes, flops = self.count_work(shape, context)
        return StepFigures(
            shape=str(shape),
            xla_flags=self.describe_options(),
            num_rows=shape.num_rows,
            num_tokens=shape.num_tokens,
            context=context,
            compile_s=compile_s,
            step_ms=1000 * step_s,
            launch_ms=1000 * statistics.median(launches),
            tokens_per_s=num_new / step_s,
            bytes=num_bytes,
            flops=flops,
            copy_share=num_bytes / step_s / ceilings.copy_bytes_per_s,
            matmul_share=flops / step_s / ceilings.matmul_flops,
        )

    def describe_options(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.tried_options.items())

    def count_work(self, shape: Shape, context: int) -> tuple[int, float]:
        """Fewest bytes and FLOPs of a step, as the file's beginning says."""
        embedding = [spec for spec in self._specs if spec.kind == "embedding"]
        head = [spec for spec in self._specs if spec.path == "head_VD"] or embedding
        inner = [spec for spec in self._specs if spec not in embedding and spec not in head]
        num_tokens = shape.num_rows + shape.num_tokens
        num_bytes = sum(
            int(self._read_share(spec, num_tokens) * count_served_bytes([spec], **self._precision))
            for spec in inner + head
        )
        num_bytes += (
            max(shape.num_rows, 1)
            * context
            * kv_bytes_per_token(self.cfg, self._kv_dtype, self.kernels.make_kv)
        )
        weights, head_weights = (
            sum(self._chosen_share(spec) * math.prod(spec.shape) for spec in specs if spec.kind != "vector")
            for specs in (inner, head)
        )
        attended = shape.num_rows * context + shape.num_tokens * (shape.num_tokens + 1) / 2
        flops = 2.0 * weights * num_tokens + 2.0 * head_weights * max(shape.num_rows, 1)
        flops += 4.0 * self.cfg.num_layers * self.cfg.num_heads * self.cfg.head_dim * attended
        return num_bytes, flops

    def _chosen_share(self, spec: ParamSpec) -> float:
        """Of a matrix's rows, what one token multiplies by."""
        return self._num_chosen / spec.experts if spec.experts > 1 else 1.0

    def _read_share(self, spec: ParamSpec, num_tokens: int) -> float:
        """Of a matrix's rows, what tokens read that choose experts at random."""
        return 1 - (1 - self._chosen_share(spec)) ** num_tokens


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", type=Path, required=True, help="a folder with a config.json")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 256], metavar="N")
    parser.add_argument("--context", type=int, default=1024, metavar="TOKENS", help="of a decode row")
    parser.add_argument("--prefill", type=int, nargs="*", default=[1024, 8192], metavar="TOKENS")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--quantization", default="none", choices=["none", "int8", "fp8", "int4"])
    parser.add_argument("--kv-cache-dtype", default="bfloat16", choices=["float32", "bfloat16", "int8"])
    parser.add_argument("--try-xla-flags", action="store_true", help="the rows again, under each of them")
    add_ceiling_flags(parser)
    return parser.parse_args()


def run_all(
    bench: StepBench, arguments: argparse.Namespace, ceilings: Ceilings
) -> Iterator[StepFigures | FailedStep]:
    for num_rows in arguments.rows:
        yield attempt(bench, Shape(num_rows, 0), ceilings)
    for num_tokens in arguments.prefill:
        yield attempt(bench, Shape(0, num_tokens), ceilings)
    for setting in untried_settings() if arguments.try_xla_flags else ():
        bench.tried_options = setting.options
        for num_rows in arguments.rows:
            yield attempt(bench, Shape(num_rows, 0), ceilings)


def attempt(bench: StepBench, shape: Shape, ceilings: Ceilings) -> StepFigures | FailedStep:
    """A program that cannot be compiled, or a setting that is refused, costs no other."""
    try:
        if shape.num_rows:
            return bench.run_decode(shape.num_rows, ceilings)
        return bench.run_prefill(shape.num_tokens, ceilings)
    except Exception as error:  # of compilers and drivers, which raise whatever they like
        reason = f"{type(error).__name__}: {error}"[:300]
        return FailedStep(shape=str(shape), xla_flags=bench.describe_options(), failed=reason)


def print_figures(figures: list[StepFigures]) -> None:
    heads = ["program", "context", "compile, s", "step, ms", "launch, ms", "tokens/s", "of copy", "of matmul"]
    rows = [
        [
            f"{one.shape} {one.xla_flags}".strip(),
            str(one.context),
            show(one.compile_s, 1),
            show(one.step_ms, 2),
            show(one.launch_ms, 2),
            show(one.tokens_per_s),
            f"{one.copy_share:.0%}",
            f"{one.matmul_share:.0%}",
        ]
        for one in figures
    ]
    print_table(heads, rows)


def main() -> None:
    arguments = parse_arguments()
    ceilings = measure_ceilings(arguments.copy_mib << 20, arguments.matmul_width)
    print(f"{ceilings}\n", flush=True)
    bench = StepBench(arguments)
    figures = []
    for one in run_all(bench, arguments, ceilings):
        figures.append(one)
        print(json.dumps(asdict(one)), flush=True)  # a run that is cut short has told this much
    print_figures([one for one in figures if isinstance(one, StepFigures)])
    report = {
        "machine": {**describe_machine(["jax", "jaxlib"]), "device": jax.devices()[0].device_kind},
        "model": str(arguments.model_path),
        "kernels": bench.kernels.name,
        "settings": {name: getattr(arguments, name) for name in ("dtype", "quantization", "kv_cache_dtype")},
        "ceilings": asdict(ceilings),
        "steps": [asdict(one) for one in figures],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
