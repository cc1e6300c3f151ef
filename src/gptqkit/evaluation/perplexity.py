"""Perplexity, and KL(original || model) per token, of checkpoints that are streamed block by block.

    perplexity = exp(mean over positions of -ln q(next token))
    KL         = mean over positions of sum_v p(v) (ln p(v) - ln q(v)),  p the original, q the model, in nats
    top-1      = share of positions where p and q have the same most likely token

Every position of a window but the last predicts the next token. Only the hidden states after the last block are kept of each model, and
logits are made of one window at a time, so two models never need to fit in memory together.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event, silent
from gptqkit.data import heldout_text
from gptqkit.hf.skeleton import resolve_model
from gptqkit.hf.tokenizer import check_vocabulary, encode, load_tokenizer
from gptqkit.models.device import give_back_memory, resolve_device, resolve_dtype
from gptqkit.models.standin import CallStore
from gptqkit.models.streamed import StreamedModel
from gptqkit.models.supply import run_in_step

_FORWARD_TOKENS = 4096
_SCORED_VALUES = 4 << 20
"""Logits turned into float32 probabilities at a time; about eight copies of them exist while they are scored."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a text, and how far it is from its original. `kl` and `top1` are None without one."""

    perplexity: float
    reference_perplexity: float | None
    kl: float | None
    top1: float | None
    tokens: int
    windows: int
    seqlen: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_checkpoint(
    model: str,
    *,
    against: str | None,
    text: str | Path | None,
    windows: int,
    seqlen: int,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    emit: Emit = silent,
) -> Evaluation:
    """See `gptqkit.api.evaluate`."""
    for name, value, least in (("windows", windows, 1), ("seqlen", seqlen, 2)):
        if value < least:
            raise InputError(f"{name}={value}; allowed: {least} or more")
    on = resolve_device(device)
    compute = torch.float32 if dtype == "auto" and on.type == "cpu" else resolve_dtype(dtype, on)

    def opened(name: str) -> StreamedModel:
        folder = resolve_model(name, trust_remote_code=trust_remote_code)
        return StreamedModel.open(folder, device=on, dtype=compute, trust_remote_code=trust_remote_code)

    subject = opened(model)
    reference = None if against is None else opened(against)
    if reference is not None and reference.vocabulary != subject.vocabulary:
        raise InputError(f"{against} has {reference.vocabulary} tokens and {model} {subject.vocabulary}; KL needs the same vocabulary")
    folder = resolve_model(against or model, trust_remote_code=trust_remote_code)
    sequences = read_windows(folder, heldout_text() if text is None else Path(text), windows, seqlen, subject, trust_remote_code)
    return compare(subject, reference, sequences, emit)


def read_windows(folder: Path, text: Path, windows: int, seqlen: int, model: StreamedModel, trust_remote_code: bool) -> list[Tensor]:
    """Up to `windows` windows of `seqlen` token ids: the text as one stream, without special tokens; NUL separates documents."""
    if not text.is_file():
        raise InputError(f"{text} is not a file; --text takes a UTF-8 text file")
    if model.context is not None and seqlen > model.context:
        raise InputError(f"seqlen={seqlen} is longer than the model's context of {model.context}; use --seqlen {model.context} or less")
    content = text.read_text(encoding="utf-8", errors="replace").replace("\x00", "\n")
    tokenizer = load_tokenizer(folder, trust_remote_code)
    check_vocabulary(tokenizer, model.vocabulary, folder)
    ids = encode(tokenizer, [content], special=False)[0][: windows * seqlen]
    count = len(ids) // seqlen
    if count == 0:
        raise InputError(f"{text} has {len(ids)} tokens; one window of --seqlen {seqlen} needs {seqlen}")
    if max(ids) >= model.vocabulary:
        raise InputError(
            f"token {max(ids)} of {text} is beyond the model's {model.vocabulary}; the tokenizer in {folder} is that of another model"
        )
    return [torch.tensor(ids[start : start + seqlen]) for start in range(0, count * seqlen, seqlen)]


