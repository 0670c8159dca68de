"""Sizes of the TPU's blocks: which are tried, which win, and how they come back from a file."""

from __future__ import annotations

from dataclasses import replace

import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxserve.kernels_pallas.kv_pages import PagesLayout
from jaxserve.kernels_pallas.paged_attention import tpu_tuner
from jaxserve.kernels_pallas.paged_attention.tpu_plan import (
    CHIPS,
    Blocks,
    TunedBlocks,
    choose_decode_blocks,
    choose_prefill_blocks,
)
from jaxserve.kernels_pallas.paged_attention.tpu_tuned import SHIPPED, read_tuned, write_tuned
from jaxserve.kernels_pallas.paged_attention.tpu_tuner import (
    NUM_LAUNCHES,
    Workload,
    list_decode_blocks,
    list_prefill_blocks,
    tune,
)

KIND = "TPU v5 lite"
CHIP = CHIPS[KIND]
LAYOUT = PagesLayout(num_kv_heads=2, head_dim=64, kv_dtype="bfloat16")
SMALL = Workload(layout=LAYOUT, num_heads=4, page_size=128, num_rows=2, context=200, num_tokens=32)
FASTEST = Blocks(block_tokens=128, num_items=2, tile_tokens=1, num_cores=1)
ROW = TunedBlocks(
    device_kind=KIND,
    jax_version="0.12.0",
    layout=LAYOUT,
    page_size=128,
    rows_per_token=0,
    blocks=FASTEST,
    time_s=1e-5,
    model_time_s=2e-5,
)


@pytest.fixture
def two_sizes(monkeypatch):
    """The chip's own and one more of each kind, as the interpreter takes seconds for each."""
    for name in ("list_decode_blocks", "list_prefill_blocks"):
        every = getattr(tpu_tuner, name)
        monkeypatch.setattr(tpu_tuner, name, lambda *args, every=every: list(every(*args))[:2])


@pytest.mark.parametrize(
    ("times_s", "winner"), [([4.0, 2.0, 9.0, 1.0], 1), ([4.0, 3.95, 9.0, 8.99], 0)], ids=["gain", "noise"]
)
def test_the_fastest_win_unless_it_may_be_noise(two_sizes, times_s, winner):
    remaining, told = list(times_s), []

    def time_call(call):
        assert call().shape[-1] == LAYOUT.head_dim  # it runs, in the interpreter
        return remaining.pop(0)

    decode, prefill = tune(
        SMALL, KIND, CHIP, lambda *done: told.append(done), time_call, pltpu.InterpretParams()
    )
    assert decode.blocks == list(list_decode_blocks(SMALL, CHIP))[winner]
    assert prefill.blocks == list(list_prefill_blocks(SMALL, CHIP))[winner]
    assert decode.time_s == pytest.approx(times_s[winner] / NUM_LAUNCHES)
    assert decode.model_time_s == pytest.approx(times_s[0] / NUM_LAUNCHES)
    assert (decode.rows_per_token, prefill.rows_per_token) == (0, SMALL.rows_per_token)
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("kind", CHIPS)
def test_what_is_tried_begins_with_the_chips_own_and_fits(kind):
    layout = PagesLayout(num_kv_heads=8, head_dim=128, kv_dtype="bfloat16")
    workload = Workload(layout=layout, num_heads=32, page_size=128)
    decode, prefill = (
        list(listed(workload, CHIPS[kind])) for listed in (list_decode_blocks, list_prefill_blocks)
    )
    assert decode[0] == choose_decode_blocks(layout, 128, 1, CHIPS[kind])
    assert prefill[0] == choose_prefill_blocks(layout, 128, 1024, workload.rows_per_token, CHIPS[kind])
    for tried in (decode, prefill):
        assert 6 <= len(tried) == len(set(tried)) <= 16
    assert all(b.num_items * b.block_tokens * workload.token_bytes <= 12 << 20 for b in decode)


def test_sizes_that_were_timed_are_those_of_their_pool_alone():
    prefill = replace(ROW, rows_per_token=8, blocks=replace(FASTEST, tile_tokens=64))
    chip = replace(CHIP, tuned=(ROW, prefill))
    assert choose_decode_blocks(LAYOUT, 128, 1, chip) == FASTEST
    assert choose_decode_blocks(LAYOUT, 128, 4, chip) == replace(FASTEST, tile_tokens=4)  # drafts
    assert choose_prefill_blocks(LAYOUT, 128, 1024, 8, chip) == prefill.blocks
    assert choose_prefill_blocks(LAYOUT, 128, 32, 8, chip).tile_tokens == 32  # of a short prefill
    others = replace(LAYOUT, kv_dtype="int8")
    assert choose_decode_blocks(others, 128, 1, chip) == choose_decode_blocks(others, 128, 1, CHIP)
    assert choose_decode_blocks(LAYOUT, 256, 1, chip) == choose_decode_blocks(LAYOUT, 256, 1, CHIP)


def test_rows_come_back_from_their_file_and_newer_ones_take_their_place(tmp_path):
    path = tmp_path / "cache" / "tuned.json"
    assert read_tuned(path) == ()
    write_tuned(path, [ROW])
    newer, other = replace(ROW, jax_version="0.13.0"), replace(ROW, device_kind="TPU v5")
    write_tuned(path, [newer, other])
    assert read_tuned(path) == (newer, other)
    assert [entry.name for entry in path.parent.iterdir()] == ["tuned.json"]


@pytest.mark.parametrize("text", ["[", "{}x", '[{"device_kind": "TPU"}]', "[3]", "null"])
def test_a_file_of_anything_else_says_so(tmp_path, text):
    path = tmp_path / "tuned.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json is no table of tuned sizes"):
        read_tuned(path)


def test_the_table_that_ships_is_read():
    assert all(row.device_kind in CHIPS for row in read_tuned(SHIPPED))
