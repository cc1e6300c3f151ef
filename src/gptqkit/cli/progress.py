"""Progress of a run on stderr, driven by events alone: a bar in a terminal, plain lines in a log.

In a terminal there is one bar for the stage at hand, with block, linear, time left and memory. In a log there is a line when a stage
begins, a line per block at most every `LINE_EVERY` seconds, and no escape codes. Warnings, fallbacks and skips are lines in both; the same
one is said once, and after `MOST_LINES` of a kind the rest is only counted, because layers.jsonl holds them all.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import psutil

from gptqkit.cli.output import duration, size
from gptqkit.core.events import Event

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LINE_EVERY = 5.0
MOST_LINES = 20
_LABELS = {"warning": "warning: ", "fallback": "fallback: ", "skip": "not quantized: ", "note": ""}


class Progress:
    """A listener for events, and a context manager around the run it listens to.

    >>> with Progress() as emit:                                  # doctest: +SKIP
    ...     run = api.quantize("MODEL", "OUT", emit=emit)
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream = stream or sys.stderr
        self._view: _Bar | _Lines = _Bar(self._stream, clock) if self._stream.isatty() else _Lines(self._stream, clock)
        self._said: set[str] = set()
        self._count: Counter[str] = Counter()

    def __enter__(self) -> Progress:
        self._view.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._view.close()
        for kind_name, count in self._count.items():
            if count > MOST_LINES:
                self._view.line(f"{_LABELS[kind_name]}{count - MOST_LINES} more like these, recorded with the run")

    def __call__(self, event: Event) -> None:
        if event.kind == "stage":
            self._view.stage(event.message)
        elif event.kind == "block":
            self._view.block(event.message, int(event.data.get("index", 0)) + 1, event.data.get("blocks"))
        elif event.kind == "linear":
            self._view.linear(str(event.data.get("name", event.message)))
        else:
            self._message(event)

    def _message(self, event: Event) -> None:
        if event.message in self._said:
            return
        self._said.add(event.message)
        self._count[event.kind] += 1
        if self._count[event.kind] <= MOST_LINES:
            self._view.line(_LABELS[event.kind] + event.message)


class _Clock:
    """Time passed in a stage, and the time left if blocks go on as they went."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = clock()
        self._first: int | None = None

    def restart(self) -> None:
        self._began, self._first = self._clock(), None

    def left(self, done: int, blocks: int | None) -> float | None:
        """Seconds; None until something can be said. Blocks that a resumed run found finished do not count."""
        if self._first is None:
            self._first = done - 1
        if not blocks or done <= self._first:
            return None
        return (self._clock() - self._began) / (done - self._first) * (blocks - done)


class _Lines:
    """For a log: plain lines, not too many."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self._stream, self._now, self._clock = stream, clock, _Clock(clock)
        self._begin = self._last = clock()

    def open(self) -> None:
        self._begin = self._last = self._now()

    def close(self) -> None:
        return

    def stage(self, name: str) -> None:
        self._clock.restart()
        self._last = self._now()
        self.line(name)

    def block(self, message: str, done: int, blocks: int | None) -> None:
        left = self._clock.left(done, blocks)
        now = self._now()
        if now - self._last < LINE_EVERY and done != blocks:
            return
        self._last = now
        more = f", about {duration(left)} left" if left else ""
        self.line(f"{_position(done, blocks)}{more}, memory {size(_memory())}")

    def linear(self, name: str) -> None:
        return

    def line(self, text: str) -> None:
        print(f"[{self._now() - self._begin:7.1f} s] {text}", file=self._stream, flush=True)


class _Bar:
    """For a terminal: one bar that is redrawn, gone at the end."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        console = Console(file=stream, highlight=False, markup=False, emoji=False)
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=12),
            TextColumn("{task.fields[status]}", markup=False),
        )
        self._bar: RichProgress = Bar(*columns, console=console, transient=True)
        self._task = self._bar.add_task("starting", total=None, status="")
        self._clock = _Clock(clock)
        self._blocks: int | None = None
        self._done = 0
        self._in_block = 0
        self._per_block = 0
        self._linear = ""
        self._left: float | None = None

    def open(self) -> None:
        self._bar.start()

    def close(self) -> None:
        self._bar.stop()

    def stage(self, name: str) -> None:
        self._clock.restart()
        self._blocks, self._done, self._in_block, self._linear, self._left = None, 0, 0, "", None
        self._bar.reset(self._task, description=_short(name, 24), total=None, status=size(_memory()))

    def block(self, message: str, done: int, blocks: int | None) -> None:
        self._left = self._clock.left(done, blocks)
        self._per_block = max(self._per_block, self._in_block)
        self._blocks, self._done, self._in_block, self._linear = blocks, done, 0, ""
        self._update()

    def linear(self, name: str) -> None:
        self._in_block += 1
        self._linear = _short(name.rsplit(".", 1)[-1], 12)
        self._update()

    def line(self, text: str) -> None:
        self._bar.console.print(text)

    def _update(self) -> None:
        """block, linear, time left, memory: with the stage and the bar just within 80 columns."""
        part = min(self._in_block / self._per_block, 1.0) if self._per_block else 0.0
        working = min(self._done + 1, self._blocks) if self._blocks and self._in_block else self._done
        position = f"block {working}/{self._blocks}" if self._blocks else ""
        left = f"{duration(self._left)} left" if self._left else ""
        status = "  ".join(filter(None, (position, self._linear, left, size(_memory()))))
        values: dict[str, Any] = {"total": self._blocks, "completed": self._done + part} if self._blocks else {}
        self._bar.update(self._task, status=status, **values)


def _position(done: int, blocks: int | None) -> str:
    return f"block {done} of {blocks}" if blocks else f"block {done}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _memory() -> int:
    return int(psutil.Process().memory_info().rss)
