"""`gptqkit bench quality`: children, results that are kept, rows, and what is said of tools that fail or are not there."""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gptqkit.bench.child import run_child
from gptqkit.bench.quality import Request, Result, measure, read_results
from gptqkit.bench.tables import markdown, problems, summarize
from gptqkit.bench.tools import PEERS, Absent, Tool, peer_tools
from gptqkit.cli.main import run
from gptqkit.core.events import Event
from gptqkit.data import heldout_text, model_folder

PEER_FOLDER = Path(sys.modules["gptqkit.bench.tools"].__file__ or "").parent / "peers"
QUICK = ["--bits", "4", "--group-size", "64", "--samples", "4", "--seqlen", "64", "--windows", "2", "--threads", "1", "--device", "cpu"]

COPY = """
import json, pathlib, shutil, sys
model, out, ids, bits, group_size, seed, device = sys.argv[1:]
assert [len(row) for row in json.loads(pathlib.Path(ids).read_text())] == [64] * 4
shutil.copytree(model, out)
pathlib.Path(out, "dequantized.json").write_text(json.dumps({"linears": 28, "bits_per_weight": 16.0}))
"""
"""A tool that changes nothing, and saves plain weights as HQQ's driver does."""

BROKEN = "print('loading'); raise ValueError('group_size 64 is not for us')"


def tool(name: str, program: str) -> Tool:
    return Tool(name, (sys.executable, "-c", program), calibrated=True, versions={"tool": "1.0"}, ours=False)


def request(out: Path, *tools: Tool, **changes: Any) -> Request:
    made = Request(
        folder=model_folder(), out=out, tools=tools, bits=(4,), group_size=64, seeds=(0,), calibration=None, samples=4, seqlen=64,
        texts=(heldout_text(),), windows=2, threads=1, device="cpu",
    )  # fmt: skip
    return replace(made, **changes)


def result(tool: str, seed: int | None, kl: float, **changes: Any) -> Result:
    scores = {"perplexity": 30.0, "reference_perplexity": 29.0, "kl": kl, "top1": 0.9}
    made = Result(
        tool=tool, bits=4, group_size=128, seed=seed, versions={}, load=0.1, wall=10.0, cpu=20.0, peak_mb=500.0, bits_per_weight=4.125,
        linears=56, texts={"wiki.txt": scores},
    )  # fmt: skip
    return replace(made, **changes)


def test_the_verb_measures_ours_keeps_the_results_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench"
    command = ["bench", "quality", str(model_folder()), "--out", str(out), *QUICK, "--python", f"gptqmodel={sys.executable}"]
    assert run([*command, "--ours", "rtn,plain", "--seeds", "0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = {row["tool"]: row for row in found["rows"]}
    assert list(rows) == ["gptqkit rtn", "gptqkit plain"]
    assert rows["gptqkit plain"]["ratio"] == 1
    for row in rows.values():
        assert row["error"] is None
        assert (row["linears"], row["runs"]) == (28, 1)
        assert 4.2 < row["bits_per_weight"] < 4.5
        assert row["kl"] > 0.001
        assert min(row["wall"], row["cpu"]) > 0.5
        assert row["peak_mb"] > 100
    assert any("gptqmodel is not installed for" in problem and "pip install gptqmodel==" in problem for problem in found["problems"])
    assert any("no interpreter given (--python hqq=PATH)" in problem for problem in found["problems"])
    assert str(tmp_path) not in (out / "quality.json").read_text() + (out / "settings.json").read_text()
    assert {"quality.md", "quality.json", "results.jsonl", "kl-bits.png", "kl-seconds.png"} <= {path.name for path in out.iterdir()}
    assert not list((out / "checkpoints").iterdir())

    first = (out / "results.jsonl").read_text()
    assert run([*command, "--ours", "rtn,plain", "--seeds", "0,1"]) == 0
    text = capsys.readouterr().out
    assert (out / "results.jsonl").read_text().startswith(first)
    assert [(r.tool, r.seed) for r in read_results(out / "results.jsonl")] == [
        ("gptqkit rtn", None), ("gptqkit plain", 0), ("gptqkit plain", 1),
    ]  # fmt: skip
    assert "4 bits, groups of 64, heldout.txt" in text
    assert len(json.loads(text.splitlines()[-1])["rows"]) == 2

    assert run([*command, "--ours", "rtn", "--samples", "5"]) == 2
    assert "holds results with samples=4, and this run has 5; name another --out" in capsys.readouterr().err


def test_a_tool_that_fails_is_a_row_and_is_tried_again(tmp_path: Path) -> None:
    said: list[Event] = []
    found = measure(request(tmp_path, tool("broken", BROKEN), tool("copy", COPY)), said.append)
    assert [r.error for r in found] == ["ValueError: group_size 64 is not for us", None]
    assert any(event.kind == "warning" and "broken at 4 bits failed: ValueError" in event.message for event in said)
    (scores,) = found[1].texts.values()
    assert scores["kl"] == pytest.approx(0, abs=1e-9)
    assert scores["perplexity"] == pytest.approx(scores["reference_perplexity"])
    rows = summarize(found)
    assert [(row.runs, row.kl is None) for row in rows] == [(0, True), (1, False)]
    assert "broken at 4 bits, groups of 64: ValueError: group_size 64 is not for us" in problems(rows, [])

    said.clear()
    assert measure(request(tmp_path, tool("broken", COPY), tool("copy", BROKEN)), said.append)[0].error is None
    assert [event.data["tool"] for event in said if event.kind == "stage"] == ["broken"]
    assert measure(request(tmp_path, tool("copy", BROKEN), again=["copy"]), said.append)[1].error is not None


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("pass", "its checkpoint cannot be evaluated: .* is not a folder"),
        ("import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])", "no linear in it is quantized"),
    ],
)
def test_a_checkpoint_that_is_none_is_an_error(tmp_path: Path, program: str, reason: str) -> None:
    (found,) = measure(request(tmp_path, tool("empty", program)))
    assert re.search(reason, found.error or "")


