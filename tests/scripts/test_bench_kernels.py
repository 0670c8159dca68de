"""bench_kernels.py on the reference forms, which run anywhere, and its loop compiled for an H200."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from scripts import (
    bench_kernels,
    kernel_bench_decode,
    kernel_bench_grouped,
    kernel_bench_int4,
    kernel_bench_prefill,
    kernel_bench_rope_write,
    kernel_bench_sampling,
)
from scripts.bench_kernels import Case, find_form, repeat_call, time_kernel
from tests.kernels.h200 import compile_for_h200, require_h200_compiler

ROOT = Path(__file__).parents[2]
KERNEL = 'custom_call_target="mosaic_gpu'
SMALL = ["--calls", "1", "--copy-mib", "8", "--matmul-width", "128"]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/bench_kernels.py", *words, *SMALL]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def make_small_case(group: str) -> Case:
    """The first shape of a group, with few rows or tokens."""
    key = jax.random.key(0)
    if group == "sampling":
        small = replace(kernel_bench_sampling.SAMPLING_BENCHES[0], num_rows=2)
        given: Any = kernel_bench_sampling.make_arguments(small, 0), {}
    elif group == "decode":
        small = replace(kernel_bench_decode.DECODE_BENCHES[0], num_rows=2, kv_len=70)
        given = kernel_bench_decode.make_arguments(small, key)
    elif group == "prefill":
        small = replace(kernel_bench_prefill.PREFILL_BENCHES[0], run_tokens=70)
        given = kernel_bench_prefill.make_arguments(small, key)
    elif group == "int4":
        small = replace(kernel_bench_int4.INT4_BENCHES[0], num_outputs=256)
        given = kernel_bench_int4.make_arguments(small, key)
    elif group == "experts":
        small = replace(kernel_bench_grouped.GROUPED_BENCHES[0], num_experts=16)
        given = kernel_bench_grouped.make_arguments(small, key)
    else:
        small = replace(kernel_bench_rope_write.ROPE_WRITE_BENCHES[0], num_tokens=8, num_pages=64)
        given = kernel_bench_rope_write.make_arguments(small, key)
    return Case(group=group, name="", arguments=given[0], options=given[1], moved_bytes=0, flops=0)


def split_computations(hlo: str) -> dict[str, str]:
    """The text of each computation of a module, by name."""
    return {match[1]: match[0] for match in re.finditer(r"^(?:ENTRY )?(%[\w.-]+) .*?^}", hlo, re.M | re.S)}


def read_with_callees(computations: dict[str, str], name: str) -> str:
    text = computations[name]
    for callee in re.findall(r"(?:calls|to_apply|body)=(%[\w.-]+)", text):
        text += read_with_callees(computations, callee)
    return text


def test_a_kernel_is_timed_and_its_bytes_are_those_of_the_shape():
    done = run("--form", "xla", "--groups", "sampling", "--only", "1 row")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    (row,) = report["kernels"]
    assert row["case"] == "top-k 50, top-p 0.9, 1 row"
    assert abs(row["tb_per_s"] * row["us"] * 1e6 - 4 * 151936) < 1  # one read of the logits
    assert report["form"] == "xla"
    assert 0 < row["loop_us"] < row["us"]
    assert row["net_us"] == pytest.approx(row["us"] - row["loop_us"])


def test_a_shape_that_fails_is_told_with_its_reason_and_costs_no_other(monkeypatch):
    def break_one(case: Case, *_: Any) -> dict[str, Any]:
        if "bf16" in case.name:
            raise RuntimeError("no such instruction")
        return {"case": case.name, "us": 1.0}

    monkeypatch.setattr(bench_kernels, "measure", break_one)
    arguments = argparse.Namespace(groups=["sampling"], only="top-k 50, top-p 0.9", first=3)
    ceilings = bench_kernels.Ceilings(copy_bytes_per_s=1.0, matmul_flops=1.0)
    rows = list(bench_kernels.measure_all(arguments, ceilings))
    assert [row.get("us") for row in rows] == [1.0, None, 1.0]
    assert rows[1]["failed"] == "RuntimeError: no such instruction"


def test_without_a_gpu_it_says_so():
    done = run("--groups", "sampling")
    assert done.returncode == 1
    assert "There is no GPU here" in done.stderr


@pytest.mark.parametrize("group", ["decode", "prefill", "rope write", "sampling", "int4", "experts"])
def test_the_timed_loop_holds_the_kernel_and_copies_nothing_large(group):
    require_h200_compiler()
    case = make_small_case(group)
    call = find_form(group, "gpu")
    donated = {"donate_argnums": 0} if group == "rope write" else {}
    hlo = compile_for_h200(repeat_call(call, case, 16), *case.arguments, **donated).hlo
    computations = split_computations(hlo)
    alone = compile_for_h200(lambda *given: call(*given, **case.options), *case.arguments).hlo
    assert alone.count(KERNEL) > 0
    bodies = re.findall(r" while\(.*body=(%[\w.-]+)", hlo)
    assert max(read_with_callees(computations, body).count(KERNEL) for body in bodies) == alone.count(KERNEL)
    largest = max((leaf for leaf in jax.tree.leaves(case.arguments)), key=lambda leaf: leaf.nbytes)
    shape = f"[{','.join(map(str, largest.shape))}]"
    assert shape in hlo
    assert [line for line in hlo.splitlines() if shape in line and " copy(" in line] == []


def test_calls_in_the_loop_see_the_arguments_unchanged_and_writes_pile_up():
    case = make_small_case("rope write")
    call = find_form("rope write", "xla")
    seen = []

    def write(*arguments: Any, **options: Any) -> Any:
        jax.debug.callback(lambda index_T: seen.append(index_T.tolist()), arguments[4])
        return call(*arguments, **options)

    mark, pool = jax.jit(repeat_call(write, case, 3))(*case.arguments)
    assert int(mark) == 0
    assert seen == 3 * [case.arguments[4].tolist()]
    _, want = call(*case.arguments, **case.options)
    assert jnp.array_equal(pool.k_PSKH, want.k_PSKH)
    assert time_kernel(call, case, 2) > 0  # of donated arguments, more than once
