"""llama.cpp as a worker of bench_peers.py: its batch interface, greedy, many sequences at once.

    PYTHON_WITH_LLAMA_CPP scripts/peer_llama_cpp.py --model model.gguf
    PYTHON_WITH_LLAMA_CPP scripts/peer_llama_cpp.py --model model.gguf --quantize-to q8_0.gguf --type Q8_0

Every prompt is decoded into a sequence of its own, up to 2,048 tokens a call; then one call a step for all
sequences, and the token of the largest logit. For each number of sequences and length of context it tries
flash attention on and off, and one KV cache for all sequences or one for each, and keeps the fastest. Needs
llama-cpp-python 0.3.16 or later; knows nothing of jaxserve.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import time
from typing import Any, NamedTuple

import llama_cpp as llama  # pyright: ignore[reportMissingImports] - of another interpreter
import numpy as np
from bench_workload import Arrival, Batch, answer_batches

TOKENS_PER_CALL = 2048
TRIAL_STEPS = 4
PAGE_TOKENS = 256  # contexts are padded to it


class Variant(NamedTuple):
    has_flash_attention: bool
    has_one_cache: bool  # for all sequences, instead of one for each


class Session:
    """A context for a number of sequences, and the steps they take together."""

    def __init__(self, model: Any, num_sequences: int, max_tokens: int, variant: Variant):
        params = llama.llama_context_default_params()
        cache_tokens = -(-max_tokens // PAGE_TOKENS) * PAGE_TOKENS  # of one sequence
        params.n_ctx = cache_tokens * num_sequences
        params.n_seq_max = num_sequences
        params.n_batch = TOKENS_PER_CALL
        params.n_threads = params.n_threads_batch = os.cpu_count() or 1
        flash = (llama.LLAMA_FLASH_ATTN_TYPE_DISABLED, llama.LLAMA_FLASH_ATTN_TYPE_ENABLED)
        params.flash_attn_type = flash[variant.has_flash_attention]
        params.kv_unified = variant.has_one_cache
        params.no_perf = True
        self._context = llama.llama_init_from_model(model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp gives no context for {num_sequences} x {max_tokens} tokens")
        self._memory = llama.llama_get_memory(self._context)
        self._vocab_size = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._batch = llama.llama_batch_init(TOKENS_PER_CALL, 0, 1)

    def close(self) -> None:
        llama.llama_batch_free(self._batch)
        llama.llama_free(self._context)

    def clear(self) -> None:
        llama.llama_memory_clear(self._memory, True)

    def copy_first_sequence(self, num_sequences: int) -> None:
        for sequence in range(1, num_sequences):
            llama.llama_memory_seq_cp(self._memory, 0, sequence, -1, -1)

    def decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """Run (token, position, sequence, whether to sample) rows; the tokens of those that sample."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for index, (token_id, position, sequence, samples) in enumerate(rows):
            batch.token[index] = token_id
            batch.pos[index] = position
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = sequence
            batch.logits[index] = samples
        status = llama.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        return [self._best_token(index) for index, row in enumerate(rows) if row[3]]

    def _best_token(self, index: int) -> int:
        logits = llama.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab_size,)).argmax())


def run_batch(session: Session, batch: Batch) -> list[Arrival]:
    """Prefill everything, then step until every sequence has ended."""
    arrivals: list[Arrival] = []
    start_s = time.perf_counter()
    last_ids = prefill(session, batch.prompts, arrivals, start_s)
    lengths = [len(prompt) for prompt in batch.prompts]
    left = [count - 1 for count in batch.num_new_tokens]
    stop_ids = set(batch.stop_ids)
    while live := [index for index, count in enumerate(left) if count and last_ids[index] not in stop_ids]:
        tokens = session.decode([(last_ids[index], lengths[index], index, True) for index in live])
        now_s = time.perf_counter() - start_s
        for index, token_id in zip(live, tokens, strict=True):
            last_ids[index] = token_id
            lengths[index] += 1
            left[index] -= 1
            arrivals.append((now_s, index, 1))
    return arrivals


