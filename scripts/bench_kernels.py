"""Kernels one at a time: time, and what that is of this device's own copy and product rates.

    python scripts/bench_kernels.py                            # every kernel's GPU form, on Hopper
    python scripts/bench_kernels.py --groups decode --only "1 row of 4k"
    python scripts/bench_kernels.py --form xla                 # the reference forms, anywhere

The shapes are those of the kernel_bench_*.py files beside this one. A kernel is called `--calls` times within
one program, each call behind the one before; median of several rounds. "loop" is what a turn of that program
takes around nothing, and is within the time. The error is that of the GPU form against the reference on the
same device, relative to the largest value, where the reference is not too slow to be asked (--no-check leaves
it out). cuDNN, through jax.nn, stands beside prompts without a prefix. Prints a Markdown table; the last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import kernel_bench_decode
import kernel_bench_grouped
import kernel_bench_int4
import kernel_bench_prefill
import kernel_bench_rope_write
import kernel_bench_sampling
from bench_workload import describe_machine, print_table, show
from device_rates import Ceilings, add_ceiling_flags, measure_ceilings, time_calls

MODULES = {
    "decode": "paged_attention.{}.paged_decode",
    "prefill": "paged_attention.{}.paged_prefill",
    "rope write": "kv_write.{}.rope_write",
    "sampling": "sampling.{}.choose_tokens",
    "int4": "int4_matmul.{}.int4_matmul",
    "experts": "grouped_matmul.{}.grouped_matmul",
}
FILES = {"decode": "gpu_decode", "prefill": "gpu_prefill"}  # others' GPU form is in gpu.py
MOST_CHECKED_FLOPS = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A call of a kernel. `moved_bytes` and `flops` are the fewest that any form needs, 0 if uncounted."""

    group: str
    name: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    moved_bytes: int
    flops: int


def list_cases(group: str, only: str) -> Iterator[Case]:
    """Made one at a time: some fill gigabytes."""
    key = jax.random.key(0)
    if group == "sampling":
        for bench in kernel_bench_sampling.SAMPLING_BENCHES:
            if only in bench.name:
                arguments = kernel_bench_sampling.make_arguments(bench, 0)
                yield Case(
                    group=group,
                    name=bench.name,
                    arguments=arguments,
                    options={},
                    moved_bytes=bench.read_bytes,
                    flops=0,
                )
        return
    benches: Any = {
        "decode": (kernel_bench_decode.DECODE_BENCHES, kernel_bench_decode.make_arguments),
        "prefill": (kernel_bench_prefill.PREFILL_BENCHES, kernel_bench_prefill.make_arguments),
        "rope write": (kernel_bench_rope_write.ROPE_WRITE_BENCHES, kernel_bench_rope_write.make_arguments),
        "int4": (kernel_bench_int4.INT4_BENCHES, kernel_bench_int4.make_arguments),
        "experts": (kernel_bench_grouped.GROUPED_BENCHES, kernel_bench_grouped.make_arguments),
    }
    for bench in benches[group][0]:
        if only in bench.name:
            arguments, options = benches[group][1](bench, key)
            flops = getattr(bench, "num_flops", 0)
            yield Case(
                group=group,
                name=bench.name,
                arguments=arguments,
                options=options,
                moved_bytes=bench.moved_bytes,
                flops=flops,
            )


def find_form(group: str, form: str) -> Callable:
    """A kernel's "gpu" or "xla" form. Raises ImportError where jax is too old for the first."""
    path = MODULES[group].format(FILES.get(group, "gpu") if form == "gpu" else "ref")
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"jaxserve.kernels_pallas.{module}"), name)


