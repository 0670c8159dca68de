"""Whether the GPU kernels are right on this card: the test suite's cases, against its float64 oracles.

    PYTHONPATH=. python scripts/check_kernels.py
    PYTHONPATH=. python scripts/check_kernels.py --form xla    # the reference forms, anywhere

The suite runs the same cases in an interpreter; only hardware says whether the machine code is right. One
JSON line a case, as it comes; the last line is the summary. Ends with 1 if a case is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import find_form

from tests.kernels import cases_decode, cases_grouped, cases_int4, cases_prefill, cases_sampling
from tests.kernels.cases import Heads, store

# Of numbers near 1: operands and probabilities are rounded to bf16, or to float16 where the pool is fp8.
TOLERANCES = {"bfloat16": 1e-2, "int8": 1e-2, "float8_e4m3fn": 2e-3}
# Heads, type of q, k and v, and of the pool.
WRITES = [
    (Heads(28, 4, 128), "float32", "bfloat16"),
    (Heads(14, 2, 64), "bfloat16", "bfloat16"),
    (Heads(32, 8, 128), "bfloat16", "int8"),
    (Heads(32, 8, 128), "bfloat16", "float8_e4m3fn"),
]
VOCAB_SIZES = (19 * 128, 1000, 151936)

Check = tuple[str, float, float]  # name, error, and the largest that is right


def check_decode(form: Callable) -> Iterator[Check]:
    for case in cases_decode.DECODE_CASES:
        given = cases_decode.make_input(case)
        decode = jax.jit(
            partial(
                form,
                scale=given.scale,
                window=case.window,
                soft_cap=case.soft_cap,
                tokens_per_row=case.tokens_per_row,
            )
        )
        out_RNH = decode(
            given.q_RNH,
            given.pool.kv,
            given.pool.table_XW,
            given.slot_R,
            given.kv_len_R,
            sinks_N=given.sinks_N,
        )
        error = measure_error(out_RNH, cases_decode.attend_exactly(case, given))
        yield case.name, error, TOLERANCES[case.dtype]


def check_prefill(form: Callable) -> Iterator[Check]:
    for case in cases_prefill.PREFILL_CASES:
        given = cases_prefill.make_input(case)
        prefill = jax.jit(partial(form, scale=given.scale, window=case.window, soft_cap=case.soft_cap))
        runs = (given.slot_C, given.token_C, given.len_C, given.kv_len_C)
        out_TNH = prefill(given.q_TNH, given.pool.kv, given.pool.table_XW, *runs, sinks_N=given.sinks_N)
        yield case.name, measure_error(out_TNH, cases_prefill.attend_exactly(case, given)), 2e-2


def check_rope_write(form: Callable) -> Iterator[Check]:
    """Against the reference on the same device: both round once, so a step of the type is the most."""
    reference = find_form("rope write", "xla")
    rng = np.random.default_rng(0)
    for heads, dtype, pool_dtype in WRITES:
        shape = (9, 64, heads.num_kv_heads, heads.head_dim)
        k_PSKH, v_PSKH = (rng.standard_normal(shape, np.float32) for _ in "kv")
        kv = jax.tree.map(jnp.asarray, store(k_PSKH, v_PSKH, pool_dtype))
        width = heads.num_heads + 2 * heads.num_kv_heads
        qkv_TAH = jnp.asarray(rng.standard_normal((200, width, heads.head_dim)), dtype)
        angle_T1I = jnp.asarray(rng.uniform(0, 6, (200, 1, heads.head_dim // 2)), jnp.float32)
        places_T = jnp.asarray(rng.permutation(np.arange(64, 9 * 64))[:200], jnp.int32).at[::7].set(0)
        arguments = kv, qkv_TAH, jnp.cos(angle_T1I), jnp.sin(angle_T1I), places_T
        got, want = (
            jax.jit(partial(one, num_heads=heads.num_heads))(*arguments) for one in (form, reference)
        )
        live = [jax.tree.map(lambda x: x[1:], kv) for _, kv in (got, want)]  # page 0 is trash
        errors = [measure_error(got[0], want[0])]
        errors += [measure_error(*pair) for pair in zip(*map(jax.tree.leaves, live), strict=True)]
        steps = {"bfloat16": 2.0**-6, "int8": 1.0, "float8_e4m3fn": 0.5}
        yield f"{heads}, {dtype} into {pool_dtype}", max(errors), steps[pool_dtype]


def check_sampling(form: Callable) -> Iterator[Check]:
    """The error is the share of rows whose token is not the one that must be drawn."""
    rows = cases_sampling.ROWS
    for vocab_size in VOCAB_SIZES:
        logits_BV = cases_sampling.make_logits(rows, vocab_size, "float32")
        names = ("temperature", "top_k", "top_p", "min_p")
        columns = [np.asarray([getattr(row, name) for row in rows]) for name in names]
        params = [jnp.asarray(x, jnp.int32 if x.dtype == np.int64 else jnp.float32) for x in columns]
        seeds, positions = (jnp.arange(len(rows), dtype=jnp.int32) + first for first in (100, 3))
        token_B, largest_B = jax.jit(form)(jnp.asarray(logits_BV), *params, seeds, positions)
        is_wrong = np.asarray(largest_B) != logits_BV.max(axis=1)
        for b, row in enumerate(rows):
            allowed = cases_sampling.allowed_tokens(logits_BV[b], row, 100 + b, 3 + b)
            is_wrong[b] |= int(token_B[b]) not in allowed
        yield f"{len(rows)} rows of {vocab_size}", float(is_wrong.mean()), 0.0


def check_int4(form: Callable) -> Iterator[Check]:
    """Of the largest result. XLA's form rounds the weights to bf16 first."""
    for case in cases_int4.CASES:
        (w, w_FD), x_TD = cases_int4.make_matrix(case), cases_int4.make_tokens(case)
        want_TF = np.asarray(x_TD).astype(np.float64) @ w_FD.T
        yield case.name, measure_error(jax.jit(form)(x_TD, w), want_TF) / np.abs(want_TF).max(), 4e-3


