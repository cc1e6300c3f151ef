"""Progress as values. The library never prints: it calls `emit(Event)`, and whoever runs it decides what a person sees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["stage", "block", "linear", "warning", "skip", "fallback", "note"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a run.

    kind     what sort: "stage" a phase began, "block"/"linear" one was finished, "warning" and "fallback" deserve attention,
             "skip" a linear was left in full precision, "note" a fact worth recording
    message  one sentence for a person
    data     the same for a machine, JSON-serialisable
    """

    kind: Kind
    message: str
    data: dict[str, Any] = field(default_factory=dict)


Emit = Callable[[Event], None]


def silent(event: Event) -> None:
    """The default listener: drops everything."""
