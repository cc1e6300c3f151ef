"""A quantized output head: solved on what it reads, untied where it has to be, and read back by everything that reads checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.pipeline.test_run import digests
from tests.tiny import save_tiny, token_ids
from transformers import AutoConfig, AutoModelForCausalLM

import gptqkit
from gptqkit import InputError, QuantConfig, Rule
from gptqkit.algorithms.gptq import solve_group
from gptqkit.algorithms.gram import Gram
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.config import LinearSpec
from gptqkit.core.events import Event
from gptqkit.pipeline import head as head_module
from gptqkit.pipeline import memory
from gptqkit.pipeline.plan import prepare

SMALL = {"calibration": token_ids(), "samples": 12, "seqlen": 32, "dtype": "float32"}
CONFIG = QuantConfig(bits=4, group_size=32, lm_head=8)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", tie_word_embeddings=request.param)


def head_weight(model: Path) -> torch.Tensor:
    tensors = load_file(model / "model.safetensors")
    return tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"]).float()


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        QuantConfig(bits=3, group_size=32, lm_head=4, sym=False, format="compressed-tensors", preset="best"),
        QuantConfig(bits=4, group_size=32, lm_head=4, method="awq"),
        QuantConfig(bits=4, group_size=32, lm_head=8, method="hqq", format="gptq_v2", rules=(Rule("lm_head", group_size=64, sym=False),)),
        QuantConfig(bits=8, group_size=64, lm_head=8, method="rtn", format="compressed-tensors"),
    ],
    ids=["gptq", "best", "awq", "hqq", "rtn"],
)
def test_from_quantize_to_generate(config: QuantConfig, model: Path, tmp_path: Path) -> None:
    out, tied = tmp_path / "out", "lm_head.weight" not in TensorSource.open(model)
    plan = gptqkit.plan(model, config)
    run = gptqkit.quantize(model, out, config, **SMALL)
    record = run.linears[-1]
    assert (record.name, record.shape, record.bits, record.method) == ("lm_head", (256, 64), config.lm_head, config.method)
    assert (record.error is not None) == config.needs_calibration
    assert plan.size_after == TensorSource.open(out).nbytes
    written = json.loads((out / "config.json").read_text())
    assert written["tie_word_embeddings"] is False
    assert any("shares its weight with the embedding" in event.message for event in run.events) == tied
    checkpoint = QuantizedCheckpoint.open(out)
    weight = checkpoint.read_linear("lm_head").dequantize()
    assert float((weight - head_weight(model)).norm() / head_weight(model).norm()) < (0.02 if config.lm_head == 8 else 0.2)
    verified = gptqkit.verify(out, against=model)
    assert verified.ok, [check for check in verified.checks if not check.ok]
    assert "lm_head" in {row.name for row in gptqkit.inspect(out).linears}
    loaded = gptqkit.load(out, dtype=torch.float32)
    ids = torch.tensor(token_ids(2, 8))
    with torch.no_grad():
        states = loaded.model(ids).last_hidden_state
        assert torch.allclose(loaded(ids).logits, states @ weight.T, atol=1e-3)
    assert torch.equal(loaded.get_input_embeddings().weight, TensorSource.open(model).read("model.embed_tokens.weight"))
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 11)


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_it_survives_conversion(format: str, model: Path, tmp_path: Path) -> None:
    other = {"gptq": "compressed-tensors", "compressed-tensors": "gptq"}[format]
    gptqkit.quantize(model, tmp_path / "a", QuantConfig(bits=4, group_size=32, lm_head=8, method="rtn", format=format))
    gptqkit.convert(tmp_path / "a", tmp_path / "b", format=other)
    gptqkit.convert(tmp_path / "b", tmp_path / "c", format=format)
    a, b, c = (QuantizedCheckpoint.open(tmp_path / name) for name in "abc")
    assert a.linears == b.linears == c.linears
    assert torch.equal(a.read_linear("lm_head").dequantize(), b.read_linear("lm_head").dequantize())
    assert c.quantization.get("lm_head", True) is True
    assert all(engine.accepts == "yes" for engine in gptqkit.inspect(tmp_path / "b").engines if engine.engine.startswith("vLLM"))


def test_it_is_solved_on_what_the_head_reads_behind_quantized_blocks(model: Path, tmp_path: Path) -> None:
    config = QuantConfig(bits=3, group_size=32, lm_head=4)
    run = gptqkit.quantize(model, tmp_path / "out", config, **{**SMALL, "calibration": token_ids(12)})
    loaded = gptqkit.load(tmp_path / "out", dtype=torch.float32)
    gram = Gram(64, "cpu")
    with torch.no_grad():
        for ids in token_ids(12):
            gram.add(loaded.model(torch.tensor([ids])).last_hidden_state[0])
    weight_OI = head_weight(model)
    spec = LinearSpec(4, 32, True)
    (expected,) = solve_group([weight_OI], gram.finish(), [spec], order="group-aware", damp=0.01, tokens=12 * 32)
    found = QuantizedCheckpoint.open(tmp_path / "out").read_linear("lm_head")
    same = (found.dequantize() - expected.weight.dequantize()).abs() < 1e-3
    assert float(same.float().mean()) > 0.99
    record = run.linears[-1]
    assert record.tokens == 12 * 32
    assert record.error == pytest.approx(expected.error, rel=0.02)
    assert expected.error < 0.9 * expected.error_rounded


@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_slices_of_rows_are_as_good_as_the_whole(method: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = QuantConfig(bits=4, group_size=32, lm_head=4, method=method, sym=False)
    gptqkit.quantize(model, tmp_path / "whole", config, **SMALL)
    monkeypatch.setattr(head_module, "head_rows", lambda in_features: 100)
    run = gptqkit.quantize(model, tmp_path / "sliced", config, **SMALL)
    whole, sliced = (QuantizedCheckpoint.open(tmp_path / name).read_linear("lm_head").dequantize() for name in ("whole", "sliced"))
    assert float(((whole - sliced).abs() < 1e-3).float().mean()) > (0.99 if method == "gptq" else 0.9999)
    assert run.linears[-1].weight_change == pytest.approx(float((sliced - head_weight(model)).norm() / head_weight(model).norm()), rel=1e-3)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_interrupted_and_resumed(after: int, model: Path, tmp_path: Path) -> None:
    """After the first block, the last one, and the head."""
    gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
    out = tmp_path / "out"

    def interrupt(event: Event) -> None:
        if (event.kind == "block" and event.data["index"] == after) or event.message == {2: "completing the checkpoint"}.get(after):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptqkit.quantize(model, out, CONFIG, emit=interrupt, **SMALL)
    assert len(list((out / "gptqkit" / "journal" / "blocks").glob("*.json"))) == after + 1
    run = gptqkit.quantize(model, out, CONFIG, resume=True, **SMALL)
    assert digests(out) == digests(tmp_path / "whole")
    assert [record.name for record in run.linears].count("lm_head") == 1


def test_a_second_copy_of_a_tied_weight_gives_way(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(model / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, model / "model.safetensors")
    gptqkit.quantize(model, tmp_path / "out", CONFIG, **SMALL)
    assert "lm_head.weight" not in TensorSource.open(tmp_path / "out")
    assert gptqkit.verify(tmp_path / "out", against=model).ok


def test_the_account_of_a_head(model: Path) -> None:
    account = gptqkit.plan(model, CONFIG).account
    rules = {row.rule: row for row in account.rows}
    tied = "lm_head.weight" not in TensorSource.open(model)
    if tied:
        row = rules["output head beside the embedding it was tied to, 8 bits, groups of 32"]
        assert (row.state, row.before, row.share) == ("not in the model", 0, None)
    else:
        assert rules["8 bits, groups of 32"].parameters == 256 * 64
    assert "output head" not in rules


@pytest.mark.parametrize(
    ("rule", "lm_head", "words"),
    [
        ("lm_head=bits:8", None, r"matches the output head, which is quantized with --lm-head BITS"),
        ("lm_head=bits:4", 8, r"gives lm_head 4 bits, and --lm-head 8; say one of them"),
        ("embed_tokens=bits:8", 8, r"embeddings stay in full precision, since no format that vLLM"),
        ("nothing", 8, r"matches no linear; names look like model\.layers\.0"),
        ("lm_head=group_size:256", 8, r"group_size=256 does not divide in_features=64 of lm_head"),
    ],
)
def test_rules_that_cannot_be_followed(rule: str, lm_head: int | None, words: str, model: Path) -> None:
    text = rule if "=" in rule else f"{rule}=bits:8"
    with pytest.raises(InputError, match=words):
        gptqkit.plan(model, QuantConfig(bits=4, group_size=32, lm_head=lm_head, rules=(Rule.parse(text),)))


def test_a_rule_may_skip_it(model: Path, tmp_path: Path) -> None:
    config = QuantConfig(bits=4, group_size=32, lm_head=8, method="rtn", rules=(Rule("lm_head", skip=True),))
    run = gptqkit.quantize(model, tmp_path / "out", config)
    assert "lm_head" not in {record.name for record in run.linears}
    assert not QuantizedCheckpoint.open(tmp_path / "out").quantization["lm_head"]


def test_a_format_that_cannot_hold_it_is_refused_before_any_work(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m", vocab_size=250)
    with pytest.raises(InputError, match=r"lm_head: gptq needs out_features to be a multiple of 4 at 8 bits, and it is 250"):
        gptqkit.quantize(model, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gpt_neox", "gpt2", "gemma2", "qwen3_moe", "bloom", "opt", "phi3"])
def test_heads_of_other_families(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m", family)
    run = gptqkit.quantize(model, tmp_path / "out", QuantConfig(bits=8, group_size=32, lm_head=8), **SMALL)
    assert run.check is not None
    assert run.check.kl is not None
    assert run.check.kl < 0.05
    loaded = gptqkit.load(tmp_path / "out", dtype=torch.float32)
    assert type(loaded.get_output_embeddings()).__name__ == "QuantLinear"
    assert gptqkit.verify(tmp_path / "out", against=model).ok


@pytest.mark.parametrize(
    ("model_type", "words"),
    [
        ("bert", r"the output head of BertLMHeadModel is called cls\.predictions\.decoder; formats and engines know"),
        ("biogpt", r"is called output_projection"),
    ],
)
def test_heads_that_engines_do_not_know_are_refused(model_type: str, words: str, tmp_path: Path) -> None:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    config = AutoConfig.for_model(model_type, **size, **({"is_decoder": True} if model_type == "bert" else {}))
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=words):
        gptqkit.plan(tmp_path / "m", QuantConfig(bits=4, group_size=32, lm_head=8))


def test_untying_what_else_is_tied_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Called by a name that engines know, the head of BERT still shares its bias."""
    monkeypatch.setattr("gptqkit.models.head.HEADS", ("decoder",))
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **size, is_decoder=True)).save_pretrained(tmp_path / "m")
    with pytest.raises(InputError, match=r"unties cls\.predictions\.(decoder\.)?bias as well, which the checkpoint does not hold"):
        gptqkit.plan(tmp_path / "m", QuantConfig(bits=4, group_size=32, lm_head=8))


def test_prediction_grows_with_the_vocabulary_but_not_the_solver(model: Path) -> None:
    opened = prepare(str(model), CONFIG, dtype="bfloat16").model
    place = memory.Memory(paused=True, flight=None, place="device", activations=0, peak=0, room=0)
    shapes = [(32_000, 4096), (128_000, 4096)]
    small, large = (memory.predict_head(place, shape, 2 * shape[0] * shape[1], CONFIG, opened) for shape in shapes)
    assert large < 4.2 * small
    assert large < 6_000_000_000 < 6 * 4 * 128_000 * 4096


def test_rounding_the_head_is_rounding(model: Path, tmp_path: Path) -> None:
    gptqkit.quantize(model, tmp_path / "out", QuantConfig(bits=4, group_size=32, lm_head=4, method="rtn"))
    found = QuantizedCheckpoint.open(tmp_path / "out").read_linear("lm_head")
    assert torch.equal(found.dequantize(), round_to_nearest(head_weight(model), LinearSpec(4, 32, True)).dequantize())
