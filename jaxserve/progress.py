"""Progress of the slow parts of a start: downloading, loading, compiling; with an estimate of what is left.

On a terminal a bar; elsewhere (log files, notebooks, service logs) a plain log line now and then; nothing
at log level warning or above. `Progress.update` fits as the `on_progress(message, done, total)` callback
that the weights room takes. Knows nothing of what is being done.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

logger = logging.getLogger("jaxserve.progress")

LINE_INTERVAL_S = 5.0  # a line at least this often, as long as there is something to say
MIN_LINE_INTERVAL_S = 1.0  # and sooner than that only for each further tenth
TENTH = 0.1


@dataclass(slots=True)
class Stage:
    """One slow part as last told. `first_done` is what a resumed download began with."""

    name: str
    unit: str
    started_s: float
    first_done: float
    done: float
    total: float | None
    told_s: float
    told_done: float


class Progress:
    """Tells how far each stage is. Safe to call from several threads; also a context manager.

    A stage is named by a sentence fit to print, such as "Downloading SmolLM2-135M.gguf".
    """

    def __init__(
        self,
        level: str = "info",
        *,
        is_terminal: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._is_silent = level not in ("debug", "info")
        self._is_terminal = sys.stderr.isatty() if is_terminal is None else is_terminal
        self._clock = clock
        self._lock = threading.Lock()
        self._stages: dict[str, Stage] = {}
        self._finished: set[str] = set()
        self._bars: Any = None  # rich's display, while a stage is open on a terminal
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def update(self, stage: str, done: float, total: float | None = None, unit: str = "B") -> None:
        """`done` of `total` (None: unknown) `unit`s: "B" is bytes, other units are printed as they are.

        A stage ends by itself when all is done.
        """
        is_done = total is not None and done >= total
        if self._is_silent or (is_done and stage in self._finished):
            return
        with self._lock:
            now_s = self._clock()
            self._finished.discard(stage)
            state = self._stages.get(stage)
            is_new = state is None
            if state is None:
                state = Stage(stage, unit, now_s, done, done, total, now_s, done)
                self._stages[stage] = state
            state.done, state.total = done, total
            if self._is_terminal:
                self._draw(state, now_s)
            elif not is_done and (is_new or _is_due(state, now_s)):
                state.told_s, state.told_done = now_s, done
                _tell(describe(state, now_s))
        if is_done:
            self.finish(stage)

    def finish(self, stage: str) -> None:
        """The stage is over: say how much was done and how long it took. Nothing if it never began."""
        with self._lock:
            state = self._stages.pop(stage, None)
            if state is None:
                return
            self._finished.add(stage)
            elapsed_s = self._clock() - state.started_s
            if self._is_terminal:
                self._draw(state, self._clock())
                if not self._stages:
                    self._stop_bars()
            else:
                amount = format_amount(state.total or state.done, state.unit)
                _tell(f"{state.name}: done, {amount} in {format_duration(elapsed_s)}")

    def close(self) -> None:
        """Leave the terminal as it was, whatever is still open."""
        with self._lock:
            self._stages.clear()
            self._stop_bars()

    def _draw(self, state: Stage, now_s: float) -> None:
        if self._bars is None:
            self._bars = _make_bars()
            self._bars.start()
        if state.name not in self._tasks:
            self._tasks[state.name] = self._bars.add_task(state.name, total=state.total, detail="")
        detail = describe(state, now_s).removeprefix(f"{state.name}: ")
        self._bars.update(self._tasks[state.name], completed=state.done, total=state.total, detail=detail)

    def _stop_bars(self) -> None:
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._tasks = None, {}


def describe(state: Stage, now_s: float) -> str:
    """One line: what, how far, and how long it may still take."""
    if not state.total:
        return f"{state.name}: {format_amount(state.done, state.unit)}" if state.done else state.name
    percent = int(100 * min(1.0, state.done / state.total))
    done = format_amount(state.done, state.unit, with_unit=False)
    text = f"{state.name}: {percent} % ({done} of {format_amount(state.total, state.unit)})"
    gained, elapsed_s = state.done - state.first_done, now_s - state.started_s
    if gained > 0 and elapsed_s > 0 and state.done < state.total:
        text += f", about {format_duration((state.total - state.done) * elapsed_s / gained)} left"
    return text


def format_amount(amount: float, unit: str, *, with_unit: bool = True) -> str:
    """ "1.4 GB", "12 programs"; bytes in decimal multiples, as download sites count them."""
    if unit != "B":
        return f"{amount:.0f} {unit}" if with_unit else f"{amount:.0f}"
    for scale, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if amount >= scale:
            return f"{amount / scale:.1f} {name}"
    return f"{amount:.0f} B"


def format_duration(seconds: float) -> str:
    """ "0.4 s", "12 s", "3 min 20 s", "1 h 5 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole_s = round(seconds)
    if whole_s < 60:
        return f"{whole_s} s"
    if whole_s < 3600:
        return f"{whole_s // 60} min {whole_s % 60} s"
    return f"{whole_s // 3600} h {whole_s % 3600 // 60} min"


def _tell(line: str) -> None:
    """As a log line; plainly where nobody has set up logging, as in a notebook that uses the library."""
    if logger.isEnabledFor(logging.INFO):
        logger.info(line)
    else:
        print(line, file=sys.stderr)


def _is_due(state: Stage, now_s: float) -> bool:
    quiet_s = now_s - state.told_s
    gained = state.done - state.told_done
    is_tenth = state.total is not None and gained >= TENTH * state.total
    return gained > 0 and (quiet_s >= LINE_INTERVAL_S or (is_tenth and quiet_s >= MIN_LINE_INTERVAL_S))


def _make_bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        console=Console(stderr=True),
    )
