"""The output head of a model: the linear outside the blocks that turns hidden states into logits, and whether it is the embedding.

Most small models tie the two: one matrix is looked up for tokens and multiplied with for logits. A quantized head cannot share it, since no
format that engines load holds a quantized embedding; so a checkpoint with a quantized head has the embedding beside it, in full precision,
and says tie_word_embeddings=false.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from gptqkit.checkpoint.engines import HEADS
from gptqkit.core.errors import InputError
from gptqkit.hf.skeleton import build_skeleton, checkpoint_names, load_config
from gptqkit.models.layout import LinearInfo, linear_info
from gptqkit.models.streamed import StreamedModel

_TIE = "tie_word_embeddings"


@dataclass(frozen=True, slots=True)
class Head:
    """The output head.

    name    as in the checkpoint that is written, without ".weight"
    source  the tensor of the original that holds its weight: the embedding's where the two are tied
    module  its path in the model
    """

    name: str
    source: str
    module: str
    info: LinearInfo
    tied: bool


def find_head(model: StreamedModel) -> Head:
    """Raises InputError for a model without a head that is a plain linear."""
    skeleton = model.skeleton
    found = skeleton.get_output_embeddings() if hasattr(skeleton, "get_output_embeddings") else None
    kind = type(skeleton).__name__
    if found is None:
        raise InputError(f"lm_head: {kind} has no output head of its own; drop --lm-head")
    if not isinstance(found, nn.Linear) or type(found).forward is not nn.Linear.forward:
        raise InputError(f"lm_head: the output head of {kind} is a {type(found).__name__}, not a plain linear; drop --lm-head")
    module = next(name for name, other in skeleton.named_modules() if other is found)
    if module.rpartition(".")[2] not in HEADS:
        raise InputError(
            f"lm_head: the output head of {kind} is called {module}; formats and engines know quantized heads by the names "
            f"{' and '.join(HEADS)} only; drop --lm-head"
        )
    parameter = next(name for name, other in skeleton.named_parameters() if other is found.weight)
    tied = parameter != f"{module}.weight" or found.weight is skeleton.get_input_embeddings().weight
    source = model.disk_name[parameter]
    if not tied:
        return Head(source.removesuffix(".weight"), source, module, linear_info(module, found), tied)
    if checkpoint_names(skeleton, [f"{module}.weight"]).get(f"{module}.weight") is None:
        raise InputError(f"lm_head: {kind} would not find a head called {module} beside its embedding; drop --lm-head")
    return Head(module, source, module, linear_info(module, found), tied)


def output_names(model: StreamedModel) -> list[str]:
    """What the module that makes the logits is called, if there is one: in the model."""
    found = model.skeleton.get_output_embeddings() if hasattr(model.skeleton, "get_output_embeddings") else None
    return [name for name, module in model.skeleton.named_modules() if module is found]


def check_unties(model: StreamedModel, folder: Path, raw: Mapping[str, Any], *, trust_remote_code: bool) -> None:
    """Raises InputError when the model ties its head to the embedding whatever its configuration says, or other tensors that the checkpoint
    holds once."""
    config = load_config(folder, trust_remote_code=trust_remote_code)
    skeleton = build_skeleton(type(config).from_dict(untied(raw)), model.dtype, trust_remote_code=trust_remote_code)
    if skeleton.get_output_embeddings().weight is skeleton.get_input_embeddings().weight:
        raise InputError(
            f"lm_head: {type(skeleton).__name__} ties its output head to the embedding whatever its configuration says, and no format "
            "that engines load holds a quantized embedding; drop --lm-head"
        )
    own = {*model.weights.names, f"{find_head(model).module}.weight"}
    apart = _twins_without(skeleton, set(checkpoint_names(skeleton, own)))
    if apart:
        raise InputError(
            f"lm_head: untying the output head of {type(skeleton).__name__} unties {apart[0]} as well, which the checkpoint does not hold; "
            "drop --lm-head"
        )


def says_tied(raw: Mapping[str, Any]) -> bool:
    """Whether config.json, or a part of it, says that the head is the embedding."""
    return raw.get(_TIE) is True or any(isinstance(value, Mapping) and value.get(_TIE) is True for value in raw.values())


def _twins_without(skeleton: Any, found: set[str]) -> list[str]:
    """Parameters of which no name is among `found`."""
    names: dict[int, list[str]] = {}
    for name, parameter in skeleton.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [twins[0] for twins in names.values() if not found.intersection(twins)]


def untied(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same model with a head of its own.

    >>> untied({"vocab_size": 8, "text_config": {"hidden_size": 4}})["text_config"]
    {'hidden_size': 4, 'tie_word_embeddings': False}
    """
    inner = {
        key: {**value, _TIE: False} for key, value in raw.items() if isinstance(value, Mapping) and (_TIE in value or key == "text_config")
    }
    return {**raw, **inner, _TIE: False}
