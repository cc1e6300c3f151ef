"""awq and awq+gptq in a whole run: what is written computes what was solved, resumes to the same bytes, and helps a trained model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_tiny, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM

import gptqkit
from gptqkit import InputError, QuantConfig
from gptqkit.core.events import Event
from gptqkit.pipeline import worker as worker_module

SMALL: dict[str, Any] = {"calibration": token_ids(20), "samples": 12, "seqlen": 32, "dtype": "float32"}
METHODS = ("awq", "awq+gptq")
TRAINED = Path(gptqkit.__file__).parent / "data" / "llama-tiny"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3, dtype=torch.bfloat16)


def config(method: str = "awq", **changes: Any) -> QuantConfig:
    return QuantConfig(**{"bits": 4, "group_size": 32, "method": method, **changes})


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def digests(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor(token_ids(2, 24, seed=9))).logits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_the_written_checkpoint_computes_what_was_solved(
    model: Path, method: str, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original with Q(W S) S^-1 in place of its weights, against the files as transformers loads them."""
    solved: dict[str, Tensor] = {}
    put = worker_module.put_weight

    def note(streamed: Any, index: int, info: Any, weight: Any, again: Any, scale_I: Tensor | None = None) -> None:
        name = f"{streamed.layout.block_name(index)}.{info.name}.weight"
        solved.setdefault(name, weight.dequantize() if scale_I is None else weight.dequantize() / scale_I)
        put(streamed, index, info, weight, again, scale_I)

    monkeypatch.setattr(worker_module, "put_weight", note)
    run = gptqkit.quantize(model, tmp_path / "out", config(method, format=form), **SMALL)
    assert {record.method for record in run.linears} == {method}
    assert len({record.absorber for record in run.linears} - {None}) >= 6
    effective = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    original = logits(effective)
    assert set(solved) == {f"{record.name}.weight" for record in run.linears}
    effective.load_state_dict({**effective.state_dict(), **solved})
    expected, found = logits(effective), logits(gptqkit.load(tmp_path / "out", dtype="float32"))
    distance = float((found - expected).norm() / (expected - original).norm())
    assert distance < 0.01, "norms and scales that are rounded must not cost anything to speak of"


def test_norms_and_values_are_divided(model: Path, tmp_path: Path) -> None:
    assert any("method awq divides norms" in event.message for event in gptqkit.plan(model, config()).events)
    run = gptqkit.quantize(model, tmp_path / "out", config(), **SMALL)
    before, after = tensors(model), tensors(tmp_path / "out")
    absorbers = {record.absorber for record in run.linears if record.absorber}
    changed = {name.removesuffix(".weight") for name in before if name in after and not torch.equal(before[name], after[name])}
    assert changed == {name for name in absorbers if name.endswith("norm")}
    assert all(after[f"{name}.weight"].dtype == torch.bfloat16 for name in changed)
    assert {record.name.rpartition(".")[2]: (record.absorber or "").rpartition(".")[2] for record in run.linears if record.absorber} == {
        "q_proj": "input_layernorm", "k_proj": "input_layernorm", "v_proj": "input_layernorm", "o_proj": "v_proj",
        "gate_proj": "post_attention_layernorm", "up_proj": "post_attention_layernorm", "down_proj": "up_proj",
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_after_any_block_and_resumed(model: Path, method: str, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "whole", config(method), **SMALL)
    for stop_after in range(2):
        out = tmp_path / f"cut-{stop_after}"

        def interrupt(event: Event, last: int = stop_after) -> None:
            if event.kind == "block" and event.data["index"] == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gptqkit.quantize(model, out, config(method), emit=interrupt, **SMALL)
        gptqkit.quantize(model, out, config(method), resume=True, **SMALL)
        assert digests(out) == digests(tmp_path / "whole")


def test_same_bytes_whatever_the_memory(model: Path, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "paused", config(), **SMALL)
    gptqkit.quantize(model, tmp_path / "replayed", config(), memory=1_000, **SMALL)
    assert digests(tmp_path / "paused") == digests(tmp_path / "replayed")


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("awq+gptq", {"preset": "best"}),
        ("awq+gptq", {"preset": "plain"}),
        ("awq+gptq", {"desc_act": True}),
        ("awq+gptq", {"order": "activation"}),
        ("awq", {"sym": False}),
        ("awq+gptq", {"sym": False}),
        ("awq", {"signed_scales": False}),
        ("awq", {"target_bits": 5.0}),
        ("awq", {"rules": ("down_proj=bits:8", r"1\.self_attn\.v_proj=bits:2", "gate_proj=skip")}),
    ],
)
def test_options_go_together(model: Path, method: str, changes: dict[str, Any], tmp_path: Path) -> None:
    made = QuantConfig.from_dict({"bits": 4, "group_size": 32, "method": method, **changes})
    run = gptqkit.quantize(model, tmp_path / "out", made, **SMALL)
    assert run.check is not None
    assert run.check.kl is not None
    assert run.check.kl < 0.15
    assert {record.method for record in run.linears} == {method}
    assert any(record.absorber for record in run.linears)
    assert gptqkit.verify(tmp_path / "out").ok


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_all_widths(model: Path, bits: int, tmp_path: Path) -> None:
    run = gptqkit.quantize(model, tmp_path / "out", config(bits=bits), **SMALL)
    assert {record.bits for record in run.linears} == {bits}
    if bits == 8:
        assert run.check is not None
        assert run.check.kl is not None
        assert run.check.kl < 1e-3


