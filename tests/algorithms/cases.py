"""Synthetic layers: correlated inputs with a decaying spectrum and uneven channels, like those of a real model."""

from __future__ import annotations

import torch
from torch import Tensor


def inputs(tokens: int, features: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[M, I]"""
    generator = torch.Generator().manual_seed(seed)
    mix_II = torch.randn(features, features, generator=generator, dtype=torch.float64) / features**0.5
    spectrum_I = torch.linspace(0, -3, features, dtype=torch.float64).exp()
    x_MI = torch.randn(tokens, features, generator=generator, dtype=torch.float64) * spectrum_I @ mix_II
    channel_I = torch.randn(features, generator=generator, dtype=torch.float64).mul(0.7).exp()
    return (x_MI * channel_I).to(dtype)


def gram(x_MI: Tensor) -> Tensor:
    return x_MI.T @ x_MI / x_MI.shape[0]


def weight(rows: int, features: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """[O, I]"""
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(1000 + seed), dtype=torch.float64).mul(0.05).to(dtype)


def h_norm(change_OI: Tensor, gram_II: Tensor) -> float:
    """tr(E H E^T)"""
    return float(((change_OI @ gram_II) * change_OI).sum())
