"""What has to be said before the tests begin.

Without a CUDA device, Triton's kernels are run by its interpreter; it asks when it is first imported. And one thread computes, here as in
`scripts/check`: where a test wants equal bits, how a sum is divided among threads must not differ.
"""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
