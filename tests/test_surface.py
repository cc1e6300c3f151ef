"""What users hold on to does not change by accident: public names, command-line options, an inert import, and the promises of the docs.

The frozen surface is tests/golden/surface.json. To change it on purpose, run `python tests/test_surface.py` and commit the difference
together with a line in CHANGELOG.md.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main

import gptqkit
from gptqkit.cli.main import GROUPS, VERBS, build

ROOT = Path(__file__).parent.parent
SOURCES = ROOT / "src" / "gptqkit"
GOLDEN = Path(__file__).parent / "golden" / "surface.json"
ADVICE = "if this is meant, run `python tests/test_surface.py`, commit tests/golden/surface.json and add a line to CHANGELOG.md"

MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 60
LONG_FILES: frozenset[str] = frozenset()
LONG_FUNCTIONS: frozenset[str] = frozenset()
"""Exceptions. These two may only shrink: a longer list needs a reason in ARCHITECTURE.md."""


def surface() -> dict[str, Any]:
    """The public names with their signatures, and the options of every verb."""
    root: Any = typer.main.get_command(build())
    names: dict[str, Any] = {}
    for name in sorted(gptqkit.__all__):
        value = getattr(import_module(gptqkit._ORIGIN[name]), name)
        if inspect.isfunction(value):
            names[name] = re.sub(r"<function (\w+) at \w+>", r"\1", str(inspect.signature(value))).replace("'", "")
        elif hasattr(value, "__dataclass_fields__"):
            names[name] = [field.name for field in fields(value)]
        else:
            names[name] = [base.__name__ for base in value.__mro__[1:-1]]
    options = {
        verb: [
            "/".join([*param.opts, *param.secondary_opts]) if param.param_type_name == "option" else param.name.upper()
            for param in command(root, verb).params
        ]
        for verb in VERBS
    }
    return {"python": names, "command line": options}


def command(root: Any, verb: str) -> Any:
    """What is run by a verb of one word or two."""
    for word in verb.split():
        root = root.commands[word]
    return root


@pytest.mark.parametrize("part", ["python", "command line"])
def test_the_surface_is_frozen(part: str) -> None:
    expected, found = json.loads(GOLDEN.read_text())[part], json.loads(json.dumps(surface()[part]))
    changed = {key: (expected.get(key), found.get(key)) for key in sorted({*expected, *found}) if expected.get(key) != found.get(key)}
    assert not changed, "\n".join(
        [f"the public surface changed ({part}):", *(f"  {key}: {was} -> {now}" for key, (was, now) in changed.items()), ADVICE]
    )


def test_all_is_sorted_and_complete() -> None:
    assert gptqkit.__all__ == sorted(gptqkit.__all__)
    assert set(gptqkit.__all__) <= set(dir(gptqkit))
    with pytest.raises(AttributeError, match="module 'gptqkit' has no attribute 'quantise'"):
        gptqkit.quantise  # noqa: B018


def test_public_names_survive_the_import_of_everything_below() -> None:
    code = """
import gptqkit, importlib
importlib.import_module("gptqkit.pipeline.run")
wrong = [name for name in gptqkit.__all__ if not callable(getattr(gptqkit, name))]
assert not wrong, wrong
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_every_verb_shows_examples_and_takes_json_and_debug() -> None:
    for verb, options in surface()["command line"].items():
        assert {"--json", "--debug"} <= set(options), verb
        assert f"gptqkit {verb}" in (inspect.getdoc(VERBS[verb]) or ""), f"{verb} --help has no example"


WATCH = """
import json, os, signal, sys, warnings
before = dict(os.environ), list(sys.path), list(warnings.filters), signal.getsignal(signal.SIGINT), sys.excepthook, sys.stdout
import_ = __import__
{code}
after = dict(os.environ), list(sys.path), list(warnings.filters), signal.getsignal(signal.SIGINT), sys.excepthook, sys.stdout
heavy = [name for name in ("torch", "transformers", "numpy", "safetensors", "huggingface_hub", "rich", "yaml") if name in sys.modules]
print(json.dumps({{"heavy": heavy, "unchanged": before == after and __import__ is import_}}))
"""


