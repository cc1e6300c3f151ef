"""Without a CUDA device, Triton's kernels are run by its interpreter; it asks when it is first imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