def repeat_call(call: Callable, case: Case, num_calls: int) -> Callable:
    """A program of the case's arguments that calls `call` so often, each time behind the call before.

    XLA takes a call whose arguments stay the same out of a loop, and leaves out one whose result nobody
    reads. So every argument passes a barrier together with a mark made from the whole result before, and the
    smallest one has that mark, which is zero, added. The program returns the mark and what is written in
    place: the pool of "rope write", which it wants donated.
    """
    is_in_place = case.group == "rope write"

    def run(*arguments: Any) -> Any:
        def again(_: Any, carried: Any) -> Any:
            mark, pool = carried
            given = (pool, *arguments[1:]) if is_in_place else arguments
            mark, given = jax.lax.optimization_barrier((mark, given))
            result = call(*_add_to_smallest(given, mark), **case.options)
            return _mark_result(result), result[1] if is_in_place else None

        return jax.lax.fori_loop(0, num_calls, again, (jnp.int32(0), arguments[0] if is_in_place else None))

    return run


def _add_to_smallest(arguments: Any, mark: jax.Array) -> Any:
    leaves, structure = jax.tree.flatten(arguments)
    smallest = min(range(len(leaves)), key=lambda index: leaves[index].nbytes)
    leaves[smallest] += mark.astype(leaves[smallest].dtype)
    return jax.tree.unflatten(structure, leaves)


def _mark_result(result: Any) -> jax.Array:
    """Zero, which the compiler cannot know: how many of the arrays begin with NaN, or with a number below any
    that a kernel gives. Behind a barrier, so that not only the first elements are computed."""
    firsts = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(jax.lax.optimization_barrier(result))]
    marks = [x != x if jnp.issubdtype(x.dtype, jnp.floating) else x < -127 for x in firsts]
    return jnp.stack(marks).astype(jnp.int32).sum()


def time_kernel(call: Callable, case: Case, num_calls: int) -> float:
    """Seconds of one call among many in a program."""
    if case.group != "rope write":
        return time_calls(jax.jit(repeat_call(call, case, num_calls)), *case.arguments) / num_calls
    write = jax.jit(repeat_call(call, case, num_calls), donate_argnums=0)
    pool, *others = case.arguments
    pool = jax.tree.map(jnp.copy, pool)  # the case keeps its own

    def write_again() -> Any:
        nonlocal pool
        mark, pool = write(pool, *others)
        return mark

    return time_calls(write_again) / num_calls


def time_loop(case: Case, num_calls: int) -> float:
    """Seconds of a turn of the loop around nothing, which `time_kernel` counts too."""

    def give_smallest(*arguments: Any, **_options: Any) -> Any:
        smallest = min(jax.tree.leaves(arguments), key=lambda leaf: leaf.nbytes)
        return (smallest, arguments[0]) if case.group == "rope write" else smallest

    return time_kernel(give_smallest, case, num_calls)


def measure_error(call: Callable, case: Case) -> float | None:
    """Largest difference from the reference, relative to the largest value; for tokens, the share that
    differs."""
    if case.flops > MOST_CHECKED_FLOPS:
        return None
    reference = partial(find_form(case.group, "xla"), **case.options)
    got, want = (jax.jit(form)(*case.arguments) for form in (partial(call, **case.options), reference))
    if case.group == "sampling":
        return float(jnp.mean(got[0] != want[0]))
    got, want = (jax.tree.leaves(value)[0].astype(jnp.float32) for value in (got, want))
    if case.group == "experts":  # rows of absent tiles hold anything
        x_MD, _, expert_I, num_tiles, *_ = case.arguments
        num_rows = int(num_tiles) * (len(x_MD) // len(expert_I))
        got, want = got[:num_rows], want[:num_rows]
    return float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))


def time_cudnn(case: Case, num_calls: int) -> float | None:
    """The same prompt through cuDNN: one run without a prefix or window, K and V of bf16 side by side."""
    if case.group != "prefill" or len(case.arguments[3]) > 1 or case.options["window"] is not None:
        return None
    q_TNH, kv, *_, kv_len_C = case.arguments
    if int(kv_len_C[0]) != len(q_TNH) or kv.k_PSKH.dtype != q_TNH.dtype:
        return None
    _, _, num_kv_heads, head_dim = kv.k_PSKH.shape
    k_1TKH, v_1TKH = (
        pool[1:].reshape(1, -1, num_kv_heads, head_dim)[:, : len(q_TNH)] for pool in (kv.k_PSKH, kv.v_PSKH)
    )
    attend = partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    peer = Case(
        group="cudnn",
        name=case.name,
        arguments=(q_TNH[None], k_1TKH, v_1TKH),
        options={"scale": case.options["scale"]},
        moved_bytes=0,
        flops=0,
    )
    return time_kernel(attend, peer, num_calls)


