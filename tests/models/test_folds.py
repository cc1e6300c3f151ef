"""What absorbs a scale in each family is pinned; that it does is checked with scales of its own; and what would notice is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny, token_ids
from torch import Tensor, nn

from gptqkit.models import supply
from gptqkit.models.folds import Fold, Folds, find_folds, fold_norm
from gptqkit.models.layout import InputGroup, linear_info
from gptqkit.models.standin import Call, CallStore
from gptqkit.models.streamed import StreamedModel

_LLAMA = "input_layernorm | v_proj | post_attention_layernorm | up_proj"
ABSORBERS = {
    "llama": _LLAMA,
    "qwen3": _LLAMA,
    "stablelm": _LLAMA,
    "gemma2": "input_layernorm | v_proj | pre_feedforward_layernorm | up_proj",
    "phi3": "input_layernorm | qkv_proj | post_attention_layernorm | gate_up_proj",
    "opt": "self_attn_layer_norm | v_proj | final_layer_norm | fc1",
    "gpt2": "ln_1 | c_attn | ln_2 | -",
    "gpt_neox": "input_layernorm | - | post_attention_layernorm | -",
    "falcon": "input_layernorm | query_key_value | -",
    "qwen3_moe": "input_layernorm | v_proj" + 4 * " | - | up_proj",
    "qwen2_moe": "input_layernorm | v_proj" + 4 * " | - | up_proj" + " | - | up_proj",
    "deepseek_v3": "input_layernorm | q_a_layernorm | kv_a_layernorm | - | post_attention_layernorm | up_proj",
    "nemotron_h": "norm | v_proj",
}


class Loaded:
    """Block 0 of a tiny model and what it is called with."""

    def __init__(self, model: StreamedModel, block: nn.Module, call: Call, hidden_BTH: Tensor) -> None:
        self.model, self.block, self.call, self.hidden_BTH = model, block, call, hidden_BTH
        self.groups = model.layout.blocks[0]
        self.linears = [linear.name for group in self.groups for linear in group.linears]

    def folds(self, skipped: str = "none") -> Folds:
        return find_folds(self.block, self.groups, {name for name in self.linears if skipped not in name}, self.call, self.hidden_BTH)

    def output(self) -> Tensor:
        with torch.no_grad():
            return self.call.run(self.block, self.hidden_BTH)


@contextmanager
def loaded(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Iterator[Loaded]:
    save_tiny(folder, family, dtype=dtype)
    model = StreamedModel.open(folder, device=torch.device("cpu"), dtype=dtype)
    calls = CallStore()
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(supply, "HELD", 100)  # the tests change weights of experts in place
        with model.loaded_outside():
            hidden_BTH = model.embed(torch.tensor(token_ids(4, 24)), 0, calls)
        with model.loaded_block(0) as block:
            # Norms that are all alike would hide one that multiplies by something else.
            generator = torch.Generator().manual_seed(3)
            for parameter in block.parameters():
                if parameter.ndim == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(dtype)
            tiny = Loaded(model, block, calls.get(0, 0), hidden_BTH)
            tiny.output()  # after which all experts are there
            yield tiny


def described(folds: Folds, groups: int) -> str:
    return " | ".join(folds.found[g].absorber.rpartition(".")[2] if g in folds.found else "-" for g in range(groups))


def weight_of(block: nn.Module, name: str) -> Any:
    module = block.get_submodule(name)
    return module.weight.data.T if linear_info(name, module).transposed else module.weight.data


def put_in(block: nn.Module, group: InputGroup, fold: Fold, scale_I: Tensor) -> None:
    """Multiplies the readers and divides the absorber."""
    module = block.get_submodule(fold.absorber)
    bias = getattr(module, "bias", None)
    if fold.offset is None:
        weight_OI = weight_of(block, fold.absorber)
        divisor_O = fold.divisor(scale_I, weight_OI.shape[0])
        weight_OI /= divisor_O[:, None]
        if bias is not None:
            bias.data /= divisor_O
    else:
        weight_I, bias_I, scale_I = fold_norm(fold.offset, module.weight.data, None if bias is None else bias.data, scale_I)
        module.weight.data.copy_(weight_I)
        if bias_I is not None:
            bias.data.copy_(bias_I)
    for linear in group.linears:
        weight_OI = weight_of(block, linear.name)
        weight_OI *= scale_I


@pytest.mark.parametrize("family", ABSORBERS)
def test_what_absorbs_and_that_it_does(family: str, tmp_path: Path) -> None:
    with loaded(tmp_path, family) as tiny:
        before = {name: value.clone() for name, value in tiny.block.state_dict().items()}
        expected = tiny.output()
        folds = tiny.folds()
        assert described(folds, len(tiny.groups)) == ABSORBERS[family]
        assert set(folds.found) | set(folds.refused) == set(range(len(tiny.groups)))
        assert all(torch.equal(before[name], value) for name, value in tiny.block.state_dict().items()), "the probe left a trace"
        generator = torch.Generator().manual_seed(1)
        for fold in folds.found.values():
            group = tiny.groups[fold.group]
            shared = fold.share_I if fold.share_I is not None else torch.arange(group.in_features)
            put_in(tiny.block, group, fold, torch.rand(group.in_features, generator=generator).mul(2).exp()[shared])
        change = expected - tiny.hidden_BTH
        assert float((tiny.output() - expected).norm() / change.norm()) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_floats_find_the_same(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    with loaded(tmp_path, family, dtype) as tiny:
        before = {name: value.clone() for name, value in tiny.block.state_dict().items()}
        assert described(tiny.folds(), len(tiny.groups)) == ABSORBERS[family]
        assert all(torch.equal(before[name], value) for name, value in tiny.block.state_dict().items())


def test_query_heads_share_the_scale_of_their_value_head(tmp_path: Path) -> None:
    with loaded(tmp_path, "llama") as tiny:
        fold = tiny.folds().found[1]
        share_I = fold.share_I
        assert share_I is not None
        # 4 query heads of 16 channels on 2 value heads: heads 0 and 1 read the first, 2 and 3 the second
        assert share_I.tolist() == [*range(16), *range(16), *range(16, 32), *range(16, 32)]


def test_a_linear_that_stays_as_it_is_blocks_what_it_reads_and_what_it_makes(tmp_path: Path) -> None:
    with loaded(tmp_path, "llama") as tiny:
        folds = tiny.folds(skipped="v_proj")
        assert described(folds, 4) == "- | - | post_attention_layernorm | up_proj"
        assert folds.refused[0] == "self_attn.v_proj reads the same input and stays in full precision"
        assert described(tiny.folds(skipped="down_proj"), 4) == "input_layernorm | v_proj | post_attention_layernorm | -"


class Branches(nn.Module):
    """A norm and its readers: `first`, and whatever `second` makes of the norm's output."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.norm, self.first, self.other = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.second, self.router = second, torch.linspace(-1, 1, 128).sin().reshape(32, 4)

    def forward(self, x_BTH: Tensor) -> Tensor:
        y_BTH = self.norm(x_BTH)
        out_BTH = x_BTH + self.first(y_BTH)
        if self.second == "copy":  # attention and MLP side by side, the MLP on a tensor of its own
            return out_BTH + self.other(y_BTH.clone())
        if self.second == "router":
            return out_BTH * torch.softmax(y_BTH @ self.router, dim=-1).amax(-1, keepdim=True)
        return out_BTH


