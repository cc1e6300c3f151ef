"""Work that a run does not wait for: writing what is done while the GPU computes what comes next."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class Background:
    """One thread that does what it is given, in order; a context manager, which waits for it. `threaded` False: at once, by the caller.

    What was given is done even when the block is left by an error, so that what was finished is not lost. An error of the thread itself
    is raised by the next `do`, or on leaving.

    >>> done = []
    >>> with Background(threaded=True) as background:
    ...     background.do(lambda: done.append(1))
    >>> done
    [1]
    """

    def __init__(self, *, threaded: bool, ahead: int = 2) -> None:
        """`ahead`: tasks that may wait before `do` does."""
        self.executor = ThreadPoolExecutor(1, thread_name_prefix="gptqkit-write") if threaded else None
        self._ahead = ahead
        self._tasks: list[Future[None]] = []

    def do(self, task: Callable[[], None]) -> None:
        if self.executor is None:
            task()
            return
        self._tasks.append(self.executor.submit(task))
        while len(self._tasks) > self._ahead:
            self._tasks.pop(0).result()

    def __enter__(self) -> Background:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.executor is not None:
            self.executor.shutdown()
        for task in self._tasks:
            if error is None:
                task.result()
