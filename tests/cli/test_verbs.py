"""The verbs on the bundled model, from the command line to what is printed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from gptqkit.cli.demo import MARKER
from gptqkit.cli.main import run
from gptqkit.data import model_folder

TINY = str(model_folder())
QUICK = ["--group-size", "64", "--samples", "8", "--seqlen", "128"]


def answer(arguments: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    """The one JSON object of a command."""
    capsys.readouterr()
    assert run([*arguments, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "tiny-4bit"
    assert run(["quantize", TINY, str(out), *QUICK]) == 0
    return out


def test_quantize_prints_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["quantize", TINY, str(out), *QUICK, "--bits", "3", "--rule", "layers\\.0\\.mlp=bits:8"]) == 0
    text, log = capsys.readouterr()
    assert "gptq, 3 bits, symmetric, groups of 64, order group-aware, format gptq" in text
    assert "The 8 of 28 linears with the largest error" in text
    for word in ("size", "error", "fallbacks", "not quantized", "kept", "check", "time", "peak memory", "written to"):
        assert any(line.startswith(word) for line in text.splitlines()), word
    assert f"gptqkit eval {out} --against {TINY}" in text
    assert "\x1b" not in text + log
    assert "quantizing blocks" in log
    assert "quantizing blocks" not in text
    assert (out / "gptqkit" / "run.json").is_file()


def test_quantize_answers_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(["quantize", TINY, str(tmp_path / "out"), *QUICK, "--method", "rtn", "--asym"], capsys)
    assert len(found["linears"]) == 28
    assert found["config"]["method"] == "rtn"
    assert found["size_after"] < found["size_before"] / 2


def test_a_recipe_is_followed_and_overridden(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("bits: 3\ngroup_size: 32\nsamples: 8\nseqlen: 64\n")
    found = answer(["quantize", TINY, str(tmp_path / "out"), "--recipe", str(recipe), "--bits", "8", "--dry-run"], capsys)
    assert {(linear["bits"], linear["group_size"]) for linear in found["linears"]} == {(8, 32)}
    assert not (tmp_path / "out").exists()


def test_dry_run_is_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", TINY, str(tmp_path / "out"), "--dry-run", "--desc-act", "--rule", "layers\\.1\\.=skip"]) == 0
    text = capsys.readouterr().out
    assert "21 in 4 blocks" in text
    assert "7 tensors such as model.layers.1" in text
    assert "vLLM 0.33, mlx-lm, compressed-tensors and GGUF refuse it" in text
    assert "Nothing was computed or written" in text
    assert max(map(len, text.splitlines())) <= 200


def test_plan_accounts_for_every_parameter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", TINY, "--bits", "3", "--group-size", "64", "--rule", "layers\\.1\\.=skip"]) == 0
    text = capsys.readouterr().out
    assert "--dry-run" not in text
    for words in ("quantized  3 bits, groups of 64", "skipped    skipped by a rule", "kept       embedding", "the model"):
        assert any(line.startswith(words) for line in text.splitlines()), words
    found = answer(["plan", TINY, "--bits", "3", "--group-size", "64"], capsys)
    assert sum(row["parameters"] for row in found["account"]["rows"]) == found["account"]["parameters"]
    assert found["account"]["after"] == found["size_after"]


def test_inspect_says_what_is_kept_and_why(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(checkpoint)]) == 0
    lines = capsys.readouterr().out.splitlines()
    for words in ("quantized  4 bits, groups of 64", "kept       embedding", "kept       norm or small parameter", "the model"):
        assert any(line.startswith(words) for line in lines), words


def test_options_without_effect_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", TINY, str(tmp_path / "out"), "--method", "hqq", "--dry-run"]
    assert run([*command, "--preset", "best", "--samples", "8"]) == 0
    assert "--samples, --preset: without effect, since method hqq has no use for it" in capsys.readouterr().out
    assert run(command) == 0
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bits", "9"], "bits=9; allowed: 2, 3, 4"),
        (["--group-size", "100"], "group_size=100; allowed: 32, 64"),
        (["--rule", "x"], "expected 'REGEX=bits:8"),
        (["--memory", "lots"], "--memory lots: not a size"),
        (["--calibration", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--recipe", "nowhere.yaml"], "--recipe nowhere.yaml: cannot be read"),
        (["--order", "random"], "order='random'; allowed: natural"),
        (["--format", "zip"], "format='zip'; allowed: gptq"),
    ],
)
def test_bad_options_are_exit_2_before_any_work(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", TINY, str(tmp_path / "out"), *arguments]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_a_finished_checkpoint_is_not_replaced_unasked(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (checkpoint / "config.json").read_bytes()
    assert run(["quantize", TINY, str(checkpoint), *QUICK]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (checkpoint / "config.json").read_bytes() == before


def test_an_interrupted_run_says_how_to_go_on_and_does(tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "gptqkit", "quantize", TINY, str(out), "--group-size", "64", "--samples", "32", "--seqlen", "512"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored where the tests run in the background
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "quantizing blocks" in line:
            break
    process.send_signal(signal.SIGINT)
    text, log = process.communicate(timeout=60)
    assert process.returncode == 130, log
    assert text == ""
    assert "Traceback" not in log
    assert f"gptqkit quantize {TINY} {out} --group-size 64 --samples 32 --seqlen 512 --resume" in log
    assert not (out / "config.json").exists()
    assert run([*command[3:], "--resume"]) == 0
    assert (out / "config.json").exists()


def test_eval_measures_and_holds_limits(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = ["--against", TINY, "--windows", "2", "--seqlen", "128"]
    found = answer(["eval", str(checkpoint), *quick, "--max-kl", "5", "--max-ppl-ratio", "3"], capsys)
    assert 0 < found["kl"] < 5
    assert [check["ok"] for check in found["checks"]] == [True, True]
    assert run(["eval", str(checkpoint), *quick, "--max-kl", "1e-6"]) == 1
    out, err = capsys.readouterr()
    assert "at most 1e-06: FAILS" in out
    assert "check failed: KL is" in err


def test_limits_need_an_original(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", str(checkpoint), "--max-kl", "1"]) == 2
    assert "add --against ORIGINAL" in capsys.readouterr().err


def test_tasks_without_lm_eval_say_what_to_install(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert run(["eval", str(checkpoint), "--tasks", "hellaswag"]) == 2
    assert "pip install 'gptqkit[eval]'" in capsys.readouterr().err


def test_inspect_has_a_row_per_kind_or_per_linear(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(checkpoint)]) == 0
    brief = capsys.readouterr().out
    assert run(["inspect", str(checkpoint), "--linears"]) == 0
    full = capsys.readouterr().out
    assert brief.count("q_proj") == 1
    assert full.count("q_proj") == 4
    assert "vLLM" in brief
    assert answer(["inspect", str(checkpoint)], capsys)["format"] == "gptq"


def test_convert_says_what_it_wrote(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", str(checkpoint), str(tmp_path / "ct"), "--format", "compressed-tensors"]) == 0
    assert "28 linears from gptq to compressed-tensors" in capsys.readouterr().out
    assert run(["convert", str(checkpoint), str(tmp_path / "zip"), "--format", "zip"]) == 2
    assert "zip" in capsys.readouterr().err


def test_verify_holds_and_fails(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert answer(["verify", str(checkpoint)], capsys)["ok"] is True
    assert run(["verify", str(checkpoint), "--against", TINY]) == 0
    assert "furthest from the original" in capsys.readouterr().out
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in checkpoint.iterdir():
        if path.is_file():
            (broken / path.name).write_bytes(path.read_bytes())
    shard = next(broken.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    assert run(["verify", str(broken)]) in (1, 2)
    assert shard.name in "".join(capsys.readouterr())


def test_doctor_with_and_without_a_model(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    assert "torch" in capsys.readouterr().out
    assert run(["doctor", str(checkpoint)]) == 0
    assert "256x768" in capsys.readouterr().out
    assert answer(["doctor", str(checkpoint)], capsys)["linears"]
    assert run(["quantize", TINY, str(tmp_path / "3bit"), "--bits", "3", "--method", "rtn"]) == 0
    assert run(["doctor", str(tmp_path / "3bit")]) == 0
    assert "cpu refuses down_proj on cpu" in capsys.readouterr().out


def test_generate_streams_the_same_text_for_the_same_seed(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(checkpoint), "--prompt", "The sea", "--max-new-tokens", "12", "--seed", "3"]
    assert run(command) == 0
    out, err = capsys.readouterr()
    assert out.startswith("The sea")
    assert "tokens/s" in err
    found = answer(command, capsys)
    assert out == f"The sea{found['text']}\n"
    assert 0 < found["tokens"] <= 12


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "x", "--max-new-tokens", "5000"], "exceed the context of 1024; use --max-new-tokens"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature -1.0; allowed: 0"),
        (["--prompt", "x", "--top-p", "2"], "--top-p 2.0; allowed"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens 0; allowed: 1 or more"),
        (["--prompt", "x", "--backend", "warp"], "warp"),
    ],
)
def test_generate_refuses_clearly(arguments: list[str], words: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", str(checkpoint), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_demo_shows_three_models_and_replaces_only_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"SAMPLES": 4, "SEQLEN": 64, "WINDOWS": 1, "NEW_TOKENS": 8}.items():
        monkeypatch.setattr(f"gptqkit.cli.demo.{name}", value)
    out = tmp_path / "demo"
    began = time.monotonic()
    assert run(["demo", "--out", str(out)]) == 0
    assert time.monotonic() - began < 60
    text = capsys.readouterr().out
    for word in ("original:", "4 bits:", "3 bits:", "perplexity", "The old man looked at the sea and"):
        assert word in text
    found = answer(["demo", "--out", str(out), "--bits", "4"], capsys)
    assert [result["name"] for result in found["results"]] == ["original", "4 bits"]
    (out / MARKER).unlink()
    assert run(["demo", "--out", str(out)]) == 2
    assert "holds files that the demo did not write" in capsys.readouterr().err


def test_demo_checks_its_options_before_it_makes_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--out", str(tmp_path / "demo"), "--bits", "9"]) == 2
    assert "bits=9; allowed: 2, 3" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
