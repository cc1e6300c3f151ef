"""Experts that see few tokens are shown tokens of their layer: which ones, how much they weigh, and what is said about it."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import tiny_config
from torch import nn
from transformers import AutoModelForCausalLM

from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.hf.experts import Expert, Experts, replace_experts
from gptqkit.models.layout import InputGroup, linear_info
from gptqkit.pipeline.coverage import ENOUGH, PRIOR, BlockCoverage, Coverage

TOKENS = 4096
HIDDEN, WIDTH = 64, 32


@pytest.fixture
def block() -> nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3_moe", num_hidden_layers=1))
    replace_experts(model, visit_all=True)
    block = model.model.layers[0].mlp.to_empty(device="cpu")
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block.requires_grad_(False)


def group(block: nn.Module, *names: str) -> InputGroup:
    return InputGroup(tuple(linear_info(name, block.get_submodule(name)) for name in names))


def gram_of(x: torch.Tensor) -> Gram:
    gram = Gram(x.shape[1], "cpu")
    gram.add(x)
    return gram


def test_an_even_sample_of_the_layer_weighs_as_much_as_the_prior_says(block: nn.Module) -> None:
    hidden = torch.randn(2, TOKENS // 2, HIDDEN)
    with Coverage(block, batches=2, tokens=TOKENS) as coverage:
        for batch in hidden:
            block(batch[None])
    step = TOKENS // (8 * HIDDEN) | 1
    sample = torch.cat([batch[::step] for batch in hidden])
    own = torch.randn(20, HIDDEN)
    gate_up = group(block, "experts.1.gate_proj", "experts.1.up_proj")
    gram = gram_of(own)
    (said,) = coverage.complete(gate_up, gram, None)
    assert (
        said
        == f"20 calibration tokens were routed here, fewer than the 64 features of its input; {len(sample)} tokens of its layer were added"
    )
    assert gram.tokens == 20
    weight = PRIOR * HIDDEN
    expected = (own.T @ own + weight * sample.T @ sample / len(sample)) / (20 + weight)
    torch.testing.assert_close(gram.finish(), expected, rtol=1e-4, atol=1e-5)


def test_down_is_shown_what_its_own_gate_and_up_make_of_the_sample(block: nn.Module) -> None:
    hidden = torch.randn(1, TOKENS, HIDDEN)
    with Coverage(block, batches=1, tokens=TOKENS) as coverage:
        block(hidden)
    experts = block.get_submodule("experts")
    expert = experts.get_submodule("2")
    assert isinstance(experts, Experts)
    assert isinstance(expert, Expert)
    expert.gate_proj.weight.mul_(2)  # as it is once quantized
    sample = hidden[0, :: TOKENS // (8 * HIDDEN) | 1]
    inner = experts.combine(torch.cat((sample @ expert.gate_proj.weight.T, sample @ expert.up_proj.weight.T), dim=1))
    nothing, cross = Gram(WIDTH, "cpu"), CrossGram(WIDTH, "cpu")
    (said,) = coverage.complete(group(block, "experts.2.down_proj"), nothing, cross)
    assert said.startswith("no calibration tokens were routed here, fewer than the 32 features of its input;")
    expected = inner.T @ inner / len(inner)
    torch.testing.assert_close(nothing.finish(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(cross.finish(), expected, rtol=1e-4, atol=1e-4)


def test_a_repeated_forward_replaces_the_sample(block: nn.Module) -> None:
    with Coverage(block, batches=1, tokens=TOKENS) as coverage:
        block(torch.full((1, TOKENS, HIDDEN), 7.0))
        block(torch.ones(1, TOKENS, HIDDEN))
    gram = Gram(HIDDEN, "cpu")
    coverage.complete(group(block, "experts.0.gate_proj"), gram, None)
    torch.testing.assert_close(gram.finish(), torch.ones(HIDDEN, HIDDEN))


def test_what_has_seen_enough_and_what_is_no_expert_are_left_alone(block: nn.Module) -> None:
    block.add_module("shared", nn.Linear(HIDDEN, HIDDEN))
    with Coverage(block, batches=1, tokens=TOKENS) as coverage:
        block(torch.randn(1, TOKENS, HIDDEN))
    for name, tokens, changed, said in (
        ("experts.0.gate_proj", ENOUGH * HIDDEN, False, 0),
        ("experts.0.gate_proj", ENOUGH * HIDDEN - 1, True, 0),
        ("experts.0.gate_proj", HIDDEN, True, 0),
        ("experts.0.gate_proj", HIDDEN - 1, True, 1),
        ("shared", 1, False, 0),
    ):
        own = torch.randn(tokens, HIDDEN)
        gram = gram_of(own)
        assert len(coverage.complete(group(block, name), gram, None)) == said
        assert torch.equal(gram.finish(), gram_of(own).finish()) is not changed


def test_with_everything_each_expert_is_solved_with_all_tokens_of_the_layer(block: nn.Module) -> None:
    hidden = torch.randn(2, 300, HIDDEN)
    with Coverage(block, batches=2, tokens=600, everything=True) as coverage:
        for batch in hidden:
            block(batch[None])
    tokens = hidden.reshape(-1, HIDDEN)
    seen = []
    for index in (0, 3):
        gate_up = group(block, f"experts.{index}.gate_proj", f"experts.{index}.up_proj")
        assert coverage.replaces(gate_up)
        own = Gram(HIDDEN, "cpu")
        own.count(tokens[: 10 + 190 * index])
        seen.append(coverage.finish(gate_up, own, None))
    assert seen[0].gram_II is seen[1].gram_II, "what all experts read is one matrix"
    assert seen[0].factors is seen[1].factors is not None
    torch.testing.assert_close(seen[0].gram_II, tokens.T @ tokens / 600, rtol=1e-4, atol=1e-5)
    assert [one.tokens for one in seen] == [600, 600]
    assert seen[0].notes == (
        "10 calibration tokens were routed here, fewer than the 64 features of its input; all 600 tokens of its layer were shown to it",
    )
    assert seen[1].notes == ()
    experts = block.get_submodule("experts")
    expert = experts.get_submodule("1")
    assert isinstance(experts, Experts)
    assert isinstance(expert, Expert)
    down = coverage.finish(group(block, "experts.1.down_proj"), Gram(WIDTH, "cpu"), None)
    inner = expert.between(tokens, experts.combine)
    torch.testing.assert_close(down.gram_II, inner.T @ inner / 600, rtol=1e-4, atol=1e-4)
    assert down.factors is None
    spread = coverage.summary(7)
    assert spread == BlockCoverage(7, 3, 0, 10.0, 580, 2, 1)
    assert str(spread) == "3 experts saw 0 to 580 calibration tokens, median 10; 2 saw fewer than they have features, 1 of them none"


def test_with_everything_tokens_that_are_routed_keep_what_the_second_stream_says(block: nn.Module) -> None:
    tokens, ahead = torch.randn(200, HIDDEN), torch.randn(50, HIDDEN)
    with Coverage(block, batches=1, tokens=200, everything=True) as coverage:
        block(tokens[None])
    own, cross = gram_of(tokens[:50]), CrossGram(HIDDEN, "cpu")
    cross.add(tokens[:50], ahead)
    coverage.finish(group(block, "experts.0.gate_proj"), own, cross)
    expected = (tokens[:50].T @ ahead + tokens[50:].T @ tokens[50:]) / 200
    torch.testing.assert_close(cross.finish(), expected, rtol=1e-4, atol=1e-4)


def test_experts_that_no_token_reaches_have_one_matrix_in_common(block: nn.Module) -> None:
    with Coverage(block, batches=1, tokens=TOKENS) as coverage:
        block(torch.randn(1, TOKENS, HIDDEN))
    groups = [group(block, f"experts.{index}.gate_proj") for index in range(3)]
    nothing = [coverage.finish(groups[index], Gram(HIDDEN, "cpu"), None) for index in (0, 1)]
    some = coverage.finish(groups[2], gram_of(torch.randn(5, HIDDEN)), None)
    assert nothing[0].gram_II is nothing[1].gram_II
    assert nothing[0].factors is nothing[1].factors is not None
    assert some.factors is None


def test_nobody_watches_any_more_once_the_block_is_done(block: nn.Module) -> None:
    with Coverage(block, batches=1, tokens=TOKENS):
        pass
    assert not any(module._forward_pre_hooks for module in block.modules())
