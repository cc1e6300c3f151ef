"""The wide attention computes what the model's own attention computes, and only where it should."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gptqkit.models.attention import WideAttention


@pytest.mark.parametrize("causal", [True, False])
def test_closer_to_float64_than_torchs_own(causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 96, 32, generator=generator).bfloat16() for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    own = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    with WideAttention():
        wide = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    assert wide.dtype == torch.bfloat16
    assert (wide - exact).norm() <= 1.02 * (own - exact).norm()


def test_masks_and_grouped_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 16, 32, generator=generator).bfloat16() for heads in (4, 2, 2))
    mask = torch.zeros(1, 1, 16, 16).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), float("-inf"))
    with WideAttention():
        biased = F.scaled_dot_product_attention(q, k, v, attn_mask=mask.bfloat16(), enable_gqa=True, scale=0.2)
        boolean = F.scaled_dot_product_attention(q, k, v, attn_mask=mask == 0, enable_gqa=True, scale=0.2)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask.double(), enable_gqa=True, scale=0.2)
    assert torch.equal(biased, boolean)
    assert (biased - expected).abs().max() < 0.02


def test_float32_is_left_alone() -> None:
    q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0))
    with WideAttention():
        inside = F.scaled_dot_product_attention(q, q, q)
    assert torch.equal(inside, F.scaled_dot_product_attention(q, q, q))
