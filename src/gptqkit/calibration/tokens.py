"""Token sequences for calibration, and their cutting.

Packed (texts and chats): the documents' tokens are laid end to end and cut into windows of exactly `seqlen`; what is held back comes
after the last window. No document gives more than `seqlen` tokens while there are others: many documents say more about a model's inputs
than long ones (llama-small, 4 bits: KL 0.0315, against 0.0336 with whole documents, of which a few novels took the most).
Not packed (token ids): a document is a sequence, cut to `seqlen`, and shorter ones stay as they are.

    packed      |-- seqlen --|-- seqlen --| … |-- seqlen --|- h -|- h -| … |      h = min(seqlen, 512), 8 of them
                 calibration                                 held back

Held-back sequences are never used to choose codes: the check at the end of a run is made on them.

Shapes: T tokens of one sequence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event

HELD_BACK = 8
HELD_BACK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Sequences to calibrate on, and a few that were kept out.

    ids          int64 [T] each; all T = seqlen when packed, T <= seqlen otherwise
    held_back    int64 [T] each, T <= min(seqlen, 512); not in `ids`, unless the description's "held_back_reused" is true
    description  JSON-serialisable: source, kind, documents, tokens, packing, bos, seed, sha256; no path of this machine
    fingerprint  sha256 of all token ids: the same data, options and tokenizer give the same one
    """

    ids: list[Tensor]
    held_back: list[Tensor]
    description: dict[str, Any]
    fingerprint: str

    @property
    def tokens(self) -> int:
        """Tokens to calibrate on."""
        return sum(len(ids_T) for ids_T in self.ids)


@dataclass(frozen=True, slots=True)
class Cut:
    """The sequences as they were cut, how many documents went into them, and whether the held-back ones had to be reused."""

    ids: list[Tensor]
    held_back: list[Tensor]
    documents: int
    reused: bool


def wanted_tokens(samples: int, seqlen: int) -> int:
    """Tokens that a packed set of `samples` sequences takes, with what is held back."""
    return samples * seqlen + HELD_BACK * min(seqlen, HELD_BACK_TOKENS)


def pack(documents: Iterator[list[int]], *, samples: int, seqlen: int, name: str, emit: Emit) -> Cut:
    """Windows of `seqlen` tokens out of the documents laid end to end; takes documents until it has enough.

    Of too little data what is left over is held back, or a tenth if that is more. Raises InputError when there is not one whole window.
    """
    short = min(seqlen, HELD_BACK_TOKENS)
    wanted = wanted_tokens(samples, seqlen)
    stream, used = _laid_end_to_end(documents, seqlen, wanted)
    have = len(stream)
    if have < seqlen:
        raise InputError(
            f"{name} holds {have:,} tokens, and one sequence takes seqlen={seqlen:,}; give more data, or lower --seqlen to {have:,} or less"
        )
    left = have - min(samples, have // seqlen) * seqlen
    held = min(HELD_BACK, max(have // 10, left) // short)
    if have - held * short < seqlen:
        held = 0
    count = min(samples, (have - held * short) // seqlen)
    if count < samples:
        _say_too_few(count, samples, f"sequences of {seqlen:,} tokens (it holds {have:,} tokens, {wanted:,} were wanted)", name, emit)
    stream_T = torch.tensor(stream, dtype=torch.int64)
    stop = count * seqlen if held else count * seqlen - short
    ids = [stream_T[start : start + seqlen].clone() for start in range(0, count * seqlen, seqlen)]
    held_back = [stream_T[start : start + short].clone() for start in range(stop, stop + max(held, 1) * short, short)]
    if held < HELD_BACK:
        _say_held_back(held, name, emit)
    return Cut(ids, held_back, used, reused=held == 0)


def _laid_end_to_end(documents: Iterator[list[int]], share: int, wanted: int) -> tuple[list[int], int]:
    """At least `wanted` tokens, if there are so many: `share` tokens of each document in turn, then the next `share` of each, and so on."""
    stream: list[int] = []
    rests: list[list[int]] = []
    used = 0
    for document in documents:
        stream += document[:share]
        rests.append(document[share:])
        used += 1
        if len(stream) >= wanted:
            return stream, used
    while rests := [rest for rest in rests if rest]:
        for rest in rests:
            stream += rest[:share]
            if len(stream) >= wanted:
                return stream, used
        rests = [rest[share:] for rest in rests]
    return stream, used


def truncate(documents: Iterator[list[int]], *, samples: int, seqlen: int, name: str, emit: Emit) -> Cut:
    """One sequence from each document, cut to `seqlen`; documents beyond `samples` are held back, else the longest serve twice."""
    sequences: list[Tensor] = []
    for document in documents:
        sequences.append(torch.tensor(document[:seqlen], dtype=torch.int64))
        if len(sequences) == samples + HELD_BACK:
            break
    calibration = sequences[:samples]
    extra = [ids_T for ids_T in sequences[samples:] if len(ids_T) > 1]  # one token predicts nothing that could be checked
    if len(calibration) < samples:
        _say_too_few(len(calibration), samples, "sequences", name, emit)
    if len(extra) < HELD_BACK:
        _say_held_back(len(extra), name, emit)
    longest = sorted(calibration, key=len, reverse=True)[:HELD_BACK]
    held_back = [ids_T[:HELD_BACK_TOKENS].clone() for ids_T in extra or longest]
    return Cut(calibration, held_back, len(sequences), reused=not extra)


def fingerprint(*groups: list[Tensor]) -> str:
    """Hex sha256 over the sequences of each group: count, then length and ids of each, as little-endian int64."""
    digest = hashlib.sha256()
    for group in groups:
        digest.update(len(group).to_bytes(8, "little"))
        for ids_T in group:
            digest.update(len(ids_T).to_bytes(8, "little"))
            digest.update(ids_T.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _say_too_few(count: int, samples: int, of_what: str, name: str, emit: Emit) -> None:
    emit(
        Event(
            "warning",
            f"{name} gives {count} of {samples} {of_what}; calibration goes on with those. More data quantizes better",
            {"calibration_sequences": count, "wanted": samples},
        )
    )


def _say_held_back(held: int, name: str, emit: Emit) -> None:
    if held:
        message = f"{name} leaves {held} of {HELD_BACK} sequences to hold back for the check at the end"
        emit(Event("note", message, {"held_back": held}))
    else:
        message = f"{name} leaves nothing to hold back: the check at the end reuses calibration tokens and looks a little too good"
        emit(Event("warning", message, {"held_back": 0}))
