"""Saying a thing once in the life of the process, through the logger "gptqkit"."""

from __future__ import annotations

import logging
from functools import cache

LOGGER = logging.getLogger("gptqkit")


@cache
def say_once(message: str) -> None:
    """Logs a warning the first time this message is given; a script that loads ten models is told about a switch once."""
    LOGGER.warning(message)
