"""Recipes by name and from files, what was typed on top of them, and the recipe that a run leaves behind."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from tests.tiny import save_tiny, token_ids

import gptqkit
from gptqkit import InputError, QuantConfig
from gptqkit.cli.main import run
from gptqkit.cli.options import parse_size
from gptqkit.cli.recipe import make_request
from gptqkit.core.recipe import read_recipe, shipped_recipes

NOTHING: dict[str, object] = dict.fromkeys(("bits", "group_size", "sym", "samples", "seqlen", "seed", "calibration", "damp"))


def written(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def test_without_a_recipe_the_defaults_hold() -> None:
    request = make_request(None, NOTHING, [])
    assert (request.config.bits, request.config.group_size, request.config.sym) == (4, 128, True)
    assert (request.samples, request.seqlen, request.seed, request.calibration) == (128, 2048, 0, None)


def test_what_was_typed_overrides_the_file_even_with_the_default_value(tmp_path: Path) -> None:
    file = written(tmp_path, "bits: 3\ngroup_size: 64\nsym: false\nsamples: 7\ndamp: 1e-2\n")
    request = make_request(file, {**NOTHING, "bits": 4, "sym": True}, [])
    assert (request.config.bits, request.config.sym) == (4, True)
    assert (request.config.group_size, request.samples, request.config.damp) == (64, 7, 0.01)


def test_typed_rules_come_first(tmp_path: Path) -> None:
    file = written(tmp_path, "rules: ['down_proj=bits:8', {pattern: up_proj, skip: true}]\n")
    request = make_request(file, NOTHING, ["down_proj=bits:2"])
    spec = request.config.spec("layers.0.mlp.down_proj")
    assert spec is not None
    assert spec.bits == 2
    assert request.config.spec("layers.0.mlp.up_proj") is None


def test_calibration_beside_the_recipe_is_found(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("{}")
    assert make_request(written(tmp_path, "calibration: texts.jsonl\n"), NOTHING, []).calibration == str(tmp_path / "texts.jsonl")
    assert make_request(written(tmp_path, "calibration: org/dataset\n"), NOTHING, []).calibration == "org/dataset"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bitz: 3\n", "unknown key bitz; allowed: bits, group_size"),
        ("- 3\n", "expected a mapping"),
        ("", "expected a mapping such as 'bits: 4', found NoneType"),
        ("bits: '4'\n", "bits='4'; expected int"),
        ("sym: 'no'\n", "sym='no'; expected bool"),
        ("bits: true\n", "bits=True; expected int"),
        ("damp: much\n", "damp='much'; expected int or float"),
        ("bits: [\n", "not YAML"),
        ("bits: 9\n", "bits=9; allowed: 2, 3"),
        ("samples: 0\n", "samples=0; allowed: 1 or more"),
        ("rules: ['a']\n", "expected 'REGEX=bits:8"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        make_request(written(tmp_path, text), NOTHING, [])
    assert words in str(caught.value)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(InputError, match=r"--recipe nowhere.yaml: cannot be read \(No such file"):
        make_request("nowhere.yaml", NOTHING, [])


@pytest.mark.parametrize("text", ["8 gigs", "", "-3GB", "0GB", "GB", "8XB"])
def test_a_size_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"write it like 8GB, 512MB or 1\.5GiB"):
        parse_size("--memory", text)


SHIPPED = {
    "standard": {"bits": 4, "group_size": 128},
    "high-accuracy": {"bits": 4, "group_size": 32, "order": "activation"},
    "aggressive": {"bits": 3, "group_size": 128, "order": "activation"},
    "tiny": {"bits": 2, "group_size": 64, "preset": "best"},
    "calibration-free": {"method": "hqq", "bits": 4},
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_valid_and_say_what_they_are_for(name: str) -> None:
    config = QuantConfig.from_recipe(name)
    assert {key: getattr(config, key) for key in SHIPPED[name]} == SHIPPED[name]
    lines = (files("gptqkit") / "recipes" / f"{name}.yaml").read_text().splitlines()
    assert 2 <= sum(line.startswith("#") for line in lines) <= 5


def test_names_are_all_in_the_help_and_in_the_message_for_an_unknown_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(shipped_recipes()) == set(SHIPPED)
    run(["quantize", "--help"])
    told = capsys.readouterr().out
    with pytest.raises(InputError) as caught:
        read_recipe("bigger")
    assert "--recipe bigger: there is no recipe of this name and no such file" in str(caught.value)
    for name, about in shipped_recipes().items():
        assert name in told.replace("\n", " ")
        assert f"{name:<18}{about}" in str(caught.value)
        assert len(about.split()) > 2


def test_a_file_may_be_a_path_and_a_shipped_name_wins_over_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("bits: 8\n")
    (tmp_path / "standard").mkdir()
    monkeypatch.chdir(tmp_path)
    assert QuantConfig.from_recipe("mine").bits == 8
    assert QuantConfig.from_recipe(Path("mine")).bits == 8
    assert QuantConfig.from_recipe("standard").bits == 4


def test_overrides_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("{}")
    file = written(tmp_path, "bits: 3\ngroup_size: 64\nrules: ['a=skip']\nsamples: 7\n")
    typed = {**NOTHING, "bits": 4, "group_size": 64, "seed": 1, "calibration": str(tmp_path / "texts.jsonl")}
    use = make_request(file, typed, ["b=skip"]).recipe
    assert use is not None
    assert use.name == "recipe.yaml"
    assert len(use.sha256) == 64
    assert use.overridden == {
        "bits": {"recipe": 3, "used": 4},
        "seed": {"recipe": None, "used": 1},
        "calibration": {"recipe": None, "used": "texts.jsonl"},
        "rules": {"recipe": ["a=skip"], "used": ["b=skip", "a=skip"]},
    }
    assert make_request(None, typed, []).recipe is None


@pytest.mark.parametrize(("text", "typed", "words"), [
    ("bits: 3\n", {"target_bits": 3.5, "bits": 3}, "--bits 3 with --target-bits: a bit budget chooses"),
    ("target_bits: 3.5\n", {"bits": 3, "group_size": 32}, "--bits 3 and --group-size 32 with target_bits of the recipe recipe.yaml"),
])  # fmt: skip
def test_bits_and_a_budget_of_bits_contradict_each_other(text: str, typed: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        make_request(written(tmp_path, text), {**NOTHING, **typed}, [])
    assert words in str(caught.value)


def test_the_bits_of_a_recipe_step_back_for_a_typed_budget(tmp_path: Path) -> None:
    assert make_request("standard", {**NOTHING, "target_bits": 3.5}, []).config.target_bits == 3.5


def test_a_run_leaves_a_recipe_that_repeats_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=1)
    data = tmp_path / "tokens.jsonl"
    data.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in token_ids(12)))
    file = written(tmp_path, "bits: 3\ngroup_size: 32\nsamples: 6\nseqlen: 24\nrules: ['down_proj=bits:8,group_size:-1']\n")
    first = ["quantize", str(model), str(tmp_path / "a"), "--recipe", file, "--bits", "4", "--calibration", str(data), "--seed", "3"]
    assert run(first) == 0
    left = tmp_path / "a" / "gptqkit" / "recipe.yaml"
    assert yaml.safe_load(left.read_text()) == {
        "bits": 4, "group_size": 32, "sym": True, "method": "gptq", "preset": "fast", "signed_scales": True, "format": "gptq",
        "desc_act": False, "calibrate_all_experts": False, "damp": 0.01, "rules": [{"pattern": "down_proj", "bits": 8, "group_size": -1}],
        "samples": 6, "seqlen": 24, "seed": 3, "calibration": "tokens.jsonl",
    }  # fmt: skip
    said = left.read_text()
    assert "Taken from the recipe recipe.yaml" in said
    assert "#   bits: 3 -> 4" in said
    assert str(tmp_path) not in said
    record = json.loads((tmp_path / "a" / "gptqkit" / "run.json").read_text())
    assert record["recipe"]["overridden"]["bits"] == {"recipe": 3, "used": 4}
    assert str(tmp_path) not in json.dumps(record)
    assert run(["quantize", str(model), str(tmp_path / "b"), "--recipe", str(left), "--calibration", str(data)]) == 0
    shards = [sorted((tmp_path / out).glob("*.safetensors")) for out in "ab"]
    assert [path.read_bytes() for path in shards[0]] == [path.read_bytes() for path in shards[1]]
    assert len(shards[0]) > 0


def test_a_run_without_calibration_leaves_a_recipe_without(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", num_hidden_layers=1)
    gptqkit.quantize(model, tmp_path / "out", QuantConfig(method="rtn", group_size=32))
    left = read_recipe(tmp_path / "out" / "gptqkit" / "recipe.yaml").values
    assert not {"samples", "seqlen", "seed", "calibration"} & set(left)
    assert QuantConfig.from_recipe(tmp_path / "out" / "gptqkit" / "recipe.yaml") == QuantConfig(method="rtn", group_size=32)
