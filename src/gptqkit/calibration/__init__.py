"""Calibration data: from whatever the user has to fixed sequences of token ids, deterministically.

source --documents--> texts, chats or token ids --tokens--> sequences
         (files, columns, hub)                   (shuffled, tokenised, packed or cut)
"""

from __future__ import annotations

from gptqkit.calibration.load import load_calibration
from gptqkit.calibration.tokens import CalibrationSet

__all__ = ["CalibrationSet", "load_calibration"]
