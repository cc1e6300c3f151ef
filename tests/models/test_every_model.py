"""Every type of language model that transformers has, from discovery to the loaded model.

A tiny random model of each is saved by transformers, quantized at 4 bits with calibration, loaded with `gptqkit.load`, and must compute
what transformers' own model computes with the dequantized weights. What discovery finds is tests/golden/structure.json, and the names are
in docs/architectures.md; after a change that is meant (or a new release of transformers) run `python tests/models/test_every_model.py`
and look at the difference of both before committing.
Types that fail are listed with the cause in tiny_configs.py, and have to fail for that cause: the list shrinks by itself.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests.models.tiny_configs import UNSTABLE, UNSUPPORTED, UNSUPPORTED_IN, VOCABULARY, every_config, model_types

import gptqkit
from gptqkit import QuantConfig
from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.hf.skeleton import auto_class, build_skeleton, load_config, quiet_transformers
from gptqkit.models.layout import Layout, discover

GOLDEN = Path(__file__).parent.parent / "golden" / "structure.json"
DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "architectures.md"
MARKERS = ("<!-- model types: begin -->\n", "<!-- model types: end -->")
RELEASE = "5.23"
"""The release of transformers that the golden file describes; others are only held to what the models compute."""
STRUCTURES: dict[str, Any] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
IS_RELEASE = transformers.__version__.startswith(f"{RELEASE}.")
PRESENT = set(model_types())
CAUSES = UNSUPPORTED if IS_RELEASE else UNSUPPORTED_IN.get(transformers.__version__.rpartition(".")[0], {})
LARGEST = 20_000_000
CALIBRATION = torch.randint(3, VOCABULARY, (3, 16), generator=torch.Generator().manual_seed(0)).tolist()
IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", [name for name in STRUCTURES if name in PRESENT and name not in CAUSES])
def test_quantized_loaded_and_compared(model_type: str, tmp_path: Path) -> None:
    found = structure(works(model_type, tmp_path))
    if IS_RELEASE:
        assert found == STRUCTURES[model_type], "if this is meant, run `python tests/models/test_every_model.py`"


@pytest.mark.parametrize("model_type", sorted(CAUSES))
def test_fails_for_the_cause_that_is_listed(model_type: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=CAUSES[model_type]):
        works(model_type, tmp_path)


@pytest.mark.skipif(not IS_RELEASE, reason=f"the lists are those of transformers {RELEASE}")
def test_no_type_is_left_out() -> None:
    assert sorted([*STRUCTURES, *UNSUPPORTED, *UNSTABLE]) == model_types()
    assert len(STRUCTURES) >= 190


def test_document_lists_them() -> None:
    assert listed() in DOCUMENT.read_text(), "run `python tests/models/test_every_model.py`"


def works(model_type: str, folder: Path) -> Layout:
    """Asserts that a type works from end to end; returns what was discovered."""
    with quiet_transformers():
        save_random(model_type, folder / "model")
        skeleton = build_skeleton(load_config(folder / "model"), torch.float32)
        layout = discover(skeleton)
        infos = [info for block in layout.blocks for group in block for info in group.linears]
        fits = all(info.out_features % 8 == 0 for info in infos)
        config = QuantConfig(bits=4, group_size=-1, format="gptq" if fits else "compressed-tensors")
        run = gptqkit.quantize(
            folder / "model", folder / "out", config, calibration=CALIBRATION, samples=2, seqlen=16, dtype="float32"
        )  # fmt: skip
        assert len(run.linears) == len(infos)
        quantized = sum(info.out_features * info.in_features for info in infos)
        assert quantized + sum(kept.numel for kept in layout.kept) == sum(p.numel() for p in skeleton.parameters())
        expected = dense_logits(folder, transposed=infos[0].transposed)
        loaded = gptqkit.load(folder / "out", dtype=torch.float32)
        with torch.no_grad():
            got = loaded(input_ids=IDS).logits
        assert torch.isfinite(got).all()
        assert (got - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
        encodes = getattr(loaded.config, "is_encoder_decoder", False)
        made = loaded.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert made.shape == (2, 4 if encodes else 15)
    return layout


def save_random(model_type: str, folder: Path) -> None:
    """A random model with weights large enough to matter, as transformers saves it."""
    torch.manual_seed(0)
    config = every_config(model_type)
    size = sum(p.numel() for p in build_skeleton(config, torch.float32).parameters())
    assert size < LARGEST, f"a tiny {model_type} has {size} parameters"
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3 / parameter.shape[-1] ** 0.25)
    model.save_pretrained(folder)


def dense_logits(folder: Path, *, transposed: bool) -> torch.Tensor:
    """Of transformers' own model with every quantized linear replaced in its checkpoint by the dequantized value; where that holds experts
    stacked, of the loaded model made dense."""
    checkpoint = QuantizedCheckpoint.open(folder / "out")
    tensors = load_file(folder / "model" / "model.safetensors")
    names = {name: f"{name}.weight" for name in checkpoint.linears}
    if not all(key in tensors for key in names.values()):
        model = gptqkit.load(folder / "out", dtype=torch.float32).dequantize()
    else:
        for name, key in names.items():
            weight_OI = checkpoint.read_linear(name).dequantize()
            tensors[key] = weight_OI.T.contiguous() if transposed else weight_OI
        save_file(tensors, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        model = auto_class(load_config(folder / "model")).from_pretrained(folder / "model", dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=IDS).logits
    return logits


def structure(layout: Layout) -> dict[str, Any]:
    """What the golden file holds of a layout: of blocks of equal structure the numbers, of experts one for all."""
    blocks: dict[str, list[int]] = {}
    for index, groups in enumerate(layout.blocks):
        shown = [" ".join(re.sub(r"\bexperts\.\d+\.", "experts.*.", linear.name) for linear in group.linears) for group in groups]
        blocks.setdefault(" | ".join(dict.fromkeys(shown)), []).append(index)
    kept: dict[str, int] = {}
    for item in layout.kept:
        kept[item.reason] = kept.get(item.reason, 0) + 1
    return {
        "blocks": ", ".join(blocks.path for blocks in layout.lists),
        "groups": {",".join(map(str, numbers)): words for words, numbers in blocks.items()},
        "kept": dict(sorted(kept.items())),
    }


def listed() -> str:
    """The part of the document that names every type."""
    passing, failing = (
        textwrap.fill(", ".join(f"`{name}`" for name in names), 140, break_on_hyphens=False)
        for names in (STRUCTURES, sorted([*UNSUPPORTED, *UNSTABLE]))
    )
    return f"""{MARKERS[0]}
{len(STRUCTURES)} types of transformers {RELEASE} pass:

{passing}

{len(UNSUPPORTED) + len(UNSTABLE)} do not, or are not known to (`tests/models/tiny_configs.py` has the cause of each):

{failing}

{MARKERS[1]}"""


def regenerate() -> None:
    """Writes the golden file and the document's list; with model types as arguments, only shows what becomes of those."""
    found = {}
    for model_type in sys.argv[1:] or sorted({*model_types()} - {*UNSTABLE}):
        with tempfile.TemporaryDirectory() as scratch:
            try:
                found[model_type] = structure(works(model_type, Path(scratch)))
                words = f"ok {json.dumps(found[model_type])}"
            except Exception as error:  # noqa: BLE001  whatever it is, it is what the list of causes has to say
                words = f"{type(error).__name__}: {str(error)[:250]}".replace("\n", " ")
            sys.stdout.write(f"{model_type} | {words}\n")
    if not sys.argv[1:]:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
        STRUCTURES.clear()
        STRUCTURES.update(found)
        before, rest = DOCUMENT.read_text().split(MARKERS[0])
        DOCUMENT.write_text(before + listed() + rest.split(MARKERS[1])[1])


if __name__ == "__main__":
    regenerate()