@pytest.mark.parametrize(("second", "found"), [("nothing", True), ("copy", False), ("router", False)])
def test_whoever_else_reads_the_norm_notices(second: str, found: bool) -> None:
    torch.manual_seed(0)
    block = Branches(second)
    with torch.no_grad():
        block.norm.bias.normal_()
        block.norm.weight.normal_()
    names = ["first", "other"] if second == "copy" else ["first"]
    groups = [InputGroup((linear_info(name, block.get_submodule(name)),)) for name in names]
    if second != "copy":
        block.other = nn.Identity()
    with torch.no_grad():
        folds = find_folds(block, groups, names, Call((), {}), torch.randn(2, 8, 32))
    assert bool(folds.found) is found
    assert found or "would notice" in folds.refused[0]


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_the_norm_is_part_of_the_scale(offset: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_I = torch.randn(256, generator=generator).to(dtype)
    weight_I[:2] = torch.tensor([-offset, 1e-7])  # a gain of nothing, and one of next to nothing
    scale_I = torch.randn(256, generator=generator).exp()
    written_I, _, really_I = fold_norm(offset, weight_I, None, scale_I)
    assert written_I.dtype == dtype
    assert (really_I > 0).all()
    assert bool(torch.isfinite(really_I).all())
    torch.testing.assert_close((offset + written_I.float()) * really_I, offset + weight_I.float(), rtol=3e-6, atol=1e-7)
    assert really_I[0] == 1
    assert torch.equal(written_I[0], weight_I[0])


def test_no_scale_leaves_the_norm_as_it_was() -> None:
    weight_I = torch.randn(64).bfloat16()
    written_I, bias_I, really_I = fold_norm(0.0, weight_I, weight_I, torch.ones(64))
    assert torch.equal(written_I, weight_I)
    assert bias_I is not None
    assert torch.equal(bias_I, weight_I)
    assert bool((really_I == 1).all())
