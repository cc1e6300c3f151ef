"""The journal of an unfinished run: what was asked, what is done. Everything a killed run needs to go on with the same bytes.

    OUT/gptqkit/journal/job.json            the fixed options and the hashes of all inputs
    OUT/gptqkit/journal/blocks/00007.json   one durable record per finished block: its shard's hash, its linears, its events
    OUT/gptqkit/journal/checkpoint/         the checkpoint as it grows: shards first, config.json last
    OUT/gptqkit/journal/activations/        hidden states, when they do not fit in memory

A record is written after its shard is on the disk, and both appear by rename, so a record that exists is true. Hidden states are not kept:
they are recomputed through the finished shards, with the same operations on the same weights, which gives the same bits.

OUT gets its config.json in the very last step; before that no loader takes it for a checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from gptqkit.checkpoint.files import read_json, rename, sha256, write_json, writing
from gptqkit.core.errors import InputError

FOLDER = "gptqkit"


class Journal:
    """The journal in the output folder `out`. Use as a context manager: it holds a lock against a second run on the same folder."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.folder = out / FOLDER / "journal"
        self.checkpoint = self.folder / "checkpoint"
        self.activations = self.folder / "activations"
        self._blocks = self.folder / "blocks"
        self._stack = ExitStack()

    def __enter__(self) -> Journal:
        with writing(self.out):
            (self.out / FOLDER).mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.out / FOLDER / ".lock", timeout=0)
            try:
                self._stack.enter_context(lock)
            except Timeout:
                raise InputError(f"{self.out} is being written by another gptqkit process; wait for it or choose another folder") from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()
        (self.out / FOLDER / ".lock").unlink(missing_ok=True)

    @property
    def unfinished(self) -> bool:
        return (self.folder / "job.json").exists()

    def begin(self, job: Mapping[str, Any]) -> None:
        """Starts a fresh journal for `job` (JSON-serialisable)."""
        with writing(self.folder):
            self._blocks.mkdir(parents=True, exist_ok=True)
            self.checkpoint.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / "job.json", job)

    def check_same(self, job: Mapping[str, Any]) -> None:
        """Raises InputError naming every fixed option that differs from the unfinished run's, with both values."""
        before = read_json(self.folder / "job.json")
        differences = [
            f"{key}: the unfinished run has {before.get(key)!r}, now {job.get(key)!r}"
            for key in sorted({*before, *job})
            if before.get(key) != job.get(key)
        ]
        if differences:
            raise InputError(
                f"{self.out} holds an unfinished run that cannot be continued with these options; "
                + "; ".join(differences)
                + ". Give the same ones, or start over with --overwrite"
            )

    def finished_blocks(self) -> list[dict[str, Any]]:
        """The records of blocks 0, 1, … up to the first one that is missing or whose shard is not what the record says."""
        records: list[dict[str, Any]] = []
        while (path := self._record(len(records))).exists():
            record = read_json(path)
            shard = self.checkpoint / record["shard"]
            if not shard.exists() or sha256(shard) != record["sha256"]:
                break
            records.append(record)
        return records

    def records(self) -> list[dict[str, Any]]:
        """All records, as they are."""
        return [read_json(path) for path in sorted(self._blocks.glob("*.json"))]

    def record(self, index: int, content: Mapping[str, Any]) -> None:
        """Makes block `index` done."""
        write_json(self._record(index), content)

    def publish(self) -> None:
        """Moves the finished checkpoint into the output folder, config.json last. Safe to repeat after an interruption."""
        if not self.checkpoint.is_dir():
            return
        files = [path for path in self.checkpoint.rglob("*") if path.is_file() and not path.name.endswith(".tmp")]
        with writing(self.out):
            for path in sorted(files, key=lambda path: (path.name == "config.json", str(path))):
                target = self.out / path.relative_to(self.checkpoint)
                target.parent.mkdir(exist_ok=True)
                rename(path, target)

    def unpublish(self) -> None:
        """Takes back what an interrupted `publish` had moved, config.json first: a resumed run finds its checkpoint in one place."""
        moved = [path for path in self.out.rglob("*") if path.is_file() and FOLDER not in path.relative_to(self.out).parts]
        with writing(self.out):
            for path in sorted(moved, key=lambda path: (path.name != "config.json", str(path))):
                target = self.checkpoint / path.relative_to(self.out)
                target.parent.mkdir(exist_ok=True)
                rename(path, target)

    def remove(self) -> None:
        """Ends the journal: the run is finished."""
        shutil.rmtree(self.folder)

    def _record(self, index: int) -> Path:
        return self._blocks / f"{index:05d}.json"
