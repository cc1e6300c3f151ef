"""From an exception to an exit code and one clear sentence. The only place that turns arbitrary failures into exit codes.

    0    done
    1    a check that was asked for did not hold
    2    bad input or usage
    3    out of memory or disk
    70   an error inside gptqkit (sysexits' EX_SOFTWARE): the sentence asks for --debug
    130  interrupted
    141  whoever read our output went away (`| head`); nothing is said, as a shell tool killed by SIGPIPE says nothing
"""

from __future__ import annotations

import errno
import functools
import os
import shlex
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from typing import Any, ParamSpec

import typer

from gptqkit.cli.output import Answer, to_json
from gptqkit.core.errors import GptqkitError

Parameters = ParamSpec("Parameters")

CHECK_FAILED, BAD_INPUT, NO_RESOURCES, INTERNAL, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 70, 130, 141

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "cannot allocate memory")

UsageError: type[Exception] = typer.BadParameter.__bases__[0].__bases__[0]
"""click's ClickException. Newer typers carry their own copy of click and older ones import it, so it is reached through typer."""


def classify(error: BaseException) -> tuple[int, str]:
    """The exit code and the sentence for any failure.

    >>> classify(MemoryError())
    (3, 'out of memory; lower --samples or --seqlen, set --memory, or use a machine with more of it')
    """
    text = str(error)
    if isinstance(error, GptqkitError):
        return error.exit_code, text
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if (isinstance(error, OSError) and error.errno in _FULL_DISK) or "No space left on device" in text:
        return NO_RESOURCES, f"no space left on the disk ({text}); free some and run again"
    if _is_memory(error, text):
        detail = f" ({text.splitlines()[0]})" if text else ""
        return NO_RESOURCES, f"out of memory{detail}; lower --samples or --seqlen, set --memory, or use a machine with more of it"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return BAD_INPUT, f"{error.filename}: {error.strerror}"
    first = text.splitlines()[0] if text else "no message"
    return INTERNAL, f"internal error: {type(error).__name__}: {first}; run again with --debug for the traceback, and please report it"


def _is_memory(error: BaseException, text: str) -> bool:
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    # torch.OutOfMemoryError by name: torch may not have been imported, and importing it here would only be for this comparison
    return type(error).__name__ == "OutOfMemoryError" or (isinstance(error, RuntimeError) and any(s in text.lower() for s in _NO_MEMORY))


def guard(verb: Callable[Parameters, Answer]) -> Callable[Parameters, None]:
    """Runs a verb, prints its answer, and leaves with the exit code of whatever happened. Reads the verb's `json` and `debug` options."""

    @functools.wraps(verb)
    def guarded(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        as_json, debug = bool(kwargs.get("json")), bool(kwargs.get("debug"))
        try:
            # under --json, nothing that a library prints may end up beside the one object on stdout
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                answer = verb(*args, **kwargs)
            say(to_json(answer.data) if as_json else answer.text)
        except (UsageError, typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:
            raise typer.Exit(_close_pipe()) from None
        except BaseException as error:  # noqa: BLE001 (here and nowhere else: anything becomes an exit code)
            raise typer.Exit(report(error, as_json=as_json, debug=debug)) from None
        if answer.failed:
            complain(f"check failed: {answer.failed}")
            raise typer.Exit(CHECK_FAILED)

    guarded.__annotations__ = {**verb.__annotations__, "return": None}
    return guarded


def report(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Says what went wrong and returns the exit code."""
    code, message = classify(error)
    if debug:
        traceback.print_exception(error)
    if code == INTERRUPTED:
        message = f"{message}; {resume_hint(sys.argv)}" if resume_hint(sys.argv) else message
    complain(message if code == INTERRUPTED else f"error: {message}")
    if as_json:
        try:
            say(to_json({"error": {"type": type(error).__name__, "message": message, "exit_code": code}}))
        except BrokenPipeError:
            return _close_pipe()
    return code


def resume_hint(argv: list[str]) -> str | None:
    """How an interrupted `quantize` is continued: the command as it was typed, with --resume; None for other verbs.

    >>> resume_hint(["/usr/bin/gptqkit", "quantize", "my model", "out", "--overwrite"])
    "finished blocks are kept; to go on, type: gptqkit quantize 'my model' out --resume"
    """
    words = argv[1:]
    if not words or words[0] != "quantize" or "--dry-run" in words:
        return None
    kept = [word for word in words if word not in ("--overwrite", "--resume")]
    return f"finished blocks are kept; to go on, type: gptqkit {shlex.join(kept)} --resume"


def complain(message: str) -> None:
    """One message on stderr. Silent when stderr is closed: there is nobody left to tell."""
    try:
        print(message, file=sys.stderr, flush=True)
    except OSError:
        return


def say(text: str) -> None:
    if text:
        print(text)
    sys.stdout.flush()


def _close_pipe() -> int:
    """Points stdout at nothing, so that the interpreter's last flush does not raise again."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (lives until the process ends)
    return BROKEN_PIPE


def show_usage_error(error: Any, *, as_json: bool) -> int:
    """A wrong flag or a missing argument, found by the parser: its own message, and the same object as any failure under --json."""
    error.show()
    if as_json:
        say(to_json({"error": {"type": "UsageError", "message": error.format_message(), "exit_code": BAD_INPUT}}))
    return BAD_INPUT
