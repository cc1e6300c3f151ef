"""The Kernel seam: what multiplies with a QuantizedWeight, what it is asked for, and how it says no.

A kernel is a stateless object. `prepare` turns a weight into named tensors in the layout the kernel likes; `matmul` uses them. The
tensors belong to whoever asked (kernels/linear.py keeps them as non-persistent buffers), so a kernel never owns memory.

Shapes: M = rows of the activation (all leading dimensions together), I = in features, O = out features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gptqkit.core.weight import QuantizedWeight

State = Mapping[str, Tensor]
"""What `Kernel.prepare` made, by local name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Everything a kernel may look at before it accepts a linear; hashable, so that equal linears share one decision.

    group_size       columns that share a scale; -1: one group over all of them
    act_order        the group of a column is not column // group_size
    negative_scales  None: not known yet (only headers were read)
    dtype            of the activations and of the result
    device           the kind of device: "cpu", "cuda", ...
    """

    bits: int
    group_size: int
    sym: bool
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: str
    act_order: bool = False
    negative_scales: bool | None = None
    bias: bool = False

    @classmethod
    def of(cls, weight: QuantizedWeight, dtype: torch.dtype, *, bias: bool = False) -> Request:
        """The request that a weight makes where it lies."""
        return cls(
            bits=weight.bits, group_size=weight.group_size, sym=weight.sym, in_features=weight.in_features,
            out_features=weight.out_features, dtype=dtype, device=weight.codes_OI.device.type, act_order=weight.group_I is not None,
            negative_scales=bool((weight.scale_OG < 0).any()), bias=bias,
        )  # fmt: skip


class Kernel(Protocol):
    """One way to compute `x @ weight.T + bias`."""

    name: str
    """What users write: `backend="torch"`, GPTQKIT_BACKEND=torch."""

    def unavailable(self) -> str | None:
        """Why this machine cannot run the kernel at all; None when it can."""

    def refuses(self, request: Request) -> str | None:
        """Why this linear cannot be multiplied here, as a phrase that names the offending value; None when it can."""

    def prepare(self, weight: QuantizedWeight, request: Request) -> dict[str, Tensor]:
        """The tensors `matmul` needs, on the device of `weight`. Only called for requests that are not refused."""

    def matmul(self, x_MI: Tensor, state: State, request: Request, bias_O: Tensor | None = None) -> Tensor:
        """[M, I] in `request.dtype` -> [M, O] in the same dtype. Traceable by torch.compile without a graph break."""
