"""The table of a bit budget."""

from __future__ import annotations

from gptqkit.cli.budget import describe_budget


def line(unit: str, block: int, bits: int | None, group: int | None, kl: float | None, share: float) -> dict[str, object]:
    return {"unit": unit, "block": block, "linears": 1, "weights": 64, "bits": bits, "group_size": group, "kl": kl, "share": share}


def test_units_of_a_kind_that_got_the_same_share_a_row() -> None:
    lines = [line(f"h.{block}.attn.{{q,k,v}}", block, 4, 128, 0.001, 0.1) for block in (0, 1, 3)]
    lines += [
        line("h.2.attn.{q,k,v}", 2, 3, 32, 0.002, 0.2),
        line("h.0.mlp", 0, None, None, None, 0.3),
        line("h.1.mlp", 1, None, None, 0.0, 0.2),
    ]
    text = describe_budget({"target_bits": 3.5, "bits_per_weight": 3.4996, "kl": 0.005, "tokens": 4096, "lines": lines})
    assert text.splitlines() == [
        "Bit budget of 3.5: 3.500 bits per weight, estimated KL 0.00500 (measured on 4096 tokens)",
        "linears       blocks  bits  group         KL    share",
        "attn.{q,k,v}  2          3     32    0.00200  20.00 %",
        "attn.{q,k,v}  0-1 3      4    128    0.00300  30.00 %",
        "mlp           1       full      -          0  20.00 %",
        "mlp           0       full      -  by a rule  30.00 %",
        "KL: to the original, with only these quantized; share: of the size of all linears",
    ]
