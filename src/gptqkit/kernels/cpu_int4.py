"""The `cpu` backend: PyTorch's own int4 kernel for small batches in bfloat16, dequantize and multiply for large ones.

ATen's operator computes, per group,  weight = (code - 8) * scale + offset  with bfloat16 scale and offset, so that

    symmetric:   offset = 0                     asymmetric:   offset = scale * (8 - zero)

map our grid onto it. Both numbers round, with unit roundoff u = 2**-8, and ATen may round the weight as well, as dequantizing does:
the weight that the kernel uses differs from ours by at most

    u * |scale| * (|code - 8| + |8 - zero| + |code - zero|)  to first order,

which tests/kernels/test_conformance.py measures. Float32 would be exact, but ATen's float32 path is plain scalar code: 24 ms for one
row of a 4096 x 4096 weight where bfloat16 takes 0.4 ms and expanding the whole weight 13 ms, so float32 and float16 are refused.

The state is ATen's packed codes besides the `torch` backend's state: large batches and gradients need codes that can be expanded, and
ATen's layout depends on the processor. Since that state aliases the checkpoint's own tensors (kernels/linear.py), the price is one
extra copy of the codes, 0.5 byte a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptqkit.core.weight import QuantizedWeight
from gptqkit.kernels.protocol import Request, State
from gptqkit.kernels.torch_reference import TorchReference

GROUP_SIZES = (32, 64, 128, 256)
ROWS_MULTIPLE = 16

SMALL_BATCH = 128
"""Largest M for ATen's kernel. Its time grows with M (0.19 ms a row for 4096 x 4096 on one core), while expanding costs the same once."""

_INNER_TILES = 2
"""An argument that ATen's CPU packing checks the range of and then ignores (it is the CUDA layout's)."""

_REFERENCE = TorchReference()


class CpuInt4:
    """See the module's docstring. State: that of TorchReference; packed uint8 [O, I / 2]; affine bfloat16 [G, O, 2] = (scale, offset)."""

    name = "cpu"

    def unavailable(self) -> str | None:
        for operator in ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu"):
            if not hasattr(torch.ops.aten, operator):
                return f"torch {torch.__version__} has no aten::{operator}"
        return None

    def refuses(self, request: Request) -> str | None:
        size = request.in_features if request.group_size == -1 else request.group_size
        if missing := self.unavailable():
            return missing
        if request.device != "cpu":
            return f"the device is {request.device}; it runs on cpu"
        if request.bits != 4:
            return f"bits={request.bits}; it handles 4"
        if request.dtype != torch.bfloat16:
            return f"dtype {str(request.dtype).removeprefix('torch.')}; it handles bfloat16"
        if request.act_order:
            return "columns are in activation order (g_idx); it needs contiguous groups"
        if size not in GROUP_SIZES:
            return f"groups of {size} columns; it handles {', '.join(map(str, GROUP_SIZES))}"
        if request.in_features % size:
            return f"in_features={request.in_features} is not a multiple of the group size {size}"
        if request.out_features % ROWS_MULTIPLE:
            return f"out_features={request.out_features} is not a multiple of {ROWS_MULTIPLE}"
        return None

    def prepare(self, weight: QuantizedWeight, request: Request) -> dict[str, Tensor]:
        scale_GO = weight.scale_OG.t().float()
        zero_GO: Tensor | int = 8 if weight.zero_OG is None else weight.zero_OG.t().float()
        affine = torch.stack([scale_GO, scale_GO * (8 - zero_GO)], dim=2).to(torch.bfloat16).contiguous()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(weight.codes_OI.int(), _INNER_TILES)
        return {**_REFERENCE.prepare(weight, request), "packed": packed, "affine": affine}

    def matmul(self, x_MI: Tensor, state: State, request: Request, bias_O: Tensor | None = None) -> Tensor:
        if x_MI.shape[0] > SMALL_BATCH or (torch.is_grad_enabled() and x_MI.requires_grad):
            return _REFERENCE.matmul(x_MI, state, request, bias_O)
        size = request.in_features if request.group_size == -1 else request.group_size
        y_MO = torch.ops.aten._weight_int4pack_mm_for_cpu(x_MI.contiguous(), state["packed"], size, state["affine"])
        return y_MO if bias_O is None else y_MO + bias_O