def compare(
    subject: StreamedModel,
    reference: StreamedModel | None,
    sequences: Sequence[Tensor],
    emit: Emit = silent,
    original: Tensor | None = None,
) -> Evaluation:
    """Evaluates on equal-length `sequences` of token ids. `original` is what `last_hidden` gave for the reference, where it is known:
    many models against one reference then cost half."""
    started = time.perf_counter()
    ids_NT = torch.stack(list(sequences))
    scores = _Scores()
    with torch.inference_mode():
        hidden = last_hidden(subject, ids_NT, "model", emit)
        if reference is not None and original is None:
            original = last_hidden(reference, ids_NT, "original", emit)
        with subject.loaded_outside(), nullcontext() if reference is None else reference.loaded_outside():
            for number in range(len(ids_NT)):
                row = slice(number, number + 1)
                expected = None if reference is None or original is None else reference.head(ids_NT[row], original[row])
                scores.add(ids_NT[row], subject.head(ids_NT[row], hidden[row]), expected)
    return scores.result(ids_NT, time.perf_counter() - started, compared=reference is not None)


def last_hidden(model: StreamedModel, ids_NT: Tensor, name: str, emit: Emit) -> Tensor:
    """[N, T, H]: what the last block returns. `name` is how events call the model."""
    step = max(1, _FORWARD_TOKENS // ids_NT.shape[1])
    batches = [ids_NT[start : start + step] for start in range(0, len(ids_NT), step)]
    emit(Event("stage", f"evaluating the {name}", {"name": name}))
    hidden: list[Tensor] = []
    for index in range(model.block_count):
        if index in model.layout.starts:
            calls = CallStore()
            with model.loaded_outside():
                hidden = [model.embed(ids, number, calls, hidden[number] if index else None) for number, ids in enumerate(batches)]
        with model.loaded_block(index) as block:
            run_in_step(block, [calls.get(number, index) for number in range(len(hidden))], hidden, hidden)
        emit(Event("block", f"block {index + 1} of {model.block_count}", {"index": index, "blocks": model.block_count, "stage": name}))
    give_back_memory()
    return torch.cat(hidden)


class _Scores:
    """Running sums in float64."""

    def __init__(self) -> None:
        self.nll = self.reference_nll = self.kl = 0.0
        self.same = self.tokens = 0

    def add(self, ids_NT: Tensor, logits_NTV: Tensor, reference_NTV: Tensor | None) -> None:
        target_P = ids_NT[:, 1:].reshape(-1).to(logits_NTV.device)
        logits_PV = logits_NTV[:, :-1].flatten(0, 1)
        reference_PV = None if reference_NTV is None else reference_NTV[:, :-1].flatten(0, 1)
        step = max(1, _SCORED_VALUES // logits_PV.shape[1])
        for start in range(0, len(target_P), step):
            part = slice(start, start + step)
            self._add(target_P[part], logits_PV[part], None if reference_PV is None else reference_PV[part])

    def _add(self, target_P: Tensor, logits_PV: Tensor, reference_PV: Tensor | None) -> None:
        q_PV = F.log_softmax(logits_PV.float(), dim=-1)
        self.tokens += target_P.numel()
        self.nll += F.nll_loss(q_PV, target_P, reduction="none").double().sum().item()
        if reference_PV is not None:
            p_PV = F.log_softmax(reference_PV.float(), dim=-1)
            self.reference_nll += F.nll_loss(p_PV, target_P, reduction="none").double().sum().item()
            self.same += int((p_PV.argmax(-1) == q_PV.argmax(-1)).sum())
            self.kl += (p_PV.exp() * (p_PV - q_PV)).sum(-1).double().sum().item()

    def result(self, ids_NT: Tensor, seconds: float, *, compared: bool) -> Evaluation:
        n = self.tokens
        return Evaluation(
            perplexity=_exp(self.nll / n),
            reference_perplexity=_exp(self.reference_nll / n) if compared else None,
            kl=self.kl / n if compared else None,
            top1=self.same / n if compared else None,
            tokens=n,
            windows=ids_NT.shape[0],
            seqlen=ids_NT.shape[1],
            seconds=seconds,
        )


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
