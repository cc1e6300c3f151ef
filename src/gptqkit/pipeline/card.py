"""The model card: README.md of a written checkpoint, for people and for the hub's metadata block."""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING

from jinja2 import Environment, StrictUndefined

if TYPE_CHECKING:
    from gptqkit.pipeline.run import Run


def model_card(run: Run) -> str:
    """Markdown with a YAML head. Names the base model by its folder's name, never by a path."""
    template = files("gptqkit.pipeline").joinpath("card.md.jinja").read_text(encoding="utf-8")
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False)
    errors = [record.error for record in run.linears if record.error is not None]
    worst = max((record for record in run.linears if record.error is not None), key=lambda record: record.error or 0.0, default=None)
    return environment.from_string(template).render(run=run, errors=errors, worst=worst)
