"""Every kernel against the float64 product with the dequantized weight, over all it accepts. A new kernel is tested by being listed."""

from __future__ import annotations

import itertools

import pytest
import torch

from gptqkit.core.weight import QuantizedWeight, group_count
from gptqkit.kernels.dispatch import KERNELS
from gptqkit.kernels.protocol import Kernel, Request

UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ROWS = (1, 3, 17, 200)


def random_weight(
    out_features: int,
    in_features: int,
    *,
    bits: int,
    group_size: int,
    sym: bool,
    act_order: bool = False,
    negative: bool = False,
    seed: int = 0,
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(in_features, group_size)
    size = in_features if group_size == -1 else group_size
    scale_OG = (torch.rand(out_features, groups, generator=generator) * 0.05 + 0.001).half()
    if negative:
        scale_OG *= torch.where(torch.rand(out_features, groups, generator=generator) < 0.5, -1, 1)
    group_I = (torch.arange(in_features) // size)[torch.randperm(in_features, generator=generator)].int() if act_order else None
    return QuantizedWeight(
        bits=bits,
        group_size=group_size,
        codes_OI=torch.randint(0, 2**bits, (out_features, in_features), generator=generator, dtype=torch.uint8),
        scale_OG=scale_OG,
        zero_OG=None if sym else torch.randint(0, 2**bits, (out_features, groups), generator=generator, dtype=torch.uint8),
        group_I=group_I,
    )


def weight_slack(weight: QuantizedWeight, dtype: torch.dtype) -> torch.Tensor:
    """[O, I]: how far a kernel's weight may be from the exact one: scale, offset and weight each rounded once to `dtype`."""
    group_I = weight.column_groups()
    zero = torch.full_like(weight.scale_OG, weight.natural_zero) if weight.zero_OG is None else weight.zero_OG
    code, zero, scale = weight.codes_OI.double(), zero.double()[:, group_I], weight.scale_OG.double()[:, group_I].abs()
    unit = UNIT[dtype]
    subnormal = 2.0**-24 if dtype == torch.float16 else 0.0
    return unit * (1 + unit) ** 3 * scale * ((code - 8).abs() + (zero - 8).abs() + (code - zero).abs()) + subnormal


def check(kernel: Kernel, weight: QuantizedWeight, dtype: torch.dtype, rows: int, bias: bool) -> None:
    request = Request.of(weight, dtype, bias=bias)
    assert kernel.refuses(request) is None
    generator = torch.Generator().manual_seed(rows)
    x_MI = torch.randn(rows, weight.in_features, generator=generator).to(dtype)
    bias_O = torch.randn(weight.out_features, generator=generator).to(dtype) if bias else None
    y_MO = kernel.matmul(x_MI, kernel.prepare(weight, request), request, bias_O)
    assert y_MO.dtype == dtype
    assert y_MO.shape == (rows, weight.out_features)
    exact_OI = weight.dequantize(torch.float64)
    expected = x_MI.double() @ exact_OI.T
    magnitude = x_MI.double().abs() @ exact_OI.abs().T
    slack = x_MI.double().abs() @ weight_slack(weight, dtype).T
    if bias_O is not None:
        expected, magnitude = expected + bias_O.double(), magnitude + bias_O.double().abs()
    accumulation = weight.in_features * UNIT[torch.float32] * magnitude
    rounding = 2 * UNIT[dtype] * (magnitude if bias else expected.abs() + slack)
    assert ((y_MO.double() - expected).abs() <= slack + accumulation + rounding + 1e-6).all()


CASES = [
    *((bits, group_size, sym, False, False, 48, 128) for bits, group_size, sym in itertools.product(range(2, 9), (32, -1), (True, False))),
    *((4, size, sym, False, sign, 32, 256) for size, sym, sign in itertools.product((32, 64, 128, 256), (True, False), (True, False))),
    *((bits, 32, sym, True, False, 48, 96) for bits, sym in itertools.product((3, 4, 8), (True, False))),
    *((bits, 32, False, False, True, 7, 100) for bits in (2, 3, 4, 5, 8)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_kernel_is_within_the_rounding_of_its_dtype(kernel: Kernel, dtype: torch.dtype) -> None:
    accepted = 0
    for number, (bits, group_size, sym, act_order, negative, out_features, in_features) in enumerate(CASES):
        weight = random_weight(
            out_features, in_features, bits=bits, group_size=group_size, sym=sym, act_order=act_order, negative=negative, seed=number
        )
        if kernel.refuses(Request.of(weight, dtype)) is None:
            accepted += 1
            for rows in ROWS:
                check(kernel, weight, dtype, rows, bias=bool((number + rows) % 2))
    if kernel.name == "torch":
        assert accepted == len(CASES)
    if dtype == torch.bfloat16:
        assert accepted >= 8


@pytest.mark.parametrize("sym", [True, False])
def test_weight_the_cpu_kernel_uses_differs_by_no_more_than_its_docstring_says(sym: bool) -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.name == "cpu")
    weight = random_weight(64, 256, bits=4, group_size=64, sym=sym, negative=True)
    request = Request.of(weight, torch.bfloat16)
    used_OI = torch.cat([kernel.matmul(part, kernel.prepare(weight, request), request) for part in torch.eye(256).bfloat16().split(64)]).T
    error = (used_OI.double() - weight.dequantize(torch.float64)).abs()
    assert (error <= weight_slack(weight, torch.bfloat16)).all()
    assert (error / weight.scale_OG.double()[:, weight.column_groups()].abs()).max() < 0.12


def test_torch_kernel_expands_exactly_what_dequantize_gives() -> None:
    kernel = next(kernel for kernel in KERNELS if kernel.name == "torch")
    for number, (bits, group_size, sym, act_order, negative, out_features, in_features) in enumerate(CASES):
        weight = random_weight(
            out_features, in_features, bits=bits, group_size=group_size, sym=sym, act_order=act_order, negative=negative, seed=number
        )
        request = Request.of(weight, torch.bfloat16)
        used_OI = kernel.matmul(torch.eye(in_features).bfloat16(), kernel.prepare(weight, request), request).T
        assert torch.equal(used_OI, weight.dequantize(torch.bfloat16))


def test_large_weights_are_expanded_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = random_weight(48, 96, bits=3, group_size=32, sym=False, act_order=True)
    kernel = next(kernel for kernel in KERNELS if kernel.name == "torch")
    request = Request.of(weight, torch.float32)
    x_MI = torch.randn(5, 96, requires_grad=True)
    whole = kernel.matmul(x_MI, kernel.prepare(weight, request), request)
    whole.square().sum().backward()
    gradient, x_MI.grad = x_MI.grad, None
    monkeypatch.setattr("gptqkit.kernels.torch_reference.CPU_CHUNK", 1000)
    parts = kernel.matmul(x_MI, kernel.prepare(weight, request), request)
    parts.square().sum().backward()
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(x_MI.grad, gradient, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_gradient_reaches_the_activations(kernel: Kernel) -> None:
    weight = random_weight(32, 64, bits=4, group_size=32, sym=True)
    dtype = torch.bfloat16
    request = Request.of(weight, dtype, bias=True)
    x_MI = torch.randn(3, 64).to(dtype).requires_grad_()
    bias_O = torch.randn(32).to(dtype).requires_grad_()
    up_MO = torch.randn(3, 32).to(dtype)
    kernel.matmul(x_MI, kernel.prepare(weight, request), request, bias_O).backward(up_MO)
    torch.testing.assert_close(x_MI.grad, up_MO @ weight.dequantize(dtype), atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(bias_O.grad, up_MO.sum(0))
