"""Where the time of a block goes: seconds by phase, each counted once however they are nested."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_SYNCHRONIZED: ContextVar[bool] = ContextVar("synchronized", default=False)


class Clock:
    """A stopwatch of phases: what begins inside another stops that one's time until it ends.

    Work given to a CUDA device counts where the host waits for it, unless inside `synchronized`.

    >>> clock = Clock(torch.device("cpu"))
    >>> with clock.phase("forward"), clock.phase("gram"):
    ...     pass
    >>> sorted(clock.take())
    ['forward', 'gram']
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._turn()
        self._running.append(name)
        try:
            yield
        finally:
            self._turn()
            self._running.pop()

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds

    def _turn(self) -> None:
        if self._device.type == "cuda" and _SYNCHRONIZED.get():
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] = self._seconds.get(self._running[-1], 0.0) + now - self._since
        self._since = now


@contextmanager
def synchronized() -> Iterator[None]:
    """Inside, clocks wait for the device at every turn: phases get the time of their own work, and nothing overlaps."""
    token = _SYNCHRONIZED.set(True)
    try:
        yield
    finally:
        _SYNCHRONIZED.reset(token)