def test_ratios_are_taken_over_common_seeds() -> None:
    rows = {
        row.tool: row
        for row in summarize(
            [result("gptqkit plain", 0, 0.04), result("gptqkit plain", 1, 0.06), result("x", 1, 0.03), result("x", 2, 9.0),
             result("free", None, 0.1)]
        )
    }  # fmt: skip
    assert rows["x"].ratio == pytest.approx(0.5)
    assert rows["free"].ratio == pytest.approx(2.0)
    assert rows["gptqkit plain"].spread == pytest.approx(0.01414, rel=1e-3)
    assert rows["free"].spread is None


def test_without_the_baseline_there_are_no_ratios_and_unequal_tools_are_told() -> None:
    rows = summarize([result("x", 0, 0.03), result("y", 0, 0.04, linears=55), result("x", 1, 0.0, error="MemoryError", texts={})])
    assert [row.ratio for row in rows] == [None, None]
    told = problems(rows, [Absent("HQQ", "no interpreter given", "pip install hqq")])
    assert told == [
        "x at 4 bits, groups of 128: 1 of 2 runs failed: MemoryError",
        "y quantized 55 linears, and others 56",
        "HQQ was not measured: no interpreter given; to have it: pip install hqq",
    ]
    computer = {"processor": "P", "cores": 2, "memory_gb": 25.0, "system": "Linux"}
    settings = {"model": "m", "samples": 1, "seqlen": 2, "calibration": "c", "windows": 3, "threads": 1, "device": "cpu"}
    data = {"settings": settings, "machine": computer, "load": 0.1, "original": {"wiki.txt": 29.0}, "versions": {"x": {"x": "1"}}}
    text = markdown(data, rows, [], [])
    assert "| x | 4.125 | 30.000 | 0.0300 | - | - | 90.00 % | 10.0 | 20.0 | 500 | 1 |" in text
    assert "The original's perplexity is 29.000." in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ours", "fast,slow"], "--ours slow: not a preset or method; allowed: plain, fast, best"),
        (["--ours", ""], "nothing to measure"),
        (["--bits", "4,x"], "--bits 4,x: expected whole numbers"),
        (["--bits", "9"], "bits=9; allowed: 2, 3, 4"),
        (["--seeds", ""], "--seeds names none"),
        (["--python", "gptqmodel"], "expected TOOL=PATH"),
        (["--python", "awq=/bin/true"], "--python awq=…: no driver for this tool; allowed: gptqmodel, llmcompressor, autoround, hqq"),
        (["--again", "gptqkit slow"], "--again 'gptqkit slow'; measured are: gptqkit rtn"),
        (["--text", "nowhere.txt"], "nowhere.txt is not a file"),
        (["--text", "a/x.txt", "--text", "b/x.txt"], "two files are called x.txt"),
    ],
)
def test_bad_options_say_what_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    arguments = ["bench", "quality", str(model_folder()), "--out", str(tmp_path / "out"), "--ours", "rtn"]
    assert run([*arguments, *options]) == 2
    assert message in capsys.readouterr().err


def test_an_interpreter_that_does_not_run_is_a_reason(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    tools, absent = peer_tools({"gptqmodel": tmp_path / "nowhere", "hqq": plain})
    assert not tools
    reasons = {tool.name: tool.reason for tool in absent}
    assert reasons["GPTQModel"].endswith("nowhere does not exist")
    assert "is not a Python that runs" in reasons["HQQ"]
    assert {tool.install.split()[3] for tool in absent} == set(PEERS)


def test_a_killed_child_is_told_by_its_signal(tmp_path: Path) -> None:
    outcome = run_child([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], tmp_path / "log", {})
    assert outcome.code == -9


@pytest.mark.parametrize("key", PEERS)
def test_drivers_need_nothing_of_ours(key: str) -> None:
    tree = ast.parse((PEER_FOLDER / f"peer_{key}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] == "gptqkit"]
    (main,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert [argument.arg for argument in main.args.args] == ["model", "out", "ids", "bits", "group_size", "seed", "device"]