def watched(code: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", WATCH.format(code=code)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def test_import_is_inert() -> None:
    assert watched("import gptqkit, gptqkit.core.config, gptqkit.core.errors") == {"heavy": [], "unchanged": True}


def test_using_a_config_needs_no_torch() -> None:
    found = watched("import gptqkit; gptqkit.QuantConfig(bits=3); gptqkit.quantize")
    assert "torch" not in found["heavy"]
    assert "transformers" not in found["heavy"]


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_loads_nothing_heavy(verb: str) -> None:
    found = watched(f"from gptqkit.cli.main import run; assert run({[*verb.split(), '--help']!r}) == 0")
    assert "torch" not in found["heavy"]
    assert "transformers" not in found["heavy"]


def test_importing_everything_patches_nothing_in_transformers() -> None:
    code = """
import transformers
from transformers.quantizers import auto
def state():
    return dict(auto.AUTO_QUANTIZER_MAPPING), dict(auto.AUTO_QUANTIZATION_CONFIG_MAPPING), transformers.AutoModelForCausalLM.from_pretrained
first = state()
import gptqkit.integrations.transformers, gptqkit.compat.auto_gptq, gptqkit.api
assert state() == first, "importing gptqkit changed transformers; only gptqkit.enable() may"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_help_is_quick() -> None:
    code = "import time; t = time.perf_counter(); from gptqkit.cli.main import run; run(['--help']); print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(done.stdout.splitlines()[-1]) for done in runs) < 0.5


def test_architecture_names_only_paths_that_exist() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    paths = set(re.findall(r"`((?:src|tests|scripts|docs|benchmarks|\.ci|[a-z_]+)/[\w./-]*)`", text))
    assert len(paths) > 20, "the pattern no longer finds the paths"
    missing = sorted(path for path in paths if not (ROOT / path).exists() and not (SOURCES / path).exists())
    assert not missing, f"ARCHITECTURE.md mentions what is not there: {missing}"


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of the statements: neither signature nor docstring, which are for the reader of --help, count."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body and body[-1].end_lineno else 0


def test_files_and_functions_stay_short() -> None:
    files, long_functions = set(), set()
    for path in sorted(SOURCES.rglob("*.py")):
        name, text = path.relative_to(SOURCES).as_posix(), path.read_text()
        if len(text.splitlines()) > MOST_LINES_OF_A_FILE:
            files.add(name)
        long_functions |= {f"{name}:{f.name}" for f in functions(ast.parse(text)) if body_lines(f) > MOST_LINES_OF_A_FUNCTION}
    for found, listed, most in ((files, LONG_FILES, MOST_LINES_OF_A_FILE), (long_functions, LONG_FUNCTIONS, MOST_LINES_OF_A_FUNCTION)):
        assert found == listed, f"over {most} lines, or listed and short by now: {sorted(found ^ listed)}"


def test_every_module_says_what_it_is_for() -> None:
    silent = [
        path.relative_to(SOURCES).as_posix()
        for path in SOURCES.rglob("*.py")
        if path.read_text().strip() and ast.get_docstring(ast.parse(path.read_text())) is None
    ]
    assert not silent


def code_blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), flags=re.DOTALL)


def test_readme_commands_are_spelled_as_the_parser_knows_them() -> None:
    options = {verb: {name for option in listed for name in option.split("/")} for verb, listed in surface()["command line"].items()}
    seen = 0
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        lines = "\n".join(code_blocks(document, "(?:bash|sh|console)")).replace("\\\n", " ").splitlines()
        for words in (line.split("#")[0].split() for line in lines if line.lstrip("$ ").startswith("gptqkit ")):
            words = words[1:] if words[0] == "$" else words
            verb = " ".join(words[1:3]) if words[1] in GROUPS else words[1]
            assert verb in {*VERBS, "--version", "--help"}, f"{document.name}: no verb {verb}"
            unknown = {w for w in words[2:] if w.startswith("--")} - options.get(verb, set()) - {"--help"}
            assert not unknown, f"{document.name}: gptqkit {verb} takes no {unknown}"
            seen += 1
    assert seen > 5


def test_readme_python_compiles_and_names_what_is_there() -> None:
    documents = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    blocks = [block for document in documents for block in code_blocks(document, "python")]
    assert blocks
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gptqkit":
                assert node.attr in gptqkit.__all__ or node.attr in ("compat", "__version__"), f"gptqkit.{node.attr} in:\n{block}"


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(surface(), indent=1) + "\n")
