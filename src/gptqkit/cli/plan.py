"""`gptqkit plan`: one call of `api.plan`."""

from __future__ import annotations

from gptqkit import api
from gptqkit.cli.failures import guard
from gptqkit.cli.options import (
    Bits,
    Debug,
    DescAct,
    Device,
    Dtype,
    Format,
    GroupSize,
    Json,
    LmHead,
    Memory,
    Method,
    Model,
    Order,
    Preset,
    RecipeName,
    RuleOptions,
    Samples,
    Seqlen,
    Sym,
    TargetBits,
    TrustRemoteCode,
    parse_size,
)
from gptqkit.cli.output import Answer
from gptqkit.cli.quantize import describe_plan
from gptqkit.cli.recipe import make_request


@guard
def plan(
    model: Model,
    bits: Bits = None,
    group_size: GroupSize = None,
    target_bits: TargetBits = None,
    sym: Sym = None,
    lm_head: LmHead = None,
    method: Method = None,
    preset: Preset = None,
    format: Format = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    order: Order = None,
    desc_act: DescAct = None,
    rule: RuleOptions = None,
    recipe: RecipeName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = None,
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Say what quantizing MODEL would do: what becomes of every parameter, sizes, memory.

    \b
    Examples:
      gptqkit plan ./llama
      gptqkit plan ./llama --bits 3 --rule 'down_proj=bits:4'
      gptqkit plan ./llama --recipe high-accuracy --json
    """
    typed = {
        "bits": bits, "group_size": group_size, "target_bits": target_bits, "sym": sym, "lm_head": lm_head,
        "method": method, "preset": preset, "format": format, "samples": samples, "seqlen": seqlen, "order": order, "desc_act": desc_act,
    }  # fmt: skip
    request = make_request(recipe, typed, rule or [])
    found = api.plan(
        model, request.config, samples=request.samples, seqlen=request.seqlen, device=device, dtype=dtype,
        memory=None if memory is None else parse_size("--memory", memory), trust_remote_code=trust_remote_code,
    )  # fmt: skip
    data = found.to_dict()
    return Answer(data, describe_plan(data, model, request.config))