@pytest.mark.parametrize("family", ["gemma2", "opt", "gpt2", "falcon", "qwen3_moe", "nemotron_h"])
def test_other_families(family: str, tmp_path: Path) -> None:
    """Eight bits are next to nothing lost, if scales went where they belong."""
    folder = save_tiny(tmp_path / "model", family)
    notes: list[Event] = []
    run = gptqkit.quantize(folder, tmp_path / "out", config(bits=8), emit=notes.append, **SMALL)
    assert run.check is not None
    assert run.check.kl is not None
    assert run.check.kl < 1e-3
    scaled = {record.name for record in run.linears if record.absorber}
    told = {name for event in notes if event.kind == "note" for name in event.data.get("linears", ())}
    assert scaled
    assert not scaled & told
    assert bool(told) is (family in ("gpt2", "falcon", "qwen3_moe", "nemotron_h"))


def test_a_trained_model_gains(tmp_path: Path) -> None:
    kl = {}
    for method in ("rtn", "awq"):
        gptqkit.quantize(TRAINED, tmp_path / method, QuantConfig(bits=3, method=method), samples=12, seqlen=64)
        kl[method] = gptqkit.evaluate(tmp_path / method, against=TRAINED, windows=4, seqlen=64).kl
    assert kl["awq"] < 0.7 * kl["rtn"]


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_are_not_finite_stop_the_run(method: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", dtype=torch.float16)
    held = load_file(folder / "model.safetensors")
    held["model.layers.1.input_layernorm.weight"].mul_(6e4)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="calibration inputs are not finite"):
        gptqkit.quantize(folder, tmp_path / "out", config(method), **{**SMALL, "dtype": "float16"})


def test_rounding_in_a_column_order_is_refused() -> None:
    with pytest.raises(InputError, match=r"desc_act=True with method='awq': rounding has no column order"):
        config(desc_act=True)


def test_the_files_are_those_of_any_method(model: Path, tmp_path: Path) -> None:
    """The configuration is that of any other checkpoint of the format: no engine has to know of the scales."""
    gptqkit.quantize(model, tmp_path / "awq", config(), **SMALL)
    gptqkit.quantize(model, tmp_path / "gptq", config("gptq"), **SMALL)
    assert (tmp_path / "awq" / "quantize_config.json").read_text() == (tmp_path / "gptq" / "quantize_config.json").read_text()
    assert set(tensors(tmp_path / "awq")) == set(tensors(tmp_path / "gptq"))


@pytest.mark.parametrize("method", METHODS)
def test_verify_knows_of_scales(model: Path, method: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    gptqkit.quantize(model, out, config(method), **SMALL)
    verdict = gptqkit.verify(out, against=model)
    assert verdict.ok, [check for check in verdict.checks if not check.ok]
    details = {check.name: check.detail for check in verdict.checks}
    assert "norms and biases carry the scales of inputs" in details["other tensors against the original"]
    other = gptqkit.verify(out, against=save_tiny(tmp_path / "other", num_hidden_layers=3, dtype=torch.bfloat16, seed=5))
    assert not other.ok, "another model is not a matter of scales"
    (out / "gptqkit" / "run.json").unlink()
    assert not gptqkit.verify(out, against=model).ok, "without a record, a changed norm is a changed norm"
