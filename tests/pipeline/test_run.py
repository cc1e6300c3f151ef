"""A whole run: what is written, resuming with the same bytes, and refusing bad input before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import FAMILIES, save_tiny, token_ids

import gptqkit
from gptqkit import InputError, QuantConfig
from gptqkit.checkpoint.spool import Spool
from gptqkit.core.events import Event
from gptqkit.pipeline import journal

CONFIG = QuantConfig(bits=4, group_size=32)
SMALL = {"calibration": token_ids(), "samples": 12, "seqlen": 32}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3, shard="60KB")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every published file except the record of times."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "gptqkit" and path.name != "README.md"]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_what_is_written(model: Path, tmp_path: Path) -> None:
    run = gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "quantize_config.json",
        "README.md",
        "model.safetensors.index.json",
        "gptqkit",
    }
    assert {path.name for path in (out / "gptqkit").iterdir()} == {"run.json", "layers.jsonl", "recipe.yaml"}
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == json.loads((out / "quantize_config.json").read_text())
    lines = [json.loads(line) for line in (out / "gptqkit" / "layers.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [record.name for record in run.linears]
    assert len(lines) == 3 * 7
    assert all(0 < line["error"] < 0.1 and line["method"] == "gptq" and line["tokens"] == 12 * 32 for line in lines)
    assert run.check is not None
    assert run.check.kl is not None
    assert 0 < run.check.kl < 1
    published = [path for path in out.rglob("*") if path.suffix in (".json", ".md", ".jsonl")]
    assert not [path for path in published if str(model.parent) in path.read_text()], "a path of this machine was published"


def test_dense_tensors_are_copied_bit_for_bit(model: Path, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    before = {k: v for path in model.glob("*.safetensors") for k, v in load_file(path).items()}
    after = {k: v for path in (tmp_path / "out").glob("*.safetensors") for k, v in load_file(path).items()}
    dense = [name for name in before if name in after]
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= set(dense)
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in dense)
    assert all(f"{name.removesuffix('.weight')}.qweight" in after for name in before if name not in after)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_quantizes(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    run = gptqkit.quantize(folder, tmp_path / "out", CONFIG, **SMALL)
    assert run.check is not None
    assert run.check.kl is not None
    assert run.check.kl < 0.5


def test_same_input_same_bytes_whatever_the_memory(model: Path, tmp_path: Path) -> None:
    """Paused in memory, replayed in memory and replayed from disk are three ways to the same bytes."""
    gptqkit.quantize(model, tmp_path / "a", CONFIG, **SMALL)
    gptqkit.quantize(model, tmp_path / "b", CONFIG, memory=120_000, **SMALL)
    gptqkit.quantize(model, tmp_path / "c", CONFIG, memory=1_000, **SMALL)
    places = [gptqkit.plan(model, CONFIG, samples=12, seqlen=32, memory=m).memory for m in (None, 120_000, 1_000)]
    assert [(m.paused, m.place) for m in places] == [(True, "device"), (False, "device"), (False, "disk")]
    assert digests(tmp_path / "a") == digests(tmp_path / "b") == digests(tmp_path / "c")


def test_interrupted_after_any_block_and_resumed(model: Path, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
    for stop_after in range(3):
        out = tmp_path / f"cut-{stop_after}"

        def interrupt(event: Event, last: int = stop_after) -> None:
            if event.kind == "block" and event.data["index"] == last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            gptqkit.quantize(model, out, CONFIG, emit=interrupt, **SMALL)
        assert not (out / "config.json").exists(), "an unfinished run must not look finished"
        with pytest.raises(InputError, match="unfinished run; go on with --resume, or start over with --overwrite"):
            gptqkit.quantize(model, out, CONFIG, **SMALL)
        gptqkit.quantize(model, out, CONFIG, resume=True, **SMALL)
        assert digests(out) == digests(tmp_path / "whole")


def test_killed_at_random_and_resumed(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=6)
    (tmp_path / "ids.json").write_text(json.dumps(token_ids(24, 64)))
    code = (
        "import json, sys, gptqkit\n"
        "ids = json.load(open(sys.argv[3]))\n"
        "c = gptqkit.QuantConfig(group_size=32)\n"
        "print('started', flush=True)\n"
        "gptqkit.quantize(sys.argv[1], sys.argv[2], c, calibration=ids, samples=16, seqlen=64, resume='--resume' in sys.argv)\n"
    )

    def start(out: Path, *flags: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(model), str(out), str(tmp_path / "ids.json"), *flags], stdout=subprocess.PIPE, text=True
        )

    whole = start(tmp_path / "whole")
    assert whole.wait() == 0
    chance = random.Random(0)
    out = tmp_path / "out"
    for _ in range(3):
        process = start(out, *(["--resume"] if (out / "gptqkit" / "journal").exists() else []))
        assert process.stdout is not None
        process.stdout.readline()
        blocks, wanted = out / "gptqkit" / "journal" / "blocks", chance.randint(1, 2)
        before = len(list(blocks.glob("*.json")))
        while process.poll() is None and len(list(blocks.glob("*.json"))) < before + wanted:
            time.sleep(0.005)
        time.sleep(chance.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    if (out / "gptqkit" / "journal").exists():
        assert start(out, "--resume").wait() == 0
    assert digests(out) == digests(tmp_path / "whole")


@pytest.mark.parametrize("files_moved", [0, 1, 3, None])
def test_interrupted_while_publishing_and_resumed(
    files_moved: int | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: everything was moved, config.json too, and only the journal was still there."""
    gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
    out, rename, moved = tmp_path / "out", journal.rename, []

    def cut(source: Path, target: Path) -> None:
        if target.parent == out and target.suffix == ".safetensors":
            if len(moved) == files_moved:
                raise KeyboardInterrupt
            moved.append(target)
        rename(source, target)

    def cut_at_the_end(self: journal.Journal) -> None:
        raise KeyboardInterrupt

    if files_moved is None:
        monkeypatch.setattr(journal.Journal, "remove", cut_at_the_end)
    monkeypatch.setattr(journal, "rename", cut)
    with pytest.raises(KeyboardInterrupt):
        gptqkit.quantize(model, out, CONFIG, **SMALL)
    monkeypatch.undo()
    with pytest.raises(InputError, match="resume"):
        gptqkit.load(out)
    gptqkit.quantize(model, out, CONFIG, resume=True, **SMALL)
    assert digests(out) == digests(tmp_path / "whole")
    assert not (out / "gptqkit" / "journal").exists()


