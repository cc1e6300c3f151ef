"""Progress in a log and in a terminal, from events alone."""

from __future__ import annotations

import io
import re

from gptqkit.cli.progress import MOST_LINES, Progress
from gptqkit.core.events import Event


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def blocks(progress: Progress, clock: Clock, seconds: float, indices: range, total: int) -> None:
    for index in indices:
        clock.now += seconds
        progress(Event("linear", "done", {"name": f"model.layers.{index}.mlp.down_proj", "error": 0.1}))
        progress(Event("block", f"block {index}", {"index": index, "blocks": total}))


def test_a_log_gets_plain_lines_and_not_one_per_linear() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as emit:
        emit(Event("stage", "quantize", {"name": "quantize"}))
        blocks(emit, clock, 1.0, range(20), 20)
    lines = stream.getvalue().splitlines()
    assert "\x1b" not in stream.getvalue()
    assert "quantize" in lines[0]
    assert 4 <= len(lines) <= 6, "a line per five seconds"
    assert "block 20 of 20" in lines[-1]
    assert re.search(r"block 5 of 20, about 15 s left, memory [\d.]+ [kMG]B$", lines[1])


def test_slow_blocks_get_a_line_each() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as emit:
        blocks(emit, clock, 60.0, range(3), 3)
    assert len(stream.getvalue().splitlines()) == 3


def test_blocks_that_were_done_before_a_resume_do_not_spoil_the_time_left() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(stream, clock) as emit:
        emit(Event("stage", "quantize", {"name": "quantize"}))
        blocks(emit, clock, 10.0, range(30, 32), 40)
    assert "block 32 of 40, about 1 min 20 s left" in stream.getvalue()


def test_messages_are_labelled_said_once_and_not_without_end() -> None:
    stream = io.StringIO()
    with Progress(stream, Clock()) as emit:
        for _ in range(3):
            emit(Event("warning", "seqlen was cut to 1024"))
        for index in range(MOST_LINES + 5):
            emit(Event("skip", f"layer {index}: 100 columns"))
    text = stream.getvalue()
    assert text.count("warning: seqlen was cut to 1024") == 1
    assert text.count("not quantized: layer") == MOST_LINES
    assert "not quantized: 5 more like these" in text


def test_a_terminal_gets_one_bar_with_block_linear_and_memory() -> None:
    stream, clock = Terminal(), Clock()
    with Progress(stream, clock) as emit:
        emit(Event("stage", "quantize", {"name": "quantize"}))
        blocks(emit, clock, 1.0, range(2), 4)
        emit(Event("fallback", "down_proj: solved in float64"))
        emit(Event("linear", "done", {"name": "model.layers.2.mlp.down_proj", "error": 0.1}))
        emit._view._bar.refresh()  # type: ignore[union-attr]
    text = stream.getvalue()
    assert "quantize" in text
    assert "block 3/4  down_proj  " in text
    assert "s left" in text
    assert "fallback: down_proj: solved in float64" in text


def test_nothing_goes_to_stdout(capsys: object) -> None:
    stream = io.StringIO()
    with Progress(stream, Clock()) as emit:
        emit(Event("note", "a fact"))
    assert stream.getvalue().endswith("a fact\n")
    assert capsys.readouterr() == ("", "")  # type: ignore[attr-defined]
