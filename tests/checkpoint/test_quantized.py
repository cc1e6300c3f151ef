"""Opening quantized checkpoints: good ones, old ones, unfinished ones, and hostile ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.checkpoint.build import LLAMA, W4, build, edit_config, edit_tensors
from tests.strategies import assert_same
from torch import Tensor

from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.files import write_json
from gptqkit.checkpoint.quantized import QuantizedCheckpoint, is_quantized
from gptqkit.checkpoint.source import INDEX_NAME, TensorSource
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("plain") / "m", "gptq")


@pytest.fixture
def copy(plain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "copy"))


@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("shards", [1, 3])
def test_linears_come_back_with_their_specs(tmp_path: Path, format: str, shards: int) -> None:
    def choose(name: str) -> LinearSpec | None:
        return None if ".1.mlp" in name else LinearSpec(8, 32, False) if "down" in name else W4

    checkpoint = QuantizedCheckpoint.open(build(tmp_path / "m", format, choose, shards=shards))
    assert checkpoint.format.name == format
    assert len(checkpoint.linears) == 4 * 7 - 3
    assert checkpoint.linears["model.layers.0.mlp.down_proj"] == LinearSpec(8, 32, False)
    assert "model.layers.1.mlp.up_proj.weight" in checkpoint.dense_names
    original = TensorSource.open(LLAMA)
    for name in (Q, "model.layers.3.mlp.down_proj"):
        expected = round_to_nearest(original.read(f"{name}.weight").float(), checkpoint.linears[name])
        assert_same(checkpoint.read_linear(name), expected)
        assert checkpoint.shape(name) == tuple(original.info(f"{name}.weight").shape)


def test_is_quantized(copy: Path) -> None:
    assert is_quantized(copy)
    assert not is_quantized(LLAMA)
    with pytest.raises(InputError, match=r"is not quantized: config\.json has no quantization_config"):
        QuantizedCheckpoint.open(LLAMA)


def test_an_old_checkpoint_has_its_config_beside(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    old = {key: config["quantization_config"][key] for key in ("bits", "group_size", "desc_act", "sym")}
    del config["quantization_config"]
    write_json(copy / "config.json", config)
    write_json(copy / "quantize_config.json", old)
    edit_tensors(copy, _pop(f"{Q}.g_idx"))
    checkpoint = QuantizedCheckpoint.open(copy)
    assert checkpoint.format.name == "gptq"
    assert checkpoint.read_linear(Q).group_I is None


def test_an_unfinished_run_is_not_a_checkpoint(copy: Path) -> None:
    (copy / "gptqkit" / "journal").mkdir(parents=True)
    with pytest.raises(InputError, match=rf"is an unfinished run; finish it with `gptqkit quantize MODEL {copy} --resume`"):
        QuantizedCheckpoint.open(copy)
    shutil.rmtree(copy / "gptqkit")
    (copy / "config.json").unlink()
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        QuantizedCheckpoint.open(copy)


def _pop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _put(name: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: value(tensors[name])})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_pop(f"{Q}.qweight"), rf"{Q}\.\w+ is there without {Q}.qweight; the checkpoint is incomplete"),
        (_pop(f"{Q}.scales"), rf"{Q}: scales is missing; found g_idx, qweight, qzeros"),
        (_put(f"{Q}.scales", lambda t: t.to(torch.int32)), rf"{Q}: scales has dtype int32; expected float16, bfloat16 or float32"),
        (_put(f"{Q}.qweight", lambda t: t.long()), rf"{Q}: qweight has dtype int64; expected int32"),
        (_put(f"{Q}.qweight", lambda t: t[:-1]), rf"{Q}: g_idx has shape \[256\]; expected \[248\] for the 248 columns"),
        (_put(f"{Q}.qweight", lambda t: t[:-8]), rf"{Q}: scales has shape \[4, 256\]; expected \[3, 256\] for 256 x 192 at 4 bits"),
        (_put(f"{Q}.qweight", lambda t: t.flatten()), rf"{Q}: qweight has shape \[8192\]; expected 2 non-empty dimensions"),
        (_put(f"{Q}.qzeros", lambda t: t[:, :-1]), rf"{Q}: qzeros has shape \[4, 31\]; expected \[4, 32\]"),
        (_put(f"{Q}.qzeros", lambda t: t + 1), "sym=true, so all zero points must be 8"),
        (_put(f"{Q}.g_idx", lambda t: t + 1), rf"{Q}: g_idx holds 4 or 1; allowed: 0 to 3"),
        (_put(f"{Q}.scales", lambda t: t * float("inf")), rf"{Q}: scales holds \d+ values that are not finite"),
        (lambda tensors: tensors.update({f"{Q}.weight": torch.zeros(2)}), "has both a dense weight and qweight"),
    ],
)
def test_broken_tensors_are_named(copy: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    edit_tensors(copy, change)
    with pytest.raises(InputError, match=message):
        QuantizedCheckpoint.open(copy).read_linear(Q)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes'; gptqkit reads"),
        ({"bits": "four"}, "bits='four'; allowed"),
        ({"bits": 8}, "qzeros has shape|scales has shape"),
        ({"group_size": 32}, "scales has shape"),
        ({"dynamic": {r"-:.*q_proj": {}}}, f"dynamic says that {Q} is not quantized, but its packed tensors are there"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"no tensor is called \*\.weight_packed"),
    ],
)
def test_a_config_that_contradicts_the_files(copy: Path, changes: dict[str, object], message: str) -> None:
    edit_config(copy, **changes)
    with pytest.raises(InputError, match=message):
        QuantizedCheckpoint.open(copy).read_linear(Q)


def test_hostile_files(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors is not a complete safetensors file"):
        QuantizedCheckpoint.open(copy)
    weights.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    with pytest.raises(InputError, match="is not a complete safetensors file"):
        QuantizedCheckpoint.open(copy)
    weights.write_bytes(content)
    (tmp_path / "outside.safetensors").write_bytes(content)
    write_json(copy / INDEX_NAME, {"weight_map": {f"{Q}.qweight": "../outside.safetensors"}})
    with pytest.raises(InputError, match=r"points to '\.\./outside\.safetensors', which is not a safetensors file inside the folder"):
        QuantizedCheckpoint.open(copy)
    (copy / INDEX_NAME).unlink()
    (copy / "config.json").write_text("[]")
    with pytest.raises(InputError, match="holds list; expected an object"):
        QuantizedCheckpoint.open(copy)
    (copy / "config.json").write_text('{"quantization_config": ')
    with pytest.raises(InputError, match="is not readable JSON"):
        QuantizedCheckpoint.open(copy)
