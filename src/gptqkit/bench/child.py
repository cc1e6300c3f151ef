"""A command run to its end as a child process, with what the kernel says it took."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptqkit.core.errors import InputError

_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_EXCEPTION = re.compile(r"([A-Za-z_][\w.]*(Error|Exception|Interrupt|Exit)\b|error:)")
_LONGEST = 300

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024
"""The unit of ru_maxrss: Linux counts kilobytes."""

_MEASURE = """
import json, os, subprocess, sys
_, status, usage = os.wait4(subprocess.Popen(sys.argv[2:]).pid, 0)
facts = [os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss]
open(sys.argv[1], "w").write(json.dumps(facts))
"""
"""Waits for the command in a small process of its own: a child's peak begins with the size of whoever started it."""

_DISTRIBUTIONS = """
import importlib.metadata, json
print(json.dumps({d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}))
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a child ended and what it cost.

    code     its exit code; below 0, the signal that ended it
    wall     seconds from start to end, imports included
    cpu      user and system seconds of the child and of the processes it waited for
    peak_mb  the largest resident set among those processes, in MB
    """

    code: int
    wall: float
    cpu: float
    peak_mb: float


def run_child(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> Outcome:
    """Runs `command` with `environment` on top of ours, in a folder that is thrown away; both of its streams go to `log`."""
    if not hasattr(os, "wait4"):
        raise InputError("this system cannot say what a child process cost (no wait4); run the benchmark on Linux or macOS")
    start = time.monotonic()
    with log.open("wb") as stream, tempfile.TemporaryDirectory(prefix="gptqkit-bench-") as folder:
        facts = Path(folder, "facts.json")
        child = subprocess.Popen(
            [sys.executable, "-S", "-c", _MEASURE, str(facts), *command],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, cwd=folder, env={**os.environ, **environment}, start_new_session=True,
        )  # fmt: skip
        try:
            child.wait()
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            raise
        if not facts.exists():
            return Outcome(child.returncode or 1, time.monotonic() - start, 0.0, 0.0)
        code, cpu, peak = json.loads(facts.read_text())
    return Outcome(code, time.monotonic() - start, cpu, peak * _MAXRSS_BYTES / 1e6)


def last_error(log: Path, code: int) -> str:
    """Why a child failed, in one line: the last line of its log that names an exception, else its last line.

    >>> import pathlib, tempfile
    >>> log = pathlib.Path(tempfile.mkdtemp(), "log")
    >>> _ = log.write_text("Traceback …\\nValueError: no such group\\n10%|█ \\x1b[1mbye\\n")
    >>> last_error(log, 1), last_error(log, -9)
    ('ValueError: no such group', 'killed by signal 9; its log ends with: 10%|█ bye')
    """
    text = _ESCAPE.sub("", log.read_text(encoding="utf-8", errors="replace")).replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    last = lines[-1] if lines else "nothing"
    if code < 0:
        return f"killed by signal {-code}; its log ends with: {last}"[:_LONGEST]
    return next((line for line in reversed(lines) if _EXCEPTION.match(line)), last)[:_LONGEST]


def installed(python: Path) -> dict[str, str]:
    """The versions of every distribution in the environment of an interpreter. Raises InputError when it does not run."""
    try:
        done = subprocess.run([str(python), "-c", _DISTRIBUTIONS], capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise InputError(f"{python} does not exist") from None
    except (OSError, subprocess.CalledProcessError) as error:
        raise InputError(f"{python} is not a Python that runs ({error})") from None
    found: dict[str, str] = json.loads(done.stdout)
    return found
