"""Sizes of the TPU's blocks that were timed on one, in files: the table that ships, and that of a machine.

A file is a JSON list, a row for each chip, pool and kind of launch (`TunedBlocks`). tpu_tuned.json, beside
this file, ships; it is empty until somebody has run the tuner on a TPU. Knows nothing of how sizes are timed.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path

from jaxserve.kernels_pallas.kv_pages import PagesLayout
from jaxserve.kernels_pallas.paged_attention.tpu_plan import Blocks, TunedBlocks

SHIPPED = Path(__file__).with_name("tpu_tuned.json")


def read_tuned(path: Path) -> tuple[TunedBlocks, ...]:
    """The rows of a file, none if there is no such file. Raises ValueError if it holds anything else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        return tuple(_read_row(row) for row in rows)
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no table of tuned sizes: {error}") from error


def write_tuned(path: Path, rows: Sequence[TunedBlocks]) -> None:
    """Put rows into a file, in front of what it has for others. Raises OSError, and as `read_tuned` does."""
    kept = [row for row in read_tuned(path) if all(_key(row) != _key(other) for other in rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.{os.getpid()}")
    text = json.dumps([dataclasses.asdict(row) for row in [*rows, *kept]], indent=1)
    fresh.write_text(text + "\n", encoding="utf-8")
    fresh.replace(path)


def _key(row: TunedBlocks) -> tuple:
    return row.device_kind, row.layout, row.page_size, row.rows_per_token


def _read_row(row: dict) -> TunedBlocks:
    return TunedBlocks(**{**row, "layout": PagesLayout(**row["layout"]), "blocks": Blocks(**row["blocks"])})
