"""Logging for our processes: one line a record on stderr, as `[2026-11-22 01:02:03] INFO engine.loop: text`.

`set_up_logging` is called once by each process that we own (launch, engine, HTTP workers), never by the
library: a program that imports jaxserve keeps its own logging. Prompts and keys never reach a log line.
"""

from __future__ import annotations

import logging
import sys

HANDLER_NAME = "jaxserve"
LINE = "{start}[{asctime}] {levelname} {room}:{end} {message}"
COLOURS = {logging.DEBUG: "2", logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "1;31"}


class CurrentStderr:
    """Whatever sys.stderr is at the moment of writing: a progress bar or a test may have replaced it."""

    def write(self, text: str) -> None:
        sys.stderr.write(text)

    def flush(self) -> None:
        sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()


def set_up_logging(level: str, http_level: str | None = None, process_name: str = "") -> None:
    """Print our records from `level` up, and other libraries' from warning up. Calling again re-sets it.

    `level`: "debug", "info", "warning" or "error"; `http_level` is that of the line a request, the same if
    None. `process_name` comes before each line's room. Colours are used on a terminal only.
    """
    threshold = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if handler.name == HANDLER_NAME]:
        root.removeHandler(old)
    handler = logging.StreamHandler(CurrentStderr())
    handler.name = HANDLER_NAME
    line = LINE.replace("{room}", process_name + "{room}")
    handler.setFormatter(logging.Formatter(line, "%Y-%m-%d %H:%M:%S", style="{"))
    handler.addFilter(_add_room_and_colour)
    root.addHandler(handler)
    root.setLevel(max(threshold, logging.WARNING))
    logging.getLogger("jaxserve").setLevel(threshold)
    logging.getLogger("jaxserve.access").setLevel((http_level or level).upper())


def _add_room_and_colour(record: logging.LogRecord) -> bool:
    record.room = record.name.removeprefix("jaxserve.")
    code = COLOURS.get(record.levelno) if sys.stderr.isatty() else None
    record.start, record.end = (f"\x1b[{code}m", "\x1b[0m") if code else ("", "")
    return True
