"""The Gram matrix: the right numbers, the right precision, and no trace left in torch's settings."""

from __future__ import annotations

import pytest
import torch

from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.algorithms.precision import exact, short_operands


@pytest.mark.parametrize("features", [5, 128, 200, 520])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_is_the_mean_of_squares_in_float32_accuracy(features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(features)
    x_MI = (torch.randn(3000, features, generator=generator) + 0.3).to(dtype)
    gram = Gram(features, "cpu")
    for batch in x_MI.split(1100):
        gram.add(batch)
    mean_II = gram.finish()
    exact_II = x_MI.double().T @ x_MI.double() / 3000
    assert gram.tokens == 3000
    assert mean_II.dtype == torch.float32
    assert torch.equal(mean_II, mean_II.T)
    assert float((mean_II - exact_II).norm() / exact_II.norm()) < 3e-6  # bfloat16 arithmetic would be at 1e-3


def test_batches_with_leading_dimensions_and_more_tokens_than_a_step() -> None:
    x = torch.randn(3, 1000, 40, generator=torch.Generator().manual_seed(0))
    gram = Gram(40, "cpu")
    gram.add(x)
    torch.testing.assert_close(gram.finish(), (x.flatten(0, 1).T @ x.flatten(0, 1)) / 3000, rtol=1e-5, atol=1e-6)


def test_same_adds_same_bytes() -> None:
    x_MI = torch.randn(700, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    results = []
    for _ in range(2):
        gram = Gram(64, "cpu")
        gram.add(x_MI[:300])
        gram.add(x_MI[300:])
        results.append(gram.finish())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[0].T)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_shows_on_the_diagonal(bad: float) -> None:
    """NaN, infinite, or so large that its square is: what solve_group looks for."""
    gram = Gram(8, "cpu")
    x_MI = torch.ones(4, 8)
    x_MI[2, 5] = bad
    gram.add(x_MI)
    assert torch.isfinite(gram.finish().diagonal()).tolist() == [column != 5 for column in range(8)]


def test_no_tokens() -> None:
    gram = Gram(4, "cpu")
    assert torch.equal(gram.finish(), torch.zeros(4, 4))
    assert gram.tokens == 0


def test_precision_is_put_back_even_after_an_error() -> None:
    def state() -> tuple[object, ...]:
        switches = (getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul)
        return tuple(getattr(s, "fp32_precision", None) for s in switches)

    before = state()
    for context in (exact, short_operands):
        with context():
            assert state() != before or before[0] is None
        assert state() == before
        with pytest.raises(RuntimeError, match="mat1 and mat2"), context():
            torch.ones(2, 3) @ torch.ones(2, 3)
        assert state() == before


def test_float32_inputs_are_never_shortened() -> None:
    """Even when the program around has asked for bfloat16 products."""
    x_MI = torch.randn(512, 256, generator=torch.Generator().manual_seed(3))
    gram = Gram(256, "cpu")
    with short_operands():
        gram.add(x_MI)
    exact_II = x_MI.double().T @ x_MI.double() / 512
    assert float((gram.finish() - exact_II).norm() / exact_II.norm()) < 3e-6


def test_the_older_switch_of_torch_serves_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.9 there was one switch for all devices; it too is put back."""
    seen = []
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", None)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    monkeypatch.setattr(torch, "set_float32_matmul_precision", seen.append)
    with short_operands():
        seen.append("inside")
    with exact():
        seen.append("inside")
    assert seen == ["medium", "inside", "high", "highest", "inside", "high"]


@pytest.mark.parametrize("tokens", [1, 15, 17, 130, 2049])
def test_any_number_of_short_tokens(tokens: int) -> None:
    """Rows are filled up to even numbers for the product; that must not show."""
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(tokens)).bfloat16()
    gram, cross = Gram(48, "cpu"), CrossGram(48, "cpu")
    gram.add(x)
    cross.add(x, x * 2)
    expected = x.double().T @ x.double() / tokens
    for mean, factor in ((gram.finish(), 1), (cross.finish(), 2)):
        assert (mean.double() - factor * expected).abs().max() <= 1e-5 * factor * expected.abs().max()


def test_blending_weighs_a_mean_by_tokens() -> None:
    own, other, cross = Gram(2, "cpu"), Gram(2, "cpu"), CrossGram(2, "cpu")
    own.add(torch.tensor([[2.0, 0.0]]))
    cross.add(torch.tensor([[2.0, 0.0]]), torch.tensor([[4.0, 0.0]]))
    other.add(torch.tensor([[1.0, 1.0], [1.0, 3.0]]))
    own.blend(other, 3)
    cross.blend(other, 3)
    assert own.tokens == 1, "what was really seen"
    assert own.finish().tolist() == [[(4 + 3 * 1) / 4, 3 * 2 / 4], [3 * 2 / 4, 3 * 5 / 4]]
    assert cross.finish().tolist() == [[(8 + 3 * 1) / 4, 3 * 2 / 4], [3 * 2 / 4, 3 * 5 / 4]]


def test_blended_tokens_count_for_what_they_tell() -> None:
    """8 I tokens that weigh as much as 2 I tell as much as 8 I on their own, and beside as many routed ones less than all together."""
    x_MI = torch.randn(640, 8, generator=torch.Generator().manual_seed(0))
    pool, own = Gram(8, "cpu"), Gram(8, "cpu")
    pool.add(x_MI[:64])
    assert pool.effective_tokens == 64
    own.blend(pool, 16)
    assert own.effective_tokens == pytest.approx(64)
    own.add(x_MI[64:80])
    assert 64 / 4 < own.effective_tokens < 80
    assert own.tokens == 16
    own.add(x_MI[80:])
    assert own.effective_tokens == pytest.approx(576 + 16, rel=0.03)
    assert Gram(8, "cpu").effective_tokens == 0
