"""Tokenizers: the one place that loads and calls them, so that every failure has a sentence that says what to do.

A local folder is read without the network; only a hub id that the user typed is looked up there. The functions take the transformers
tokenizer itself, so a caller that needs more of it (decode, stop tokens) has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer

from gptqkit.core.errors import InputError

_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "vocab.txt",
    "spiece.model", "sentencepiece.bpe.model", "qwen.tiktoken",
)  # fmt: skip

LEAST_SHARE = 0.6


def load_tokenizer(model: str | Path, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer (the fast one where there is one) of a folder or a hub id.

    Raises InputError when the folder has no tokenizer, when its files cannot be read, or when it needs code of the repository.
    """
    folder = Path(model)
    local = folder.is_dir()
    if local and not trust_remote_code and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise InputError(
            f"{folder} has no tokenizer (none of {', '.join(_TOKENIZER_FILES[:3])}, …); copy the tokenizer files of the original model "
            "into it, or pass token ids instead of text"
        )
    if not local and isinstance(model, Path):
        raise InputError(f"{folder} is not a folder; expected a model folder with a tokenizer")
    try:
        return AutoTokenizer.from_pretrained(str(model), trust_remote_code=trust_remote_code, local_files_only=local)
    except Exception as error:  # the Rust tokenizers raise bare Exception for a broken file; nothing is swallowed
        raise InputError(f"the tokenizer of {model} cannot be loaded: {_first_line(error)}; {_remedy(error)}") from error


def bos_id(tokenizer: Any) -> int | None:
    """The id of the token that begins a text, or None where the tokenizer defines none."""
    return tokenizer.bos_token_id


def adds_bos(tokenizer: Any) -> bool:
    """True if the tokenizer puts its BOS token before a text by itself, as the model was then trained to see."""
    bos = bos_id(tokenizer)
    return bos is not None and encode(tokenizer, ["a"], special=True)[0][:1] == [bos]


def encode(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Token ids of each text, unpadded and uncut; `special` adds what the tokenizer adds by itself (BOS, for some EOS)."""
    if not texts:
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=special, padding=False, truncation=False, return_attention_mask=False, verbose=False
    )  # fmt: skip
    return encoded["input_ids"]


def base_vocabulary(tokenizer: Any) -> int:
    """How many ids the tokenizer has without tokens that were added later (models often have no embedding for those)."""
    return tokenizer.vocab_size


def check_vocabulary(tokenizer: Any, vocab_size: int, folder: Path) -> None:
    """Raises InputError when the tokenizer cannot be the model's: it has more tokens than the embedding has rows, or far fewer.

    Tokens that were added later are not counted as too many: some models (gemma-3) carry one more than they have embeddings for and never
    use it. Embeddings are often padded by a few percent; a tokenizer with less than LEAST_SHARE of the rows belongs to something else.
    """
    if base_vocabulary(tokenizer) > vocab_size or len(tokenizer) < LEAST_SHARE * vocab_size:
        raise InputError(
            f"the tokenizer in {folder} has {len(tokenizer):,} tokens, but the model has embeddings for {vocab_size:,}; "
            "it is the tokenizer of another model: copy the right tokenizer files into the folder, or pass token ids instead of text"
        )


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    """The conversation as one text, by the model's own chat template. Raises InputError without a template or if it refuses."""
    if not tokenizer.chat_template:
        raise InputError(
            "the tokenizer has no chat template, so chat messages cannot be turned into text; add chat_template.jinja to the model's "
            'folder, or give {"text": …} records'
        )
    try:
        return tokenizer.apply_chat_template(list(messages), tokenize=False)
    except (TemplateError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"the model's chat template refuses these messages: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next((line.strip().rstrip(".:") for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _remedy(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it brings its own code, which runs only with --trust-remote-code; read that code first"
    if isinstance(error, ImportError):
        return "install what is missing"
    return "download its files again, or pass token ids instead of text"
