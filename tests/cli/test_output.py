"""Numbers, tables and JSON as a person and a program read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptqkit.cli.output import duration, facts, number, size, table, to_json


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (999_600, "1.00 MB"), (27_800_000, "27.8 MB"), (3_000_000_000, "3.00 GB")],
)
def test_sizes_have_three_digits(value: int | None, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.04, "0.0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3600, "1 h 0 min"), (None, "-")])
def test_durations(value: float | None, text: str) -> None:
    assert duration(value) == text


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(29.6634, 5, "29.663"), (0.0, 3, "0"), (1234.56, 3, "1235"), (-0.5, 3, "-0.500"), (float("nan"), 3, "nan"), (4.5e-7, 3, "4.50e-07")],
)
def test_numbers_have_sensible_digits(value: float, digits: int, text: str) -> None:
    assert number(value, digits) == text


def test_json_is_strict_and_one_line() -> None:
    text = to_json({"a": float("nan"), "b": (1, 2), "c": Path("x/y"), "d": {"e": float("inf")}})
    assert "\n" not in text
    assert json.loads(text) == {"a": None, "b": [1, 2], "c": "x/y", "d": {"e": None}}


def test_a_table_in_a_log_is_plain_aligned_and_never_folded() -> None:
    name = "model.language_model.layers.17.mlp.experts.down_proj"
    text = table(["linear", ">error"], [[name, "0.0123"], ["short", "1.2"]])
    lines = text.splitlines()
    assert text.isascii()
    assert lines[1].startswith(name)
    assert len({len(line) for line in lines}) == 1, "right-aligned last column: all lines end together"


def test_a_table_in_a_terminal_keeps_long_names_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptqkit.cli.output.width", lambda: 80)
    name = "model." + "very_long_module_name." * 5 + "down_proj"
    text = table(["linear", ">error"], [[name, "0.0123"]])
    assert max(map(len, text.splitlines())) <= 80
    assert name in "".join(line.removesuffix("0.0123").strip() for line in text.splitlines()[1:])


def test_markup_in_names_is_text() -> None:
    assert "[bold]x[/bold] :smile:" in facts([("name", "[bold]x[/bold] :smile:")])
