"""Recipe files, and what was typed on top of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptqkit import InputError
from gptqkit.cli.options import parse_size
from gptqkit.cli.recipe import make_request

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
