"""What every finished checkpoint folder needs beside its shards: the side files of the model it came from, and an index.

Side files are chosen by what they are for, never by "everything else": a model folder may also hold the same weights in other formats,
training state, pickles and logs, and none of these belong into a quantized copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gptqkit.checkpoint.files import write_bytes, write_json, writing
from gptqkit.checkpoint.source import INDEX_NAME
from gptqkit.core.errors import InputError

SUFFIXES = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".vocab", ".bpe", ".py")
"""Tokenizers, chat templates, generation and processor configs, and the code of a model that brings its own."""

LEGAL = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY", "COPYING")
NOT_COPIED = ("config.json", "quantize_config.json", "quant_config.json", "adapter_config.json", "trainer_state.json", "training_args.json")
TEMPLATES = "additional_chat_templates"


def side_files(source: Path) -> list[str]:
    """The files of a model folder that go into a quantized copy unchanged, as sorted paths relative to it.

    Left out: weights and their indexes, config.json (it is rewritten), model cards, pickles, hidden files. Raises InputError for a
    link that leaves the folder (links into a hub cache's own blobs are how that cache works, and are followed).
    """
    folders = [source, *(folder for folder in [source / TEMPLATES] if folder.is_dir())]
    found = [path for folder in folders for path in folder.iterdir() if _is_side_file(path)]
    for path in found:
        _check_link(source, path)
    return sorted(path.relative_to(source).as_posix() for path in found)


def copy_side_files(source: Path, out: Path) -> list[str]:
    """Copies `side_files(source)` into the existing folder `out` and returns their relative paths. Raises InputError, ResourceError."""
    names = side_files(source)
    for name in names:
        target = out / name
        with writing(target):
            target.parent.mkdir(exist_ok=True)
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise InputError(f"{source / name} cannot be read ({error.strerror}); repair it or remove it from the model folder") from None
        write_bytes(target, content)
    return names


def write_index(out: Path, files: Mapping[str, str], total_size: int) -> None:
    """Writes model.safetensors.index.json. `files` maps each tensor to its file; `total_size` is the bytes of all tensors."""
    write_json(out / INDEX_NAME, {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))})


def shard_name(number: int, total: int) -> str:
    """The name of shard `number` (from 1) of `total`.

    >>> shard_name(2, 3), shard_name(1, 1)
    ('model-00002-of-00003.safetensors', 'model.safetensors')
    """
    return "model.safetensors" if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"


def _is_side_file(path: Path) -> bool:
    if path.name.startswith(".") or path.name in NOT_COPIED or path.name.endswith(".index.json") or path.is_dir():
        return False
    if path.name.upper().startswith("README"):
        return False
    return path.suffix.lower() in SUFFIXES or path.name.upper().startswith(LEGAL)


def _check_link(source: Path, path: Path) -> None:
    """A folder from elsewhere must not make us publish a file of this machine: links may only lead to the model's own files."""
    home = source.resolve()
    allowed = (home, home.parent.parent / "blobs") if home.parent.name == "snapshots" else (home,)
    target = path.resolve()
    if not target.is_file():
        raise InputError(f"{path} is a broken link or not a plain file; download the model again or remove it")
    if not any(target.is_relative_to(folder) for folder in allowed):
        raise InputError(f"{path} is a link to {target}, outside the model folder; replace the link by a copy of the file")
