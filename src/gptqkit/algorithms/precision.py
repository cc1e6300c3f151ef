"""Precision of float32 matrix products: one switch, set for the length of a call and always put back.

torch may compute float32 products from shortened operands (TF32 on CUDA, bfloat16 on CPUs that have it) when the program around us asked
for it. The solver never wants that silently, so its products run under `exact`. The Gram matrix of bfloat16 activations is the opposite
case: its operands *are* bfloat16 values stored in float32, so the short product is exact, the sum is float32 either way, and the matrix
units run at twice the speed; it runs under `short_operands`.

The switch is per process, not per thread: two threads inside different contexts would see each other's setting.

Short products on a CPU are oneDNN's, which compiles a kernel for every shape and keeps the last 1024 of them, up to a megabyte each. Where
the number of rows never repeats (experts), that came to 500 MB in a run on a 14 M-parameter model; `filled_rows` brings few numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact() -> Iterator[None]:
    """Float32 products from full float32 operands, on every device."""
    with _precision("ieee", "ieee", "highest"):
        yield


@contextmanager
def short_operands() -> Iterator[None]:
    """Allows the CPU to shorten float32 operands to bfloat16; lossless exactly when they hold bfloat16 values. CUDA stays exact."""
    with _precision("bf16", "ieee", "medium"):
        yield


@contextmanager
def short_updates() -> Iterator[None]:
    """For the solver's bulk updates, which bring later columns up to date with the errors of earlier ones: TF32 on CUDA, CPUs stay exact.

    A product's operands lose what is below 5e-4 of them; a rounding error is some 5 % of a weight, and what the update is wrong by decides
    a code only where two are equally good. Every result is judged afterwards, and its cost computed anew.
    """
    with _precision("ieee", "tf32", "high"):
        yield


@contextmanager
def short_products() -> Iterator[None]:
    """Shortens float32 operands wherever a device gains by it (bfloat16 on CPUs, TF32 on CUDA), for comparisons of two forwards.

    Results are not what they are exactly, but two forwards that differ little are shortened alike: KL between them comes out within 0.3 %
    of float32's, where bfloat16 forwards, which round every result anew, add as much KL as a 4-bit linear (llama-small).
    """
    with _precision("bf16", "tf32", "high"):
        yield


def filled_rows(x_MI: Tensor, dtype: torch.dtype) -> Tensor:
    """In `dtype`; on a CPU, what is narrower than float32 gets rows of zeros up to one of eight numbers an octave."""
    rows = x_MI.shape[0]
    step = 1 << max(rows.bit_length() - 4, 4)
    if x_MI.device.type != "cpu" or x_MI.dtype.itemsize >= 4 or rows % step == 0:
        return x_MI.to(dtype)
    filled_MI = x_MI.new_zeros(rows + -rows % step, x_MI.shape[1], dtype=dtype)
    filled_MI[:rows] = x_MI
    return filled_MI


@contextmanager
def _precision(cpu: str, cuda: str, legacy: str) -> Iterator[None]:
    cpu_switch: Any = getattr(torch.backends.mkldnn, "matmul", None)
    cuda_switch: Any = torch.backends.cuda.matmul
    if not (hasattr(cpu_switch, "fp32_precision") and hasattr(cuda_switch, "fp32_precision")):  # before torch 2.9: one switch for both
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(legacy)
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    cpu_before, cuda_before = cpu_switch.fp32_precision, cuda_switch.fp32_precision
    cpu_switch.fp32_precision, cuda_switch.fp32_precision = cpu, cuda
    try:
        yield
    finally:
        cpu_switch.fp32_precision, cuda_switch.fp32_precision = cpu_before, cuda_before
