"""The `torch` backend: dequantize, then multiply. Always available, on any device; the oracle the other kernels are tested against.

    weight = scale * (code - zero), in float32, cast once to the dtype of the activations: bit for bit what
    QuantizedWeight.dequantize gives, so the result is that of the dense model.

Codes stay packed in memory as a dense little-endian bit stream along the row: code i of a row lies in bits [i*b, (i+1)*b) of its
int32 words (core/bits.py). This is the layout of compressed-tensors, and the transpose of that of gptq, so kernels/linear.py can hand the
checkpoint's own tensor to this kernel instead of a copy.

Rows are expanded in chunks, so that a large dense weight never exists as a whole: at most CHUNK weights at a time. Where a gradient is
wanted it flows to the activations, and the backward pass expands the rows once more instead of keeping them.

Shapes: M = rows of the activation, O, I = out and in features, G = groups, W = words of a row = ceil(I * bits / 32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gptqkit.core.bits import pack, unpack
from gptqkit.core.weight import QuantizedWeight
from gptqkit.kernels.protocol import Request, State

CHUNK = 1 << 24
"""Weights expanded at a time: 64 MiB in float32."""

CPU_CHUNK = 1 << 20
"""The same on a CPU, where a chunk should stay in its cache: expanding 4096 x 4096 at 4 bits took 107 ms at 1 << 24 and 18 ms here."""

_NAMES = ("codes", "scale", "zero", "group")


class TorchReference:
    """See the module's docstring. State: codes int32 [O, W], scale float16 [O, G], zero uint8 [O, G] if asymmetric,
    group int32 [I] if in activation order."""

    name = "torch"

    def unavailable(self) -> str | None:
        return None

    def refuses(self, request: Request) -> str | None:
        return None

    def prepare(self, weight: QuantizedWeight, request: Request) -> dict[str, Tensor]:
        state = {"codes": pack(weight.codes_OI, weight.bits), "scale": weight.scale_OG.contiguous()}
        if weight.zero_OG is not None:
            state["zero"] = weight.zero_OG.contiguous()
        if weight.group_I is not None:
            state["group"] = weight.group_I.contiguous()
        return state

    def matmul(self, x_MI: Tensor, state: State, request: Request, bias_O: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and x_MI.requires_grad:
            y_MO = _Recomputed.apply(x_MI, request, *(state.get(name) for name in _NAMES))
            return y_MO if bias_O is None else y_MO + bias_O
        return _forward(x_MI, state, request, bias_O)


class _Recomputed(torch.autograd.Function):
    """x @ weight.T whose backward expands the weight again; the weight itself gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, request: Request, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        ctx.request = request
        return _forward(x_MI, _state(*tensors), request, None)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> Any:
        state, request = _state(*ctx.saved_tensors), ctx.request
        grad_MI = None
        for start, stop in _row_chunks(request):
            part_MI = grad_MO[:, start:stop] @ expand_rows(state, request, start, stop, grad_MO.dtype)
            grad_MI = part_MI if grad_MI is None else grad_MI + part_MI
        return grad_MI, None, None, None, None, None


def expand_rows(state: State, request: Request, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Rows start..stop of the dense weight: [stop - start, I]."""
    codes_RI = unpack_rows(state["codes"][start:stop], request.bits, request.in_features)
    scale_RG = state["scale"][start:stop].float()
    zero_RG = state["zero"][start:stop].float() if "zero" in state else None
    size = request.in_features if request.group_size == -1 else request.group_size
    if "group" not in state and request.in_features % size == 0:
        shape = (stop - start, request.in_features // size, size)
        shifted = codes_RI.view(shape).float() - (2 ** (request.bits - 1) if zero_RG is None else zero_RG[:, :, None])
        return (shifted * scale_RG[:, :, None]).to(dtype).view(stop - start, request.in_features)
    columns = torch.arange(request.in_features, device=codes_RI.device)
    group_I = state["group"].long() if "group" in state else columns // size
    zero: Tensor | int = 2 ** (request.bits - 1) if zero_RG is None else zero_RG[:, group_I]
    return ((codes_RI.float() - zero) * scale_RG[:, group_I]).to(dtype)


def unpack_rows(words_OW: Tensor, bits: int, in_features: int) -> Tensor:
    """core.bits.unpack, faster where codes do not straddle bytes: int32 [O, W] -> uint8 [O, in_features]."""
    if bits not in (2, 4, 8):
        return unpack(words_OW, bits, in_features)
    if torch.compiler.is_compiling():
        # Inductor drops the .contiguous() before a view as bytes and then refuses the view; it fuses these shifts, which eager would not.
        shifts = torch.arange(0, 32, bits, device=words_OW.device)
        codes_OWP = (words_OW[:, :, None] >> shifts) & (2**bits - 1)
        return codes_OWP.to(torch.uint8).reshape(words_OW.shape[0], -1)[:, :in_features]
    octets = words_OW.contiguous().view(torch.uint8)
    if bits < 8:
        parts = [(octets >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        octets = torch.stack(parts, dim=2).view(octets.shape[0], -1)
    return octets[:, :in_features]


def _forward(x_MI: Tensor, state: State, request: Request, bias_O: Tensor | None) -> Tensor:
    parts = []
    for start, stop in _row_chunks(request):
        bias = None if bias_O is None else bias_O[start:stop]
        parts.append(functional.linear(x_MI, expand_rows(state, request, start, stop, x_MI.dtype), bias))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _row_chunks(request: Request) -> list[tuple[int, int]]:
    # A compiler fuses the expansion into one pass, so small chunks would only make its graph longer.
    chunk = CPU_CHUNK if request.device == "cpu" and not torch.compiler.is_compiling() else CHUNK
    step = max(1, chunk // request.in_features)
    return [(start, min(start + step, request.out_features)) for start in range(0, request.out_features, step)]


def _state(*tensors: Tensor | None) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in zip(_NAMES, tensors, strict=True) if tensor is not None}
