"""What inspect says, and the engines' rules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.checkpoint.build import LLAMA, W4, build

from gptqkit.checkpoint.engines import ENGINES, Facts, judge
from gptqkit.checkpoint.inspect import inspect_checkpoint
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError

VLLM, SGLANG, OURS, STOCK, MLX = ENGINES


def verdicts(format: str, specs: dict[str, LinearSpec], **changes: object) -> dict[str, str]:
    facts = {"dense": frozenset(), "desc_act": False, "reordered": False, "exceptions": False, **changes}
    return {verdict.engine: verdict.accepts for verdict in judge(Facts(format=format, specs=specs, **facts))}  # type: ignore[arg-type]


def one(bits: int, group_size: int, sym: bool) -> dict[str, LinearSpec]:
    return {"model.layers.0.mlp.down_proj": LinearSpec(bits, group_size, sym)}


@pytest.mark.parametrize(
    ("format", "specs", "changes", "expected"),
    [
        ("gptq", one(4, 128, True), {}, {VLLM: "yes", SGLANG: "yes", OURS: "yes", STOCK: "yes", MLX: "no"}),
        ("gptq", one(4, 128, True), {"desc_act": True, "reordered": True}, {VLLM: "no", SGLANG: "yes", STOCK: "yes"}),
        ("gptq", one(4, 128, True), {"reordered": True}, {VLLM: "no"}),
        ("gptq", one(4, -1, True), {"desc_act": True}, {VLLM: "yes"}),
        ("gptq", one(4, 256, True), {}, {VLLM: "no", SGLANG: "yes"}),
        ("gptq", one(4, 128, False), {}, {VLLM: "no", SGLANG: "yes", STOCK: "yes"}),
        ("gptq", one(3, 128, True), {}, {VLLM: "no", SGLANG: "yes", STOCK: "yes"}),
        ("gptq", one(4, 128, True), {"exceptions": True}, {VLLM: "yes", STOCK: "no"}),
        ("gptq", {"model.layers.0.mlp.experts.3.up_proj": W4}, {}, {VLLM: "yes", STOCK: "no", OURS: "yes"}),
        (
            "gptq",
            {"a.0.experts.0.up_proj": W4, "a.0.experts.1.up_proj": LinearSpec(8, 64, True)},
            {},
            {VLLM: "no", SGLANG: "no", OURS: "yes"},
        ),
        ("gptq", {"a.0.experts.0.up_proj": W4}, {"dense": frozenset({"a.0.experts.1.up_proj"})}, {VLLM: "no"}),
        ("gptq", {"a.0.experts.0.up_proj": W4, "a.1.experts.0.up_proj": LinearSpec(8, 64, True)}, {}, {VLLM: "yes"}),
        ("gptq", {"a.0.q_proj": W4, "a.0.k_proj": LinearSpec(8, 64, True)}, {}, {VLLM: "no"}),
        ("gptq", {"a.0.q_proj": W4}, {"dense": frozenset({"a.0.k_proj"})}, {VLLM: "no"}),
        ("compressed-tensors", one(3, 128, True), {}, {VLLM: "yes", SGLANG: "unverified", STOCK: "yes", MLX: "no"}),
        ("compressed-tensors", one(4, 128, False), {}, {VLLM: "yes", STOCK: "no", OURS: "yes"}),
        ("compressed-tensors", one(4, 128, True), {"reordered": True}, {VLLM: "no", SGLANG: "no", STOCK: "no"}),
    ],
)
def test_rules(format: str, specs: dict[str, LinearSpec], changes: dict[str, object], expected: dict[str, str]) -> None:
    found = verdicts(format, specs, **changes)
    assert {engine: found[engine] for engine in expected} == expected


def test_a_reason_names_its_rule_and_its_source() -> None:
    verdict = judge(Facts("gptq", one(3, 128, False), frozenset(), False, False, False))[0]
    assert verdict.to_dict() == {
        "engine": "vLLM 0.33",
        "accepts": "no",
        "reasons": [
            {
                "rule": "gptq types",
                "reason": "its gptq loader takes symmetric 4 and 8 bits, this is asymmetric [3]; --format compressed-tensors works",
                "source": "vllm auto_gptq.py: TYPE_MAP",
            }
        ],
    }


def test_inspect_counts(tmp_path: Path) -> None:
    def choose(name: str) -> LinearSpec | None:
        return None if ".3." in name else LinearSpec(8, 32, False) if "down" in name else W4

    folder = build(tmp_path / "m", "gptq", choose, shards=2)
    found = inspect_checkpoint(folder)
    assert (found.format, found.model_type, found.quantizer[0].partition(":")[0]) == ("gptq", "llama", "gptqkit")
    assert [(spec["bits"], spec["sym"], spec["linears"]) for spec in found.specs] == [(4, True, 18), (8, False, 3)]
    assert found.parameters == inspect_checkpoint(LLAMA).parameters
    assert found.nbytes == sum(row.nbytes for row in found.linears) + found.not_quantized_nbytes
    row = next(row for row in found.linears if row.name == "model.layers.0.mlp.up_proj")
    assert (row.out_features, row.in_features, row.bits, row.group_size, row.sym, row.g_idx) == (768, 256, 4, 64, True, "natural")
    weights = 768 * 256
    assert row.nbytes == weights // 2 + weights // 64 * 2 + weights // 64 // 2 + 256 * 4
    assert found.tied_head
    assert any(dense.name == "model.layers.3.mlp.down_proj.weight" for dense in found.not_quantized)
    assert json.loads(json.dumps(found.to_dict()))["engines"][0]["engine"] == VLLM


def test_inspect_of_other_models(tmp_path: Path) -> None:
    dense = inspect_checkpoint(LLAMA)
    assert (dense.format, dense.linears, dense.engines, dense.linear_bits_per_weight) == ("dense", (), (), None)
    assert dense.bits_per_weight == 16
    reordered = inspect_checkpoint(build(tmp_path / "r", "gptq_v2", reorder=True))
    assert reordered.desc_act
    assert {row.g_idx for row in reordered.linears} == {"reordered"}
    assert {row.g_idx for row in inspect_checkpoint(build(tmp_path / "c", "compressed-tensors")).linears} == {"none"}
    with pytest.raises(InputError, match="is not a folder"):
        inspect_checkpoint(tmp_path / "nothing")