def test_overwriting_waits_for_nobody_and_destroys_nobodys_work(model: Path, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    before = digests(tmp_path / "out")
    with journal.Journal(tmp_path / "out"), pytest.raises(InputError, match="is being written by another gptqkit process"):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, overwrite=True, **SMALL)
    assert digests(tmp_path / "out") == before


def test_a_shard_that_changed_is_made_again(model: Path, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
    out = tmp_path / "out"

    def interrupt(event: Event) -> None:
        if event.kind == "block" and event.data["index"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptqkit.quantize(model, out, CONFIG, emit=interrupt, **SMALL)
    shard = sorted((out / "gptqkit" / "journal" / "checkpoint").glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-10])
    gptqkit.quantize(model, out, CONFIG, resume=True, **SMALL)
    assert digests(out) == digests(tmp_path / "whole")


def test_a_changed_option_is_refused_with_both_values(model: Path, tmp_path: Path) -> None:
    def interrupt(event: Event) -> None:
        if event.kind == "block":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, emit=interrupt, **SMALL)
    with pytest.raises(InputError, match=r"config\.bits: the unfinished run has 4, now 3"):
        gptqkit.quantize(model, tmp_path / "out", QuantConfig(bits=3, group_size=32), resume=True, **SMALL)
    with pytest.raises(InputError, match=r"calibration_sha256: the unfinished run has"):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, resume=True, calibration=token_ids(seed=9), samples=12, seqlen=32)