def prefill(session: Session, prompts: list[list[int]], arrivals: list[Arrival], start_s: float) -> list[int]:
    """The first new token of each prompt. Prompts share a call as long as there is room."""
    rows = [
        (token_id, position, sequence, position == len(prompt) - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token_id in enumerate(prompt)
    ]
    first_ids: list[int] = []
    for begin in range(0, len(rows), TOKENS_PER_CALL):
        tokens = session.decode(rows[begin : begin + TOKENS_PER_CALL])
        now_s = time.perf_counter() - start_s
        arrivals += [(now_s, len(first_ids) + offset, 1) for offset in range(len(tokens))]
        first_ids += tokens
    return first_ids


class Chooser:
    """Sessions by shape, the fastest variant of each; only the last is kept, for their memory."""

    def __init__(self, model: Any):
        self._model = model
        self._variants: dict[tuple[int, int], Variant] = {}
        self._shape = (0, 0)
        self._session: Session | None = None
        self.trials: dict[str, float] = {}

    def run(self, batch: Batch) -> list[Arrival]:
        num_sequences = len(batch.prompts)
        pairs = zip(batch.prompts, batch.num_new_tokens, strict=True)
        max_tokens = max(len(prompt) + count for prompt, count in pairs)
        shape = (num_sequences, -(-max_tokens // PAGE_TOKENS) * PAGE_TOKENS)
        if shape != self._shape:
            self._open(shape, batch.prompts[0])
        assert self._session is not None
        self._session.clear()
        return run_batch(self._session, batch)

    def _open(self, shape: tuple[int, int], prompt: list[int]) -> None:
        if self._session is not None:
            self._session.close()
        if shape not in self._variants:
            caches = (False, True) if shape[0] > 1 else (True,)
            variants = [Variant(*choices) for choices in itertools.product((True, False), caches)]
            self._variants[shape] = min(variants, key=lambda variant: self._try(shape, variant, prompt))
        self._shape = shape
        self._session = Session(self._model, *shape, self._variants[shape])

    def _try(self, shape: tuple[int, int], variant: Variant, prompt: list[int]) -> float:
        """Seconds of a prompt's share of prefill and of a few steps of all sequences."""
        session = Session(self._model, *shape, variant)
        arrivals: list[Arrival] = []
        [token_id] = prefill(session, [prompt[:PAGE_TOKENS]], arrivals, time.perf_counter())
        length = min(len(prompt), PAGE_TOKENS)
        session.copy_first_sequence(shape[0])
        steps_s = []
        for step in range(TRIAL_STEPS):
            start_s = time.perf_counter()
            session.decode([(token_id, length + step, sequence, True) for sequence in range(shape[0])])
            steps_s.append(time.perf_counter() - start_s)
        session.close()
        name = f"{shape[0]} x {shape[1]}, {describe(variant)}"
        self.trials[name] = min(steps_s)
        return min(steps_s)


def describe(variant: Variant) -> str:
    flash = "with" if variant.has_flash_attention else "without"
    return f"{flash} flash attention, {'one cache' if variant.has_one_cache else 'a cache a sequence'}"


def quantize(source: str, target: str, type_name: str) -> None:
    """Write `source` in another type. What is already quantised is dequantised first: its values are kept
    as far as the new type can tell them."""
    params = llama.llama_model_quantize_default_params()
    params.nthread = os.cpu_count() or 1
    params.ftype = getattr(llama, f"LLAMA_FTYPE_MOSTLY_{type_name}")
    params.allow_requantize = True
    status = llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))
    if status != 0:
        raise RuntimeError(f"llama.cpp could not write {type_name} of {source}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a .gguf file")
    parser.add_argument(
        "--plain-buffers", action="store_true", help="weights as they are in the file: no AMX, no repacking"
    )
    parser.add_argument("--probe", action="store_true", help="decode a few tokens and end, or crash")
    parser.add_argument("--quantize-to", help="write this file and end")
    parser.add_argument("--type", default="Q8_0", help="of the file to write, such as Q8_0 or BF16")
    arguments = parser.parse_args()
    lines: list[str] = []
    log = llama.llama_log_callback(lambda level, text, data: lines.append(text.decode(errors="replace")))
    llama.llama_log_set(log, ctypes.c_void_p(0))
    llama.llama_backend_init()
    if arguments.quantize_to:
        quantize(arguments.model, arguments.quantize_to, arguments.type)
        return
    params = llama.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = not arguments.plain_buffers
    model = llama.llama_model_load_from_file(arguments.model.encode(), params)
    if not model:
        raise SystemExit(f"llama.cpp cannot load {arguments.model}: {''.join(lines[-5:])}")
    if arguments.probe:
        Chooser(model).run(Batch(prompts=[list(range(64))], num_new_tokens=[2]))
        return
    ready = {
        "version": llama.__version__,
        "system": llama.llama_print_system_info().decode().strip(),
        "buffers": [" ".join(line.split()) for line in lines if "buffer size" in line],
    }
    chooser = Chooser(model)
    answer_batches(ready, chooser.run, lambda: {"seconds a step": chooser.trials})


if __name__ == "__main__":
    main()
