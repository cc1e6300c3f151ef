"""Choosing a kernel: an ordered list, each entry of which accepts a request or says why not.

One call to `decide` serves choosing (the first without a refusal), explaining (`gptqkit doctor`), and failing (the whole table).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptqkit.core.errors import InputError
from gptqkit.kernels.cpu_int4 import CpuInt4
from gptqkit.kernels.protocol import Kernel, Request
from gptqkit.kernels.torch_reference import TorchReference

KERNELS: tuple[Kernel, ...] = (CpuInt4(), TorchReference())
"""Fastest first; the last one refuses nothing. A new kernel is one entry here, and the conformance test picks it up."""

BACKEND_VARIABLE = "GPTQKIT_BACKEND"


@dataclass(frozen=True, slots=True)
class Decision:
    """One kernel's answer to one request; `refusal` None means it would do."""

    kernel: Kernel
    refusal: str | None

    def to_dict(self) -> dict[str, Any]:
        return {"backend": self.kernel.name, "refusal": self.refusal}


def decide(request: Request, backend: str | None = None) -> list[Decision]:
    """Every kernel's answer, in order of preference. A backend forced by `backend` or by GPTQKIT_BACKEND refuses for the others.

    Raises InputError for a backend that does not exist.
    """
    forced = forced_backend(backend)
    return [Decision(kernel, _not_forced(kernel, forced) or kernel.refuses(request)) for kernel in KERNELS]


def choose(request: Request, backend: str | None = None, *, name: str = "this linear") -> Kernel:
    """The first kernel that accepts. Raises InputError with every refusal when none does."""
    decisions = decide(request, backend)
    for decision in decisions:
        if decision.refusal is None:
            return decision.kernel
    raise InputError(f"no backend can multiply with {name} ({describe(request)}):\n{table(decisions)}{_remedy(forced_backend(backend))}")


def forced_backend(backend: str | None = None) -> str | None:
    """The backend asked for by argument, else by the environment, else None. Raises InputError for an unknown name."""
    origin, value = ("backend", backend) if backend else (BACKEND_VARIABLE, os.environ.get(BACKEND_VARIABLE))
    names = [kernel.name for kernel in KERNELS]
    if value and value not in names:
        raise InputError(f"{origin}={value!r}; allowed: {', '.join(names)}")
    return value or None


def table(decisions: Sequence[Decision]) -> str:
    """One indented line a kernel."""
    return "\n".join(f"  {d.kernel.name:8} {'yes' if d.refusal is None else 'no: ' + d.refusal}" for d in decisions)


def describe(request: Request) -> str:
    """A request in one line.

    >>> import torch
    >>> describe(Request(bits=4, group_size=128, sym=True, in_features=64, out_features=32, dtype=torch.bfloat16, device="cpu"))
    '32 x 64, 4 bits, group size 128, sym, bfloat16 on cpu'
    """
    words = [f"{request.out_features} x {request.in_features}", f"{request.bits} bits", f"group size {request.group_size}"]
    words.append("sym" if request.sym else "asym")
    if request.act_order:
        words.append("activation order")
    return ", ".join([*words, f"{str(request.dtype).removeprefix('torch.')} on {request.device}"])


def _not_forced(kernel: Kernel, forced: str | None) -> str | None:
    return f"the backend {forced} was asked for" if forced and kernel.name != forced else None


def _remedy(forced: str | None) -> str:
    return f"\nleave out backend={forced!r} (and {BACKEND_VARIABLE}) to let one be chosen" if forced else ""
