"""The Gram matrix of a layer's inputs, X^T X / tokens: everything GPTQ knows about the data.

Accumulated as a float32 running sum and divided once, so that the order of batches is the only thing its bits depend on. Only the blocks
on and above the diagonal are computed (the rest is their mirror image), which halves the work.

On a CPU, bfloat16 activations are multiplied as float32 tensors whose operands the CPU may shorten to bfloat16: the products of bfloat16
values are exact in float32, so nothing is lost against full float32 but the order of a sum. One core of an AVX512-BF16 machine does
106 GFLOP/s in float32, 230 this way, and 400 counted for the whole matrix when the lower half is skipped (512, 1408, 2048 and 5632
features, 4096 tokens a call). A bfloat16 product proper would be faster still but rounds its *result* to 8 bits.

Shapes: M = tokens, I = in features.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptqkit.algorithms.precision import exact, filled_rows, short_operands

# Width of a column block. Narrow blocks skip more of the lower triangle, wide ones feed the matrix units better; measured as above.
_NARROW, _WIDE, _WIDE_FROM = 128, 256, 2048
# Tokens multiplied at once: bounds the float32 copy of the activations; on a CPU small enough that it stays in cache (8192 cost 20 % more).
_CPU_TOKENS, _CUDA_TOKENS = 2048, 65536


class Gram:
    """Running X^T X of one input group.

    >>> gram = Gram(2, "cpu")
    >>> gram.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.finish()
    tensor([[5., 1.],
            [1., 2.]])
    """

    def __init__(self, in_features: int, device: torch.device | str) -> None:
        self.tokens = 0
        self._blended = 0.0
        self._blended_square = 0.0
        self._sum_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)

    def add(self, x_MI: Tensor) -> None:
        """Adds tokens: float32, bfloat16 or float16 activations [M, I] (leading dimensions are flattened), on this Gram's device."""
        x_MI = x_MI.reshape(-1, x_MI.shape[-1])
        self.tokens += x_MI.shape[0]
        step = _CUDA_TOKENS if x_MI.is_cuda else _CPU_TOKENS
        for start in range(0, x_MI.shape[0], step):
            self._add_step(x_MI[start : start + step])

    def count(self, x_MI: Tensor) -> None:
        """Counts tokens without adding them."""
        self.tokens += x_MI.numel() // x_MI.shape[-1]

    def blend(self, other: Gram, tokens: float) -> None:
        """Adds another Gram's mean as if it came from so many tokens; `tokens` of this one goes on counting what was really seen here."""
        self._blended += tokens
        self._blended_square += tokens**2 / max(other.tokens, 1)
        self._sum_II.add_(other._sum_II, alpha=tokens / max(other.tokens, 1))

    @property
    def effective_tokens(self) -> float:
        """Equally weighted tokens that would say as much: (sum of weights)^2 / sum of squared weights (Kish 1965)."""
        return (self.tokens + self._blended) ** 2 / max(self.tokens + self._blended_square, 1)

    def symmetric(self) -> Tensor:
        """The sum so far, [I, I], both halves of it."""
        return self._sum_II.triu() + self._sum_II.triu(1).T

    def _add_step(self, x_MI: Tensor) -> None:
        native = x_MI.is_cuda and x_MI.dtype in (torch.bfloat16, torch.float16)  # CUDA multiplies halves into a float32 result
        lossless = x_MI.dtype == torch.bfloat16
        x_MI = x_MI if native else filled_rows(x_MI, torch.float32)
        in_features = x_MI.shape[1]
        width = _NARROW if in_features < _WIDE_FROM else _WIDE
        with short_operands() if lossless else exact():
            for start in range(0, in_features, width):
                stop = min(start + width, in_features)
                target = self._sum_II[start:stop, start:]
                if native:
                    target += torch.mm(x_MI[:, start:stop].T, x_MI[:, start:], out_dtype=torch.float32)
                else:
                    target.addmm_(x_MI[:, start:stop].T, x_MI[:, start:])

    def finish(self) -> Tensor:
        """The mean [I, I], float32, exactly symmetric; zeros when no tokens came. Made in place, so that no second matrix of this size is
        needed: nothing can be added afterwards."""
        mean_II, self._sum_II = self._sum_II, self._sum_II.new_empty(0, 0)
        for start in range(0, mean_II.shape[0], _WIDE):
            stop = min(start + _WIDE, mean_II.shape[0])
            corner_BB = mean_II[start:stop, start:stop].triu()
            mean_II[start:stop, start:stop] = corner_BB + corner_BB.triu(1).T
            mean_II[stop:, start:stop] = mean_II[start:stop, stop:].T
        return mean_II.div_(max(self.tokens + self._blended, 1))


class CrossGram:
    """Running X^T Y of the same tokens: X what a linear reads in the quantized model, Y what it reads in the original [M, I], or what its
    output is behind by [M, C].

    >>> cross = CrossGram(1, "cpu")
    >>> cross.add(torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [4.0]]))
    >>> cross.finish()
    tensor([[7.]])
    """

    def __init__(self, in_features: int, device: torch.device | str, columns: int | None = None) -> None:
        self.tokens = 0
        self._blended = 0.0
        self._sum_IC = torch.zeros(in_features, columns or in_features, dtype=torch.float32, device=device)

    def add(self, x_MI: Tensor, other_MC: Tensor) -> None:
        """Adds tokens, row by row the same ones (leading dimensions are flattened)."""
        x_MI, other_MC = x_MI.reshape(-1, x_MI.shape[-1]), other_MC.reshape(-1, other_MC.shape[-1])
        self.tokens += x_MI.shape[0]
        step = _CUDA_TOKENS if x_MI.is_cuda else _CPU_TOKENS
        native = x_MI.is_cuda and x_MI.dtype in (torch.bfloat16, torch.float16)
        with short_operands() if x_MI.dtype == torch.bfloat16 else exact():
            for start in range(0, x_MI.shape[0], step):
                left_MI, right_MC = x_MI[start : start + step], other_MC[start : start + step]
                if native:
                    self._sum_IC += torch.mm(left_MI.T, right_MC, out_dtype=torch.float32)
                else:
                    self._sum_IC.addmm_(filled_rows(left_MI, torch.float32).T, filled_rows(right_MC, torch.float32))

    def blend(self, both: Gram, tokens: float) -> None:
        """Adds the mean of a Gram, taken to be the same in both streams, as if it came from so many tokens."""
        self._blended += tokens
        self._sum_IC.add_(both.symmetric(), alpha=tokens / max(both.tokens, 1))

    def complete(self, mean_II: Tensor, tokens: int, seen: Gram) -> None:
        """Adds those of all tokens, of which the mean of x x^T is given, that are not among the `seen` ones, taken to be the same in both
        streams."""
        self._sum_IC.add_(mean_II, alpha=tokens).sub_(seen.symmetric())
        self.tokens += tokens - seen.tokens

    def finish(self) -> Tensor:
        """The mean [I, C]. Nothing can be added afterwards."""
        mean_IC, self._sum_IC = self._sum_IC, self._sum_IC.new_empty(0, 0)
        return mean_IC.div_(max(self.tokens + self._blended, 1))
