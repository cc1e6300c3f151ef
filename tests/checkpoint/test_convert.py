"""Conversion is lossless, refuses by name before writing, and never leaves a folder that looks finished and is not."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.checkpoint.build import W4, build, edit_config, edit_tensors
from tests.strategies import assert_same, make_weight

from gptqkit.checkpoint import convert as convert_module
from gptqkit.checkpoint.convert import Conversion, convert_checkpoint
from gptqkit.checkpoint.files import sha256, write_shard
from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError, ResourceError
from gptqkit.core.events import silent
from gptqkit.formats.compressed import COMPRESSED_TENSORS


def convert(model: Path, out: Path, format: str, *, overwrite: bool = False) -> Conversion:
    return convert_checkpoint(model, out, format=format, overwrite=overwrite, emit=silent)


def mixed(name: str) -> LinearSpec | None:
    return None if ".1.mlp" in name else LinearSpec(8, 32, False) if "down" in name else LinearSpec(3, -1, True) if "o_proj" in name else W4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("convert") / "m", "gptq", mixed, shards=3)


def test_round_trip_through_every_format_gives_the_same_file(source: Path, tmp_path: Path) -> None:
    first = convert(source, tmp_path / "v1", "gptq")
    assert first.linears == len(QuantizedCheckpoint.open(source).linears)
    convert(tmp_path / "v1", tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "v2", "gptq_v2")
    last = convert(tmp_path / "v2", tmp_path / "back", "gptq")
    assert sha256(tmp_path / "back" / "model.safetensors") == sha256(tmp_path / "v1" / "model.safetensors")
    assert (last.source_format, last.format, last.files) == ("gptq_v2", "gptq", ["model.safetensors"])
    for folder in ("v1", "ct", "v2", "back"):
        checkpoint, original = QuantizedCheckpoint.open(tmp_path / folder), QuantizedCheckpoint.open(source)
        assert dict(checkpoint.linears) == dict(original.linears)
        for name in original.linears:
            assert_same(checkpoint.read_linear(name), original.read_linear(name))
        for name in original.dense_names:
            assert torch.equal(checkpoint.source.read(name), original.source.read(name))
        assert json.loads((tmp_path / folder / "quantize_config.json").read_text()) == checkpoint.quantization
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= {p.name for p in (tmp_path / folder).iterdir()}
        assert not (tmp_path / folder / "gptqkit" / "partial").exists()
        assert str(tmp_path) not in (tmp_path / folder / "config.json").read_text()
    assert QuantizedCheckpoint.open(tmp_path / "back").quantization["damp_percent"] == 0.02


def test_shards_stay_small(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 1 << 20)
    result = convert(source, tmp_path / "out", "compressed-tensors")
    assert len(result.files) > 2
    assert all((tmp_path / "out" / file).stat().st_size < 3 << 20 for file in result.files)
    assert TensorSource.open(tmp_path / "out").nbytes == result.bytes_after


def test_what_a_format_cannot_hold_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    reordered = build(tmp_path / "desc_act", "gptq", reorder=True)
    with pytest.raises(InputError, match=r"0\.mlp\.down_proj cannot be stored without loss: compressed-tensors cannot hold groups"):
        convert(reordered, tmp_path / "out", "compressed-tensors")
    five = build(tmp_path / "five", "compressed-tensors", lambda name: LinearSpec(5, 64, True) if ".2.mlp.up" in name else W4)
    with pytest.raises(InputError, match=r"2\.mlp\.up_proj cannot be stored without loss: gptq holds 2, 3, 4 or 8 bits, not 5"):
        convert(five, tmp_path / "out", "gptq")
    zero = build(tmp_path / "zero", "compressed-tensors", lambda name: LinearSpec(4, 64, False))
    name = "model.layers.3.self_attn.k_proj"
    weight = make_weight(bits=4, group_size=64, out_features=128, in_features=256, sym=False, zero_min=0)
    edit_tensors(zero, lambda tensors: tensors.update({f"{name}.{k}": v for k, v in COMPRESSED_TENSORS.encode(weight).items()}))
    with pytest.raises(InputError, match=rf"{name} cannot be stored without loss: \d+ of its zero points are 0.*use --format gptq_v2"):
        convert(zero, tmp_path / "out", "gptq")
    edit_config(five, kv_cache_scheme={"num_bits": 8})
    with pytest.raises(InputError, match="kv_cache_scheme would be lost"):
        convert(five, tmp_path / "out", "gptq_v2")
    assert not (tmp_path / "out").exists()
    assert_same(QuantizedCheckpoint.open(tmp_path / "zero").read_linear(name), weight)


def test_the_output_folder_is_respected(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is or contains the model folder"):
        convert(source, source, "gptq_v2")
    with pytest.raises(InputError, match="is or contains the model folder"):
        convert(source, source.parent, "gptq_v2")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file; the output is a folder"):
        convert(source, tmp_path / "file", "gptq_v2")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="is not empty and was not written by gptqkit"):
        convert(source, tmp_path / "mine", "gptq_v2", overwrite=True)
    convert(source, tmp_path / "out", "gptq_v2")
    with pytest.raises(InputError, match="holds a finished checkpoint; write elsewhere, or replace it with --overwrite"):
        convert(source, tmp_path / "out", "gptq")
    convert(source, tmp_path / "out", "gptq", overwrite=True)
    assert QuantizedCheckpoint.open(tmp_path / "out").format.name == "gptq"
    with pytest.raises(InputError, match="format='awq'; allowed"):
        convert(source, tmp_path / "other", "awq")


@pytest.mark.parametrize("when", range(1, 4))
def test_a_full_disk_leaves_nothing_and_keeps_the_old(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    monkeypatch.setattr(convert_module, "SHARD_BYTES", 2 << 20)
    calls = []

    def full(path: Path, tensors: dict[str, Any]) -> str:
        calls.append(path)
        if len(calls) == when:
            path.with_name(path.name + ".tmp").write_bytes(b"half")
            with convert_module.writing(path):
                raise OSError(errno.ENOSPC, "No space left on device")
        return write_shard(path, tensors)

    convert(source, tmp_path / "old", "gptq_v2")
    before = {path.name: sha256(path) for path in (tmp_path / "old").iterdir() if path.is_file()}
    monkeypatch.setattr(convert_module, "write_shard", full)
    for name in ("new", "old"):
        calls.clear()
        with pytest.raises(ResourceError, match="no space left while writing"):
            convert(source, tmp_path / name, "compressed-tensors", overwrite=True)
    assert not (tmp_path / "new").exists()
    assert {path.name: sha256(path) for path in (tmp_path / "old").iterdir() if path.is_file()} == before
    assert not (tmp_path / "old" / "gptqkit" / "partial").exists()


def test_a_killed_conversion_can_be_started_again(source: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "out" / "gptqkit" / "partial"
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_bytes(b"half")
    with pytest.raises(InputError, match=r"config\.json does not exist"):
        QuantizedCheckpoint.open(tmp_path / "out")
    convert(source, tmp_path / "out", "gptq_v2")
    assert QuantizedCheckpoint.open(tmp_path / "out").format.name == "gptq_v2"


def test_links_that_leave_the_model_folder_are_refused(source: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(source, tmp_path / "m"))
    (tmp_path / "secret.json").write_text("{}")
    (model / "extra.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(InputError, match=r"extra\.json is a link to .*secret\.json, outside the model folder"):
        convert(model, tmp_path / "out", "gptq_v2")
    assert not (tmp_path / "out").exists()