@pytest.mark.parametrize("method", ["rtn", "hqq"])
def test_methods_that_need_no_calibration(method: str, model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    config = QuantConfig(method=method, group_size=32)
    run = gptqkit.quantize(model, tmp_path / "out", config, emit=events.append)
    assert run.check is None
    assert {record.method for record in run.linears} == {method}
    assert {record.tokens for record in run.linears} == {0}
    assert "embed" not in {event.data.get("name") for event in events}, "nothing is run forward"
    with pytest.raises(InputError, match=f"desc_act needs calibration, and method {method} has none"):
        gptqkit.plan(model, QuantConfig(method=method, group_size=32, desc_act=True))


def test_hqq_scales_are_positive_on_request(model: Path, tmp_path: Path) -> None:
    for signed in (True, False):
        out = tmp_path / str(signed)
        gptqkit.quantize(model, out, QuantConfig(method="hqq", group_size=32, signed_scales=signed))
        scales = [v for path in out.glob("*.safetensors") for k, v in load_file(path).items() if k.endswith(".scales")]
        assert any(bool((scale < 0).any()) for scale in scales) is signed


def test_rules_change_and_skip_linears(model: Path, tmp_path: Path) -> None:
    config = QuantConfig(
        bits=4, group_size=32, rules=(gptqkit.Rule.parse(r"down_proj=bits:8"), gptqkit.Rule.parse(r"layers\.0\..*o_proj=skip"))
    )
    events: list[Event] = []
    run = gptqkit.quantize(model, tmp_path / "out", config, emit=events.append, **SMALL)
    assert {record.bits for record in run.linears if "down_proj" in record.name} == {8}
    assert [tensor.name for tensor in run.skipped] == ["model.layers.0.self_attn.o_proj.weight"]
    assert [event.message for event in events if event.kind == "skip"] == [
        "model.layers.0.self_attn.o_proj.weight stays in full precision: skipped by a rule"
    ]
    loaded = gptqkit.load(tmp_path / "out")
    assert loaded.model.layers[0].self_attn.o_proj.weight.dtype.is_floating_point


def test_a_linear_outside_the_blocks_is_an_event_and_refused_under_strict(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "opt", word_embed_proj_dim=32)  # a projection before and one after the blocks
    with pytest.raises(InputError, match=r"--strict: \S*project_\S+\.weight, \S*project_\S+\.weight would stay in full precision"):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, strict=True, **SMALL)
    events: list[Event] = []
    gptqkit.quantize(model, tmp_path / "out", CONFIG, emit=events.append, **SMALL)
    assert len([event for event in events if event.kind == "skip" and "linear outside the blocks" in event.message]) == 2
    gptqkit.quantize(save_tiny(tmp_path / "llama"), tmp_path / "strict", CONFIG, strict=True, **SMALL)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            QuantConfig(group_size=128),
            r"group_size=128 does not divide in_features=64 of model\.layers\.0\.self_attn\.q_proj; use 32 or 64 or -1",
        ),
        (QuantConfig(bits=5, group_size=32), "5"),
        (QuantConfig(group_size=32, format="compressed-tensors", desc_act=True), "compressed-tensors"),
        (
            QuantConfig(group_size=32, rules=(gptqkit.Rule.parse("qproj=skip"),)),
            "'qproj' matches no linear; names look like model.layers.0",
        ),
    ],
)
def test_what_cannot_be_stored_is_refused_first(model: Path, tmp_path: Path, config: QuantConfig, message: str) -> None:
    with pytest.raises(InputError, match=message):
        gptqkit.quantize(model, tmp_path / "out", config, **SMALL)
    assert not (tmp_path / "out").exists()


