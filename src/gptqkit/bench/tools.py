"""What is compared: recipes of ours, and other tools with the environment that each is installed in.

A tool is run as a command line. Ours is `gptqkit quantize`, as a user would type it; another tool is its driver in peers/, run by the
interpreter that the user named. A tool that has no interpreter, or whose interpreter lacks it, is reported with what would install it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptqkit.bench.child import installed
from gptqkit.core.config import METHODS, PRESETS
from gptqkit.core.errors import InputError

UNCALIBRATED = ("rtn", "hqq")
"""Methods that look at weights alone: seeds draw calibration tokens, so one run stands for all of them."""

BASELINE = "gptqkit plain"
"""Textbook GPTQ, which ratios are against."""

_OUR_PACKAGES = ("gptqkit", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Tool:
    """One row of the comparison.

    name        as tables show it
    arguments   the command without what differs from run to run
    calibrated  False when it needs no calibration
    versions    of the packages that matter, in its environment
    ours        takes our command line, and reads and tokenises the calibration itself; else a driver's arguments, and token ids
    """

    name: str
    arguments: tuple[str, ...]
    calibrated: bool
    versions: Mapping[str, str]
    ours: bool


@dataclass(frozen=True, slots=True)
class Absent:
    """A tool that cannot be measured: why, and the commands that would change it."""

    name: str
    reason: str
    install: str


@dataclass(frozen=True, slots=True)
class Peer:
    """Another tool: its name, its package and release, the packages whose versions are recorded, and what it does not need."""

    name: str
    package: str
    release: str
    more: tuple[str, ...]
    extra: tuple[str, ...] = ()
    calibrated: bool = True
    cpu_torch: bool = True

    def install(self, key: str) -> str:
        """The commands that make its environment. torch comes first and pinned, so that a CPU build that pip is pointed at stays."""
        first = f"{key}/bin/pip install torch==2.13.0 && " if self.cpu_torch else ""
        return f"python3 -m venv {key} && {first}{key}/bin/pip install {' '.join((f'{self.package}=={self.release}', *self.extra))}"


PEERS: Mapping[str, Peer] = {
    "gptqmodel": Peer("GPTQModel", "gptqmodel", "7.7.0", ("torch", "transformers"), cpu_torch=False),
    "llmcompressor": Peer("llm-compressor", "llmcompressor", "0.14.0.1", ("compressed-tensors", "torch", "transformers")),
    "autoround": Peer("AutoRound", "auto-round", "0.16.1", ("torch", "transformers")),
    "hqq": Peer("HQQ", "hqq", "0.2.8.post1", ("torch", "transformers"), ("accelerate",), calibrated=False),
}
"""By the name that --python takes. The releases are those that the drivers were written for; others may work."""


def our_tools(names: Sequence[str]) -> list[Tool]:
    """One tool for each preset of GPTQ or method named. Raises InputError for a name that is neither."""
    methods = tuple(method for method in METHODS if method != "gptq")
    held = installed(Path(sys.executable))
    versions = {package: held[package] for package in _OUR_PACKAGES if package in held}
    tools = []
    for name in names:
        if name not in (*PRESETS, *methods):
            raise InputError(f"--ours {name}: not a preset or method; allowed: {', '.join((*PRESETS, *methods))}")
        choice = ("--method", name) if name in methods else ("--method", "gptq", "--preset", name)
        command = (sys.executable, "-m", "gptqkit", "quantize", *choice)
        tools.append(Tool(f"gptqkit {name}", command, name not in UNCALIBRATED, versions, ours=True))
    return tools


def peer_tools(pythons: Mapping[str, Path]) -> tuple[list[Tool], list[Absent]]:
    """The peers that can be run with these interpreters, and those that cannot. Raises InputError for a name that is no peer's."""
    unknown = [name for name in pythons if name not in PEERS]
    if unknown:
        raise InputError(f"--python {unknown[0]}=…: no driver for this tool; allowed: {', '.join(PEERS)}")
    tools: list[Tool] = []
    absent: list[Absent] = []
    for key, peer in PEERS.items():
        found = _found(key, peer, pythons.get(key))
        if isinstance(found, Tool):
            tools.append(found)
        else:
            absent.append(Absent(peer.name, found, peer.install(key)))
    return tools, absent


def _found(key: str, peer: Peer, python: Path | None) -> Tool | str:
    """The tool, or why there is none."""
    if python is None:
        return f"no interpreter given (--python {key}=PATH)"
    try:
        held = installed(python)
    except InputError as error:
        return str(error)
    if peer.package not in held:
        return f"{peer.package} is not installed for {python.name}"
    driver = Path(__file__).parent / "peers" / f"peer_{key}.py"
    versions = {package: held[package] for package in (peer.package, *peer.more) if package in held}
    return Tool(peer.name, (str(python), str(driver)), peer.calibrated, versions, ours=False)
