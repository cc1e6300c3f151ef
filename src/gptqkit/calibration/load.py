"""`load_calibration`: the calibration sequences of a run.

The documents are shuffled by the seed and tokenised in that order, a few at a time, until there are enough tokens: a large file costs
no more than what is used of it. A document begins with the BOS token where the model's tokenizer adds one by itself, because the model
was trained to see it there; nothing is put at its end. A chat begins with what its template writes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gptqkit.calibration.documents import read_documents
from gptqkit.calibration.records import Document
from gptqkit.calibration.tokens import HELD_BACK, CalibrationSet, fingerprint, pack, truncate, wanted_tokens
from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event, silent
from gptqkit.hf.tokenizer import adds_bos, bos_id, chat_text, check_vocabulary, encode, load_tokenizer

_BATCH = 16
"""Documents given to the tokenizer at once: enough to keep its threads busy, few enough to waste little at the end."""


def load_calibration(
    source: Any,
    *,
    tokenizer_folder: Path | None,
    vocab_size: int,
    samples: int,
    seqlen: int,
    seed: int,
    trust_remote_code: bool = False,
    emit: Emit = silent,
    column: str | None = None,
    packed: bool | None = None,
) -> CalibrationSet:
    """`samples` sequences of `seqlen` tokens from `source`, and a few held back. The same input and seed give the same ids.

    source            None (the bundled text); a file (see calibration.files); a hub data set "owner/name" or "owner/name:split"; or an
                      iterable of texts, chats (lists of messages), token-id lists or tensors, or dicts with one of these
    tokenizer_folder  the model's folder; not read for token ids, which may pass None
    vocab_size        rows of the model's embedding: every id must be below
    column            which column holds the data; None: input_ids, messages or text, whichever is there
    packed            lay documents end to end and cut windows; None: for texts and chats, not for token ids

    Raises InputError for data that is missing, broken, too little for one sequence, or of another model's tokenizer. Fewer sequences
    than asked, nothing to hold back and a tokenizer without BOS are events.

    >>> load_calibration([[1, 2, 3], [4, 5]], tokenizer_folder=None, vocab_size=6, samples=2, seqlen=2, seed=0).ids
    [tensor([1, 2]), tensor([4, 5])]
    """
    _positive("samples", samples)
    _positive("seqlen", seqlen)
    documents = read_documents(source, column=column, tokens=wanted_tokens(samples, seqlen), sequences=samples + HELD_BACK)
    if source is None:
        emit(Event("note", "calibrating on the bundled text (encyclopedia, novels); text of your own domain is better: --calibration FILE"))
    if documents.empty:
        emit(Event("note", f"{documents.name}: {documents.empty} empty documents left out", {"empty_documents": documents.empty}))
    order = list(range(len(documents.items)))
    random.Random(seed).shuffle(order)
    shuffled = [documents.items[index] for index in order]
    if documents.kind == "token ids":
        sequences, bos = _given(shuffled, vocab_size), "as given"
    else:
        encoder = _Encoder.load(tokenizer_folder, vocab_size, trust_remote_code, emit)
        sequences, bos = encoder.sequences(shuffled), encoder.bos
    packed = documents.kind != "token ids" if packed is None else packed
    cut = (pack if packed else truncate)(sequences, samples=samples, seqlen=seqlen, name=documents.name, emit=emit)
    digest = fingerprint(cut.ids, cut.held_back)
    description = {
        "source": documents.name, "kind": documents.kind, "documents": len(documents.items), "documents_used": cut.documents,
        "whole_source_read": documents.whole, "sequences": len(cut.ids), "seqlen": seqlen, "tokens": sum(map(len, cut.ids)),
        "held_back_sequences": len(cut.held_back), "held_back_reused": cut.reused, "packing": "packed" if packed else "truncated",
        "bos": bos, "seed": seed, "sha256": digest,
    }  # fmt: skip
    return CalibrationSet(cut.ids, cut.held_back, description, digest)


@dataclass(frozen=True, slots=True)
class _Encoder:
    """The model's tokenizer with what is known of it."""

    tokenizer: Any
    folder: Path
    vocab_size: int
    bos: str
    prefix: list[int]

    @classmethod
    def load(cls, folder: Path | None, vocab_size: int, trust_remote_code: bool, emit: Emit) -> _Encoder:
        """Raises InputError without a tokenizer, or when it knows more tokens than the model has embeddings for."""
        if folder is None:
            raise InputError("texts and chats need the model's tokenizer; pass the model's folder, or token ids instead of text")
        tokenizer = load_tokenizer(folder, trust_remote_code)
        check_vocabulary(tokenizer, vocab_size, folder)
        bos = bos_id(tokenizer)
        if bos is None:
            emit(Event("note", "the tokenizer defines no BOS token: documents are joined without a mark between them"))
            return cls(tokenizer, folder, vocab_size, "none defined", [])
        if not adds_bos(tokenizer):
            return cls(tokenizer, folder, vocab_size, "defined, but not added by the tokenizer", [])
        return cls(tokenizer, folder, vocab_size, "before every document", [bos])

    def sequences(self, documents: list[Document]) -> Iterator[list[int]]:
        """The ids of each document, tokenised when they are asked for."""
        remaining = iter(documents)
        while batch := list(islice(remaining, _BATCH)):
            for document, ids in zip(batch, self._encode(batch), strict=True):
                _check_ids(ids, document.where, self.vocab_size, f"the tokenizer in {self.folder} may be that of another model")
                yield ids

    def _encode(self, batch: list[Document]) -> list[list[int]]:
        if batch[0].kind == "text":
            return [self.prefix + ids for ids in encode(self.tokenizer, [document.content for document in batch], special=False)]
        texts = []
        for document in batch:
            try:
                texts.append(chat_text(self.tokenizer, document.content))
            except InputError as error:
                raise InputError(f"{document.where}: {error}") from error
        return encode(self.tokenizer, texts, special=False)


def _given(documents: list[Document], vocab_size: int) -> Iterator[list[int]]:
    # All are checked before the first is used: a wrong id may lie in a sequence that this seed leaves out and the next one takes.
    for document in documents:
        _check_ids(document.content, document.where, vocab_size, "were they made with the tokenizer of another model?")
    return iter([document.content for document in documents])


def _check_ids(ids: list[int], where: str, vocab_size: int, cause: str) -> None:
    if ids and (max(ids) >= vocab_size or min(ids) < 0):
        place, wrong = next((place, number) for place, number in enumerate(ids) if not 0 <= number < vocab_size)
        raise InputError(f"{where}: token id {wrong} at position {place} is outside the model's vocabulary of {vocab_size:,}; {cause}")


def _positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InputError(f"--{name} {value!r}; expected a whole number of at least 1")
