"""Where the time of a step goes, measured on a real engine of a tiny model."""

from __future__ import annotations

import pytest

from jaxserve.config import ServerConfig
from jaxserve.scheduler import schedule as scheduler
from scripts.bench_engine import OfflineEngine
from scripts.bench_steps import HOST_PARTS, Step, summarize
from scripts.bench_workload import Workload, read_figures
from tests.tiny import write_tiny_checkpoint


def make_step(device_s: float, gap_s: float, **host_s: float) -> Step:
    step = Step("8 rows", 5, 0.0, False)
    step.device_s, step.gap_s, step.wait_s = device_s, gap_s, 0.001
    step.host_s.update(host_s)
    return step


def test_steps_are_told_by_program_as_medians():
    steps = [make_step(0.002, 0.0, pack=0.001), make_step(0.004, 0.002, pack=0.003)]
    [row] = summarize(steps)
    assert row["program"] == "8 rows"
    assert (row["num_steps"], row["num_live_rows"]) == (2, 5)
    assert row["device_ms"] == pytest.approx(3)
    assert row["gap_share"] == pytest.approx(0.002 / 0.008)
    assert row["host_ms"]["pack"] == pytest.approx(2)
    assert row["host_ms"]["read"] == 0
    assert row["step_ms"] == pytest.approx(3)  # the host's two, and one of waiting


@pytest.mark.slow
def test_the_clock_sees_every_step_of_an_engine(tmp_path):
    write_tiny_checkpoint(tmp_path / "model", "qwen2")
    config = ServerConfig(
        model_path=str(tmp_path / "model"),
        page_size=8,
        max_running_requests=4,
        max_total_tokens=512,
        chunked_prefill_size=32,
        compilation_cache_dir=str(tmp_path / "programs"),
    )
    schedule = scheduler.schedule
    engine = OfflineEngine(config, has_clock=True)
    try:
        work = Workload(num_sequences=3, num_prompt_tokens=16, num_new_tokens=12)
        assert engine.clock is not None
        engine.clock.start()
        arrivals = engine.run(work.make_batch(engine.info.vocab_size, seed=0))
        steps = engine.clock.stop()
    finally:
        engine.close()
    assert scheduler.schedule is schedule, "what was replaced is back"
    assert sum(count for _, _, count in arrivals) == 3 * 12
    assert read_figures(arrivals, 3 * 16).job_tps > 0
    assert sum("tokens" in step.program for step in steps) >= 2  # 48 tokens of prompts, 32 a step
    assert any(step.num_live_rows == 3 and "tokens" not in step.program for step in steps)
    for step in steps:
        assert step.device_s > 0
        assert step.host_s.keys() <= set(HOST_PARTS)
        assert {"schedule", "pack", "launch"} <= step.host_s.keys()
