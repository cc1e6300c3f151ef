"""One thread for small work: the solver's tensors are small and many, and two threads that wait for each other cost more than they save.

Measured on two cores, Gram matrices of 512 and 1408 features: one thread 2.4 CPU seconds, two threads 8, no faster. Besides, the bits of a
result then do not depend on the number of threads the process was given.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(enabled: bool) -> Iterator[None]:
    """Runs torch's CPU kernels on the calling thread while inside, if `enabled`; the setting is put back."""
    before = torch.get_num_threads()
    if not enabled or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
