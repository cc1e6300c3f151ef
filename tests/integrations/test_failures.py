"""What a person reads when a checkpoint cannot be loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from tests.integrations.checkpoints import Checkpoint, make_checkpoint, tokens, write_tensors

import gptqkit
from gptqkit.core.errors import InputError
from gptqkit.hf import containers

UP = "model.layers.1.mlp.up_proj"


def copy_with(llama: Checkpoint, folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    shutil.copytree(llama.folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] |= config
    (folder / "config.json").write_text(json.dumps(values))
    write_tensors(folder, llama.tensors if tensors is None else tensors)
    return folder


def without(llama: Checkpoint, *names: str) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in llama.tensors.items() if name not in names}


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ((f"{UP}.scales",), rf"{UP}: .*scales"),
        ((f"{UP}.qweight", f"{UP}.qzeros", f"{UP}.scales", f"{UP}.g_idx"), rf"lacks 1 tensors that LlamaForCausalLM needs: {UP}\.weight;"),
        (("model.norm.weight", "lm_head.weight"), r"lacks 2 tensors that LlamaForCausalLM needs: lm_head\.weight, model\.norm\.weight;"),
    ],
)
def test_missing_tensors_are_an_error_not_random_weights(missing: tuple[str, ...], said: str, llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        gptqkit.load(copy_with(llama, tmp_path / "model", without(llama, *missing)))


def test_a_missing_g_idx_means_natural_order(llama: Checkpoint, tmp_path: Path) -> None:
    model = gptqkit.load(copy_with(llama, tmp_path / "model", without(llama, f"{UP}.g_idx")))
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, gptqkit.load(llama.folder)(tokens()).logits)


def test_values_that_contradict_the_configuration(llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model\.layers\.0\..*: the checkpoint holds a weight of|is wrong in config\.json|scales"):
        gptqkit.load(copy_with(llama, tmp_path / "bits", bits=8))
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    with pytest.raises(InputError, match=r"no tensor named \*\.weight_packed"):
        gptqkit.load(copy_with(llama, tmp_path / "method", **config))
    with pytest.raises(InputError, match="files hold no tensor named"):
        gptqkit.load(copy_with(llama, tmp_path / "dense", {name: t for name, t in llama.tensors.items() if "qweight" not in name}))


def test_quantized_tensors_of_something_that_is_no_linear(llama: Checkpoint, tmp_path: Path) -> None:
    tensors = without(llama, "model.embed_tokens.weight")
    tensors |= {name.replace(UP, "model.embed_tokens"): t.clone() for name, t in llama.tensors.items() if name.startswith(f"{UP}.")}
    with pytest.raises(InputError, match=r"model\.embed_tokens is quantized, but .* is a Embedding, not a plain linear"):
        gptqkit.load(copy_with(llama, tmp_path / "model", tensors))


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3_moe")
    missing = [name for name in checkpoint.tensors if name.startswith("model.layers.1.mlp.experts.2.up_proj.")]
    write_tensors(checkpoint.folder, without(checkpoint, *missing))
    with pytest.raises(InputError, match=r"lacks 1 tensors that Qwen3MoeForCausalLM needs: model\.layers\.1\.mlp\.experts\.2\.up_proj"):
        gptqkit.load(checkpoint.folder)


def test_experts_that_cannot_be_taken_apart_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "qwen3_moe")
    monkeypatch.setattr(containers, "_KINDS", ())
    with pytest.raises(InputError, match=r"experts\.0\.\w+ is quantized, but Qwen3MoeForCausalLM merges it .* cannot take apart"):
        gptqkit.load(checkpoint.folder)


def test_broken_files_are_named(llama: Checkpoint, tmp_path: Path) -> None:
    shutil.copytree(llama.folder, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        gptqkit.load(tmp_path / "cut")
    file.unlink()
    with pytest.raises(InputError, match=r"cannot be loaded: .*no file named"):
        gptqkit.load(tmp_path / "cut")


def test_folders_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist; expected a model folder or a hub id"):
        gptqkit.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        gptqkit.load(tmp_path)
    (tmp_path / "gptqkit" / "journal").mkdir(parents=True)
    with pytest.raises(InputError, match=r"is an unfinished run; finish it with `gptqkit quantize MODEL .* --resume`"):
        gptqkit.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is not a folder; expected a model folder"):
        gptqkit.load(tmp_path / "file")
