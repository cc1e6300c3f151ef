"""Verify holds for what is sound, with and without the original, and names what is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.checkpoint.build import LLAMA, W4, build, edit_config, edit_tensors
from torch import Tensor

from gptqkit.checkpoint.files import write_json
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.events import silent
from gptqkit.evaluation.verify import Verification, verify_checkpoint

Q = "model.layers.0.self_attn.q_proj"


def verify(folder: Path, against: Path | None = None) -> Verification:
    return verify_checkpoint(folder, against=None if against is None else str(against), emit=silent)


def failed(result: Verification) -> dict[str, str]:
    return {check.name: check.detail for check in result.checks if not check.ok}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("verify") / "m", "gptq", lambda name: None if ".1.mlp" in name else W4)


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_sound_checkpoint_holds(tmp_path: Path, format: str) -> None:
    folder = build(tmp_path / "m", format, lambda name: LinearSpec(2, 32, False) if "down" in name else W4, shards=3)
    result = verify(folder, LLAMA)
    assert failed(result) == {}
    assert result.ok
    assert len(result.errors) == 28
    assert all(row.error == pytest.approx(row.rounded) for row in result.errors)
    assert json.loads(json.dumps(result.to_dict()))["ok"] is True


def test_what_is_not_quantized_is_listed_with_the_reason(plain: Path) -> None:
    result = verify(plain)
    assert {row.name: row.why for row in result.not_quantized} == {
        "model.embed_tokens.weight": "embedding",
        **{f"model.layers.1.mlp.{part}_proj.weight": "the config says to leave it" for part in ("gate", "up", "down")},
    }


def put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    ("change", "check", "message"),
    [
        (put(f"{Q}.scales", lambda t: t * 0), "scales", f"{Q} has 1024 scales below 2**-14, which engines flush to zero"),
        (put(f"{Q}.scales", lambda t: t[:-1]), "tensors", f"{Q}: scales has shape [3, 256]; expected [4, 256]"),
        (put(f"{Q}.g_idx", lambda t: t + 9), "tensors", f"{Q}: g_idx holds 12 or 9; allowed: 0 to 3"),
        (put(f"{Q}.g_idx", lambda t: t.flip(0)), "column order", f"desc_act is false, but g_idx is not trivial in {Q}"),
        (put("model.norm.weight", lambda t: t * float("nan")), "dense tensors", "model.norm.weight holds values that are not finite"),
        (put("model.embed_tokens.weight", lambda t: t[:-1]), "output head", "has 4095 rows, and config.json says vocab_size=4096"),
    ],
)
def test_a_broken_tensor_fails_one_check_that_names_it(
    copy: Path, change: Callable[[dict[str, Tensor]], None], check: str, message: str
) -> None:
    edit_tensors(copy, change)
    result = verify(copy)
    assert not result.ok
    assert list(failed(result)) == [check]
    assert message in failed(result)[check]


def test_zero_points_of_zero_fail_in_version_one_only(tmp_path: Path) -> None:
    for format, expected in (("gptq", ["zero points"]), ("gptq_v2", [])):
        folder = build(tmp_path / format, format, lambda name: LinearSpec(4, 64, False))
        zero = -1 if format == "gptq" else 0
        edit_tensors(folder, put(f"{Q}.qzeros", lambda t, zero=zero: torch.full_like(t, zero)))  # type: ignore[misc]
        assert list(failed(verify(folder))) == expected


def test_configs_that_disagree(copy: Path) -> None:
    write_json(copy / "quantize_config.json", {"bits": 4})
    assert failed(verify(copy)) == {"configs": "quantize_config.json differs from config.json's quantization_config"}
    (copy / "quantize_config.json").unlink()
    assert verify(copy).ok
    edit_config(copy, desc_act=True)
    assert verify(copy).ok
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", {**config, "tie_word_embeddings": False})
    assert "there is no output head" in failed(verify(copy))["output head"]
    write_json(copy / "config.json", {**config, "num_hidden_layers": 6})
    assert failed(verify(copy)) == {"blocks": "block 4 has no tensors; block 5 has no tensors"}


def test_against_the_original_finds_what_looks_sound(copy: Path, plain: Path) -> None:
    edit_tensors(copy, put(f"{Q}.qweight", lambda t: t.flip(0)))
    edit_tensors(copy, put("model.norm.weight", lambda t: t * 2))
    assert verify(copy).ok
    result = failed(verify(copy, LLAMA))
    assert result["weights against the original"].startswith(f"{Q} is 1.")
    assert result["other tensors against the original"] == "model.norm.weight differs from the original's"
    against_itself = verify(plain, plain)
    assert against_itself.ok
    assert max(row.error for row in against_itself.errors) == 0


def test_against_an_original_that_stores_in_by_out(plain: Path, tmp_path: Path) -> None:
    """GPT-2's Conv1D: weights are transposed in the original, and a square one does not show it."""
    original = Path(shutil.copytree(LLAMA, tmp_path / "conv"))
    source = TensorSource.open(LLAMA)
    transposed = {name: source.read(name).T.contiguous() for name in source.names if "_proj" in name and ".1.mlp" not in name}
    edit_tensors(original, lambda tensors: tensors.update(transposed))
    assert failed(verify(plain, original)) == {}


def test_hostile_files_are_input_errors(copy: Path) -> None:
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        verify(copy)
    (copy / "model.safetensors").write_bytes(b"\x00" * 100)
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        verify(copy)
    with pytest.raises(InputError, match="is not quantized"):
        verify(LLAMA)
