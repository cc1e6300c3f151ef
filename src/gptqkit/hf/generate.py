"""One prompt through a transformers model, piece by piece as it comes. The only caller of `model.generate` in the package."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import TextStreamer

from gptqkit.core.errors import InputError


@dataclass(frozen=True, slots=True)
class Generation:
    """What came out: `text` is the continuation without the prompt, `tokens` its length, `seconds` prefill included."""

    prompt: str
    text: str
    prompt_tokens: int
    tokens: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Forward(TextStreamer):
    """Hands finished words to a function instead of printing them."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.7,
    top_p: float = 0.95,
    seed: int = 0,
    write: Callable[[str], None] | None = None,
) -> Generation:
    """Continues `prompt`; `write` gets each piece of text as soon as it is final. The same seed gives the same text.

    temperature 0 takes the most likely token each time. The random state of torch is left as it was. Raises InputError for a value out of
    range, an empty prompt, and a prompt that with `max_new_tokens` is longer than the model's context.
    """
    _check(max_new_tokens, temperature, top_p)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("--prompt is empty and the tokenizer adds no start token; give it at least a word")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and length + max_new_tokens > context:
        room = f"use --max-new-tokens {context - length} or fewer" if length < context else "shorten the prompt"
        raise InputError(f"{length} tokens of prompt and --max-new-tokens {max_new_tokens} exceed the context of {context}; {room}")
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    streamer = _Forward(tokenizer, write) if write is not None else None
    began = time.perf_counter()
    with torch.random.fork_rng(), torch.inference_mode():
        torch.manual_seed(seed)
        output = model.generate(
            **inputs.to(model.device), max_new_tokens=max_new_tokens, pad_token_id=padding, streamer=streamer, **sampling
        )
    new = output[0, 0 if model.config.is_encoder_decoder else length :]
    return Generation(prompt, tokenizer.decode(new, skip_special_tokens=True), length, new.numel(), time.perf_counter() - began)


def _check(max_new_tokens: int, temperature: float, top_p: float) -> None:
    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens {max_new_tokens}; allowed: 1 or more")
    if not 0 <= temperature <= 10:
        raise InputError(f"--temperature {temperature}; allowed: 0 (always the most likely token) to 10")
    if not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p}; allowed: above 0 and at most 1")
