"""The command line: a table of verbs. Each verb parses, calls one function of the package, and answers.

Nothing here imports torch: `gptqkit --help` must be quick. What is heavy is imported by the functions that verbs call.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated

import typer

import gptqkit
from gptqkit.cli import bench
from gptqkit.cli.convert import convert
from gptqkit.cli.demo import demo
from gptqkit.cli.doctor import doctor
from gptqkit.cli.eval import evaluate
from gptqkit.cli.failures import BROKEN_PIPE, INTERRUPTED, UsageError, complain, show_usage_error
from gptqkit.cli.generate import generate
from gptqkit.cli.inspect import inspect
from gptqkit.cli.plan import plan
from gptqkit.cli.quantize import quantize
from gptqkit.cli.verify import verify

VERBS: dict[str, Callable[..., None]] = {
    "quantize": quantize,
    "eval": evaluate,
    "verify": verify,
    "inspect": inspect,
    "convert": convert,
    "plan": plan,
    "doctor": doctor,
    "generate": generate,
    "demo": demo,
    "bench quality": bench.quality,
    "bench quantize": bench.quantize,
}
"""By what is typed. Two words are a group and a verb in it."""

GROUPS = {"bench": "Measure gptqkit: its quality beside other tools, its speed on known shapes."}


def _version(asked: bool) -> None:
    if asked:
        print(f"gptqkit {gptqkit.__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version and exit.", show_default=False)
    ] = False,
) -> None:
    """Quantize a language model, prove the loss, and use it.

    \b
    Start with:
      gptqkit demo                      see it work on a small bundled model
      gptqkit quantize MODEL OUT        the main job
      gptqkit eval OUT --against MODEL  how much was lost

    \b
    Exit codes: 0 done, 1 a check did not hold, 2 bad input or usage, 3 out of memory or disk,
    70 an internal error, 130 interrupted.
    """


def build() -> typer.Typer:
    """The application. Markup and pretty tracebacks are off: help and failures read the same in a terminal and in a log."""
    app = typer.Typer(name="gptqkit", add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.callback()(_root)
    groups = {name: typer.Typer(help=about, rich_markup_mode=None) for name, about in GROUPS.items()}
    for words, verb in VERBS.items():
        group, _, name = words.rpartition(" ")
        (groups[group] if group else app).command(name)(verb)
    for name, group_app in groups.items():
        group_app.callback()(lambda: None)  # with one verb, a group without a callback would be that verb
        app.add_typer(group_app, name=name)
    return app


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit code. `arguments` are without the program's name; none at all means --help."""
    try:
        result = build()(args=list(arguments) or ["--help"], prog_name="gptqkit", standalone_mode=False)
        sys.stdout.flush()
    except UsageError as error:
        return show_usage_error(error, as_json="--json" in arguments)
    except (KeyboardInterrupt, typer.Abort):
        complain("interrupted")
        return INTERRUPTED
    except (BrokenPipeError, SystemExit):
        # with standalone_mode off the parser exits for one reason only: the reader of --help went away
        return BROKEN_PIPE
    return result if isinstance(result, int) else 0


def main() -> None:
    """The entry point of the `gptqkit` command."""
    for stream in (sys.stdout, sys.stderr):
        # a terminal that cannot show a character gets a "?", not a failed run
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # Idle threads of torch's pool should sleep, not spin: 5 % less CPU time alone, many times less on a shared machine. The pool reads this
    # when torch is loaded, so it is set here, in our own process, and never by the library.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sys.exit(run(sys.argv[1:]))
