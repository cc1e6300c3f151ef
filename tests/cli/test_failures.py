"""What went wrong: which exit code, which sentence, and nothing else on the screen."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gptqkit import CheckFailed, InputError, ResourceError, api
from gptqkit.cli.failures import classify, resume_hint
from gptqkit.cli.main import run


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (CheckFailed("it does not hold"), 1, "it does not hold"),
        (InputError("bits=9; allowed: 2"), 2, "bits=9; allowed: 2"),
        (ResourceError("disk"), 3, "disk"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "texts.txt"), 2, "texts.txt: No such file or directory"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 3, "no space left"),
        (MemoryError(), 3, "out of memory; lower --samples"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 3, "Tried to allocate 2 GiB"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), 3, "out of memory"),
        (KeyError("layers"), 70, "internal error: KeyError: 'layers'; run again with --debug"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_failure_has_a_code_and_a_sentence(error: BaseException, code: int, words: str) -> None:
    found, message = classify(error)
    assert found == code
    assert words in message


def raising(error: BaseException) -> Any:
    def function(*args: object, **kwargs: object) -> None:
        raise error

    return function


@pytest.mark.parametrize(
    ("error", "code"),
    [(InputError("a clear sentence"), 2), (ResourceError("a clear sentence"), 3), (ZeroDivisionError("a clear sentence"), 70)],
)
def test_one_message_on_stderr_and_no_traceback(
    error: Exception, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(api, "inspect", raising(error))
    assert run(["inspect", "x"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert "a clear sentence" in err
    assert len(err.splitlines()) == 1


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api, "inspect", raising(InputError("a clear sentence")))
    assert run(["inspect", "x", "--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_json_holds_the_failure_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api, "inspect", raising(InputError("a clear sentence")))
    assert run(["inspect", "x", "--json"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": {"type": "InputError", "message": "a clear sentence", "exit_code": 2}}
    assert err == "error: a clear sentence\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantise"], "No such command 'quantise'"),
        (["quantize", "a"], "Missing argument 'OUT'"),
        (["quantize", "a", "b", "--bit", "4"], "--bit"),
        (["quantize", "a", "b", "--bits", "four"], "--bits"),
        (["convert", "a", "b"], "--format"),
    ],
)
def test_usage_errors_are_exit_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, "--json"]) == 2
    out, err = capsys.readouterr()
    assert words in err
    assert json.loads(out)["error"]["exit_code"] == 2


def test_what_libraries_print_does_not_reach_stdout_under_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Found:
        def to_dict(self) -> dict[str, Any]:
            return {"format": "gptq"}

    def chatty(model: str) -> Found:
        print("loading!")  # noqa: T201 (what a library does)
        return Found()

    monkeypatch.setattr(api, "inspect", chatty)
    monkeypatch.setattr("gptqkit.cli.inspect.describe_inspection", lambda data, every: "")
    assert run(["inspect", "x", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"format": "gptq"}
    assert err == "loading!\n"


def test_an_interrupt_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(api, "quantize", raising(KeyboardInterrupt()))
    monkeypatch.setattr(sys, "argv", ["gptqkit", "quantize", "my model", "out", "--bits", "3"])
    assert run(sys.argv[1:]) == 130
    err = capsys.readouterr().err
    assert "gptqkit quantize 'my model' out --bits 3 --resume" in err
    assert "Traceback" not in err


def test_only_quantize_can_be_resumed() -> None:
    assert resume_hint(["gptqkit", "eval", "out"]) is None
    assert resume_hint(["gptqkit", "quantize", "a", "b", "--dry-run"]) is None
    assert resume_hint(["gptqkit"]) is None


def test_a_reader_that_goes_away_is_not_an_error(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", "gptqkit", "quantize", "--help"], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert done.returncode == 141
    assert done.stderr == b""


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    assert "quantize" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == "gptqkit 0.1.0\n"