def measure(case: Case, arguments: argparse.Namespace, ceilings: Ceilings) -> dict[str, Any]:
    call = find_form(case.group, arguments.form)
    call_s = time_kernel(call, case, arguments.calls)
    loop_s = time_loop(case, arguments.calls)
    found = {
        "kernel": case.group,
        "case": case.name,
        "us": 1e6 * call_s,
        "loop_us": 1e6 * loop_s,
        "net_us": 1e6 * (call_s - loop_s),
        "tb_per_s": case.moved_bytes / call_s / 1e12,
        "tflops": case.flops / call_s / 1e12,
        "copy_share": case.moved_bytes / call_s / ceilings.copy_bytes_per_s,
        "matmul_share": case.flops / call_s / ceilings.matmul_flops,
        "error": None,
        "cudnn_us": None,
    }
    if arguments.form != "gpu":
        return found
    try:  # what was measured so far is not lost where the reference is too large, or cuDNN is not there
        found["error"] = None if arguments.no_check else measure_error(call, case)
        cudnn_s = time_cudnn(case, arguments.calls)
        found["cudnn_us"] = None if cudnn_s is None else 1e6 * cudnn_s
    except Exception as error:  # of libraries and drivers, which raise whatever they like
        found["failed"] = describe(error)
    return found


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def measure_all(arguments: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """A shape that fails is told with its reason, and costs no other."""
    for group in arguments.groups:
        for case in islice(list_cases(group, arguments.only), arguments.first):
            try:
                yield measure(case, arguments, ceilings)
            except Exception as error:  # of compilers and drivers, which raise whatever they like
                yield {"kernel": group, "case": case.name, "failed": describe(error)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=MODULES, default=list(MODULES))
    parser.add_argument("--only", default="", metavar="WORDS", help="shapes whose names hold these words")
    parser.add_argument("--first", type=int, metavar="N", help="so many shapes of each kernel")
    parser.add_argument("--form", choices=["gpu", "xla"], default="gpu")
    parser.add_argument("--calls", type=int, default=16, help="in one program [%(default)s]")
    parser.add_argument("--no-check", action="store_true", help="without errors against the reference")
    add_ceiling_flags(parser)
    return parser.parse_args()


def print_figures(found: Iterable[dict[str, Any]]) -> None:
    print()
    rows = []
    for one in found:
        error = "–" if one["error"] is None else f"{one['error']:.1e}"
        rates = [show(one["tb_per_s"], 2), f"{one['copy_share']:.0%}", show(one["tflops"], 1)]
        rates += [f"{one['matmul_share']:.0%}", error, show(one["cudnn_us"], 1)]
        rows.append([one["kernel"], one["case"], show(one["us"], 1), show(one["loop_us"], 1), *rates])
    heads = [
        "kernel",
        "case",
        "us",
        "loop, us",
        "TB/s",
        "of copy",
        "TFLOP/s",
        "of matmul",
        "error",
        "cuDNN, us",
    ]
    print_table(heads, rows)


def main() -> None:
    arguments = parse_arguments()
    if arguments.form == "gpu" and jax.default_backend() != "gpu":
        raise SystemExit("There is no GPU here; --form xla times the reference forms.")
    ceilings = measure_ceilings(arguments.copy_mib << 20, arguments.matmul_width)
    print(f"{ceilings}\n", flush=True)
    found = []
    for one in measure_all(arguments, ceilings):
        found.append(one)
        print(json.dumps(one), flush=True)  # a run that is cut short has told this much
    print_figures([one for one in found if "us" in one])
    machine = {**describe_machine(["jax", "jaxlib"]), "device": jax.devices()[0].device_kind}
    report = {"machine": machine, "form": arguments.form, "ceilings": asdict(ceilings), "kernels": found}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
