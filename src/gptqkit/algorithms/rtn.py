"""Round to nearest: each group gets the grid that covers its range, each weight its nearest code. Needs no data.

The method `rtn`, and what GPTQ falls back to when the data cannot be trusted. Shapes: O = out features, I = in features, G = groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import encode, minmax_grid
from gptqkit.core.weight import QuantizedWeight, group_count


def round_to_nearest(weight_OI: Tensor, spec: LinearSpec, group_I: Tensor | None = None) -> QuantizedWeight:
    """Quantizes [O, I] without calibration.

    group_I  int32 [I], the group of each column, when the checkpoint's groups are not runs of neighbours (desc_act); kept in the result

    >>> round_to_nearest(torch.tensor([[-1.0, 0.5, 0.25, 2.0]]), LinearSpec(bits=4, group_size=-1, sym=True)).codes_OI
    tensor([[ 4, 10,  9, 15]], dtype=torch.uint8)
    """
    weight_OI = weight_OI.detach()
    weight_OI = weight_OI if weight_OI.dtype == torch.float64 else weight_OI.float()
    out_features, in_features = weight_OI.shape
    columns_I = torch.arange(in_features, device=weight_OI.device) if group_I is None else torch.argsort(group_I, stable=True)
    size = in_features if spec.group_size == -1 else spec.group_size
    groups = group_count(in_features, spec.group_size)
    codes_OI = torch.empty(out_features, in_features, dtype=torch.uint8, device=weight_OI.device)
    scale_OG = torch.empty(out_features, groups, dtype=torch.float16, device=weight_OI.device)
    zero_OG = torch.empty(out_features, groups, dtype=torch.uint8, device=weight_OI.device)
    for group in range(groups):
        columns_C = columns_I[group * size : (group + 1) * size]
        weight_OC = weight_OI[:, columns_C]
        grid = minmax_grid(weight_OC, bits=spec.bits, sym=spec.sym)
        codes_OI[:, columns_C] = encode(weight_OC, grid, spec.bits).to(torch.uint8)
        scale_OG[:, group] = grid.scale_R.to(torch.float16)
        zero_OG[:, group] = grid.zero_R.to(torch.uint8)
    stored_zero_OG = None if spec.sym else zero_OG
    return QuantizedWeight(
        bits=spec.bits, group_size=spec.group_size, codes_OI=codes_OI, scale_OG=scale_OG, zero_OG=stored_zero_OG, group_I=group_I
    )