def check_experts(form: Callable) -> Iterator[Check]:
    """Of the largest result."""
    for case in cases_grouped.CASES:
        *arguments, want_MF = cases_grouped.make_input(case)
        yield case.name, cases_grouped.measure_error(jax.jit(form)(*arguments), want_MF), 1e-5


def measure_error(got: Any, want: Any) -> float:
    """The largest difference; not a number where a number is missing."""
    got, want = (np.asarray(x).astype(np.float64) for x in (got, want))
    return float(np.abs(got - want).max(initial=0.0))


CHECKS = {
    "decode": check_decode,
    "prefill": check_prefill,
    "rope write": check_rope_write,
    "sampling": check_sampling,
    "int4": check_int4,
    "experts": check_experts,
}


def run_group(group: str, form: str, first: int | None) -> list[str]:
    """The wrong cases. One that fails ends its group, whose cases come one from another, and no other."""
    wrong = []
    checks = CHECKS[group](find_form(group, form))
    try:
        for name, error, tolerance in islice(checks, first):
            is_right = bool(error <= tolerance)  # no number is less than NaN; NumPy's bool is not JSON's
            wrong += [] if is_right else [f"{group}: {name}"]
            found = {"kernel": group, "case": name, "error": error, "tolerance": tolerance, "right": is_right}
            print(json.dumps(found), flush=True)
    except Exception as error:  # of compilers and drivers, which raise whatever they like
        reason = f"{type(error).__name__}: {error}"[:300]
        print(json.dumps({"kernel": group, "case": "the next", "right": False, "failed": reason}), flush=True)
        wrong.append(f"{group}: {reason}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--groups", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--form", choices=["gpu", "xla"], default="gpu")
    parser.add_argument("--first", type=int, metavar="N", help="so many cases of each group")
    arguments = parser.parse_args()
    if arguments.form == "gpu" and jax.default_backend() != "gpu":
        raise SystemExit("There is no GPU here; --form xla checks the reference forms.")
    wrong = [name for group in arguments.groups for name in run_group(group, arguments.form, arguments.first)]
    print(json.dumps({"groups": arguments.groups, "wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
