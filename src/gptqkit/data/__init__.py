"""Files that travel with the package: a small trained model, a calibration text and a held-out text (README.md says where they come from).

They make `gptqkit demo` and a calibration without own data work offline. The paths are real files on disk, because the readers of
safetensors and tokenizers need such: a package that is imported out of a zip archive is refused with that reason.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from gptqkit.core.errors import InputError

_HERE = files("gptqkit.data")


def model_folder() -> Path:
    """The folder of llama-tiny: a trained Llama of 4.2 M parameters in bfloat16 with its tokenizer."""
    return _on_disk("llama-tiny")


def calibration_texts() -> Path:
    """A gzip-compressed jsonl file of 408 documents, `{"text": …}` a line, 1.3 MB: half encyclopedia articles, half novels."""
    return _on_disk("calibration.jsonl.gz")


def heldout_text() -> Path:
    """A UTF-8 text file of encyclopedia articles, 250 KB, that no model of ours was trained or calibrated on."""
    return _on_disk("heldout.txt")


def _on_disk(name: str) -> Path:
    resource = _HERE / name
    if not isinstance(resource, Path) or not resource.exists():
        raise InputError(
            f"{resource} is not a file on disk; install gptqkit with pip, which unpacks it, instead of importing it from an archive"
        )
    return resource