def damaged(model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "damaged"
    copy.mkdir()
    for path in model.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_broken_models_are_refused_by_name(model: Path, tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(InputError, match=message):
            gptqkit.quantize(folder, tmp_path / "out", CONFIG, **SMALL)
        assert not (tmp_path / "out").exists()

    folder = damaged(model, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    refused(folder, f"{shard.name} is not a complete safetensors file")
    shard.unlink()
    refused(folder, f"{shard.name} is missing")
    shard.write_bytes(content)
    index = folder / "model.safetensors.index.json"
    original = index.read_text()
    index.write_text(original.replace(shard.name, f"../{shard.name}"))
    refused(folder, "not a safetensors file inside the folder")
    index.write_text(original)
    tensors = load_file(shard)
    name = next(iter(tensors))
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, shard, metadata={"format": "pt"})
    refused(folder, rf"tensor {name} in \S+ holds 1 NaN or infinite values")
    shard.write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    refused(folder, 'names no "architectures"')


def test_activations_that_are_not_finite_name_their_linears(model: Path, tmp_path: Path) -> None:
    folder = damaged(model, tmp_path)
    for shard in folder.glob("*.safetensors"):
        tensors = load_file(shard)
        if "model.layers.1.input_layernorm.weight" in tensors:
            tensors["model.layers.1.input_layernorm.weight"] *= 1e30
            save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model\.layers\.1\.self_attn\.q_proj, .*v_proj: the calibration inputs are not finite in 64 of 64 channels"
    ):
        gptqkit.quantize(folder, tmp_path / "out", CONFIG, **SMALL)


def test_output_folders_are_not_clobbered(model: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not empty and was not written by gptqkit"):
            gptqkit.quantize(model, foreign, CONFIG, overwrite=overwrite, **SMALL)
    with pytest.raises(InputError, match="is or contains the model folder"):
        gptqkit.quantize(model, model, CONFIG, overwrite=True, **SMALL)
    gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    with pytest.raises(InputError, match="holds a finished checkpoint"):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    gptqkit.quantize(model, tmp_path / "out", QuantConfig(bits=3, group_size=32), overwrite=True, **SMALL)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["bits"] == 3


def test_a_quantized_model_is_not_quantized_again(model: Path, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    with pytest.raises(InputError, match="is quantized already; use `gptqkit convert`"):
        gptqkit.quantize(tmp_path / "out", tmp_path / "again", CONFIG, **SMALL)


def test_a_full_disk_is_a_resource_error_and_resumable(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
    publish = Spool.publish
    calls = iter(range(100))

    def full(self: Spool, path: Path) -> str:
        if next(calls) == 1:
            raise gptqkit.ResourceError("no space left while writing")
        return publish(self, path)

    monkeypatch.setattr(Spool, "publish", full)
    with pytest.raises(gptqkit.ResourceError):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    monkeypatch.undo()
    gptqkit.quantize(model, tmp_path / "out", CONFIG, resume=True, **SMALL)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.skipif(os.geteuid() != 0 or not Path("/bin/mount").exists(), reason="needs the right to mount a tmpfs")
def test_a_really_full_disk(model: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        (disk / "ballast").write_bytes(bytes(300_000))

        def fill(event: Event) -> None:
            if event.kind == "block" and event.data["index"] == 0:
                (disk / "filler").write_bytes(bytes(max(0, _free(disk) - 20_000)))

        with pytest.raises(gptqkit.ResourceError, match="no space left while writing"):
            gptqkit.quantize(model, disk / "out", CONFIG, emit=fill, **SMALL)
        (disk / "filler").unlink()
        gptqkit.quantize(model, disk / "out", CONFIG, resume=True, **SMALL)
        gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
        assert digests(disk / "out") == digests(tmp_path / "whole")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _free(folder: Path) -> int:
    stats = os.statvfs(folder)
    return stats.f_bavail * stats.f_frsize
