"""What every benchmark of tokens per second is worked out from: arrivals of tokens, by sequence."""

from __future__ import annotations

import sys

import pytest

from scripts import bench_workload
from scripts.bench_workload import Batch, RealPrompt, Worker, Workload, read_figures, read_kinds, read_prompts
from tests.source_tree import ROOT


def test_figures_are_of_the_time_in_which_every_sequence_decodes():
    first = [(1.0, 0, 1), (2.0, 1, 1)]  # the second sequence begins to decode after two seconds
    both = [(2.0 + 0.5 * step, sequence, 1) for step in range(1, 5) for sequence in (0, 1)]
    tail = [(4.5, 1, 1), (5.0, 1, 1)]  # the first has ended at four
    figures = read_figures([*first, *both, *tail], num_prompt_tokens=100)
    assert figures.prefill_tps == 100 / 2
    assert figures.decode_tps == 8 / 2
    assert figures.job_tps == 12 / 5


def test_tokens_that_come_together_count_each():
    arrivals = [(1.0, 0, 1), (2.0, 0, 3), (3.0, 0, 5)]  # drafts that were accepted
    assert read_figures(arrivals, num_prompt_tokens=10).decode_tps == 8 / 2


def test_where_one_ends_before_another_begins_the_tail_counts_or_nothing_does():
    early = [(float(second), 0, 1) for second in range(1, 5)]
    late = [(float(second), 1, 1) for second in range(5, 14)]
    assert read_figures([*early, *late], num_prompt_tokens=1).decode_tps == 8 / 8
    assert read_figures([*early, *late[:3]], num_prompt_tokens=1).decode_tps is None


def test_random_prompts_are_the_same_for_everybody():
    work = Workload(num_sequences=3, num_prompt_tokens=7, num_new_tokens=5)
    batch = work.make_batch(vocab_size=1000, seed=1)
    assert batch == work.make_batch(vocab_size=1000, seed=1)
    assert batch != work.make_batch(vocab_size=1000, seed=2)
    assert [len(prompt) for prompt in batch.prompts] == [7, 7, 7]
    assert all(0 <= token_id < 500 for prompt in batch.prompts for token_id in prompt)


def test_every_token_of_a_kind_counts_the_same():
    chat_1 = [(1.0, 0, 1), (2.0, 0, 1)]  # a token in a second, after the first
    chat_2 = [(1.0, 0, 1), (4.0, 0, 8)]
    edit = [(9.0, 0, 1)]  # ended at its first token
    kinds = read_kinds(["chat", "chat", "edit"], [chat_1, chat_2, edit])
    assert list(kinds) == ["chat", "edit", "all"]
    assert kinds["chat"].decode_tps == 9 / 4
    assert kinds["edit"].decode_tps == 0
    assert (kinds["all"].num_prompts, kinds["all"].num_tokens) == (3, 9)


def test_the_bundled_prompts_are_of_three_kinds():
    prompts = read_prompts(sorted((ROOT / "benchmarks" / "prompts").glob("*.jsonl")))
    assert {prompt.kind for prompt in prompts} == {"chat", "code_edit", "summary"}
    assert all(prompt.messages[-1]["role"] == "user" for prompt in prompts)


def test_a_prompt_is_messages_or_text(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "Once"}\n\n{"kind": "chat"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 3: give either messages or prompt"):
        read_prompts([path])
    path.write_text('{"prompt": "Once"}\n', encoding="utf-8")
    assert read_prompts([path]) == [RealPrompt(kind="mine", messages=[], text="Once")]


WORKER = f"""
import sys
sys.path.insert(0, {str(ROOT / "scripts")!r})
from bench_workload import answer_batches
def run_batch(batch):
    print("a library says something")
    return [(0.5, index, count) for index, count in enumerate(batch.num_new_tokens)]
answer_batches({{"version": "1"}}, run_batch, lambda: {{"steps": 2}})
"""


def test_a_worker_answers_batches_whatever_is_printed_meanwhile():
    worker = Worker([sys.executable, "-c", WORKER])
    try:
        assert worker.wait_ready() == {"version": "1"}
        batch = Batch(prompts=[[1], [2, 3]], num_new_tokens=[4, 5])
        assert worker.run(batch) == [(0.5, 0, 4), (0.5, 1, 5)]
        assert worker.run(batch) == [(0.5, 0, 4), (0.5, 1, 5)]
        assert worker.close() == {"steps": 2}
    finally:
        worker.kill()


def test_a_worker_that_ends_is_told():
    with pytest.raises(RuntimeError, match="exit status 3"):
        Worker([sys.executable, "-c", "raise SystemExit(3)"]).wait_ready()


def test_a_median_is_of_what_there_is():
    assert bench_workload.median([None, 1.0, 3.0, None]) == 2.0
    assert bench_workload.median([None]) is None
    assert bench_workload.show(None) == "–"
